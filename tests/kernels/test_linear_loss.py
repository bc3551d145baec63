import copy
import functools
import gc
import importlib
import types
import weakref

import pytest
import torch

import soul_kernels
from soul import losses
from soul_kernels import Head, Reference, TokenBatch, backends
from soul_kernels import chunks as head_chunks
from soul_kernels._head import gradients as head_gradients
from soul_kernels._head import rows as head_rows
from soul_kernels._head import sweeps as head_sweeps
from soul_kernels._head.rows import HeadRows
from soul_kernels.errors import ArgumentError
from soul_kernels.reference import linear_loss as reference
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, assert_rows_close, loose, mutant, needs_kernels_on_cpu, relative_error

linear_logprob = loose(soul_kernels.linear_logprob)
linear_objective = loose(soul_kernels.linear_objective)
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


class MeanProbability(losses.Objective):
    """A sum over tokens that is not 0 where log p is 0, so it shows whether tokens of other chunks are left out."""

    additive = "tokens"

    def terms(self, logps, batch):
        return {"forget": (logps.exp() * (batch.mask & batch.is_forget[:, None])).sum() / batch.n_forget_tokens}


OBJECTIVES = {
    "probability": MeanProbability(),
    "ga": losses.GradAscent(gamma=0.7),
    "graddiff": losses.GradDiff(gamma=0.7, alpha=1.3),
    "npo": losses.NPO(beta=0.2, gamma=0.7, alpha=1.3),
    "npo_token_mean": losses.NPO(beta=0.2, gamma=0.7, alpha=1.3, reduction="token_mean"),
    "po": losses.PO(gamma=0.7, alpha=1.3),
}


def make(device, dtype=FLOAT, shape=(5, 9, 16), n_vocab=131, bias=False, spread=3.0):
    """Ragged question-answer sequences: ignored prompts and padding, one sequence without any label."""
    B, T, D = shape
    hidden = torch.randn(B, T, D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(n_vocab, D, device=device) * spread / D**0.5).to(dtype).requires_grad_()
    labels = torch.randint(n_vocab, (B, T), device=device)
    for b in range(B):
        labels[b, : 1 + b % 3] = -100
        labels[b, T - (b * 2) % 4 :] = -100
    labels[:, -1] = -100
    labels[2:3] = -100
    case = {
        "hidden": hidden,
        "weight": weight,
        "labels": labels,
        "bias": torch.randn(n_vocab, device=device).to(dtype).requires_grad_() if bias else None,
        "is_forget": torch.arange(B, device=device) % 2 == 0,
        "ref_logps": -20.0 + 5.0 * torch.randn(B, device=device),
    }
    return case


def gradients(loss, case, scale=1.0):
    leaves = [case[name] for name in ("hidden", "weight", "bias") if case[name] is not None]
    return torch.autograd.grad(loss * scale, leaves, allow_unused=True)


def fp64(case):
    """Return the same inputs in fp64, as leaves."""
    double = {name: case[name] for name in ("labels", "is_forget")}
    for name in ("hidden", "weight", "bias", "ref_logps"):
        value = case[name]
        double[name] = None if value is None else value.detach().double().requires_grad_(name != "ref_logps")
    return double


def definition(case, objective):
    """The objective of log_softmax, in fp64, without any code of the library but the objective itself."""
    logits = case["hidden"] @ case["weight"].T
    if case["bias"] is not None:
        logits = logits + case["bias"]
    keep = case["labels"] != -100
    logps = logits.log_softmax(-1).gather(-1, case["labels"].clamp(min=0)[..., None])[..., 0] * keep
    return objective(logps, TokenBatch.from_labels(case["labels"], case["is_forget"], case["ref_logps"])), logps


def check_objectives(op, device, dtype=FLOAT, names=OBJECTIVES, chunk_rows=None, bias=False, scale=2.0, backend="triton"):
    """Value and gradients of objectives against fp64; raises AssertionError if they are off."""
    for name in names:
        case = make(device, dtype, bias=bias)
        double = fp64(case)
        want, want_logps = definition(double, OBJECTIVES[name])
        options = {} if chunk_rows is None else {"chunk_bytes": chunk_rows * 192 * 4}
        loss, logps = op(**case, objective=OBJECTIVES[name], return_logps=True, backend=backend, **options)
        assert_close(loss, want, 1e-5, f"{name}: loss")
        assert (logps.double() - want_logps.detach()).abs().max() <= tol.LOGP_ABS
        got_all, want_all = gradients(loss, case, scale), gradients(want, double, scale)
        limit, row_limit = (tol.GRAD_FP32, tol.WORST_ROW_FP32) if dtype == FLOAT else (tol.GRAD_BF16, tol.WORST_ROW_BF16)
        for which, got, expected in zip(("dX", "dW", "dbias"), got_all, want_all):
            assert got.dtype == dtype
            assert_close(got, expected, limit, f"{name}: {which}")
            if which != "dbias":
                assert_rows_close(got, expected, row_limit, f"{name}: {which}")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF])
def test_objectives_against_fp64(dtype, bias, backend, device):
    # Gradients of an improbable token's probability are below the smallest fp16 number: out of range, not inaccurate.
    names = [name for name in OBJECTIVES if not (dtype == HALF and name == "probability")]
    check_objectives(linear_objective, device, dtype, names, bias=bias, backend=backend)


# 1: each token its own chunk. 4: chunks cut inside sequences, or longer than some. 7: several sequences a chunk.
@pytest.mark.parametrize("chunk_rows", [1, 4, 7])
def test_chunks_do_not_change_the_result(chunk_rows, backend, device):
    check_objectives(linear_objective, device, chunk_rows=chunk_rows, backend=backend)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_reference_against_fp64(name, device):
    case = make(device, bias=True)
    double = fp64(case)
    want, _ = definition(double, OBJECTIVES[name])
    loss = linear_objective(**case, objective=OBJECTIVES[name], backend="reference")
    assert_close(loss, want, 1e-5, "loss")
    for got, expected in zip(gradients(loss, case), gradients(want, double)):
        assert_close(got, expected, tol.GRAD_FP32, "gradient")


