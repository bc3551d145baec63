"""The losses allocate no more than a formula allows, which excludes a tensor of all tokens times the vocabulary."""

import pytest
import torch

import soul_kernels
from soul import losses
from soul_kernels.reference import linear_loss as reference_ops
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, loose, peak_bytes

linear_gnb = loose(soul_kernels.linear_gnb)
linear_kl = loose(soul_kernels.linear_kl)
linear_logprob = loose(soul_kernels.linear_logprob)
linear_statistics = loose(soul_kernels.linear_statistics)
linear_objective = loose(soul_kernels.linear_objective)
B, T, D, V = 4, 16, 32, 4096  # N V is 1 MiB, eight chunks
N = B * T
CHUNK = 8  # rows
FLOAT = 4
NAMES = ["npo", "token_mean", "npo, kl", "undial", "ceu", "logprob", "kl", "gnb", "statistics"]
CHUNKED = ["undial", "kl", "statistics"]  # by the reference


def make(device, frozen_head, backend="triton"):
    reference = dict(ref_hidden=torch.randn(B, T, D, device=device), ref_weight=torch.randn(V, D, device=device))
    case = {
        "hidden": torch.randn(B, T, D, device=device, requires_grad=True),
        "weight": torch.randn(V, D, device=device, requires_grad=not frozen_head),
        "labels": torch.randint(V, (B, T), device=device),
        "token_indices": torch.arange(N),
        "backend": backend,
    }
    return case, reference


def allowed(*, trained, chunk_factor=1, ref_rows=0, gradients=True, block_rows=0):
    """Scratch of a chunk; rows of hidden states; fp32 gradients of rows and head, and those that backward returns; without
    kernels, what formulas make of a block's logits.
    """
    scratch = (chunk_factor * CHUNK + block_rows) * V * FLOAT
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


# Sixteen tokens a sequence and eight a chunk: NPO takes two sweeps, and so does token_mean; the others one.
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_peak_memory(name, frozen_head, backend, device):
    case, reference = make(device, frozen_head, backend)
    has_reference = name in ("npo, kl", "undial", "kl")
    chunk_factor = 2 if has_reference else 1
    chunk_bytes = chunk_factor * CHUNK * V * FLOAT
    call = loss_of(name, case, reference, chunk_bytes)
    call()  # what is made once is not counted
    case["hidden"].grad = case["weight"].grad = None
    peak = peak_bytes(call, device)
    ref_rows = 0 if not has_reference else N if name == "kl" else N // 2
    # A block of 2^16 to 2^18 logits, in this test a row, of which a divergence makes some fifteen tensors, and a draw eight.
    block_rows = 0 if backend == "triton" else 15 if has_reference or name in ("ceu", "statistics") else 8
    limit = allowed(
        trained=not frozen_head, chunk_factor=chunk_factor, ref_rows=ref_rows, gradients=name != "statistics",
        block_rows=block_rows,
    )  # fmt: skip
    assert peak <= 1.1 * limit, f"{peak} bytes, {limit} allowed"


@pytest.mark.parametrize("name", CHUNKED)
def test_peak_memory_of_the_reference(name, device, monkeypatch):
    """Users without a GPU run it. A divergence makes a dozen tensors of tokens times vocabulary: so it works in chunks."""
    chunk = CHUNK // 2 * V * FLOAT
    monkeypatch.setattr(reference_ops, "CHUNK_BYTES", chunk)
    case, reference = make(device, False)
    call = loss_of(name, case | {"backend": "reference"}, reference, 2**30)
    call()
    case["hidden"].grad = case["weight"].grad = None
    # Of the head: the gradients of two chunks, their sum, and that of the forget sequences.
    limit = 20 * chunk + 4 * V * D * FLOAT + 8 * N * D * FLOAT + 64 * N * FLOAT
    peak = peak_bytes(call, device)
    assert peak <= limit, f"{peak} bytes, {limit} allowed"


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_of_the_reference_change_no_value(name, device, monkeypatch):
    values = {}
    for chunk in (2**30, CHUNK * V * FLOAT, 1):  # all tokens, a few, one
        monkeypatch.setattr(reference_ops, "CHUNK_BYTES", chunk)
        torch.manual_seed(0)
        case, reference = make(device, False)
        outcome = loss_of(name, case | {"backend": "reference"}, reference, 2**30)()
        values[chunk] = [case["hidden"].grad, case["weight"].grad] if outcome is None else list(outcome)
    for chunk in (CHUNK * V * FLOAT, 1):
        for got, want in zip(values[chunk], values[2**30]):
            assert_close(got, want, tol.GRAD_FP32, f"{name}, chunks of {chunk} bytes")


def test_reference_of_several_chunks_under_torch_func(device, monkeypatch):
    """The transforms of torch.func do not allow the code that saves memory."""
    monkeypatch.setattr(reference_ops, "CHUNK_BYTES", CHUNK * V * FLOAT)
    case, reference = make(device, True)
    hidden = case.pop("hidden")
    options = case | reference | {"backend": "reference"}
    got = torch.func.grad(lambda hidden: linear_kl(hidden, **options).sum())(hidden.detach())
    (want,) = torch.autograd.grad(linear_kl(hidden, **options).sum(), hidden)
    assert_close(got, want, tol.GRAD_FP32, "gradient")


def test_the_measure_sees_a_buffer_of_all_logits(device):
    case, _ = make(device, True)
    hidden = case["hidden"].detach().view(N, D)
    weight = case["weight"]
    (hidden @ weight.T).sum()  # the workspace of cuBLAS stays
    peak = peak_bytes(lambda: (hidden @ weight.T).sum(), device)
    assert N * V * FLOAT <= peak <= 1.2 * N * V * FLOAT


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow(reason="real heads take seconds; one op is always measured")]
                 * (name != "gnb")) for name in ("npo", "gnb", "kl", "npo, kl")
])  # fmt: skip
def test_without_kernels_a_loss_takes_its_chunk_and_little_more(name, monkeypatch):
    """At sizes of real heads, in fp32: a fifth of the chunk for all else. The sum that becomes dW is no extra."""
    for size, value in dict(B=4, T=256, D=64, V=32768, N=1024).items():
        monkeypatch.setitem(globals(), size, value)
    case, reference = make(torch.device("cpu"), False, "torch")
    call = loss_of(name, case, reference, 2**26)
    chunk_bytes = 2**26
    peak = peak_bytes(call, torch.device("cpu"))
    gradients = sum(case[leaf].numel() * FLOAT for leaf in ("hidden", "weight"))
    assert 0.5 * chunk_bytes < peak - gradients <= 1.2 * chunk_bytes, f"{(peak - gradients) / chunk_bytes:.2f} chunks"
