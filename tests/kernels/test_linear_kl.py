import pytest
import torch

import soul_kernels
from soul_kernels import Head
from soul_kernels.reference import linear_kl as reference
from tests.kernels.test_linear_loss import use_mutant
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, assert_rows_close, loose

linear_kl, reference_kl = loose(soul_kernels.linear_kl), loose(reference.linear_kl)
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def make(device, dtype=FLOAT, bias=False, n_vocab=131, distance=0.3):
    """Ragged sequences, one without a label; the reference is wider, has a head of its own, and is not far off."""
    B, T, D = 5, 9, 16
    hidden = torch.randn(B, T, D, device=device)
    weight = torch.randn(n_vocab, D, device=device) * 3 / D**0.5
    labels = torch.randint(n_vocab, (B, T), device=device)
    for b in range(B):
        labels[b, : 1 + b % 3], labels[b, T - (b * 2) % 4 :] = -100, -100
    labels[2] = -100
    extra = torch.zeros(n_vocab, 8, device=device) if not bias else 0.1 * torch.randn(n_vocab, 8, device=device)
    case = {
        "hidden": hidden,
        "weight": weight,
        "ref_hidden": torch.cat([hidden + distance * torch.randn_like(hidden), torch.randn(B, T, 8, device=device)], -1),
        "ref_weight": torch.cat([weight, extra], 1),
        "bias": torch.randn(n_vocab, device=device) if bias else None,
        "ref_bias": torch.randn(n_vocab, device=device) if bias else None,
    }
    case = {name: None if value is None else value.to(dtype) for name, value in case.items()}
    for name in ("hidden", "weight", "bias"):
        if case[name] is not None:
            case[name].requires_grad_()
    return case | {"labels": labels}


def fp64(case):
    return {
        name: v.detach().double().requires_grad_(v.requires_grad) if v is not None and v.is_floating_point() else v
        for name, v in case.items()
    }


def check(device, op=linear_kl, *, backend="triton", dtype=FLOAT, bias=False, chunk_rows=1000, frozen=(), **options):
    """Values and gradients under an arbitrary function of the tokens' values, against fp64."""
    case = make(device, dtype, bias)
    double = fp64(case)
    for name in frozen:
        case[name].requires_grad_(False), double[name].requires_grad_(False)
    upstream = torch.randn(case["labels"].shape, device=device).double()
    got = op(**case, backend=backend, chunk_bytes=chunk_rows * 192 * 8, **options)
    want = reference_kl(**double, **options)
    assert got.dtype == FLOAT and (got[case["labels"] == -100] == 0).all()
    assert_close(got, want, tol.GRAD_OBJECTIVE, "value")
    leaves = [name for name in ("hidden", "weight", "bias") if case[name] is not None and name not in frozen]
    got_all = torch.autograd.grad((got * upstream).sum(), [case[name] for name in leaves])
    want_all = torch.autograd.grad((want * upstream).sum(), [double[name] for name in leaves])
    for name, a, b in zip(leaves, got_all, want_all):
        assert a.dtype == dtype
        assert_close(a, b, tol.GRAD_OBJECTIVE if dtype == FLOAT else tol.GRAD_BF16, name)
        if name != "bias":
            assert_rows_close(a, b, tol.WORST_ROW_KL if dtype == FLOAT else 2 * tol.WORST_ROW_BF16, name)


@pytest.mark.parametrize("kind", ["kl", "soul_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF])
def test_against_fp64(dtype, kind, backend, device):
    check(device, backend=backend, dtype=dtype, bias=True, kind=kind, **({"beta": 0.3} if kind == "jsd" else {}))


# A frozen head forms its gradient in forward; a frozen body needs none of it.
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",)])
def test_frozen_parts(frozen, backend, device):
    check(device, backend=backend, bias=True, frozen=frozen)


@pytest.mark.parametrize("chunk_rows", [1, 4, 7])  # each token on its own; sequences cut; several sequences
def test_chunks_do_not_change_the_result(chunk_rows, backend, device):
    check(device, backend=backend, chunk_rows=chunk_rows, strengths=torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0], device=device))


def test_capped_and_scaled_logits(backend, device):
    check(device, backend=backend, bias=True, logit_scale=0.5, softcap=2.0)


