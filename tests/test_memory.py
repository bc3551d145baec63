"""What the losses may allocate, by a formula: nobody slips in a tensor of all tokens times the vocabulary."""

import pytest
import torch

from soul import losses
from soul_kernels import linear_gnb, linear_kl, linear_logprob, linear_objective, linear_statistics
from tests.helpers import peak_bytes

B, T, D, V = 8, 8, 32, 4096  # N V is 1 MiB, sixteen chunks
N = B * T
CHUNK = 4  # rows
FLOAT = 4


def make(device, frozen_head):
    reference = dict(ref_hidden=torch.randn(B, T, D, device=device), ref_weight=torch.randn(V, D, device=device))
    case = {
        "hidden": torch.randn(B, T, D, device=device, requires_grad=True),
        "weight": torch.randn(V, D, device=device, requires_grad=not frozen_head),
        "labels": torch.randint(V, (B, T), device=device),
        "rows": torch.arange(N),
        "backend": "triton",
    }
    return case, reference


def allowed(*, trained, chunk_factor=1, ref_rows=0, gradients=True):
    """Scratch of a chunk; rows of hidden states; fp32 gradients of rows and head, and those that backward returns."""
    scratch = chunk_factor * CHUNK * V * FLOAT
    rows = (N + ref_rows) * D * FLOAT
    vectors = 64 * N * FLOAT  # statistics, labels, indices, log-probabilities, masks, coefficients
    total = scratch + rows + vectors
    if gradients:
        total += N * D * FLOAT * 3  # of the rows, scaled, and put in place
        total += 2 * V * D * FLOAT * trained  # fp32 sum, and what backward returns
    return total


def loss_of(name, case, reference, chunk_bytes):
    is_forget = torch.arange(B) < B // 2
    if name == "statistics":
        return lambda: linear_statistics(**case, chunk_bytes=chunk_bytes)
    if name == "gnb":
        options = {key: value for key, value in case.items() if key != "labels"}
        keep = torch.ones(B, T, dtype=torch.bool, device=case["hidden"].device)
        return lambda: linear_gnb(keep=keep, chunk_bytes=chunk_bytes, **options)[0].backward()
    if name == "logprob":
        return lambda: linear_logprob(**case, chunk_bytes=chunk_bytes).sum().backward()
    if name == "kl":
        return lambda: linear_kl(**case, **reference, chunk_bytes=chunk_bytes).sum().backward()
    objective = {"npo": losses.NPO(), "token_mean": losses.NPO(reduction="token_mean"), "npo, kl": losses.NPO(retain="kl"),
                 "undial": losses.UNDIAL(), "ceu": losses.CEU()}[name]  # fmt: skip
    extra = reference if objective.divergence else {}
    ref_logps = torch.zeros(B, device=case["hidden"].device)
    call = dict(objective=objective, is_forget=is_forget, ref_logps=ref_logps, chunk_bytes=chunk_bytes)
    return lambda: linear_objective(**case, **call, **extra).backward()


# Eight tokens a sequence and four a chunk: NPO takes two sweeps, and so does token_mean; the others one.
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("name", ["npo", "token_mean", "npo, kl", "undial", "ceu", "logprob", "kl", "gnb", "statistics"])
def test_peak_memory(name, frozen_head, device):
    case, reference = make(device, frozen_head)
    has_reference = name in ("npo, kl", "undial", "kl")
    chunk_factor = 2 if has_reference else 1
    chunk_bytes = chunk_factor * CHUNK * V * FLOAT
    call = loss_of(name, case, reference, chunk_bytes)
    call()  # what is made once is not counted
    case["hidden"].grad = case["weight"].grad = None
    peak = peak_bytes(call, device)
    ref_rows = 0 if not has_reference else N if name == "kl" else N // 2
    limit = allowed(trained=not frozen_head, chunk_factor=chunk_factor, ref_rows=ref_rows, gradients=name != "statistics")
    assert peak <= 1.1 * limit, f"{peak} bytes, {limit} allowed"


def test_the_measure_sees_a_buffer_of_all_logits(device):
    case, _ = make(device, True)
    hidden, weight = case["hidden"].detach().view(N, D), case["weight"]
    (hidden @ weight.T).sum()  # the workspace of cuBLAS stays
    peak = peak_bytes(lambda: (hidden @ weight.T).sum(), device)
    assert N * V * FLOAT <= peak <= 1.2 * N * V * FLOAT
