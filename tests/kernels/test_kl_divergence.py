"""The row kernels of the divergences against fp64; the op on hidden states is in ``test_linear_kl``."""

import functools

import pytest
import torch

from soul_kernels._head import rows as head_rows
from soul_kernels.kl_divergence import divergence_gradient, divergence_statistics
from soul_kernels.reference import kl_divergence as reference
from soul_kernels.reference.token_logprob import token_logprob, transformed
from soul_kernels.token_logprob import STATISTICS_CONFIG, token_statistics
from tests.kernels.test_token_logprob import overlaid
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, assert_rows_close, mutant


@pytest.fixture
def row_functions(backend, monkeypatch):
    """Run a test with the kernels, and with the PyTorch functions that replace them."""
    functions = head_rows.row_functions(backend)
    for name in ("token_statistics", "divergence_statistics", "divergence_gradient"):
        monkeypatch.setitem(globals(), name, getattr(functions, name))


def run(logits, ref_logits, labels, coefficients, weights, *, statistics_op=None, gradient_op=None,
        out=None, strengths=None, kind="kl", beta=0.3, **transform):  # fmt: skip
    both = [torch.empty(4, len(labels), device=logits.device) for _ in range(2)]
    for raw, statistics in zip((logits, ref_logits), both):
        token_statistics(raw, labels, statistics, **transform)
    divergences = torch.full((3 if kind == "jsd" else 2, len(labels)), float("nan"), device=logits.device)
    options = dict(strengths=strengths, kind=kind, beta=beta, **transform)
    (statistics_op or divergence_statistics)(logits, ref_logits, labels, *both, divergences, **options)
    out = torch.full_like(logits, float("nan")) if out is None else out
    (gradient_op or divergence_gradient)(logits, ref_logits, labels, *both, divergences, coefficients, weights, out, **options)
    return divergences[:2], out


def oracle(logits, ref_logits, labels, coefficients, weights, *, strengths=None, kind="kl", beta=0.3, **transform):
    """Definition in fp64, without the care for small values that fp32 needs: KL as sum q (log q - log p)."""

    def kl(log_a, log_b):
        return (log_a.exp() * torch.where(log_a.exp() > 0, log_a - log_b, 0.0)).sum(1)

    leaf = logits.double().requires_grad_()
    z, z_ref = (transformed(t, **transform) for t in (leaf, ref_logits.double()))
    log_p = z.log_softmax(1)
    log_q = reference.ref_log_probabilities(z_ref, labels, strengths)
    if kind == "kl":
        value = kl(log_q, log_p)
    elif kind == "reverse_kl":
        value = kl(log_p, log_q)
    elif kind == "jsd":
        log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).clamp(min=1e-300).log()
        value = beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
    else:
        value = -(log_p.exp() * torch.log(log_q.exp() + 1e-12)).sum(1)
    loss = (token_logprob(z, labels) * coefficients + value * weights).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return torch.stack([value.detach(), reference.entropy(log_q)]), gradient


def run_reference(logits, ref_logits, labels, coefficients, weights, *, strengths=None, kind="kl"):
    """Return the outputs of `run` from the reference in fp32 under autograd."""
    leaf = logits.clone().requires_grad_()
    log_q = reference.ref_log_probabilities(ref_logits, labels, strengths)
    value = reference.kl_divergence(leaf, labels, log_q, kind, beta=0.3)
    (gradient,) = torch.autograd.grad((token_logprob(leaf, labels) * coefficients + value * weights).sum(), leaf)
    return torch.stack([value.detach(), reference.entropy(log_q)]), gradient