def test_token_indices_and_no_grad(backend, device):
    case = make(device)
    want = linear_kl(**case, backend=backend)
    rows = (case["labels"].flatten() != -100).nonzero()[:, 0].cpu()
    padded = torch.cat([rows, torch.full((3,), case["labels"].numel() - 1)])
    assert case["labels"].flatten()[-1] == -100 or rows[-1] == case["labels"].numel() - 1
    case["labels"][-1, -1] = -100
    rows = rows[rows != case["labels"].numel() - 1]
    padded = torch.cat([rows, torch.full((3,), case["labels"].numel() - 1)])
    for token_indices in (rows, padded, padded.to(device)):
        with torch.no_grad():
            got = linear_kl(**case, token_indices=token_indices, backend=backend)
        assert not got.requires_grad
        assert_close(got[:-1], want[:-1], 1e-6, "value")


def test_a_frozen_head_serves_both(backend, device):
    case = make(device)
    case["weight"].requires_grad_(False)
    case |= {"ref_hidden": case["hidden"].detach().clone(), "ref_weight": None, "ref_bias": None}
    got = linear_kl(**case, backend=backend)
    assert (got == 0).all()
    (gradient,) = torch.autograd.grad(got.sum(), case["hidden"])
    assert (gradient == 0).all()


@pytest.mark.parametrize("change, message", [
    ({"weight": Head(torch.zeros(131, 16)), "bias": torch.zeros(131)}, "bias: expected None beside a Head, .* got a tensor"),
    ({"kind": "js"}, "kind: expected one of 'kl', 'soul_kl', 'reverse_kl', 'jsd', got 'js'"),
    ({"kind": "jsd", "beta": 1.0}, "beta: expected a number between 0 and 1, got 1.0"),
    ({"ref_hidden": torch.zeros(5, 8, 24)}, r"reference.hidden: expected \[B, T, D\] with \[B, T\] \(5, 9\), got \(5, 8, 24\)"),
    ({"ref_weight": torch.zeros(130, 24)}, r"reference.weight: expected shape \(131, 24\), got \(130, 24\)"),
    ({"ref_bias": torch.zeros(3)}, r"reference.bias: expected shape \(131,\), got \(3,\)"),
    ({"strengths": torch.zeros(4)}, r"strengths: expected shape \(5,\), got \(4,\)"),
    ({"softcap": 0.0}, "softcap: expected a positive number or None, got 0.0"),
    ({"logit_scale": 0.0}, "logit_scale: expected a number other than 0, got 0.0"),
    ({"chunk_bytes": 0}, "chunk_bytes: expected a positive whole number, got 0"),
    ({"logits_dtype": torch.float16}, "logits_dtype: expected torch.float32 or torch.float32, .* got torch.float16"),
])  # fmt: skip
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_kl(**make("cpu") | change)


@pytest.mark.parametrize("module, old, new", [
    ("_head.rows", "self.ref_x[ref], chunk", "self.ref_x[: ref.stop - ref.start], chunk"),  # the first chunk's reference
    ("_head.rows", "index_select(0, sequences)", "index_select(0, 0 * sequences)"),  # the first sequence's strength
    ("_head.rows", "divergence_coefficients[local], out", "0 * divergence_coefficients[local], out"),
    ("_head.sweeps", "(torch.zeros_like(values), values)", "(values, values)"),
    ("_head.sweeps", "head_rows.log_probs() if head_rows.kind is None else", "head_rows.log_probs() if True else"),
])  # fmt: skip
def test_mutants_do_not_pass(module, old, new, device, tmp_path, monkeypatch):
    use_mutant(module, old, new, tmp_path, monkeypatch)
    with pytest.raises((AssertionError, TypeError)):
        check(device, chunk_rows=7, strengths=torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0], device=device))


@pytest.mark.parametrize("old, new", [
    ("gradient.mul_(weights[rows, None])", "gradient.mul_(0 * weights[rows, None])"),
    ("total.log() - strengths", "total.log()"),
    ("(ref_logits, labels_in, ref_statistics, rows,", "(ref_logits, labels_in, ref_statistics, slice(0, len(log_p)),"),
    ("score(log_p, log_q, kind, beta) - mean_scores[rows, None]", "score(log_p, log_q, kind, beta)"),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_mutants_without_kernels_do_not_pass(old, new, backend, device, tmp_path, monkeypatch):
    use_mutant("reference._rows", old, new, tmp_path, monkeypatch, DIVERGENCE_BLOCK=300)
    options = dict(kind="reverse_kl", softcap=5.0, strengths=torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0], device=device))
    with pytest.raises(AssertionError):
        check(device, backend=backend, chunk_rows=7, **options)
