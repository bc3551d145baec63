import pytest
import torch

import soul_kernels
from soul_kernels import Head
from soul_kernels.reference import linear_gnb as reference
from tests.kernels.test_linear_loss import use_mutant
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, loose

linear_gnb = loose(soul_kernels.linear_gnb)
linear_logprob = loose(soul_kernels.linear_logprob)
reference_gnb = loose(reference.linear_gnb)
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def make(device, dtype=FLOAT, n_vocab=131, bias=False):
    B, T, D = 5, 9, 16
    keep = torch.rand(B, T, device=device) < 0.6
    keep[2] = False
    return {
        "hidden": torch.randn(B, T, D, device=device).to(dtype).requires_grad_(),
        "weight": (torch.randn(n_vocab, D, device=device) * 2 / D**0.5).to(dtype).requires_grad_(),
        "bias": torch.randn(n_vocab, device=device).to(dtype).requires_grad_() if bias else None,
        "keep": keep,
        "uniforms": torch.rand(B, T, device=device),
    }


def check(device, op=linear_gnb, *, backend="triton", dtype=FLOAT, bias=False, chunk_rows=1000, **options):
    """Labels as the reference draws them; loss and gradients are those of the cross-entropy with these labels, in fp64."""
    case = make(device, dtype, bias=bias)
    double = {n: v.detach().double().requires_grad_() if v is not None and n in ("hidden", "weight", "bias") else v
              for n, v in case.items()}  # fmt: skip
    loss, labels = op(**case, backend=backend, chunk_bytes=chunk_rows * 192 * 4, **options)
    options.pop("token_indices", None)
    want, want_labels = reference_gnb(**double, **options)
    assert torch.equal(labels, want_labels)
    assert (labels == -100).equal(~case["keep"])
    assert_close(loss, want, tol.GRAD_OBJECTIVE, "loss")
    leaves = [name for name in ("hidden", "weight", "bias") if case[name] is not None]
    got_all = torch.autograd.grad(loss * 3, [case[name] for name in leaves])
    want_all = torch.autograd.grad(want * 3, [double[name] for name in leaves])
    for name, a, b in zip(leaves, got_all, want_all):
        assert a.dtype == dtype
        assert_close(a, b, tol.GRAD_OBJECTIVE if dtype == FLOAT else tol.GRAD_BF16, name)


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF])
def test_against_the_reference(dtype, backend, device):
    check(device, backend=backend, dtype=dtype, bias=True)


@pytest.mark.parametrize("chunk_rows", [1, 4, 7])
def test_labels_do_not_depend_on_the_chunks(chunk_rows, backend, device):
    check(device, backend=backend, chunk_rows=chunk_rows)


def test_capped_and_scaled_logits(backend, device):
    check(device, backend=backend, logit_scale=2.0, softcap=1.5)


def test_generators_give_the_labels(backend, device):
    """The same generator state, the same labels; another seed, others; rows of the collator change nothing."""
    case = make(device) | {"uniforms": None}
    drawn = []
    for seed, rows in ((1, None), (1, case["keep"].flatten().nonzero()[:, 0].cpu()), (2, None)):
        generator = torch.Generator(device).manual_seed(seed)
        drawn.append(linear_gnb(**case, generator=generator, token_indices=rows, backend=backend)[1])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    generator = torch.Generator(device).manual_seed(1)
    assert torch.equal(linear_gnb(**case, generator=generator, backend="reference")[1], drawn[0])


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_nothing_kept_no_grad_and_a_frozen_head(backend, device):
    case = make(device)
    case["weight"].requires_grad_(False)
    with torch.no_grad():
        quiet, labels = linear_gnb(**case, backend=backend)
    loss, again = linear_gnb(**case, backend=backend)
    assert torch.equal(labels, again) and not quiet.requires_grad
    assert_close(quiet, loss, 1e-6, "loss")
    loss.backward()
    assert case["hidden"].grad.norm() > 0 and case["weight"].grad is None
    nothing, labels = linear_gnb(**case | {"keep": torch.zeros_like(case["keep"])}, backend=backend)
    assert nothing.item() == 0 and (labels == -100).all()
    assert (torch.autograd.grad(nothing, case["hidden"])[0] == 0).all()


def test_the_loss_is_that_of_the_labels(backend, device):
    case = make(device)
    loss, labels = linear_gnb(**case, backend=backend)
    logps = linear_logprob(case["hidden"], case["weight"], labels, backend=backend)
    assert_close(loss, -logps.sum() / case["keep"].sum(), 1e-6, "loss")


@pytest.mark.parametrize("change, message", [
    ({"keep": torch.ones(5, 9)}, r"keep: expected \(5, 9\) of torch.bool, got \(5, 9\) of torch.float32"),
    ({"keep": torch.ones(5, 8, dtype=torch.bool)}, r"keep: expected \(5, 9\) of torch.bool, got \(5, 8\)"),
    ({"uniforms": torch.rand(5, 8)}, r"uniforms: expected \(5, 9\) of torch.float32, got \(5, 8\)"),
    ({"token_indices": torch.tensor([44])}, "token_indices: expected every labelled token once"),
    ({"weight": Head(torch.zeros(131, 16)), "bias": torch.zeros(131)}, "bias: expected None beside a Head, .* got a tensor"),
    ({"weight": torch.zeros(0, 16)}, r"weight: expected a vocabulary, got \(0, 16\)"),
])  # fmt: skip
def test_bad_input_is_named(change, message):
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=message):
        linear_gnb(**make("cpu") | {"bias": None} | change)


@pytest.mark.parametrize("module, old, new", [
    ("_head.sweeps", "(-share).expand", "share.expand"),
    ("_head.sweeps", "count = keep.sum().clamp(min=1)", "count = keep.sum().clamp(max=1)"),
    ("_head.rows", "self.uniforms[chunk.span]", "self.uniforms[: chunk.stop - chunk.start]"),
    ("_head.rows", "self.uniforms = self.gather(uniforms)", "self.uniforms = uniforms.flatten()[: len(self)].clone()"),
])  # fmt: skip
def test_mutants_do_not_pass(module, old, new, device, tmp_path, monkeypatch):
    use_mutant(module, old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check(device, chunk_rows=7)


@pytest.mark.parametrize("old, new", [
    ("uniforms[rows])", "uniforms[: len(z)])"),
    ("labels[rows] != IGNORE_INDEX, IGNORE_INDEX)", "labels[rows] != IGNORE_INDEX, 0)"),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_mutants_without_kernels_do_not_pass(old, new, backend, device, tmp_path, monkeypatch):
    """Of rows that pad the others as well, which draw nothing."""
    use_mutant("reference._rows", old, new, tmp_path, monkeypatch, BLOCK=300)
    with pytest.raises(AssertionError):
        check(device, backend=backend, chunk_rows=7, token_indices=torch.arange(45))