def log_of_sum_error(n_vocab):
    """Bound on the error of the logarithm of a row's sum where one term, exp(0) = 1, is nearly all of it.

    Each addition that this term takes part in rounds to a multiple of 2^-23, by 2^-24 at most. A compiled kernel makes 2 of
    them among the columns that a lane has of a block, and 10 between the 1024 lanes; numpy, which serves the interpreter, makes
    3, then 15 + 3 in a leaf of 128 lanes, and 3 between leaves. One more for each block but the first, and one for the label.
    """
    return (24 + -(-n_vocab // STATISTICS_CONFIG["BLOCK"])) * 2**-24


def check(device, n_vocab=4099, distance=1.0, kind="kl", strengths=None, spread=3.0, limit=tol.GRAD_OBJECTIVE, **options):
    transform = {name: options.pop(name) for name in ("logit_scale", "softcap") if name in options}
    logits = torch.randn(5, n_vocab, device=device) * spread
    ref_logits = logits + torch.randn(5, n_vocab, device=device) * distance
    labels = torch.tensor([0, n_vocab - 1, n_vocab // 2, n_vocab // 3, 0], device=device)
    coefficients = torch.tensor([0.0, 0.0, 1.0, -0.5, 2.0], device=device)
    weights = torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0], device=device)
    if strengths is not None:
        strengths = torch.tensor(strengths, device=device)
    arguments = (logits, ref_logits, labels, coefficients, weights)
    divergences, gradient = run(*arguments, strengths=strengths, kind=kind, **transform, **options)
    want, want_gradient = oracle(*arguments, strengths=strengths, kind=kind, **transform)
    assert (divergences[0] >= 0).all() or kind == "soul_kl"  # -log(1 + 1e-12) of a certain token
    # Beside the label each log q carries the error of the logarithm of the sum: an entropy close to 0 is known to that.
    allowed = limit * want.abs() + torch.tensor([[1e-9], [log_of_sum_error(n_vocab)]], device=device)
    assert ((divergences.double() - want).abs() <= allowed).all(), "value"
    assert_rows_close(gradient, want_gradient, tol.WORST_ROW_FP32 + limit, "dlogits")
    # A gradient of softmaxes sums to 0. That of the reverse divergence is a sum of terms of the size of the divergence.
    bound = 1e-6 * (10 + want[0].max()) if kind == "reverse_kl" else 1e-5
    assert gradient.double().sum(1).abs().max() <= bound or transform


# 1 and 2: hardly a distribution. 129: a warp and one. 2048, 2049: one block, and one element more. 50257: a tail.
@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("n_vocab", [1, 2, 129, 2048, 2049, 50257])
@pytest.mark.parametrize("kind", reference.KINDS)
def test_every_vocabulary_size(kind, n_vocab, device):
    check(device, n_vocab, kind=kind)


# Past each block at which threads wait for each other: 0, 2, 6 of 2048.
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("n_vocab", [3 * 2048, 7 * 2048 + 9])
def test_a_narrow_gradient_in_the_bytes_of_the_logits(n_vocab, kind, device):
    logits = torch.randn(3, n_vocab, device=device)
    arguments = (logits + torch.randn_like(logits), torch.tensor([0, n_vocab - 1, -100], device=device), *torch.randn(2, 3))
    arguments = tuple(argument.to(device) for argument in arguments)
    padded, _ = overlaid(logits, torch.bfloat16)
    want = run(padded, *arguments, kind=kind, out=torch.empty_like(logits, dtype=torch.bfloat16))
    copy, out = overlaid(logits, torch.bfloat16)
    for got, expected in zip(run(copy, *arguments, kind=kind, out=out), want):
        assert torch.equal(got, expected)


# KL of about 5e-7, where the sum of q (log q - log p) has lost everything in fp32, to 50, where expm1(-d) overflows.
@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("distance, limit", [(1e-3, 5e-3), (0.1, 1e-4), (10.0, tol.GRAD_OBJECTIVE), (60.0, tol.GRAD_OBJECTIVE)])
def test_close_and_distant_distributions(distance, limit, kind, device):
    # The rounding of z and of log-sum-exp, 1e-6, is a thousandth of the differences at 1e-3.
    check(device, distance=distance, limit=limit, kind=kind)


@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("beta", [0.01, 0.5, 0.9])
def test_the_weight_of_a_mixture(beta, device):
    logits, ref_logits = (torch.randn(3, 2051, device=device) * 3 for _ in range(2))
    arguments = (logits, ref_logits, torch.arange(3, device=device), *torch.randn(2, 3, device=device))
    for got, want in zip(run(*arguments, kind="jsd", beta=beta), oracle(*arguments, kind="jsd", beta=beta)):
        assert_rows_close(got, want, tol.WORST_ROW_FP32, "jsd")


def test_entropy_of_a_reference_that_is_nearly_certain(device):
    torch.manual_seed(138)  # of 400 in the interpreter, the one whose sum is off the most where the entropy is small: 4.5 2^-24
    check(device, distance=10.0)


@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("kind", reference.KINDS)
def test_lowered_labels(kind, device):
    """UNDIAL's teacher: one row unchanged, one label slightly lowered, two until q is subnormal or 0, of which log q counts."""
    check(device, kind=kind, strengths=[0.0, 200.0, 3.0, 95.0, 0.5])


@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("kind", reference.KINDS)
def test_capped_and_scaled_logits(kind, device):
    check(device, kind=kind, strengths=[0.0, 1.0, 3.0, 0.0, 5.0], spread=20.0, logit_scale=0.5, softcap=8.0)


@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("strengths", [None, [4.0] * 4])
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("rest", [1e-4, 1e-9])
def test_memorised_by_both(rest, kind, strengths, device):
    """p and q of the label are 1 but for 1e-9: value, entropy and gradient keep their relative accuracy."""
    labels = torch.randint(5000, (4,), device=device)
    both = []
    for _ in range(2):
        logits = torch.randn(4, 5000, device=device)
        others = logits.double().scatter(1, labels[:, None], -torch.inf).logsumexp(1)
        both.append(logits.scatter(1, labels[:, None], (others - torch.log(torch.tensor(rest).double())).float()[:, None]))
    weights = torch.ones(4, device=device)
    zeros = torch.zeros(4, device=device)
    strengths = None if strengths is None else torch.tensor(strengths, device=device)
    divergences, gradient = run(*both, labels, zeros, weights, kind=kind, strengths=strengths)
    want, want_gradient = oracle(*both, labels, zeros, weights, kind=kind, strengths=strengths)
    assert_close(divergences, want, tol.ONE_MINUS_P, "divergence and entropy")
    assert ((divergences.double() - want).abs() <= 2 * tol.ONE_MINUS_P * want).all()
    assert_rows_close(gradient, want_gradient, 2 * tol.ONE_MINUS_P, "dlogits")


@pytest.mark.parametrize("n_vocab, backend", [(50257, "triton"), (50257, "torch"), (50257, "reference"), (128256, "reference")])
@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("strengths", [None, [0.0, 1.0, 3.0, 5.0]])
@pytest.mark.parametrize("distance", [1.0, 1e-2])
def test_gradient_at_an_unlikely_label(distance, strengths, n_vocab, backend, device):
    """Where p and q of the label are about 1/V, its gradient p - q is as exact as that of any other token.

    1 - p and 1 - q are then close to 1, and their difference would carry the rounding of 1: 6e-8 against p of 2e-5.
    """
    logits = torch.randn(4, n_vocab, device=device)
    ref_logits = logits + torch.randn(4, n_vocab, device=device) * distance
    labels = torch.tensor([0, n_vocab - 1, n_vocab // 2, n_vocab // 3], device=device)
    weights = torch.ones(4, device=device)
    zeros = torch.zeros(4, device=device)
    strengths = None if strengths is None else torch.tensor(strengths, device=device)
    op = run_reference if backend == "reference" else run
    _, gradient = op(logits, ref_logits, labels, zeros, weights, strengths=strengths)
    _, want = oracle(logits, ref_logits, labels, zeros, weights, strengths=strengths)
    p = logits.double().softmax(1)
    error = ((gradient.double() - want).abs() / p).gather(1, labels[:, None])
    # The logits of size 5 and the logarithms of the sums, 11, are rounded by 1e-6 at most; so p and q are.
    larger = (want.abs() / p).gather(1, labels[:, None]).clamp(min=1.0)  # q may be larger than p
    assert (error <= 1e-5 * larger).all(), error


@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd"])
def test_equal_distributions_are_exactly_zero_apart(kind, device):
    logits = torch.randn(4, 5000, device=device) * 5
    labels = torch.arange(4, device=device)
    ones = torch.ones(4, device=device)
    divergences, gradient = run(logits, logits.clone(), labels, 0 * ones, ones, kind=kind)
    assert (divergences[0] == 0).all() and (gradient == 0).all()


@pytest.mark.usefixtures("row_functions")
def test_masked_entries_ignored_rows_and_low_precision(device):
    logits, ref_logits = (torch.randn(3, 4100, device=device) for _ in range(2))
    logits[0, 100:], ref_logits[0, 100:] = -torch.inf, -torch.inf  # entries that both models exclude
    ref_logits[1, 4000:] = -torch.inf  # excluded by the reference model
    logits[2], ref_logits[2] = float("nan"), float("nan")
    labels = torch.tensor([5, 7, -100], device=device)
    ones = torch.ones(3, device=device)
    divergences, want = run(logits, ref_logits, labels, ones, ones)
    assert torch.isfinite(divergences).all() and torch.isfinite(want).all() and (want[2] == 0).all()
    expected, _ = oracle(logits[1:2], ref_logits[1:2], labels[1:2], ones[1:2], ones[1:2])
    assert_close(divergences[0, 1:2], expected[0], tol.GRAD_OBJECTIVE, "KL")
    low = torch.full((3, 4160), float("nan"), device=device, dtype=torch.bfloat16)
    run(logits, ref_logits, labels, ones, ones, out=low[:, :4100])
    assert torch.equal(low[:, :4100], want.bfloat16()) and low[:, 4100:].isnan().all()
    copy = logits.clone()
    assert torch.equal(run(copy, ref_logits, labels, ones, ones, out=copy)[1], want)


@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_masked_entries_of_other_divergences(kind, device):
    """Entries that both models exclude; one that the model excludes, and for the mixture one that the reference model does."""
    logits, ref_logits = (torch.randn(3, 2100, device=device) for _ in range(2))
    logits[:, 100:], ref_logits[:, 101:] = -torch.inf, -torch.inf
    if kind == "jsd":
        ref_logits[0, 50] = -torch.inf
    labels = torch.tensor([5, 7, -100], device=device)
    divergences, gradient = run(logits, ref_logits, labels, *torch.ones(2, 3, device=device), kind=kind)
    finite = [torch.where(values[:2].isinf(), -1e4, values[:2]) for values in (logits, ref_logits)]
    want, want_gradient = oracle(*finite, labels[:2], *torch.ones(2, 2, device=device), kind=kind)
    assert_close(divergences[0, :2], want[0], tol.GRAD_OBJECTIVE, kind)
    assert_rows_close(gradient[:2], want_gradient, tol.WORST_ROW_FP32, "dlogits")
    assert (gradient[2] == 0).all() and (divergences[:, 2] == 0).all()


@pytest.mark.slow(reason="compiles the kernels anew for each of them")
@pytest.mark.parametrize("old, new", [
    ("far = a * (d - 1.0) + b", "far = a * d"),
    ("near = a * d * d * (0.5", "near = a * d * d * (1.0"),
    ("ref.rest - rest, tl.exp", "rest - ref.rest, tl.exp"),
    ("factors.label_difference, p - q)", "p - q, p - q)"),  # 1 - p is lost
    # The digits of an unlikely label's p are lost.
    ("tl.where(rest < 0.5, ref.rest - rest, tl.exp(label_log_p) - tl.exp(ref.label_log_q))", "ref.rest - rest"),
    ("label_difference, p - q)", "label_difference, q - p)"),
    (" - factors.mean_score)", ")"),
    ("return tl.where(tl.exp(log_p) > 0.0, log_p - log_q, 0.0)", "return 0.0 * log_q"),
    ("return (1.0 - beta) * of_p", "return of_p"),
    ("of_q = tl.where(is_near, d - near,", "of_q = tl.where(is_near, d,"),
    ("near = log1p_of_small(beta * expm1)", "near = beta * expm1"),
    ("-of_larger - tl.maximum(d, 0.0)", "-of_larger"),
    ("model_side = (1.0 - beta) * _excess(p, mixture, of_p)", "model_side = _excess(p, mixture, of_p)"),
    ("model_side += tl.sum(by_lane(side, model_side), 1)", "model_side = tl.sum(by_lane(side, model_side), 1)"),
    ("at_label = tl.exp(log_q - lowered) * total", "at_label = tl.exp(log_q) * total"),
    ("total = others + at_label", "total = total"),
    ("log_q - lowered + tl.log(unlowered / total)", "log_q - lowered"),
    ("log_q - lowered + tl.log(unlowered / total)", "tl.log(at_label) - tl.log(total)"),  # -inf where at_label is 0
    ("log_q = tl.where(block.columns == row.label, ref.label_log_q, log_q)", "log_q = 1.0 * log_q"),
    ("divergence=sums.divergence + ", "divergence="),  # the last block alone
    ("log_q - log_p, 1.0)", "log_q - log_p, 0.0)"),  # p that q excludes
    ("factors.coefficient * tl.where(is_label, factors.rest, -p)", "0.0 * p"),
    ("gradient += factors.weight * tl.where", "gradient += tl.where"),
    ("times_slope(gradient, raw,", "times_slope(gradient, 0.0 * raw,"),
])  # fmt: skip
def test_mutants_do_not_pass(old, new, device, tmp_path, monkeypatch):
    broken = mutant("soul_kernels.kl_divergence", old, new, tmp_path)
    ops = dict(statistics_op=broken.divergence_statistics, gradient_op=broken.divergence_gradient)
    monkeypatch.setitem(globals(), "run", functools.partial(run, **ops))
    with pytest.raises(AssertionError):
        for kind in reference.KINDS:
            test_every_vocabulary_size(kind, 2049, device)
            test_lowered_labels(kind, device)
            test_capped_and_scaled_logits(kind, device)
            test_memorised_by_both(1e-9, kind, [4.0] * 4, device)
        test_gradient_at_an_unlikely_label(1e-2, None, 50257, "triton", device)