def test_reference_is_accurate_in_fp32_on_memorised_tokens():
    """The contract itself: fp32 against fp64 where 1 - p is 1e-9."""
    logits = torch.zeros(1, 1000)
    logits[0, 3] = 27.6
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype).requires_grad_()
        (g,) = torch.autograd.grad(reference.token_logprob(leaf, torch.tensor([3])).sum(), leaf)
        results.append(g.double())
    assert ((results[0] - results[1]) / results[1]).abs().max() < tol.ONE_MINUS_P


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",)], ids=["trained", "frozen head", "frozen body"])
def test_logprob_gradients(frozen, dtype, backend, device):
    """Any function may stand on top of the log-probabilities; zero and negative upstream gradients included."""
    case = make(device, dtype, bias=True)
    double = fp64(case)
    for name in frozen:
        case[name].requires_grad_(False)
        double[name].requires_grad_(False)
    upstream = torch.randn(case["labels"].shape, device=device).double()
    upstream[0] = 0.0
    logps = linear_logprob(
        case["hidden"], case["weight"], case["labels"], bias=case["bias"], backend=backend, chunk_bytes=9 * 192 * 4
    )
    _, want = definition(double, lambda logps, batch: logps.sum())
    assert logps.dtype == torch.float32 and (logps.double() - want).abs().max() <= tol.LOGP_ABS
    leaves = [name for name in ("hidden", "weight", "bias") if name not in frozen]
    got_all = torch.autograd.grad((logps * upstream).sum(), [case[name] for name in leaves])
    want_all = torch.autograd.grad((want * upstream).sum(), [double[name] for name in leaves])
    for name, got, expected in zip(leaves, got_all, want_all):
        assert_close(got, expected, tol.GRAD_FP32 if dtype == FLOAT else tol.GRAD_BF16, name)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_only_requested_gradients_and_no_grad(backend, device):
    case = make(device)
    case["weight"].requires_grad_(False)
    loss = linear_objective(**case, objective=OBJECTIVES["npo"], backend=backend)
    loss.backward()
    assert case["hidden"].grad is not None and case["weight"].grad is None
    with torch.no_grad():
        quiet = linear_objective(**case, objective=OBJECTIVES["npo"], backend=backend)
    assert not quiet.requires_grad
    assert_close(quiet, loss, 1e-6, "loss under no_grad")


def test_graph_can_be_walked_twice_and_gradients_accumulate(backend, device):
    case = make(device)
    loss = linear_objective(**case, objective=OBJECTIVES["graddiff"], backend=backend)
    first = gradients_of(loss, case, 1.0)
    second = gradients_of(loss, case, -3.0)
    for a, b in zip(first, second):
        assert_close(b, -3.0 * a, 1e-6, "second walk")


def gradients_of(loss, case, scale):
    return torch.autograd.grad(loss * scale, [case["hidden"], case["weight"]], retain_graph=True)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_all_labels_ignored(backend, device):
    case = make(device)
    case["labels"].fill_(-100)
    for objective in OBJECTIVES.values():
        loss = linear_objective(**case, objective=objective, backend=backend)
        assert loss.item() == 0.0
        for gradient in torch.autograd.grad(loss, [case["hidden"], case["weight"]]):
            assert (gradient == 0).all()


def test_token_indices_from_the_host_and_padded(backend, device):
    """The collator's path: token indices on the CPU, padded with an ignored position to a fixed count."""
    case = make(device)
    want = linear_objective(**case, objective=OBJECTIVES["npo"], backend=backend)
    want_gradients = gradients_of(want, case, 1.0)
    rows = (case["labels"].flatten() != -100).nonzero()[:, 0].cpu()
    padded = torch.cat([rows, torch.full((5,), case["labels"].numel() - 1)])
    everything = torch.arange(case["labels"].numel())
    for token_indices in (rows, padded, everything, padded.to(device)):
        for chunk_rows in (1000, 7):  # 7: the sequences are cut with the counts that the rows give
            options = dict(token_indices=token_indices, chunk_bytes=chunk_rows * 192 * 4, backend=backend)
            loss = linear_objective(**case, objective=OBJECTIVES["npo"], **options)
            assert_close(loss, want, 1e-6, "loss")
            for name, got, expected in zip(("dX", "dW"), gradients_of(loss, case, 1.0), want_gradients):
                assert_close(got, expected, 1e-6, name)


