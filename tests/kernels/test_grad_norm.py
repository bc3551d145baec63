import pytest
import torch

from soul_kernels import TensorTable, grad_norm
from tests.support.helpers import mutant

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


def make(device):
    # 0: empty; (): 0-dim; 127: a tail alone; 65536 + 2048 + 1: a second piece with a full block and a tail. Three launches.
    shapes = [((0,), FLOAT), ((), FLOAT), ((127,), BRAIN), ((65536 + 2048 + 1,), FLOAT), ((3, 50), HALF), ((40, 30), BRAIN)]
    return [torch.randn(shape, device=device).to(dtype) for shape, dtype in shapes]


def check_against_fp64(norm, device, backend="triton"):
    grads = make(device)
    kept = [g.clone() for g in grads]
    want = torch.cat([g.double().flatten() for g in grads]).norm().item()
    got = norm(grads, backend=backend)
    assert got.dtype == FLOAT and got.shape == () and got.device == grads[0].device
    assert abs(got.item() / want - 1) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(grads, kept))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_against_fp64(backend, device):
    check_against_fp64(grad_norm, device, backend)


@pytest.mark.parametrize("old, new", [
    ("squares += g * g\n    if", "squares += g\n    if"),
    ("g = load(g_ptr, offsets, offsets < chunk.count).to(tl.float32)\n        squares += g * g", "pass"),  # no tail
    ("range(full)", "range(tl.minimum(full, 1))"),  # one block
    ("tl.sqrt(tl.sum(total, 0))", "tl.sum(total, 0)"),
    ("if len(partials) == 1 else torch.cat", "if partials else torch.cat"),  # of the first launch only
])  # fmt: skip
def test_mutants_do_not_pass(old, new, device, tmp_path):
    broken = mutant("soul_kernels.grad_norm", old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_against_fp64(broken.grad_norm, device)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_is_finite_exactly_if_all_gradients_are(bad, backend, device):
    for index, place in ((3, 65536 + 2048), (5, 0), (1, 0)):  # in a tail, in another bucket, in a 0-dim tensor
        grads = make(device)
        grads[index].view(-1)[place] = bad
        assert not grad_norm(grads, backend=backend).isfinite()


def test_is_the_same_at_every_run_and_with_a_table(device):
    grads, table = make(device), TensorTable()
    norms = [grad_norm(grads, table=t, backend="triton") for t in (None, table, table)]
    assert norms[0] == norms[1] == norms[2]
    grads[3] = grads[3] * 2  # lies elsewhere: the table must notice
    assert grad_norm(grads, table=table, backend="triton") == grad_norm(grads, backend="triton") != norms[0]


def test_no_gradients_and_views(device):
    assert grad_norm([]) == 0 and grad_norm([torch.zeros(0, device=device)], backend="triton") == 0
    base = torch.randn(40, 50, device=device)
    views = [base.t(), base[:, ::2], base[1:, 1:], base.flatten()[1:100]]  # dense, strided, strided, off a 16-byte boundary
    want = torch.cat([v.double().flatten() for v in views]).norm()
    for backend in ("triton", "reference"):
        assert abs(grad_norm(views, backend=backend).double() / want - 1) < 1e-6


def test_bad_input_is_named():
    good = torch.zeros(4)
    for bad, message in (
        (good.to_sparse(), "dense tensor"),
        (good.to(torch.complex64), "real tensor"),
        (good.double(), "dtype"),
        (None, "a tensor"),
    ):
        with pytest.raises(ValueError, match=rf"^grads\[1\]: expected .*{message}"):
            grad_norm([good, bad])
