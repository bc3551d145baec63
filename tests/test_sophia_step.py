import itertools

import pytest
import torch

from soul_kernels import sophia_step
from soul_kernels._launch import _chunk_map, interpreting, triton_dtype
from soul_kernels.sophia_step import _sophia_step_kernel
from tests import tolerances as tol
from tests.helpers import assert_close, mutant, relative_error

OPTIONS = dict(lr=1e-2, beta1=0.9, rho=0.04, bs=50, eps=1e-15, weight_decay=0.1)
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# 1: a lone lane. 127, 128, 129: around a warp's worth. 2048: one full block. 16385: a second chunk of one element.
SIZES = (0, 1, 127, 128, 129, 2048, 16385)


def make(shapes, device, dtypes=(FLOAT,) * 4, scale=0.02):
    """Parameters, gradients, momenta and Hessians; rho bs h is of the size of m, so that some coordinates are clipped."""
    p_dtype, g_dtype, m_dtype, h_dtype = dtypes
    params = [torch.randn(s, device=device).mul(scale).to(p_dtype) for s in shapes]
    grads = [torch.randn(s, device=device).to(g_dtype) for s in shapes]
    exp_avgs = [torch.randn(s, device=device).mul(0.3).to(m_dtype) for s in shapes]
    hessians = [torch.rand(s, device=device).mul(0.3).to(h_dtype) for s in shapes]
    return params, grads, exp_avgs, hessians


def clone(lists):
    return tuple([t.clone() for t in tensors] for tensors in lists)


def fp64_step(p, g, m, h, *, lr, beta1, rho, bs, eps, weight_decay, beta2=None):
    """The published formulas, one by one, in fp64: decay first, then sign(m) times the clipped ratio."""
    p, g, m, h = (t.double() for t in (p, g, m, h))
    if beta2 is not None:
        h = beta2 * h + (1 - beta2) * g * g
    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    ratio = (m.abs() / (rho * bs * h + eps)).clamp(None, 1)
    return p - lr * m.sign() * ratio, m, h


@pytest.mark.parametrize("beta2", [None, 0.95], ids=["step", "step+hessian"])
@pytest.mark.parametrize("dtypes", [
    (FLOAT, FLOAT, FLOAT, FLOAT),
    (BRAIN, BRAIN, BRAIN, FLOAT),  # what bf16 training uses
    (BRAIN, FLOAT, BRAIN, BRAIN),  # fp32 gradients of bf16 parameters
    (HALF, HALF, FLOAT, FLOAT),
], ids=lambda d: "-".join(str(t).split(".")[1] for t in d))  # fmt: skip
def test_kernel_equals_reference_bit_for_bit(dtypes, beta2, device):
    shapes = [(n,) for n in SIZES] + [(), (3, 5, 7)]
    got, want = (lists := make(shapes, device, dtypes)), clone(lists)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    sophia_step(*got, **OPTIONS, beta2=beta2, clip_count=counts[:1], backend="triton")
    sophia_step(*want, **OPTIONS, beta2=beta2, clip_count=counts[1:], backend="reference")
    for name, mine, theirs in zip("pgmh", got, want):
        for a, b in zip(mine, theirs):
            assert relative_error(a, b) <= tol.STEP_BITWISE, name
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_one_step_against_fp64(backend, device):
    for dtype, tolerance in ((FLOAT, tol.STEP_50_FP32), (BRAIN, tol.STEP_ONE_BF16), (HALF, tol.STEP_ONE_FP16)):
        lists = make([(1000,)], device, (dtype, dtype, FLOAT, FLOAT), scale=1.0)
        p, m, h = fp64_step(*(t[0] for t in lists), **OPTIONS, beta2=0.95)
        sophia_step(*lists, **OPTIONS, beta2=0.95, backend=backend)
        for name, got, want in (("p", lists[0][0], p), ("m", lists[2][0], m), ("h", lists[3][0], h)):
            assert_close(got, want, tolerance if name == "p" else tol.STEP_50_FP32, f"{name} in {dtype}")


def check_fifty_steps(step, device):
    """50 steps of SophiaG and of SOUL against the published formulas in fp64; raises AssertionError if they part."""
    for beta2 in (None, 0.95):
        lists = make([(300,)], device)
        start = lists[0][0].double()
        p, _, m, h = (t[0].double() for t in lists)
        for index in range(50):
            g = torch.randn(300, device=device) * (index + 1) / 10
            g[:30] = 0.0  # zero gradient and, below, zero Hessian: 0 / (0 + eps) is 0
            if index == 0:
                for t in (lists[2][0], lists[3][0], m, h):
                    t[:30] = 0.0
            p, m, h = fp64_step(p, g, m, h, **OPTIONS, beta2=beta2)
            step(lists[0], [g], lists[2], lists[3], **OPTIONS, beta2=beta2, backend="triton")
        assert_close(lists[0][0].double() - start, p - start, 1e-4, "displacement")
        assert_close(lists[0][0], p, 50 * tol.STEP_50_FP32, "p")
        assert_close(lists[2][0], m, tol.STEP_50_FP32, "m")
        assert_close(lists[3][0], h, tol.STEP_50_FP32, "h")