# Total memory as torch reports it, in GiB -> chunks of 8192 rows at the vocabulary of Llama 3.
@pytest.mark.parametrize("total, chunks", [(7.8, 16), (15.6, 8), (23.6, 6), (79.1, 2), (79.6, 2), (139.7, 1)])
def test_the_default_chunk_is_a_share_of_the_total_memory(total, chunks, monkeypatch):
    properties = types.SimpleNamespace(total_memory=int(total * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    chunk_bytes = head_chunks.default_chunk_bytes(torch.device("cuda", 0))
    assert chunk_bytes % 2**25 == 0 and total * 2**25 <= chunk_bytes < (total + 1) * 2**25
    options = head_chunks.ResolvedOptions(BRAIN, FLOAT, chunk_bytes)
    assert -(-8192 // head_chunks.chunk_rows(128256, options, False, chunk_bytes)) == chunks
    assert head_chunks.default_chunk_bytes(torch.device("cpu")) == 2**26


def test_a_narrow_gradient_takes_no_memory_of_its_own(device):
    """fp32 logits and a bf16 gradient: the scratch is that of the logits."""
    case = make(device, BRAIN)
    options = head_chunks.ResolvedOptions(BRAIN, FLOAT, None, "triton")
    rows = HeadRows(case["hidden"], Head(case["weight"]), case["labels"], None, options)
    (chunk,) = rows.even_chunks()
    rows.load(chunk)
    rows.measure(chunk)
    logits = rows._loaded
    gradient = rows.gradient(chunk, torch.ones(len(rows), device=device))
    assert gradient.dtype == BRAIN and gradient.data_ptr() == logits.data_ptr()
    assert gradient.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()


def test_deterministic_run_to_run(backend, device):
    case = make(device, BRAIN)
    runs = []
    for _ in range(2):
        loss = linear_objective(**case, objective=OBJECTIVES["npo"], backend=backend)
        runs.append((loss, *gradients_of(loss, case, 1.0)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_sums_over_sequences_take_one_sweep(backend, device, monkeypatch):
    """The GEMM count is the promise: one product for the logits of each chunk, unless the objective cannot be split."""
    calls = []
    real = HeadRows.load
    monkeypatch.setattr(HeadRows, "load", lambda self, c: calls.append(c.stop - c.start) or real(self, c))
    case = make(device)
    n_labelled = int((case["labels"] != -100).sum())
    for name, sweeps in (("graddiff", 1), ("npo", 1), ("npo_token_mean", 2)):
        calls.clear()
        linear_objective(**case, objective=OBJECTIVES[name], chunk_bytes=7 * 192 * 4, backend=backend)
        assert sum(calls) == sweeps * n_labelled, name
        assert len(calls) > 1
    calls.clear()
    linear_objective(**case, objective=OBJECTIVES["npo_token_mean"], backend=backend)
    assert sum(calls) == n_labelled  # one chunk: any objective takes one sweep


def two_kernels(objective):
    """Return an objective that does not say that it is linear."""
    copied = copy.copy(objective)
    copied.linear = False
    return copied


def recorded(name, function, calls):
    """Return a function that appends its name to ``calls`` before it does what another one does."""

    @functools.wraps(function)
    def call(*arguments):
        calls.append(name)
        return function(*arguments)

    return call


@pytest.mark.parametrize("chunk_rows", [1000, 7])
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF])
@pytest.mark.parametrize("name", ["ga", "graddiff", "po"])
def test_a_linear_objective_takes_one_read_and_gives_the_bits_of_two(name, dtype, chunk_rows, backend, device, monkeypatch):
    case = make(device, dtype, bias=True)
    options = dict(return_logps=True, backend=backend, chunk_bytes=chunk_rows * 192 * 4)
    want, want_logps = linear_objective(**case, objective=two_kernels(OBJECTIVES[name]), **options)
    calls = []
    for method in ("measure", "gradient", "measured_gradient"):
        monkeypatch.setattr(HeadRows, method, recorded(method, getattr(HeadRows, method), calls))
    got, logps = linear_objective(**case, objective=OBJECTIVES[name], **options)
    scaled = dtype == HALF and backend == "triton"  # by what is measured
    assert set(calls) == ({"measure", "gradient"} if scaled else {"measured_gradient"})
    assert torch.equal(logps, want_logps)
    assert_close(got, want, 0.0 if chunk_rows == 1000 else 1e-6, "loss")  # sums of chunks are added in another order
    for a, b in zip(gradients(got, case), gradients(want, case)):
        assert torch.equal(a, b)


def test_a_frozen_head_takes_one_read_for_log_probabilities(backend, device, monkeypatch):
    case = make(device)
    upstream = torch.randn(case["labels"].shape, device=device)
    weight = case["weight"].detach()
    results = []
    for one_kernel in (True, False):
        if not one_kernel:
            monkeypatch.setattr(head_sweeps, "_measure_and_add", by_two_kernels)
        logps = linear_logprob(case["hidden"], weight, case["labels"], backend=backend)
        results.append((logps, *torch.autograd.grad((logps * upstream).sum(), case["hidden"])))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def by_two_kernels(head_rows, gradients, chunk, upstream):
    head_rows.measure(chunk)
    gradients.add(chunk, upstream)


def test_a_false_claim_of_linearity_is_refused(backend, device):
    def claimed(logps, batch):
        return -(logps.exp() * batch.mask).sum()

    claimed.linear = True
    with pytest.raises(ArgumentError, match="objective.linear: expected False for an objective whose derivatives depend on"):
        linear_objective(**make(device), objective=claimed, backend=backend)


def test_a_plain_function_can_be_linear_with_weights_and_a_constant(backend, device):
    """Whatever the coefficients are, 0 included; tokens without a label and a term without log-probabilities change nothing."""
    case = make(device)
    weights = torch.randn(case["labels"].shape, device=device)
    weights[0] = 0.0

    def weighted(logps, batch):
        return (logps * weights.to(logps.dtype)).sum() / batch.n_forget_tokens + 3.0

    weighted.linear = True
    double = fp64(case)
    want, _ = definition(double, weighted)
    loss = linear_objective(**case, objective=weighted, backend=backend, chunk_bytes=7 * 192 * 4)
    assert_close(loss, want, 1e-5, "loss")
    for got, expected in zip(gradients(loss, case), gradients(want, double)):
        assert_close(got, expected, tol.GRAD_FP32, "gradient")

    def constant(logps, batch):
        return batch.n_forget_tokens * 2.0

    constant.linear = True
    loss = linear_objective(**case, objective=constant, backend=backend)
    assert loss == 2.0 * TokenBatch.from_labels(case["labels"], case["is_forget"]).n_forget_tokens
    assert all((gradient == 0).all() for gradient in gradients(loss, case)[:2])


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_an_objective_must_return_one_number(backend, device):
    with pytest.raises(ValueError, match=r"objective: expected a loss of shape \(\), got shape \(5,\)"):
        linear_objective(**make(device), objective=lambda logps, batch: logps.sum(1), backend=backend)


def test_a_misspelt_additive_is_refused(backend, device):
    objective = losses.GradAscent()
    objective.additive = "token"
    with pytest.raises(
        ValueError, match="objective.additive: expected one of None, 'tokens', 'sequences', 'pairs', got 'token'"
    ):
        linear_objective(**make(device), objective=objective, backend=backend)


def test_plain_functions_are_objectives(backend, device):
    case = make(device)
    double = fp64(case)

    def worst_sequence(logps, batch):
        return -logps.sum(1).min()

    want, _ = definition(double, worst_sequence)
    loss = linear_objective(**case, objective=worst_sequence, chunk_bytes=4 * 192 * 4, backend=backend)
    for got, expected in zip(gradients(loss, case), gradients(want, double)):
        assert_close(got, expected, tol.GRAD_FP32, "gradient")


def test_autocast_converts_hidden_and_weight(device):
    case = make(device)
    low = case | {name: case[name].detach().to(BRAIN).requires_grad_() for name in ("hidden", "weight")}
    want = linear_objective(**low, objective=OBJECTIVES["graddiff"], backend="triton")
    want_x, want_weight = gradients_of(want, low, 1.0)
    for backend in ("triton", "torch", "reference"):
        with torch.autocast(device.type, dtype=BRAIN):
            loss = linear_objective(**case, objective=OBJECTIVES["graddiff"], backend=backend)
        assert_close(loss, want, 1e-5, "loss")
        x, weight = gradients_of(loss, case, 1.0)
        assert x.dtype == weight.dtype == FLOAT
        assert_close(x, want_x, 2 * tol.GRAD_BF16, "dX")
        assert_close(weight, want_weight, 2 * tol.GRAD_BF16, "dW")


def test_fp16_gradients_survive_small_weights(backend, device):
    """Coefficients are of the size of 1 / N, far below what fp16 resolves; the loss scale must not come too late for them."""
    case = make(device, HALF, shape=(6, 20, 32), n_vocab=4001)
    objective = losses.GradDiff(gamma=0.1, alpha=0.1)
    loss_scale = 65536.0
    double = fp64(case)
    want, _ = definition(double, objective)
    loss = linear_objective(**case, objective=objective, backend=backend)
    for got, expected in zip(gradients_of(loss, case, loss_scale), gradients_of(want, double, loss_scale)):
        assert_rows_close(got, expected, 1e-2, "gradient")


@pytest.mark.parametrize("name", ["npo", "sum", "large gamma"])
def test_fp16_gradients_do_not_overflow(name, backend, device):
    """Coefficients may be of any size: of the size of 1 where an objective sums over tokens, a thousand with a large weight."""
    objective = {
        "npo": losses.NPO(alpha=0.0),
        "sum": lambda logps, batch: -logps.sum(),
        "large gamma": losses.GradAscent(gamma=1000.0),
    }[name]
    case = make(device, HALF, shape=(1, 600, 16), n_vocab=50, bias=True)
    double = fp64(case)
    want, _ = definition(double, objective)
    want_gradients = gradients(want, double)
    for chunk_rows in (1000, 100) if name == "sum" else (1000,):  # one matrix product over all rows overflows first
        loss = linear_objective(**case, objective=objective, chunk_bytes=chunk_rows * 64 * 4, backend=backend)
        for got, expected in zip(gradients(loss, case), want_gradients):
            assert_close(got, expected, 2e-3, "gradient")


def test_an_upstream_factor_is_not_rounded_to_the_dtype_of_the_model(backend, device):
    """1/3 in bf16 is off by 0.1%, for every element alike."""
    case = make(device, BRAIN)
    double = fp64(case)
    want, _ = definition(double, OBJECTIVES["graddiff"])
    loss = linear_objective(**case, objective=OBJECTIVES["graddiff"], backend=backend)
    for name, got, expected in zip(("dX", "dW"), gradients_of(loss, case, 1 / 3), gradients_of(want, double, 1 / 3)):
        bias = (got.double() * expected).sum() / (expected * expected).sum() - 1  # of the length along the right direction
        assert abs(bias) < 5e-4, name


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN])
def test_no_worse_than_eager_in_the_same_dtype(dtype, backend, device):
    """What a careful user writes in PyTorch, logits in the dtype of the model and a log-softmax in fp32."""
    case = make(device, dtype, shape=(8, 32, 64), n_vocab=1000, spread=8.0)
    double = fp64(case)
    want, _ = definition(double, OBJECTIVES["graddiff"])
    ours = linear_objective(**case, objective=OBJECTIVES["graddiff"], backend=backend)
    logps = (case["hidden"] @ case["weight"].T).float().log_softmax(-1)
    keep = case["labels"] != -100
    logps = logps.gather(-1, case["labels"].clamp(min=0)[..., None])[..., 0] * keep
    eager = OBJECTIVES["graddiff"](logps, TokenBatch.from_labels(case["labels"], case["is_forget"]))
    exact = gradients_of(want, double, 1.0)
    for name, a, b, c in zip(("dX", "dW"), gradients_of(ours, case, 1.0), gradients_of(eager, case, 1.0), exact):
        assert relative_error(a, c) <= 1.5 * relative_error(b, c) + 1e-7, name
    assert abs(ours.item() - want.item()) <= 1.5 * abs(eager.item() - want.item()) + 1e-6 * abs(want.item())


def test_logits_in_low_precision_are_an_option(device):
    """bf16 logits, which their gradient overwrites: the gradients are nearly as good, the log-probabilities are not."""
    case = make(device, BRAIN, bias=True)
    double = fp64(case)
    want, want_logps = definition(double, OBJECTIVES["npo"])
    want_gradients = gradients(want, double)
    errors = {}
    for dtype in (FLOAT, BRAIN):
        for chunk_rows in (1000, 7):
            options = dict(logits_dtype=dtype, chunk_bytes=chunk_rows * 192 * 2, return_logps=True, backend="triton")
            loss, logps = linear_objective(**case, objective=OBJECTIVES["npo"], **options)
            errors[dtype] = (logps.double() - want_logps).abs().max().item()
            for name, got, expected in zip(("dX", "dW", "dbias"), gradients(loss, case), want_gradients):
                assert_close(got, expected, tol.GRAD_BF16 if dtype == FLOAT else 5 * tol.GRAD_BF16, name)
    assert errors[FLOAT] <= tol.LOGP_ABS < 1e-3 < errors[BRAIN] < 0.1


@pytest.mark.parametrize("name", ["graddiff", "npo, kl", "ceu", "dpo"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing to wait for")
def test_a_loss_never_waits_for_the_device(name, device):
    """With rows and is_forget on the host, as the collator gives them."""
    objective = {"npo, kl": losses.NPO(retain="kl"), "ceu": losses.CEU(), "dpo": losses.DPO()}.get(name, losses.GradDiff())
    case = make(device, BRAIN)
    case["is_forget"] = case["is_forget"].cpu()
    rows = (case["labels"].flatten() != -100).nonzero()[:, 0].cpu()
    if objective.divergence:
        case |= {"ref_hidden": case["hidden"].detach(), "ref_weight": case["weight"].detach()}
    for attempt in range(2):  # the first one compiles
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            for chunk_rows in (1000, 7):
                options = dict(token_indices=rows, chunk_bytes=chunk_rows * 192 * 8)
                linear_objective(**case, objective=objective, **options).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_loss_replays_in_a_graph(device):
    """Static shapes: padded rows on the device. A replay computes with the values that its inputs hold then."""
    case = make(device, BRAIN)
    rows = (case["labels"].flatten() != -100).nonzero()[:, 0]
    rows = torch.cat([rows, rows.new_full((5,), case["labels"].numel() - 1)])
    case |= {
        "ref_hidden": case["hidden"].detach().clone(),
        "ref_weight": case["weight"].detach().clone(),
        "token_indices": rows,
    }
    objective = losses.NPO(retain="kl")

    def run():
        loss = linear_objective(**case, objective=objective)
        return loss, *torch.autograd.grad(loss, [case["hidden"], case["weight"]])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # for the inputs: row indices that are not there yet may be any
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        case["hidden"].mul_(1.5)
        case["labels"].copy_(torch.where(case["labels"] == -100, -100, (case["labels"] + 1) % 131))
    graph.replay()
    for got, want in zip(captured, run()):
        assert torch.equal(got, want)


@pytest.mark.parametrize("where", ["host", "device"])
def test_what_does_not_count_may_be_nan(where, backend, device, monkeypatch):
    """Hidden states of padding, and those of a reference in sequences that need none, whoever knows the rows."""
    case = make(device)
    case["hidden"].data[-1, -1] = float("nan")  # an ignored token, which pads the rows
    case |= {"ref_hidden": case["hidden"].detach().clone(), "ref_weight": case["weight"].detach().clone()}
    case["ref_hidden"][case["is_forget"]] = float("nan")
    rows = (case["labels"].flatten() != -100).nonzero()[:, 0]
    rows = torch.cat([rows, rows.new_full((3,), case["labels"].numel() - 1)]).cpu()
    if where == "device":  # as a tensor on a GPU would be, whose values the host does not know
        real = HeadRows.__init__

        def init(self, *args, **options):
            self.__class__ = type("Unseen", (HeadRows,), {"host_indices": property(lambda s: None, lambda s, v: None)})
            real(self, *args, **options)

        monkeypatch.setattr(HeadRows, "__init__", init)
    objective = losses.NPO(retain="kl")
    loss = linear_objective(**case, objective=objective, token_indices=rows, backend=backend)
    assert torch.isfinite(loss)
    for gradient in gradients(loss, case):
        assert torch.isfinite(gradient).all() and gradient.norm() > 0


def test_reference_backend_under_autocast_is_at_its_own_reference(device):
    """Both sides are converted to one dtype: hidden states in fp32 and in bf16 would differ."""
    case = make(device)
    case |= {"ref_hidden": case["hidden"].detach(), "ref_weight": case["weight"].detach()}
    with torch.autocast(device.type, dtype=BRAIN):
        loss = linear_objective(**case, objective=losses.GradDiff(gamma=0.0, retain="kl"), backend="reference")
    assert loss.item() == 0.0


def test_fp16_gradients_under_a_large_logit_scale(backend, device):
    case = make(device, HALF, shape=(1, 20, 16))
    with torch.no_grad():
        case["hidden"] /= 3000
    double = fp64(case)
    want, _ = definition(double | {"hidden": double["hidden"] * 3000}, OBJECTIVES["ga"])
    loss = linear_objective(**case, objective=OBJECTIVES["ga"], logit_scale=3000.0, backend=backend)
    for got, expected in zip(gradients(loss, case, 1e-2), gradients(want, double, 1e-2)):
        assert_close(got, expected, 5e-3, "gradient")


def test_fp16_rows_of_a_frozen_head_keep_memorised_tokens(backend, device):
    """Its gradient rows are formed before what they are multiplied with is known: an unlikelihood loss has 1 / (1 - p)."""
    weight = torch.zeros(50, 8, device=device, dtype=HALF)
    weight[3, 0], weight[7, 1] = 1.0, 1.0
    hidden = torch.zeros(1, 2, 8, device=device, dtype=HALF)
    hidden[0, 0, 0], hidden[0, 1, 1] = 22.0, 0.5  # 1 - p is 1e-8, and about 0.97
    hidden.requires_grad_()
    labels = torch.tensor([[3, 7]], device=device)
    logps = linear_logprob(hidden, weight, labels, backend=backend)
    upstream = torch.tensor([[1e8, 1.0]], device=device)
    (got,) = torch.autograd.grad((logps * upstream).sum(), hidden)
    double = hidden.detach().double().requires_grad_()
    exact = reference.linear_logprob(double, weight.double(), labels)
    (want,) = torch.autograd.grad((exact * upstream.double()).sum(), double)
    assert_rows_close(got[0], want[0], 5e-3, "dX")


def test_values_that_do_not_count_do_not_reach_an_objective():
    """0 times -inf is NaN: a label that is masked out of the vocabulary in a forget sequence, and references of retain ones."""
    logps = torch.tensor([[-1.0, -torch.inf], [-2.0, -1.0]])
    is_forget = torch.tensor([True, False])
    ref_logps = torch.tensor([-3.0, torch.nan])
    batch = TokenBatch.from_labels(torch.zeros(2, 2, dtype=torch.int64), is_forget, ref_logps)
    assert losses.retain_nll(logps, batch) == 1.5
    assert torch.isfinite(losses.NPO()(logps.clamp(min=-5), batch))


def test_memory_of_a_trained_head_is_given_back_after_backward(backend, device):
    """log-probabilities that are kept for a log must not keep hidden states and heads alive."""
    case = make(device)
    with torch.autocast(device.type, dtype=BRAIN):  # the head is copied
        logps = linear_logprob(case["hidden"], case["weight"], case["labels"], backend=backend)
    copies = [weakref.ref(t) for t in logps.grad_fn.saved_tensors if t is not None]
    assert copies
    logps.sum().backward()
    gc.collect()
    assert not any(ref() is not None and ref().shape == case["weight"].shape for ref in copies)
    with pytest.raises(RuntimeError, match="second time"):
        logps.sum().backward()


def test_a_weight_changed_before_backward_is_noticed(backend, device):
    case = make(device)
    logps = linear_logprob(case["hidden"], case["weight"], case["labels"], backend=backend)
    with torch.no_grad():
        case["weight"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@pytest.mark.parametrize("module, old, new", [
    ("_head.gradients", "first=self._is_first", "first=True"),  # only the last chunk's dW
    ("_head.sweeps", "dense[first:last] = derivative", "dense[: last - first] = derivative"),  # wrong sequence
    ("_head.sweeps", "loss += value", "loss = value"),
    ("_head.gradients", "gradient.mul_(scale)", "gradient"),  # upstream dropped
    ("_head.sweeps", "piece = piece.tokens(", "_ = piece.tokens("),  # tokens of other chunks counted as p = 1
    ("_head.sweeps", "chunk, coefficients[chunk.span])", "chunk, coefficients[: chunk.stop - chunk.start])"),
    ("_head.sweeps", "objective(head_rows.log_probs(), batch)", "objective(zeros, batch)"),
    ("_head.rows", "out.add_(head.bias)", "out"),
    ("_head.gradients", "dlogits.sum(0, dtype=self.bias.dtype)", "0.0"),
    ("_head.rows", "self.x[chunk.span], chunk", "self.x[: chunk.stop - chunk.start], chunk"),
    ("token_logprob", "row.label, factors.at_label, -", "row.label, -factors.at_label, "),
    ("token_logprob", "coefficient = tl.load(coefficients_ptr + row.index)", "coefficient = 0.0"),  # zero gradient
])  # fmt: skip
def test_mutants_do_not_pass(module, old, new, device, tmp_path, monkeypatch):
    use_mutant(module, old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check_objectives(linear_objective, device, chunk_rows=7, bias=True)


@pytest.mark.parametrize("module, old, new", [
    ("reference._rows", ".mul_(scale[rows])", ".neg_()"),
    ("reference._rows", "coefficients * statistics[ONE_MINUS_P]", "statistics[ONE_MINUS_P]"),
    ("reference._rows", "labels_in[rows, None]", "labels_in[rows, None].flip(0)"),
    ("_head.rows", "beta=0 if columns.start == 0 else 1", "beta=0"),  # only the last block of the weight
    ("_head.gradients", "gradient.mul_(scale)", "gradient"),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_mutants_without_kernels_do_not_pass(module, old, new, backend, device, tmp_path, monkeypatch):
    use_mutant(module, old, new, tmp_path, monkeypatch, BLOCK=2000, WEIGHT_BLOCK=1000)
    with pytest.raises(AssertionError):
        check_objectives(linear_objective, device, BRAIN, ["npo"], chunk_rows=18, backend=backend)


def use_mutant(module, old, new, tmp_path, monkeypatch, **constants):
    """Replace what the ops have imported from a module by the functions of its mutant."""
    broken = mutant(f"soul_kernels.{module}", old, new, tmp_path)
    vars(broken).update(constants)
    for home in (
        "linear_loss", "linear_kl", "linear_gnb", "linear_cross_entropy", "_head.autograd", "_head.sweeps", "_head.gradients",
        "_head.rows", "reference._rows", "reference.linear_cross_entropy",
    ):  # fmt: skip
        user = importlib.import_module(f"soul_kernels.{home}")
        for name, value in vars(broken).items():
            if getattr(value, "__module__", None) == broken.__name__ and hasattr(user, name):
                monkeypatch.setattr(user, name, value)


@pytest.mark.parametrize("name, old, new", [
    ("graddiff", "= self.alpha * RETAIN", "= RETAIN"),
    ("graddiff", '"forget": self.gamma', '"forget": -self.gamma'),
    ("npo", "-self.beta * ratio) * counted", "self.beta * ratio) * counted"),
    ("npo", "(2 / self.beta)", "(1 / self.beta)"),
    ("npo", "- batch.ref_logps", ""),
    ("npo", "/ batch.n_forget_sequences", "/ len(counted)"),  # the sequence without a label counted in
])  # fmt: skip
def test_mutant_objectives_do_not_pass(name, old, new, device, tmp_path):
    """The objectives against their formulas, written out here once more from the papers."""
    check_formulas(losses, name, device)
    broken = mutant("soul.losses", old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_formulas(broken, name, device)


def check_formulas(module, name, device):
    logps = -torch.rand(4, 6, dtype=torch.float64, device=device)
    labels = torch.zeros(4, 6, dtype=torch.int64, device=device)
    labels[:, 4:] = -100
    labels[2] = -100
    labels[1, 1:] = -100
    logps = logps * (labels != -100)
    is_forget = torch.tensor([True, True, True, False], device=device)
    ref = torch.tensor([-1.5, -0.2, 0.0, -9.0], dtype=torch.float64, device=device)
    batch = TokenBatch.from_labels(labels, is_forget, ref)
    retain = -logps[3, :4].mean()
    if name == "graddiff":
        got = module.GradDiff(gamma=0.5, alpha=3.0)(logps, batch)
        want = 0.5 * torch.cat([logps[0, :4], logps[1, :1]]).mean() + 3.0 * retain
    else:
        got = module.NPO(beta=0.2, gamma=0.5, alpha=3.0)(logps, batch)
        ratios = (logps[:2].sum(1) - ref[:2]).tolist()
        sigmoid = [1 / (1 + torch.tensor(0.2 * r, dtype=torch.float64).exp()) for r in ratios]  # of -beta log-ratio
        want = -0.5 * (2 / 0.2) * sum(torch.log(s) for s in sigmoid) / 2 + 3.0 * retain
    assert_close(got, torch.as_tensor(want), 1e-9, name)


@pytest.mark.parametrize("change, message", [
    ({"labels": torch.full((5, 9), 131)}, r"labels: expected values in \[0, 131\) or -100, got 131 at \[0, 0\]"),
    ({"labels": torch.full((5, 9), -1)}, r"labels: expected values in \[0, 131\) or -100, got -1"),
    ({"labels": torch.zeros(5, 8, dtype=torch.int64)}, r"labels: expected \[B, T\] \(5, 9\), got \(5, 8\)"),
    ({"labels": torch.zeros(5, 9)}, r"labels: expected dtype torch.int64, got torch.float32"),
    ({"weight": torch.zeros(131, 17)}, r"weight: expected width 16, as hidden, got 17"),
    ({"weight": torch.zeros(131, 16, dtype=torch.float16)}, r"weight: expected dtype torch.float32, as hidden, got"),
    ({"hidden": torch.zeros(45, 16)}, r"labels: expected \[N\] \(45,\), beside hidden \[N, D\], got \(5, 9\)"),
    ({"hidden": torch.zeros(16)}, r"hidden: expected \[B, T, D\] or \[N, D\], got \(16,\)"),
    ({"bias": torch.zeros(130)}, r"bias: expected shape \(131,\), got \(130,\)"),
    ({"weight": Head(torch.zeros(131, 16)), "bias": torch.zeros(131)}, "bias: expected None beside a Head, .* got a tensor"),
    ({"weight": [[0.0] * 16] * 131}, r"weight: expected a tensor \[V, D\] or a Head, got list"),
    ({"is_forget": torch.ones(4, dtype=torch.bool)}, r"is_forget: expected shape \(5,\), got \(4,\)"),
    ({"ref_logps": None}, r"ref_logps: expected one value per sequence, got None"),
    ({"is_forget": torch.ones(5, dtype=torch.int64)}, r"is_forget: expected dtype torch.bool, got torch.int64"),
    ({"token_indices": torch.tensor([4, 3])}, r"token_indices: expected rising indices in \[0, 45\)"),
    ({"token_indices": torch.tensor([3, 3, 4])}, r"token_indices: expected rising indices in \[0, 45\)"),
    ({"token_indices": torch.tensor([3, 45])}, r"token_indices: expected rising indices in \[0, 45\)"),
    ({"token_indices": [3, 4]}, r"token_indices: expected \[R\] int64, got list"),
    ({"chunk_bytes": 1e9}, "chunk_bytes: expected a positive whole number, got 1000000000.0"),
    ({"token_indices": torch.tensor([3, 4])}, r"token_indices: expected every labelled token once, got 2 of"),
])  # fmt: skip
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_kernels_on_cpu), "torch", "reference"])
def test_bad_input_is_named(change, message, backend):
    with pytest.raises(ValueError, match=message):
        linear_objective(**make("cpu") | change, objective=OBJECTIVES["npo"], backend=backend)


def test_a_head_is_a_weight_and_a_bias():
    """In one bundle or beside each other: the same numbers, from every op that takes a head."""
    case = make("cpu", bias=True)
    gnb = soul_kernels.linear_gnb
    kl = soul_kernels.linear_kl
    statistics = soul_kernels.linear_statistics
    hidden, weight, labels, bias = (case[name] for name in ("hidden", "weight", "labels", "bias"))
    reference = Reference(hidden.detach() + 0.1, weight.detach(), bias.detach())
    keep = labels != -100
    uniforms = torch.rand(labels.shape)
    calls = [
        lambda weight, **bias: linear_logprob(hidden, weight, labels, **bias),
        lambda weight, **bias: linear_objective(hidden, weight, labels, losses.GradAscent(), **bias),
        lambda weight, **bias: linear_objective(hidden, weight, labels, losses.UNDIAL(), reference=reference, **bias),
        lambda weight, **bias: kl(hidden, weight, labels, reference, **bias),
        lambda weight, **bias: gnb(hidden, weight, keep, uniforms=uniforms, **bias)[0],
        lambda weight, **bias: statistics(hidden, weight, labels, **bias).entropies,
    ]
    for call in calls:
        assert torch.equal(call(Head(weight, bias)), call(weight, bias=bias))
        assert not torch.equal(call(Head(weight, bias)), call(weight))


@pytest.mark.parametrize("bundle, message", [
    ({"options": {"backend": "torch"}}, "options: expected soul_kernels.LinearOptions, got dict"),
    ({"reference": torch.zeros(5, 9, 16)}, "reference: expected soul_kernels.Reference, got Tensor"),
    ({"reference": None}, "reference: expected the hidden states and the head of the reference model, got None"),
    ({"reference": Reference(torch.zeros(5, 9, 16))}, "reference.weight: expected the head of the reference model"),
    ({"reference": Reference(torch.zeros(5, 9, dtype=torch.int64), torch.zeros(131, 16))},
     "reference.hidden: expected a floating-point dtype, got torch.int64"),
])  # fmt: skip
def test_a_wrong_bundle_is_named(bundle, message):
    case = make("cpu")
    for op, needs in ((soul_kernels.linear_objective, {"objective": losses.KLMin()}), (soul_kernels.linear_kl, {})):
        keywords = {"reference": Reference(case["hidden"].detach(), case["weight"].detach())} | needs | bundle
        with pytest.raises(ArgumentError, match=message):
            op(case["hidden"], case["weight"], case["labels"], **keywords)


@pytest.mark.parametrize("runs", [False, True])
def test_the_way_of_computing_is_chosen_by_the_device(runs, monkeypatch):
    """Without kernels "auto" sweeps all the same; the definition, which needs memory for all logits, must be asked for."""
    monkeypatch.setattr(backends, "runs_on_cpu", lambda: runs)
    tensor = torch.empty(1)
    kernels = runs and backends.has_triton()
    for backend, ours in (("auto", "triton" if kernels else "torch"), ("torch", "torch"), ("reference", "reference")):
        assert backends.resolve_head_backend(backend, tensor) == ours
    if kernels:
        assert backends.resolve_head_backend("triton", tensor) == "triton"
    else:
        with pytest.raises(ValueError, match="backend: expected a place where Triton can run for 'triton'"):
            backends.resolve_head_backend("triton", tensor)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_kernels_fp64_is_fp64(name):
    """Which the kernels refuse; sums, statistics and gradients are fp64 as well, or the errors would be 1e-7."""
    case = fp64(make("cpu", bias=True))
    want, want_logps = definition(case, OBJECTIVES[name])
    options = dict(objective=OBJECTIVES[name], return_logps=True, chunk_bytes=7 * 192 * 8, backend="torch")
    loss, logps = linear_objective(**case, **options)
    assert loss.dtype == logps.dtype == torch.float64
    assert_close(loss, want, 1e-12, "loss")
    assert_close(logps, want_logps, 1e-12, "log-probabilities")
    for got, expected in zip(gradients(loss, case), gradients(want, case)):
        assert_close(got, expected, 1e-12, "gradient")


def test_the_gradient_of_an_fp32_head_is_the_sum_itself():
    """A copy would cost memory of the size of the head, and time; it is made only if the graph may be walked again."""
    case = make("cpu")
    for retain in (False, True):
        case["hidden"].grad = case["weight"].grad = None
        loss = linear_objective(**case, objective=OBJECTIVES["ga"], backend="torch")
        memory = {t.data_ptr() for t in loss.grad_fn.saved_tensors if t is not None}
        loss.backward(retain_graph=retain)
        assert (case["weight"].grad.data_ptr() in memory) != retain
        first = case["weight"].grad.clone()
        if retain:
            (2 * loss).backward()
            assert_close(case["weight"].grad, 3 * first, 1e-6, "both walks")


@pytest.mark.parametrize("dtype, tiles", [(BRAIN, True), (BRAIN, False), (HALF, True), (FLOAT, True)])
def test_products_of_bf16_go_to_the_tiles_of_a_cpu(dtype, tiles, monkeypatch):
    """All three of a trained head, where there are tiles and the model is bf16; nothing else of the process is rounded."""
    switch = torch.backends.mkldnn.matmul
    precisions = []
    before = switch.fp32_precision

    def spied(function):
        def spy(*args, **options):
            precisions.append(switch.fp32_precision)
            return function(*args, **options)

        return spy

    case = make("cpu", dtype)
    monkeypatch.setattr(head_rows, "multiplies_bf16", lambda: tiles)
    monkeypatch.setattr(head_rows, "_converted_blocks", spied(head_rows._converted_blocks))
    monkeypatch.setattr(head_gradients, "_accumulate_fp32", spied(head_gradients._accumulate_fp32))
    options = dict(is_forget=case["is_forget"], backend="torch")
    loss = linear_objective(case["hidden"], case["weight"], case["labels"], OBJECTIVES["graddiff"], **options)
    loss.backward()
    within = "bf16" if dtype == BRAIN and tiles else before
    assert set(precisions) == {within} and len(precisions) >= {FLOAT: 1, HALF: 2, BRAIN: 3}[dtype]
    assert switch.fp32_precision == before


def test_what_goes_wrong_in_a_product_leaves_no_rounding_behind(monkeypatch):
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    monkeypatch.setattr(head_rows, "multiplies_bf16", lambda: True)
    with pytest.raises(RuntimeError, match="size mismatch|cannot be multiplied"):
        head_rows.product_with_weight(torch.zeros(2, 3), torch.zeros(4, 5, dtype=BRAIN), torch.zeros(2, 5))
    assert switch.fp32_precision == before


@pytest.mark.skipif(not backends.multiplies_bf16(), reason="this processor has no tiles for bf16")
def test_logits_from_the_tiles_are_exact_sums():
    """bf16 logits would be off by 4e-3 of their size; these are fp32 sums of exact products."""
    x, weight = torch.randn(64, 192).to(BRAIN), torch.randn(700, 192).to(BRAIN)
    logits = torch.empty(64, 700)
    head_rows._product(x.float(), Head(weight), logits)
    exact = x.double() @ weight.double().T
    assert relative_error(logits, exact) < 1e-6 < 1e-4 < relative_error((x @ weight.T).float(), exact)
