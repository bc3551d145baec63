"""Flat inputs: every op on hidden states takes [N, D] as one sequence, and returns values of tokens as [N]."""

import pytest
import torch

from soul_kernels import (
    LinearOptions,
    Reference,
    linear_cross_entropy,
    linear_gnb,
    linear_kl,
    linear_logprob,
    linear_objective,
    linear_statistics,
)
from tests.kernels.test_linear_loss import OBJECTIVES, make

OPS = ("cross_entropy", "logprob", "statistics", "objective", "kl", "gnb")


def results_of(name, hidden, weight, labels, ref_hidden, uniforms, options):
    """Call an op, with the arguments by position or by name as users write them; return its results as a list."""
    if name == "cross_entropy":
        loss, predictions = linear_cross_entropy(hidden, weight, labels, return_predictions=True, options=options)
        return [loss, *predictions]
    if name == "logprob":
        return [linear_logprob(hidden=hidden, weight=weight, labels=labels, options=options)]
    if name == "statistics":
        statistics = linear_statistics(hidden, weight, labels, options=options)
        assert statistics.lse is statistics[1]
        return [*statistics]
    if name == "objective":
        is_forget = torch.ones(1, dtype=torch.bool, device=labels.device)
        ref_logps = torch.full((1,), -20.0, device=labels.device)
        return [*linear_objective(hidden, weight, labels, OBJECTIVES["npo"], is_forget=is_forget, ref_logps=ref_logps,
                                  return_logps=True, options=options)]  # fmt: skip
    if name == "kl":
        return [linear_kl(hidden, weight, labels, Reference(ref_hidden, weight.detach()), options=options)]
    return [*linear_gnb(hidden, weight, labels != -100, uniforms=uniforms, options=options)]


def tokens(device):
    """Hidden states [N, D] with labels [N], some of which are ignored."""
    case = make(device)
    hidden = case["hidden"].detach().flatten(0, 1).requires_grad_()
    ref_hidden = hidden.detach() + 0.1 * torch.randn_like(hidden)
    return hidden, case["weight"], case["labels"].flatten(), ref_hidden, torch.rand(len(hidden), device=device)


@pytest.mark.parametrize("op_backend", ["torch", "reference"])
@pytest.mark.parametrize("name", OPS)
def test_flat_inputs_are_one_sequence(name, op_backend, device):
    hidden, weight, *per_token = tokens(device)
    options = LinearOptions(backend=op_backend)
    got = results_of(name, hidden, weight, *per_token, options)
    batched = [value[None] for value in per_token]
    want = results_of(name, hidden[None], weight, *batched, options)
    assert [value.shape for value in got] == [value.shape[1:] for value in want]
    assert all(torch.equal(a, b.squeeze(0)) for a, b in zip(got, want))
    if got[0].requires_grad:
        gradients = [torch.autograd.grad(values[0].sum(), [hidden, weight]) for values in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_flat_inputs_under_torch_compile(device):
    hidden, weight, labels, *_ = tokens(device)
    options = LinearOptions(backend="torch", token_indices=(labels != -100).nonzero()[:, 0])

    def loss(hidden, weight):
        return linear_logprob(hidden, weight, labels, options=options)

    want = loss(hidden, weight)
    got = torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden, weight)
    assert got.shape == labels.shape and torch.equal(got, want)


@pytest.mark.parametrize("name", ["logprob", "kl", "gnb"])
def test_values_of_tokens_in_another_shape_are_named(name):
    hidden, weight, labels, *others = tokens(torch.device("cpu"))
    argument = "keep" if name == "gnb" else "labels"
    with pytest.raises(
        ValueError, match=rf"{argument}: expected \[N\] \(45,\), beside hidden \[N, D\], got \(5, 9\); flatten both"
    ):
        results_of(name, hidden, weight, labels.view(5, 9), *others, LinearOptions())


def test_flat_hidden_states_of_the_reference_model_only_beside_flat_ones():
    hidden, weight, labels, ref_hidden, _ = tokens(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"reference.hidden: expected \[B, T, D\] with \[B, T\] \(1, 45\), got \(45, 16\)"):
        linear_kl(hidden[None], weight, labels[None], Reference(ref_hidden, weight.detach()))
