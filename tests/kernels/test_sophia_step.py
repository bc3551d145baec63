import itertools
import shutil

import pytest
import torch

from soul_kernels import (
    Guards,
    HessianEma,
    Noise,
    SophiaStep,
    StepOptions,
    StepTensors,
    grad_norm,
    hessian_ema,
    sophia_step,
)
from soul_kernels._compiled import Compiled, _refusals
from soul_kernels._launch import launch, triton_dtype
from soul_kernels._table import _chunk_map
from soul_kernels.backends import cpp_compiler, runs_on_cpu
from soul_kernels.reference import _blocks
from soul_kernels.reference.rounding import GROUP, decode, encode, join, noise_key, noise_words, round_stochastic, salt, split
from soul_kernels.rounding import ROUNDINGS
from soul_kernels.sophia_step import sophia_step_kernel
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, mutant, peak_bytes, relative_error

OPTIONS = dict(lr=1e-2, beta1=0.9, rho=0.04, bs=50, eps=1e-15, weight_decay=0.1)
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# 1: a lone lane. 127, 128, 129: around a warp's worth. 1700: a full block, then one half and a part of the other. 2048: full
# blocks alone. 16385: a second chunk of one element.
SIZES = (0, 1, 127, 128, 129, 1700, 2048, 16385)


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
    check_against_the_reference(sophia_step, dtypes, beta2, device)


def check_against_the_reference(step, dtypes, beta2, device):
    shapes = [(n,) for n in SIZES] + [(), (3, 5, 7)]
    got, want = (lists := make(shapes, device, dtypes)), clone(lists)
    counted = torch.zeros(2, 3, dtype=torch.float64, device=device)
    step(*got, **OPTIONS, beta2=beta2, telemetry=counted[0], backend="triton")
    sophia_step(*want, **OPTIONS, beta2=beta2, telemetry=counted[1], backend="reference")
    for name, mine, theirs in zip("pgmh", got, want):
        for a, b in zip(mine, theirs):
            assert relative_error(a, b) <= tol.STEP_BITWISE, name
    assert torch.equal(counted[0, :2], counted[1, :2]) and counted[0, 0] > 0
    assert_close(counted[0, 2], counted[1, 2], 1e-6, "squared norm of the update")