def test_fifty_steps_follow_the_published_formulas(device):
    check_fifty_steps(sophia_step, device)


@pytest.mark.parametrize("old, new", [
    ("p - lr * (", "p + lr * ("),  # sign
    ("weight_decay * p + update", "update"),  # no decay
    ("beta1 * m + beta1_rest * g", "beta1 * m + g"),
    ("h_weight * h + eps", "h_weight * h"),  # 0 / 0
    ("tl.where(update > 1.0, 1.0, update)", "update"),  # clipped on one side only
    ("tl.where(update < -1.0, -1.0, update)", "update"),
    ("h_weight * h", "h"),
    ("h = ema_of_squares(h, g, beta2, beta2_rest)", "h = ema_of_squares(h, g, beta2, 0.0)"),
    ("h = ema_of_squares(h, g, beta2, beta2_rest)", "h = ema_of_squares(h, g, 1.0, beta2_rest)"),
    ("tl.store(h_ptr + offsets, round_nearest(h, H_DTYPE), mask=mask)", "pass"),
    ("tl.store(m_ptr + offsets, round_nearest(m, M_DTYPE), mask=mask)", "pass"),
    ("chunk_pointer(table_ptr, 2 * n_tensors", "chunk_pointer(table_ptr, 3 * n_tensors"),  # m and h mixed up
])  # fmt: skip
def test_mutants_do_not_pass(old, new, device, tmp_path):
    broken = mutant("soul_kernels.sophia_step", old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_fifty_steps(broken.sophia_step, device)


def test_counts_exactly_the_coordinates_that_move_by_lr(device):
    params, grads, exp_avgs, hessians = make([(5000,), (77,)], device)
    before = [p.clone() for p in params]
    count = torch.full((), 5, dtype=torch.int64, device=device)
    sophia_step(params, grads, exp_avgs, hessians, **OPTIONS | {"weight_decay": 0.0}, clip_count=count, backend="triton")
    full = sum(((p - b).abs() >= 0.999999 * OPTIONS["lr"]).sum() for p, b in zip(params, before))
    assert int(count) - 5 == int(full)  # added to what was there
    assert 0 < int(full) < 5077


def test_gradient_is_left_alone_and_maximize_mirrors(device):
    lists = make([(129,)], device)
    mirrored = clone(lists)
    mirrored[1][0].neg_()
    grad = lists[1][0].clone()
    for backend in ("triton", "reference"):
        a, b = clone(lists), clone(mirrored)
        sophia_step(*a, **OPTIONS, beta2=0.9, maximize=True, backend=backend)
        sophia_step(*b, **OPTIONS, beta2=0.9, backend=backend)
        assert torch.equal(a[0][0], b[0][0]) and torch.equal(a[2][0], b[2][0])
        assert torch.equal(a[1][0], grad)


def test_nan_and_inf_propagate_to_their_own_coordinate_only(device):
    for backend in ("triton", "reference"):
        lists = make([(130,)], device)
        lists[1][0][3], lists[1][0][7] = float("nan"), float("inf")
        sophia_step(*lists, **OPTIONS, backend=backend)
        assert lists[0][0].isnan().nonzero().flatten().tolist() == [3]
        assert lists[2][0][7].isinf() and lists[0][0][7].isfinite()  # a full step, as the published code does


def test_misaligned_views_and_dense_strides(device):
    """Views that start off a 16-byte boundary take the other variant; channels_last and transposed tensors are dense."""
    base = make([(1001,)], device)
    shifted = tuple([t[0][1:]] for t in base)
    want = clone(shifted)
    sophia_step(*shifted, **OPTIONS, backend="triton")
    sophia_step(*want, **OPTIONS, backend="reference")
    assert torch.equal(shifted[0][0], want[0][0])

    for layout in (lambda t: t.to(memory_format=torch.channels_last), lambda t: t.transpose(1, 3)):
        lists = tuple([layout(t[0])] for t in make([(2, 3, 5, 4)], device))
        lists[1][0] = lists[1][0].contiguous()  # the gradient has other strides than the parameter
        want = clone(lists)
        sophia_step(*lists, **OPTIONS, backend="triton")
        sophia_step(*want, **OPTIONS, backend="reference")
        assert torch.equal(lists[0][0], want[0][0])


def test_mixed_dtypes_need_one_launch_each(device, monkeypatch):
    launches = []
    monkeypatch.setattr("soul_kernels._launch.launch", lambda kernel, grid, device, **a: launches.append(a["P_DTYPE"]))
    parts = [make([(9,), (5000,)], device, (d, d, FLOAT, FLOAT)) for d in (FLOAT, BRAIN, FLOAT)]
    lists = [list(itertools.chain(*column)) for column in zip(*parts)]
    sophia_step(*lists, **OPTIONS, backend="triton")
    assert len(launches) == 2


@pytest.mark.skipif(not interpreting(), reason="8 GiB a tensor: untouched memory costs nothing on the CPU only")
def test_offsets_beyond_two_to_the_31(device):
    n = 2**31 + 3 * 16384
    lists = [[torch.empty(n, dtype=BRAIN)] for _ in range(4)]  # pages that are not touched are not there
    piece = 2**31 // 16384 + 1
    window = slice(piece * 16384, (piece + 1) * 16384)
    small = make([(16384,)], device, (BRAIN,) * 4)
    for big, part in zip(lists, small):
        big[0][window] = part[0]
    table = torch.tensor([[t[0].data_ptr()] for t in lists] + [[n]])
    options = dict(lr=1e-2, beta1=0.9, beta1_rest=0.1, beta2=0.0, beta2_rest=0.0, h_weight=2.0, eps=1e-15, weight_decay=0.1)
    _sophia_step_kernel[(1,)](
        table_ptr=table, chunk_tensor_ptr=torch.zeros(1, dtype=torch.int32), clip_count_ptr=None, n_tensors=1,
        chunk_piece_ptr=torch.tensor([piece], dtype=torch.int32), HESSIAN_IN_STEP=False, ROUNDING="nearest", ALIGNED=True,
        CHUNK=16384, BLOCK=2048, **options, **{f"{r}_DTYPE": triton_dtype(BRAIN) for r in "PGMH"},
    )  # fmt: skip
    sophia_step(*small, **OPTIONS, backend="reference")
    assert torch.equal(lists[0][0][window], small[0][0])


def test_chunk_map_covers_every_element_once(device):
    sizes, chunk = (1, 16384, 16385, 40000), 16384
    tensor, piece = _chunk_map(sizes, chunk, device)
    covered = {(t, p * chunk) for t, p in zip(tensor.tolist(), piece.tolist())}
    assert covered == {(t, start) for t, n in enumerate(sizes) for start in range(0, n, chunk)}
    assert len(covered) == len(tensor)


def _spoil(name, index, value):
    def spoil(lists):
        lists[name][index] = value(lists[name][index])

    return spoil


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("spoil, message", [
    (_spoil("grads", 1, lambda t: t.to_sparse()), r"grads\[1\]: expected a dense tensor, got layout torch.sparse_coo"),
    (_spoil("grads", 1, lambda t: t.to(torch.complex64)), r"grads\[1\]: expected a real tensor"),
    (_spoil("grads", 1, lambda t: None), r"grads\[1\]: expected a tensor, got NoneType"),
    (_spoil("grads", 1, lambda t: t[:-1]), r"grads\[1\]: expected shape \(6,\), got \(5,\)"),
    (_spoil("params", 0, lambda t: t.double()), r"params\[0\]: expected dtype .* got torch.float64"),
    (_spoil("hessians", 0, lambda t: t.half()), r"hessians\[0\]: expected dtype"),
    (_spoil("params", 1, lambda t: torch.zeros(12)[::2]), r"params\[1\]: expected dense strides"),
    (_spoil("params", 1, lambda t: torch.zeros(1).expand(6)), r"params\[1\]: expected dense strides"),
    (lambda lists: lists["exp_avgs"].pop(), r"exp_avgs: expected 2 tensors, as many as params, got 1"),
    (lambda lists: lists["params"].__setitem__(1, lists["params"][0]), r"params\[1\]: expected memory of its own"),
])  # fmt: skip
def test_bad_input_is_named_and_changes_nothing(spoil, message, backend):
    lists = dict(zip(("params", "grads", "exp_avgs", "hessians"), make([(6,), (6,)], "cpu")))
    kept = lists["params"][0].clone()
    first = lists["params"][0]
    spoil(lists)
    with pytest.raises(ValueError, match=message):
        sophia_step(**lists, **OPTIONS, backend=backend)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("option", [
    {"lr": -1.0}, {"lr": float("nan")}, {"beta1": 1.0}, {"beta2": -0.1}, {"rho": -1}, {"bs": 0}, {"eps": -1.0},
    {"weight_decay": -0.1}, {"param_rounding": "up"}, {"backend": "cuda"}, {"clip_count": torch.zeros(1)},
])  # fmt: skip
def test_bad_options_are_named(option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))}: expected"):
        sophia_step(*make([(3,)], "cpu"), **OPTIONS | option)
