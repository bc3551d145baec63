import functools

import pytest
import torch

from soul_kernels._launch import interpreting
from soul_kernels.reference.token_logprob import token_logprob
from soul_kernels.token_logprob import token_gradient, token_statistics
from tests import tolerances as tol
from tests.helpers import assert_rows_close, mutant

# 1: nothing beside the label. 127 to 129: around a warp's worth. 4096, 4097: one block, and one element more.
# 32003, 50257: odd vocabularies of real models.
VOCABULARIES = (1, 2, 17, 127, 128, 129, 4096, 4097, 32003, 50257)


def run(logits, labels, coefficients, out=None, statistics_op=token_statistics, gradient_op=token_gradient):
    statistics = torch.full((4, len(labels)), float("nan"), device=logits.device)
    statistics_op(logits, labels, statistics)
    out = torch.full_like(logits, float("nan")) if out is None else out
    gradient_op(logits, labels, statistics, coefficients, out)
    return statistics, out


def oracle(logits, labels, coefficients):
    leaf = logits.double().requires_grad_()
    logp = token_logprob(leaf, labels)
    (gradient,) = torch.autograd.grad(logp, leaf, coefficients.double())
    return logp.detach(), gradient


def peaked(n, n_vocab, rest, device):
    """Rows whose label has probability 1 - rest, with the rest spread unevenly over the other entries."""
    labels = torch.randint(n_vocab, (n,), device=device)
    logits = torch.randn(n, n_vocab, device=device)
    others = logits.double().scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    at_label = others + torch.log1p(torch.tensor(-rest, dtype=torch.float64)) - torch.log(torch.tensor(rest).double())
    return logits.scatter(1, labels[:, None], at_label.float()[:, None]), labels


@pytest.mark.parametrize("n_vocab", VOCABULARIES)
def test_every_vocabulary_size(n_vocab, device):
    logits = torch.randn(5, n_vocab, device=device) * 4
    labels = torch.tensor([0, n_vocab - 1, n_vocab // 2, 0, n_vocab - 1], device=device)
    coefficients = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], device=device)
    statistics, gradient = run(logits, labels, coefficients)
    logp, want = oracle(logits, labels, coefficients)
    assert (statistics[0].double() - logp).abs().max() <= tol.LOGP_ABS
    assert_rows_close(gradient, want, tol.WORST_ROW_FP32, "dlogits")
    assert gradient.double().sum(1).abs().max() <= 1e-5  # a softmax gradient sums to 0


# From a flat guess to memorised text, where unlearning starts.
@pytest.mark.parametrize("rest", [1 - 1e-4, 0.5, 1e-2, 1e-4, 1e-7, 1e-10])
def test_one_minus_p_stays_accurate_on_memorised_tokens(rest, device):
    logits, labels = peaked(6, 5000, rest, device)
    statistics, gradient = run(logits, labels, torch.ones(6, device=device))
    logp, want = oracle(logits, labels, torch.ones(6, device=device))
    exact = -torch.expm1(logp)
    assert ((statistics[3].double() - exact) / exact).abs().max() <= tol.ONE_MINUS_P
    assert ((statistics[0].double() - logp) / logp).abs().max() <= tol.ONE_MINUS_P
    assert_rows_close(gradient, want, tol.WORST_ROW_FP32, "dlogits")
    naive = 1 - logits.softmax(1).gather(1, labels[:, None])[:, 0].double()
    if rest <= 1e-7:  # what the field computes is lost here: the test can tell the difference
        assert ((naive - exact) / exact).abs().max() > 100 * tol.ONE_MINUS_P


def test_extreme_logits(device):
    logits = torch.full((4, 300), -80.0, device=device)
    logits[0, 5], logits[1, 7], logits[2, :] = 80.0, 80.0, 80.0
    logits[3, 100:] = -torch.inf  # vocabulary entries that are masked out
    labels = torch.tensor([5, 8, 0, 1], device=device)
    statistics, gradient = run(logits, labels, torch.ones(4, device=device))
    want = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    assert (statistics[0].double() - want).abs().max() <= 1e-4  # |log p| is up to 160 here
    assert torch.isfinite(gradient).all()