@pytest.mark.parametrize("old, new", [
    ("range(2 * full, tl.cdiv(chunk.count, HALF))", "range(2 * full, 2 * full + 1)"),  # the first half of the last block alone
    ("counted = tl.sum(tl.reshape(counted, [HALF, 2]), 1)", "counted = tl.zeros([HALF], tl.int32)"),  # full blocks not counted
    ("moved = tl.sum(tl.reshape(moved, [HALF, 2]), 1)", "moved = tl.zeros([HALF], tl.float32)"),
    ("moved += tl.where(mask, change * change, 0.0)", "pass"),
    ("counted += tl.where(mask, counts, 0)", "pass"),
    ("tl.sum(counted >> 16, 0)", "tl.sum(counted, 0)"),
])  # fmt: skip
def test_mutants_of_the_walk_over_a_chunk_do_not_pass(old, new, device, tmp_path):
    broken = mutant("soul_kernels.sophia_step", old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_against_the_reference(broken.sophia_step, (BRAIN, BRAIN, BRAIN, FLOAT), 0.95, device)


def make_storage(shapes, device, p_dtype, state_dtype, rounding):
    """The lists of a step in any storage: (positional lists, keyword lists)."""
    params, grads, exp_avgs, hessians = make(shapes, device, (p_dtype, p_dtype, FLOAT, FLOAT))
    more = {}
    if state_dtype == "8bit":
        for name, kind, states in (("exp_avg_scales", "exp_avg", exp_avgs), ("hessian_scales", "hessian", hessians)):
            codes = [encode(t.flatten(), None, kind) for t in states]
            more[name] = [scale for _, scale in codes]
            states[:] = [code.view(t.shape) for t, (code, _) in zip(states, codes)]
    else:
        exp_avgs, hessians = ([t.to(state_dtype) for t in states] for states in (exp_avgs, hessians))
    if rounding == "compensated" and p_dtype != FLOAT:
        more["low_bits"] = [torch.zeros_like(p, dtype=torch.int8) for p in params]
    return (params, grads, exp_avgs, hessians), more


def clone_storage(storage):
    lists, more = storage
    return clone(lists), {name: [t.clone() for t in tensors] for name, tensors in more.items()}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("state_dtype", [FLOAT, BRAIN, "8bit"], ids=str)
@pytest.mark.parametrize("p_dtype", [FLOAT, BRAIN, HALF], ids=str)
def test_every_storage_equals_the_reference_bit_for_bit(p_dtype, state_dtype, rounding, device, monkeypatch):
    """Three steps, so that what one stores is what the next one reads; SOUL's and, last, SophiaG's with its own Hessian. A
    Hessian in 8 bits is rounded to nearest, and with 0.999 stochastically. The reference takes the largest tensor in five
    blocks.
    """
    monkeypatch.setattr(_blocks, "BLOCK", 512)
    got = make_storage([(2049,), (300,), (), (0,), (3, 5, 7)], device, p_dtype, state_dtype, rounding)
    want = clone_storage(got)
    counted = torch.zeros(2, 3, dtype=torch.float64, device=device)
    for index, beta2 in enumerate((0.95, 0.999, None)):
        for (lists, more), backend, telemetry in ((got, "triton", counted[0]), (want, "reference", counted[1])):
            options = OPTIONS | dict(seed=index, param_rounding=rounding, telemetry=telemetry, backend=backend)
            sophia_step(*lists, **options, **more, beta2=beta2)
            if beta2 is None:
                scales = more.get("hessian_scales")
                hessian_ema(lists[3], lists[1], beta2=0.999, seed=9, hessian_scales=scales, backend=backend)
    for mine, theirs in zip((*got[0], *got[1].values()), (*want[0], *want[1].values())):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    assert torch.equal(counted[0, :2], counted[1, :2])


@pytest.mark.parametrize("n_elements", [1 << 21, 1 << 22])
def test_the_reference_holds_blocks_and_no_copies_of_tensors(n_elements):
    """At most 64 MiB, however large a tensor is; whole tensors took up to 92 bytes an element, 368 MiB here."""
    cpu = torch.device("cpu")
    lists, more = make_storage([(n_elements,)], cpu, BRAIN, "8bit", "compensated")
    options = OPTIONS | dict(param_rounding="compensated", backend="reference")
    scales = more["hessian_scales"]
    for call in (
        lambda: sophia_step(*lists, **options, **more, beta2=0.95),
        lambda: hessian_ema(lists[3], lists[1], beta2=0.99, hessian_scales=scales, backend="reference"),
        lambda: grad_norm(lists[1], backend="reference"),
    ):
        assert peak_bytes(call, cpu) <= 64 * 2**20


def check_rounded(got, exact, error, store, what):
    """Checks ``got`` against what the ends of ``exact +- error`` are stored as: a larger value is never stored as a smaller one
    (but where half of fp16's smallest number meets noise).
    """
    low, high = (store((exact + end).float()).double() for end in (-error, error))
    outside = ~((low <= got.double()) & (got.double() <= high))
    assert not outside.any(), f"{what}: {int(outside.sum())} of {outside.numel()} are not what the exact value may be stored as"


def check_codes(got, exact, error, kind, what):
    """As `check_rounded`, for an 8-bit state. Where ``exact +- error`` leave two scales to choose from, the value must be right
    to a level at the top of its group.
    """
    (low, low_scale), (high, high_scale) = (encode((exact + end).float(), None, kind) for end in (-error, error))
    low, high = decode(low, low_scale, kind).double(), decode(high, high_scale, kind).double()
    clear = (low_scale == high_scale).repeat_interleave(GROUP)[: len(got)]
    outside = clear & ~((torch.minimum(low, high) <= got) & (got <= torch.maximum(low, high)))
    assert not outside.any(), f"{what}: {int(outside.sum())} of {outside.numel()} are not what the exact value may be stored as"
    largest = torch.nn.functional.pad(exact.abs(), (0, -len(exact) % GROUP)).view(-1, GROUP).amax(1)
    near = (got - exact).abs() <= 0.01 * largest.repeat_interleave(GROUP)[: len(got)]
    assert near.all(), what
    if len(got) > 1000:
        assert clear.double().mean() > 0.9, f"{what}: hardly anything was compared"


def stored_param(x, words, dtype, rounding):
    """The fp32 value of a parameter that has been stored."""
    if dtype != FLOAT and rounding == "compensated":
        return join(*split(x, words, dtype))
    return (round_stochastic(x, words, dtype) if rounding == "stochastic" else x.to(dtype)).float()


def words_of(salt, tensor):
    """The noise of all elements of a tensor in the first step, [numel] int32."""
    return noise_words(noise_key(salt, 0, 0, tensor.device), torch.tensor(0, device=tensor.device), (tensor.numel(),))


def flat_values(storage, i):
    """Values of parameter, gradient, momentum and Hessian number ``i``, [n] fp64 each."""
    lists, more = storage
    p, g, m, h = (tensors[i].flatten() for tensors in lists)
    p = join(p, more["low_bits"][i].flatten()) if "low_bits" in more else p
    m, h = decode(m, more["exp_avg_scales"][i], "exp_avg"), decode(h, more["hessian_scales"][i], "hessian")
    return tuple(values.double() for values in (p, g, m, h))


def check_8_bit_tensor(before, after, beta2, rounding, words, dtype):
    """One tensor's step against exact values; returns how many coordinates are clipped, at least and at most.

    The bounds hold for any order of rounding, with multiply and add fused or not. They count, in units of u = 2^-24, every
    constant, product and sum, each relative to the magnitudes that are added, for a sum may cancel. A quotient counts 4: 2 ulp
    is what an approximate division may be off. One more is for the ends of the interval, which are rounded to fp32.
    """
    u, (lr, beta1, weight_decay) = 2.0**-24, (OPTIONS[name] for name in ("lr", "beta1", "weight_decay"))
    p, g, m, h = before
    exact_p, exact_m, exact_h = fp64_step(p, g, m, h, **OPTIONS, beta2=beta2)
    terms = beta1 * m.abs() + (1 - beta1) * g.abs()
    check_codes(after[2], exact_m, 4 * u * terms, "exp_avg", "m")
    if beta2 is not None:
        check_codes(after[3], exact_h, 5 * u * exact_h, "hessian", "h")
    denominator = OPTIONS["rho"] * OPTIONS["bs"] * exact_h + OPTIONS["eps"]  # 9: rho, bs, their product, 4 of h, product, sum
    ratio = exact_m.abs() / denominator
    error = u * (3 * terms / denominator + (9 + 4) * ratio)
    clipped, may_be_clipped = ratio - error >= 1, ratio + error >= 1
    of_update = torch.where(clipped, 0.0, error) + 3 * u * ratio.clamp(max=1)  # 3: sum, lr, product
    of_change = lr * (of_update + 5 * u * weight_decay * p.abs())
    check_rounded(after[0], exact_p, of_change + 2 * u * exact_p.abs(), lambda x: stored_param(x, words, dtype, rounding), "p")
    return int(clipped.sum()), int(may_be_clipped.sum())


def check_8_bit_step(storage, device, *, step=sophia_step, beta2, rounding, seed, backend):
    """One step with 8-bit states; raises AssertionError where a number is not what its exact value may be stored as."""
    lists, more = storage
    before = clone_storage(storage)
    counted = torch.zeros(3, dtype=torch.float64, device=device)
    options = dict(beta2=beta2, seed=seed, param_rounding=rounding, telemetry=counted, backend=backend)
    step(*lists, **OPTIONS, **more, **options)
    counts = []
    for i, param in enumerate(lists[0]):
        words = words_of(salt(seed, i), param)
        values = (flat_values(states, i) for states in (before, storage))
        if param.numel():
            counts.append(check_8_bit_tensor(*values, beta2, rounding, words, param.dtype))
    least, most = map(sum, zip(*counts))
    assert 0 < least <= counted[0] <= most, "clipped"


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("p_dtype", [FLOAT, BRAIN, HALF], ids=str)
def test_8_bit_states_hold_what_exact_values_round_to(p_dtype, rounding, backend, device):
    """Every number is one that arithmetic in fp32 allows, in whatever order it is rounded.

    Three steps, each from the states that the one before has stored; then the Hessian alone.
    """
    storage = make_storage([(20000,), (300,), (), (0,), (3, 5, 7)], device, p_dtype, "8bit", rounding)
    for seed, beta2 in enumerate((0.95, 0.95, None)):
        check_8_bit_step(storage, device, beta2=beta2, rounding=rounding, seed=seed, backend=backend)
    (_, grads, _, hessians), more = storage
    _, g, _, h = flat_values(storage, 0)
    hessian_ema(hessians, grads, beta2=0.99, seed=9, hessian_scales=more["hessian_scales"], backend=backend)
    exact = 0.99 * h + (1 - 0.99) * g * g
    check_codes(flat_values(storage, 0)[3], exact, 5 * 2.0**-24 * exact, "hessian", "h")


@pytest.mark.parametrize("old, new", [  # off by 2^-18; off by a hundredth of a level; noise where none belongs
    ("update = tl.div_rn(m, denominator)", "update = tl.div_rn(m, denominator) * 1.000004"),
    ("store_state(pointers.m, pointers.m_scale, m,", "store_state(pointers.m, pointers.m_scale, m * 1.0001,"),
    ("store_state(pointers.h, pointers.h_scale, h,", "store_state(pointers.h, pointers.h_scale, h * 1.0001,"),
    ("VARIANT.STOCHASTIC_CODES", "True"),
    ("noise_words(noise.key, ", "noise_words(0 * noise.key, "),  # the same noise at every step
])  # fmt: skip
def test_mutants_of_8_bit_states_do_not_pass(old, new, device, tmp_path):
    broken = mutant("soul_kernels.sophia_step", old, new, tmp_path)
    storage = make_storage([(20000,)], device, BRAIN, "8bit", "compensated")
    with pytest.raises(AssertionError):
        check_8_bit_step(storage, device, step=broken.sophia_step, beta2=0.95, rounding="compensated", seed=0, backend="triton")


COMPILES = pytest.mark.skipif(shutil.which(cpp_compiler()) is None, reason="no C++ compiler")
CUT = (
    (BRAIN, BRAIN, "compensated"),
    (HALF, FLOAT, "compensated"),
    (BRAIN, BRAIN, "stochastic"),
    (BRAIN, "8bit", "compensated"),
)
# Of a tensor of 20500 elements, whose chunks have 16384: where it begins in the whole one, and where it is cut.
PLACES = {
    "at the beginning": (0, (3001, 16384)),
    "2^32 at a cut": (2**32 - 3001, (3001, 16384)),
    "2^32 within pieces": (5 * 2**32 - 9000, (3001, 16384)),
}


@pytest.mark.parametrize("backend, p_dtype, state_dtype, rounding", [
    *((backend, *storage) for backend in ("reference", "triton") for storage in CUT),
    pytest.param("compile", BRAIN, BRAIN, "compensated", marks=[
        COMPILES, pytest.mark.slow(reason="compiles; the same in 8 bits, where pieces are groups too, is always compiled")]),
    pytest.param("compile", BRAIN, "8bit", "compensated", marks=COMPILES),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("place", PLACES)
def test_pieces_of_a_tensor_draw_the_noise_of_the_whole(place, p_dtype, state_dtype, rounding, backend, device, monkeypatch):
    """Cut in three and stepped piece by piece, a tensor becomes what it becomes as one, bit for bit. Of 8-bit states the groups
    must be those of the whole: cut at multiples of 32 only.
    """
    monkeypatch.setattr(_blocks, "BLOCK", 1024)
    monkeypatch.setattr(Compiled, "size", 4096)
    unit, (first, cuts) = GROUP if state_dtype == "8bit" else 1, PLACES[place]
    first, edges = first // unit * unit, [0, *(cut // unit * unit for cut in cuts), 20500]
    lists, more = make_storage([(20500,)], device, p_dtype, state_dtype, rounding)
    groups = {name: unit if name.endswith("scales") else 1 for name in more}
    cut = [slice(low, high) for low, high in itertools.pairwise(edges)]
    pieces = [[tensors[0][here].clone() for here in cut] for tensors in lists]
    more_pieces = {
        name: [tensors[0][here.start // groups[name] : -(-here.stop // groups[name])].clone() for here in cut]
        for name, tensors in more.items()
    }
    options = OPTIONS | dict(param_rounding=rounding, beta2=0.95, seed=3)

    def step(lists, more, offsets, ids, backend):
        steps = torch.full((len(ids),), 7.0, device=device)
        sophia_step(*lists, **options, **more, tensor_ids=ids, tensor_offsets=offsets, steps=steps, backend=backend)
        scales = more.get("hessian_scales")
        hessian_ema(lists[3], lists[1], beta2=0.9, hessian_scales=scales, seed=9, tensor_ids=ids, tensor_offsets=offsets,
                    steps=steps, backend=backend)  # fmt: skip

    step(lists, more, [first], [2], "reference")
    step(pieces, more_pieces, [first + edge for edge in edges[:-1]], [2] * 3, backend)
    assert not _refusals
    for (whole,), parts in zip((*lists, *more.values()), (*pieces, *more_pieces.values())):
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("offsets, message", [
    ([0], r"^tensor_offsets: expected 2 integers, one a tensor, got 1; "),
    ([0, -1], r"^tensor_offsets\[1\]: expected an integer from 0, got -1; "),
    ([0, 1.0], r"^tensor_offsets\[1\]: expected an integer from 0, got 1.0; "),
    ([64, 63], r"^tensor_offsets\[1\]: expected a multiple of 32, the groups of 8-bit states, from 0, got 63; "),
])  # fmt: skip
def test_offsets_that_do_not_fit_are_named(offsets, message, device):
    lists, more = make_storage([(500,), (700,)], device, BRAIN, "8bit" if 64 in offsets else BRAIN, "nearest")
    with pytest.raises(ValueError, match=message):
        sophia_step(*lists, **OPTIONS, **more, tensor_offsets=offsets)
    with pytest.raises(ValueError, match=message):
        hessian_ema(lists[3], lists[1], beta2=0.9, hessian_scales=more.get("hessian_scales"), tensor_offsets=offsets)


def test_noise_depends_on_seed_step_and_tensor_but_not_on_how_tensors_are_bucketed(device):
    def run(seed=0, step=1.0, ids=None, misalign=False, alone=None):
        torch.manual_seed(0)
        (params, grads, m, h), more = make_storage([(500,), (700,)], device, BRAIN, BRAIN, "stochastic")
        if misalign:  # another variant of the kernel, another launch
            params[0] = torch.cat([params[0][:1], params[0]])[1:]
        lists = [[t[alone]] if alone is not None else t for t in (params, grads, m, h)]
        steps = torch.full((len(lists[0]),), step, device=device)
        sophia_step(
            *lists, **OPTIONS, beta2=0.9, param_rounding="stochastic", seed=seed, steps=steps, tensor_ids=ids, backend="triton"
        )
        return lists[0] + lists[3]

    base = run()
    assert all(torch.equal(a, b) for a, b in zip(base, run()))
    assert all(torch.equal(a, b) for a, b in zip(base, run(misalign=True)))
    assert torch.equal(base[1], run(alone=1, ids=[1])[0])
    for other in (run(seed=1), run(step=2.0), run(ids=[5, 6]), run(seed=2**33)):
        assert all(not torch.equal(a, b) for a, b in zip(base, other))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_options_may_lie_on_the_device(backend, device):
    """As a captured step needs them; the same bits as from numbers."""
    a = make([(300,)], device)
    b, c = clone(a), clone(a)
    numbers = dict(lr=0.01, rho=0.25, bs=50.0, weight_decay=0.1)
    tensors = {name: torch.tensor(value, device=device) for name, value in numbers.items()}
    sophia_step(*a, beta1=0.9, **numbers, backend=backend)
    sophia_step(*b, beta1=0.9, **tensors, backend=backend)
    sophia_step(*c, beta1=0.9, **numbers | {"rho": tensors["rho"]}, backend=backend)
    assert torch.equal(a[0][0], b[0][0]) and torch.equal(a[0][0], c[0][0])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_factor_skip_corrections_and_the_papers_denominator(backend, device):
    a = make([(300,), (40,)], device)
    a[3][0][:50] *= -1  # as Hutchinson may leave them: they count as 0
    a[3][0][50:100] = 1e-9
    kept, scaled = clone(a), clone(a)
    one = torch.ones((), device=device)
    count = torch.zeros(3, dtype=torch.float64, device=device)
    sophia_step(*a, **OPTIONS, beta2=0.9, skip=one, telemetry=count, backend=backend)
    assert all(torch.equal(x, y) for mine, theirs in zip(a, kept) for x, y in zip(mine, theirs)) and not count.any()
    sophia_step(*a, **OPTIONS, skip=one * 0, grad_factor=one * 0.5, backend=backend)
    for g in scaled[1]:
        g *= 0.5
    sophia_step(*scaled, **OPTIONS, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(a[0], scaled[0]))

    b = clone(kept)
    corrections = torch.tensor([0.5, 0.25], device=device)
    sophia_step(*b, **OPTIONS | {"eps": 1e-3}, corrections=corrections, eps_mode="max", backend=backend)
    for i in range(2):
        p, g, m, h = (t[i].double() for t in kept)
        m = 0.9 * m + 0.1 * g
        ratio = m / (OPTIONS["rho"] * OPTIONS["bs"] * h / corrections[i].item()).clamp(min=1e-3)
        want = p - OPTIONS["lr"] * (OPTIONS["weight_decay"] * p + ratio.clamp(-1, 1))
        assert_close(b[0][i] - kept[0][i], want - p, 1e-5, "update")


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_counts_updates_that_rounding_to_nearest_loses(backend, device):
    """bf16 near 1 has a step of 2^-8 upwards; an update of 1e-4 is lost, one of 1e-2 is not."""
    count = torch.zeros(3, dtype=torch.float64, device=device)
    lists = [
        [torch.full((400,), value, device=device, dtype=d)]
        for value, d in ((1.0, BRAIN), (-1.0, BRAIN), (0.0, FLOAT), (0.0, FLOAT))
    ]
    lists[0][0][:100] = 0.001  # these move
    lists[1][0][300:] = 0.0  # these have nothing to lose
    sophia_step(*lists, lr=1e-4, beta1=0.9, rho=0.0, bs=1, telemetry=count, backend=backend)
    assert count[0] == 300 and count[1] == 200
    assert_close(count[2], torch.tensor(300 * 1e-8), 1e-5, "squared norm")


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
    ("p - change", "p + change"),  # sign
    ("numbers.weight_decay * p + update", "update"),  # no decay
    ("numbers.beta1 * m + numbers.beta1_rest * g", "numbers.beta1 * m + g"),
    ("curvature + numbers.eps", "curvature"),  # 0 / 0
    ("tl.minimum(update, 1.0, propagate_nan=tl.PropagateNan.ALL)", "update"),  # clipped on one side only
    ("tl.maximum(update, -1.0, propagate_nan=tl.PropagateNan.ALL)", "update"),
    ("numbers.h_weight * tl.maximum(h", "tl.maximum(h"),
    ("ema(h, g * g, numbers.beta2, numbers.beta2_rest)", "ema(h, g * g, numbers.beta2, 0.0)"),
    ("ema(h, g * g, numbers.beta2, numbers.beta2_rest)", "ema(h, g * g, 1.0, numbers.beta2_rest)"),
    ("store_state(pointers.h, pointers.h_scale, h, words", "store_state(pointers.h, pointers.h_scale, m, words"),
    ("store_state(pointers.m, pointers.m_scale, m, words", "store_state(pointers.m, pointers.m_scale, g, words"),
    ("m=chunk_pointer(chunk, M_ROW", "m=chunk_pointer(chunk, H_ROW"),  # m and h mixed up
])  # fmt: skip
def test_mutants_do_not_pass(old, new, device, tmp_path):
    broken = mutant("soul_kernels.sophia_step", old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_fifty_steps(broken.sophia_step, device)


def check_low_precision(step, device, steps=120):
    """Updates of 5e-6, all in one direction, in compensated bf16 and with 8-bit states; raises AssertionError if lost."""
    n = 1024 + 300  # one full block of 8-bit states and a tail, whose gradients are 100 times as large
    lists, more = make_storage([(n,)], device, BRAIN, "8bit", "compensated")
    index = torch.arange(n, device=device)
    start, signs = join(lists[0][0], more["low_bits"][0]).double(), 1.0 - 2 * (index % 2)
    size = torch.where(index < 1024, 1.0, 100.0)
    lists[1][0] = (signs * size).to(BRAIN)
    for seed in range(steps):
        step(
            *lists,
            lr=5e-6,
            beta1=0.9,
            rho=0.0,
            bs=1,
            beta2=0.95,
            seed=seed,
            param_rounding="compensated",
            backend="triton",
            **more,
        )
    moved = (join(lists[0][0], more["low_bits"][0]).double() - start) / (steps * 5e-6)
    lag = 10 / steps  # until the momentum that there was has turned
    assert abs(-(moved * signs).mean().item() - 1) < lag + 0.01
    assert abs(((moved + signs) * start.sign()).mean().item()) < 0.012  # no drift towards 0, as cutting off would give
    m, h = (decode(lists[i][0], more[f"{name}_scales"][0], name) for i, name in ((2, "exp_avg"), (3, "hessian")))
    # Averages of constants. Rounded to nearest, one stands still where a step would move it by less than half a level: at the
    # top of a group that is 0.83% of m and 0.39% of h, so they stop 8.3% and 7.8% short at most.
    m, h = m * signs / size, h / size**2
    assert (m - 1).abs().max() < 0.083 + 0.01 and (h - 1).abs().max() < 0.078 + 0.01


@pytest.mark.slow(reason="compiles the kernels anew for each of them")
@pytest.mark.parametrize("old, new", [
    ("new, low = split(p - change, words", "new, low = split(p - change, words * 0"),  # not stochastic: cut off
    ("tl.store(pointers.low + block.offsets, low", "tl.store(pointers.low + block.offsets, low * 0"),  # low bits lost
    ("p = join(stored, load(pointers.low, block.offsets, block.mask), P_DTYPE)", "p = stored.to(tl.float32)"),
    ("store_state(pointers.h, pointers.h_scale, h, words", "store_state(pointers.h, pointers.m_scale, h, words"),
    ("load_state(pointers.m, pointers.m_scale, block", "load_state(pointers.m, pointers.h_scale, block"),
])  # fmt: skip
def test_low_precision_mutants_do_not_pass(old, new, device, tmp_path):
    with pytest.raises(AssertionError):
        check_low_precision(mutant("soul_kernels.sophia_step", old, new, tmp_path).sophia_step, device)


def test_low_precision_keeps_small_updates(device):
    check_low_precision(sophia_step, device)


def test_counts_exactly_the_coordinates_that_move_by_lr(device):
    params, grads, exp_avgs, hessians = make([(5000,), (77,)], device)
    before = [p.clone() for p in params]
    telemetry = torch.full((3,), 5.0, dtype=torch.float64, device=device)
    sophia_step(params, grads, exp_avgs, hessians, **OPTIONS | {"weight_decay": 0.0}, telemetry=telemetry, backend="triton")
    full = sum(((p - b).abs() >= 0.999999 * OPTIONS["lr"]).sum() for p, b in zip(params, before))
    assert int(telemetry[0]) - 5 == int(full)  # added to what was there
    moved = sum((p - b).double().square().sum() for p, b in zip(params, before))
    assert_close(telemetry[2] - 5, moved, 1e-4, "squared norm of the update")
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
    monkeypatch.setattr("soul_kernels._table.launch", lambda kernel, grid, device, **a: launches.append(a["P_DTYPE"]))
    parts = [make([(9,), (5000,)], device, (d, d, FLOAT, FLOAT)) for d in (FLOAT, BRAIN, FLOAT)]
    lists = [list(itertools.chain(*column)) for column in zip(*parts)]
    sophia_step(*lists, **OPTIONS, backend="triton")
    assert len(launches) == 2


@pytest.mark.skipif(not runs_on_cpu(), reason="8 GiB a tensor: untouched memory costs nothing on the CPU only")
def test_offsets_beyond_two_to_the_31(device, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # with NaN: it would be touched
    n = 2**31 + 3 * 16384
    lists = [[torch.empty(n, dtype=BRAIN)] for _ in range(4)]  # pages that are not touched are not there
    piece = 2**31 // 16384 + 1
    window = slice(piece * 16384, (piece + 1) * 16384)
    small = make([(16384,)], device, (BRAIN,) * 4)
    for big, part in zip(lists, small):
        big[0][window] = part[0]
    table = torch.tensor([[t[0].data_ptr()] for t in lists] + [[0]] * 5 + [[n], [0], [0]])
    options = dict(
        lr=1e-2, weight_decay=0.1, rho=0.04, bs=50.0, beta1=0.9, beta1_rest=0.1, beta2=0.0, beta2_rest=0.0, eps=1e-15
    )
    launch(
        sophia_step_kernel, (1,), device, table_ptr=table, chunk_tensor_ptr=torch.tensor([0], dtype=torch.int32),
        chunk_piece_ptr=torch.tensor([piece], dtype=torch.int32),
        telemetry_ptr=None, factor_ptr=None, skip_ptr=None, n_tensors=1, LOW_DTYPE=None, ON_DEVICE=0, HESSIAN_IN_STEP=False,
        ADD_EPS=True, ROUNDING="nearest", STEPS=False, CORRECTIONS=False, CROSSES=False, ALIGNED=True, CHUNK=16384,
        STOCHASTIC_CODES=False, BLOCK=2048, **options, **{f"{r}_DTYPE": triton_dtype(BRAIN) for r in "PGMH"},
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


@pytest.mark.parametrize("change, message", [
    ({"low_bits": None}, r"low_bits\[0\]: expected \(600,\) of torch.int8, got NoneType"),
    ({"low_bits": [torch.zeros(600)]}, r"low_bits\[0\]: expected \(600,\) of torch.int8, got \(600,\) of torch.float32"),
    ({"low_bits": [torch.zeros(600, dtype=torch.int8)] * 2}, "low_bits: expected 1 tensors"),
    ({"param_rounding": "nearest"}, "low_bits: expected None, got a list"),
    ({"exp_avg_scales": None}, r"exp_avg_scales\[0\]: expected int16 scales of the uint8 exp_avgs, got NoneType"),
    ({"hessian_scales": [torch.zeros(2)]}, r"hessian_scales\[0\]: expected \(19,\) of torch.int16, got \(2,\) of "),
    ({"steps": torch.zeros(2)}, "steps: expected 1 elements of torch.float32"),
    ({"corrections": torch.zeros(1).double()}, "corrections: expected 1 elements of torch.float32"),
    ({"grad_factor": 2.0}, "grad_factor: expected 1 elements of torch.float32, got float"),
    ({"skip": torch.zeros(2)}, "skip: expected 1 elements"),
    ({"lr": torch.ones((), dtype=torch.int64)}, "lr: expected 1 elements of torch.float32"),
])  # fmt: skip
def test_bad_storage_is_named_and_changes_nothing(change, message):
    lists, more = make_storage([(600,)], torch.device("cpu"), BRAIN, "8bit", "compensated")
    kept = clone(lists)
    with pytest.raises(ValueError, match=f"^{message}"):
        sophia_step(*lists, **OPTIONS | {"param_rounding": "compensated"} | more | change)
    assert all(torch.equal(a, b) for mine, theirs in zip(lists, kept) for a, b in zip(mine, theirs))


def test_memory_that_overlaps_is_refused(device):
    """Two programs would write there at once; also where the views begin at different addresses."""
    base = torch.zeros(100, device=device)
    for views in ([base[:60], base[50:]], [base[50:], base[:60]], [base, base[99:]]):
        params, grads, exp_avgs, hessians = make([v.shape for v in views], device)
        with pytest.raises(ValueError, match=r"^params\[\d\]: expected memory of its own, got the memory of params\[\d\]"):
            sophia_step(views, grads, exp_avgs, hessians, **OPTIONS)
        with pytest.raises(ValueError, match=r"expected memory of its own"):
            sophia_step(params, grads, views, hessians, **OPTIONS)
        with pytest.raises(ValueError, match=r"expected memory of its own"):
            sophia_step(params, grads, exp_avgs, exp_avgs, **OPTIONS)
    halves = [base[:50], base[50:]]  # neighbours do not overlap
    sophia_step(halves, *make([(50,), (50,)], device)[1:], **OPTIONS)


@pytest.mark.parametrize("option", [
    {"lr": -1.0}, {"lr": float("nan")}, {"beta1": 1.0}, {"beta2": -0.1}, {"rho": -1}, {"bs": 0}, {"eps": -1.0},
    {"weight_decay": -0.1}, {"param_rounding": "up"}, {"backend": "cuda"}, {"telemetry": torch.zeros(3)},
    {"eps_mode": "mean"},
])  # fmt: skip
def test_bad_options_are_named(option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))}: expected"):
        sophia_step(*make([(3,)], "cpu"), **OPTIONS | option)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_bundles_are_the_keywords(backend, device):
    """Both ways to pass an option, and steps of one object that is kept: the same bits."""
    results = []
    for how in ("keywords", "bundles", "kept"):
        torch.manual_seed(0)
        lists, more = make_storage([(600,), (40,)], device, BRAIN, BRAIN, "compensated")
        factor, skip = torch.tensor(0.5, device=device), torch.zeros((), device=device)
        corrections, steps = torch.tensor([0.5, 0.25], device=device), torch.zeros(2, device=device)
        kept, kept_ema = SophiaStep(), HessianEma()
        for _ in range(3):
            noise = dict(seed=3, tensor_ids=[4, 2], tensor_offsets=[0, 7], steps=steps.add_(1.0))
            guards, extra = dict(grad_factor=factor, skip=skip), dict(maximize=True, eps_mode="max", corrections=corrections)
            options = OPTIONS | dict(beta2=0.95, param_rounding="compensated")
            bundles = dict(noise=Noise(**noise), guards=Guards(**guards), backend=backend)
            if how == "keywords":
                sophia_step(*lists, **options, **more, **noise, **guards, **extra, backend=backend)
                hessian_ema(lists[3], lists[1], beta2=0.9, **noise, **guards, backend=backend)
            elif how == "bundles":
                sophia_step(*lists, **options, **more, **extra, **bundles)
                hessian_ema(lists[3], lists[1], beta2=0.9, **bundles)
            else:
                kept.prepare(StepTensors(*lists, **more), StepOptions(**options, **extra), **bundles)()
                kept_ema.prepare(lists[3], lists[1], beta2=0.9, **bundles)()
        assert how != "kept" or kept.version == 1
        results.append([*lists[0], *lists[2], *lists[3], *more["low_bits"]])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others))


def test_a_keyword_of_no_bundle_is_named():
    lists = make([(3,)], "cpu")
    with pytest.raises(TypeError, match=r"^sophia_step\(\) got an unexpected keyword argument 'sed'"):
        sophia_step(*lists, **OPTIONS, sed=1)
    with pytest.raises(TypeError, match=r"^hessian_ema\(\) got an unexpected keyword argument 'param_rounding'"):
        hessian_ema(lists[3], lists[1], beta2=0.9, param_rounding="nearest")


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_is_prepared_runs_once_and_before_the_next_is_prepared(backend, device):
    lists = make([(300,)], device)
    tensors, options, before = StepTensors(*lists), StepOptions(**OPTIONS), clone(lists)
    for kept, prepare in (
        (SophiaStep(), lambda kept: kept.prepare(tensors, options, backend=backend)),
        (HessianEma(), lambda kept: kept.prepare(lists[3], lists[1], beta2=0.9, backend=backend)),
    ):
        first, second = prepare(kept), prepare(kept)
        with pytest.raises(RuntimeError, match="^prepared call: "):
            first()
        assert all(torch.equal(a, b) for mine, theirs in zip(lists, before) for a, b in zip(mine, theirs))
        second()
        before = clone(lists)
        with pytest.raises(RuntimeError, match="^prepared call: "):
            second()
        assert all(torch.equal(a, b) for mine, theirs in zip(lists, before) for a, b in zip(mine, theirs))


def test_gradients_of_other_strides_are_copied_when_the_step_is_taken(device):
    """Of several steps that are prepared together no more than one has copies."""
    lists = make([(512, 1024)], device)
    lists[1][0] = torch.randn(1024, 512, device=device).t()
    want, kept, steps = clone(lists), SophiaStep(), []

    def prepare():
        steps.append(kept.prepare(StepTensors(*lists), StepOptions(**OPTIONS), backend="triton"))

    for _ in range(2):
        assert peak_bytes(prepare, device) < 2**20
        steps[-1]()
        sophia_step(*want, **OPTIONS, backend="reference")
        assert all(torch.equal(a, b) for mine, theirs in zip(lists, want) for a, b in zip(mine, theirs))
    assert kept.version == 4  # twice a step: such gradients are never known