def test_ignored_rows_are_zero_and_foreign_labels_are_nan(device):
    logits = torch.randn(4, 200, device=device)
    logits[0] = float("nan")  # hidden states of padding may be anything
    labels = torch.tensor([-100, 7, 200, -1], device=device)
    statistics, gradient = run(logits, labels, torch.ones(4, device=device))
    assert statistics[0, 0] == 0 and statistics[0, 2:].isnan().all()
    assert (gradient[[0, 2, 3]] == 0).all() and (gradient[1] != 0).all()


def test_nan_logits_surface(device):
    logits = torch.randn(2, 200, device=device)
    logits[1, 150] = float("nan")
    statistics, _ = run(logits, torch.tensor([3, 3], device=device), torch.ones(2, device=device))
    assert statistics[0].isnan().tolist() == [False, True]


def test_in_place_and_low_precision_outputs(device):
    logits, labels = torch.randn(3, 4200, device=device), torch.tensor([1, 4199, 77], device=device)
    coefficients = torch.randn(3, device=device)
    _, want = run(logits, labels, coefficients)
    buffer = torch.full((3, 4224), float("nan"), device=device, dtype=torch.bfloat16)  # padded rows
    _, rounded = run(logits, labels, coefficients, out=buffer[:, :4200])
    assert torch.equal(rounded, want.bfloat16()) and buffer[:, 4200:].isnan().all()
    copy = logits.clone()
    _, in_place = run(copy, labels, coefficients, out=copy)
    assert torch.equal(in_place, want)


@pytest.mark.skipif(not interpreting(), reason="4 GiB a matrix: untouched memory costs nothing on the CPU only")
def test_rows_beyond_two_to_the_31():
    rows, stride = 3, 2**30 + 64  # row 2 starts beyond 2^31 elements
    logits = torch.empty(2 * stride + 64, dtype=torch.float16).as_strided((rows, 50), (stride, 1))
    logits.copy_(torch.randn(rows, 50))
    labels = torch.tensor([1, 2, 3])
    statistics, _ = run(logits, labels, torch.ones(rows), out=torch.empty(rows, 50))
    want = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    assert (statistics[0].double() - want).abs().max() <= tol.LOGP_ABS


@pytest.mark.parametrize("old, new", [
    ("tl.where(columns == label, 0.0, tl.exp(z - new_max))", "tl.exp(z - new_max)"),  # the label counted twice
    ("rescale * rest + ", "rest + "),
    ("at_label, -tl.exp(z - row_max) * scale", "at_label, tl.exp(z - row_max) * scale"),
    ("at_label = coefficient * tl.load", "at_label = tl.load"),
    ("tl.load(statistics_ptr + 3 * statistics_stride + row)", "(1.0 - tl.exp(tl.load(statistics_ptr + row)))"),  # softmax - 1
    ("log1p(rest), tl.log(total)", "tl.log(1.0 + rest), tl.log(total)"),
    ("columns == label", "columns == label + 1"),
    ("scale = coefficient / total", "scale = 1.0 / total"),
])  # fmt: skip
def test_mutants_do_not_pass(old, new, device, tmp_path, monkeypatch):
    broken = mutant("soul_kernels.token_logprob", old, new, tmp_path)
    ops = dict(statistics_op=broken.token_statistics, gradient_op=broken.token_gradient)
    monkeypatch.setitem(globals(), "run", functools.partial(run, **ops))
    with pytest.raises(AssertionError):
        test_every_vocabulary_size(4097, device)
        for rest in (0.5, 1e-10):
            test_one_minus_p_stays_accurate_on_memorised_tokens(rest, device)
