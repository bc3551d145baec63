"""The cases on which cut-cross-entropy and Liger test their fused losses: their shapes, dtypes, options and tolerances.

Only what is tested comes from there, and no code. Both tests compare with eager PyTorch that computes in the dtype of the
inputs. Here the truth is computed in fp32 from the same inputs, as in cut-cross-entropy's tests, whose criterion is: the error
of each element exceeds that of eager PyTorch by no more than a tolerance. Without a GPU the sweep runs in plain PyTorch; a few
cases also run the kernels.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from soul_kernels import Head, LinearOptions, Reference, linear_cross_entropy, linear_kl

SLOW = pytest.mark.slow(reason="hundreds of cases, of which the others are a sample")
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(256, 512, 128), (252, 507, 128), (252, 507, 123)]  # N, V, D: whole tiles, odd sizes, an odd width


def some(cases, step):
    """Every ``step``-th case as it is, and the others marked slow."""
    return [case if i % step == 0 else pytest.param(*case, marks=SLOW) for i, case in enumerate(cases)]


def eager_logits(e, c, bias, softcap, dtype=None):
    if dtype is not None:
        e, c, bias = e.to(dtype), c.to(dtype), None if bias is None else bias.to(dtype)
    logits = F.linear(e, c, bias)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def cut_inputs(shape, dtype, has_bias, invalids, device):
    """Half of the head's rows are hidden states, so that some tokens are likely; a fifth of the labels may be invalid."""
    n, n_vocab, d = shape
    e = (torch.randn(n, d, device=device) / d**0.5).to(dtype)
    c = torch.randn(n_vocab, d, device=device).to(dtype)
    c[: min(n, n_vocab) // 2] = e[: min(n, n_vocab) // 2]
    labels = torch.randint(n_vocab, (n,), device=device)
    if invalids:
        labels[torch.randperm(n, device=device)[: int(0.2 * n)]] = -100
    bias = (torch.randn(n_vocab, device=device) * 0.02).to(dtype) if has_bias else None
    return e.view(4, -1, d), c, labels.view(4, -1), bias


def within(got, truth, eager, tolerance):
    """Check that the error of each element exceeds that of eager PyTorch by no more than a tolerance."""
    got, truth, eager = (value.detach().float() for value in (got, truth, eager))
    assert ((got - truth).abs() <= (eager - truth).abs() + tolerance).all()


FORWARD = list(itertools.product([(FLOAT, 1e-5), (HALF, 1e-3), (BRAIN, 1e-2)], [None, 20.0], [True, False], [0, 2],
                                 [False, True], SHAPES, [False, True]))  # fmt: skip
BACKWARD = list(itertools.product([(HALF, 1e-3), (BRAIN, 1e-2)], [None, 20.0], [False, True], [0, 1], [False, True],
                                  ["none", "mean", "sum"], SHAPES, [False, True]))  # fmt: skip


def check_forward(precision, softcap, has_bias, shift, invalids, shape, return_lse, device, backend):
    dtype, tolerance = precision
    e, c, labels, bias = cut_inputs(shape, dtype, has_bias, invalids, device)
    result = linear_cross_entropy(
        e, Head(c, bias, softcap=softcap), labels, reduction="none", shift=shift, return_lse=return_lse,
        options=LinearOptions(backend=backend),
    )  # fmt: skip
    loss, lse = result if return_lse else (result, None)
    end = labels.shape[1] - shift
    assert (loss[:, end:] == 0).all()

    def expected(dtype):
        logits = eager_logits(e[:, :end], c, bias, softcap, dtype).float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels[:, shift:].flatten(), reduction="none")
        return losses.view(4, end), logits.logsumexp(-1) * (labels[:, shift:] != -100)

    for got, truth, eager in zip((loss, lse), expected(FLOAT), expected(None)):
        if got is not None:
            within(got[:, :end], truth, eager, tolerance)


def check_backward(precision, softcap, has_bias, shift, invalids, reduction, shape, return_lse, device, backend):
    """With a logsumexp, its square is added to the loss: a z-loss."""
    dtype, tolerance = precision
    e, c, labels, bias = cut_inputs(shape, dtype, has_bias, invalids, device)
    leaves = [tensor.requires_grad_() for tensor in (e, c, bias) if tensor is not None]
    end = labels.shape[1] - shift
    keep = labels[:, shift:] != -100

    def gradients(loss, lse):
        total = (loss / keep.sum() if reduction == "sum" else loss).mean()
        return torch.autograd.grad(total if lse is None else total + lse.square().mean(), leaves)

    def expected(dtype):
        logits = eager_logits(e[:, :end], c, bias, softcap, dtype).float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, shift:].flatten(), reduction=reduction)
        return gradients(loss, logits.logsumexp(-1) * keep if return_lse else None)

    result = linear_cross_entropy(
        e, Head(c, bias, softcap=softcap), labels, reduction=reduction, shift=shift, return_lse=return_lse,
        options=LinearOptions(backend=backend),
    )  # fmt: skip
    loss, lse = result if return_lse else (result, None)
    loss = loss[:, :end] if reduction == "none" else loss
    got = gradients(loss, None if lse is None else lse[:, :end])
    for ours, truth, eager in zip(got, expected(FLOAT), expected(None)):
        within(ours, truth, eager, tolerance)


@pytest.mark.parametrize("precision, softcap, has_bias, shift, invalids, shape, return_lse", some(FORWARD, 23))
def test_cut_cross_entropy_forward(precision, softcap, has_bias, shift, invalids, shape, return_lse, device):
    backend = "auto" if device.type == "cuda" else "torch"
    check_forward(precision, softcap, has_bias, shift, invalids, shape, return_lse, device, backend)


@pytest.mark.parametrize("precision, softcap, has_bias, shift, invalids, reduction, shape, return_lse", some(BACKWARD, 23))
def test_cut_cross_entropy_backward(precision, softcap, has_bias, shift, invalids, reduction, shape, return_lse, device):
    backend = "auto" if device.type == "cuda" else "torch"
    check_backward(precision, softcap, has_bias, shift, invalids, reduction, shape, return_lse, device, backend)


@pytest.mark.slow(reason="the kernels on the CPU take 100 times as long")
@pytest.mark.parametrize("return_lse", [False, True])
def test_cut_cross_entropy_by_the_kernels(return_lse, device):
    check_forward((BRAIN, 1e-2), 20.0, True, 2, True, SHAPES[2], return_lse, device, "triton")
    check_backward((BRAIN, 1e-2), 20.0, True, 1, True, "none", SHAPES[2], return_lse, device, "triton")


# Of hidden states, head and bias.
@pytest.mark.parametrize("needed", [(True, False, True), (False, True, False), (False, False, True)])
def test_cut_cross_entropy_partial_gradients(needed, device):
    e, c, labels, bias = cut_inputs(SHAPES[0], BRAIN, True, False, device)
    tensors = [tensor.requires_grad_(need) for tensor, need in zip((e, c, bias), needed)]
    linear_cross_entropy(e, c, labels, bias=bias).backward()
    assert [tensor.grad is not None for tensor in tensors] == list(needed)


LIGER_SHAPES = [(4, 47, 31, 123), (8, 128, 1024, 4096)]  # B, T, D, V
LIGER_PRECISIONS = [("mean", BRAIN, 5e-3, 5e-2), ("mean", FLOAT, 1e-5, 5e-4), ("sum", BRAIN, 5.0, 50.0),
                    ("sum", FLOAT, 1e-3, 5e-2), ("none", BRAIN, 5.0, 50.0), ("none", FLOAT, 1e-3, 5e-2)]  # fmt: skip
LIGER = list(itertools.product(LIGER_SHAPES, LIGER_PRECISIONS, [True, False], [False, True]))
AMP = list(itertools.product(LIGER_SHAPES, [BRAIN, HALF], [True, False]))


def by_size(cases):
    """The cases of the larger shape take seconds each."""
    return [case if case[0] == LIGER_SHAPES[0] else pytest.param(*case, marks=SLOW) for case in cases]


def liger_inputs(shape, dtype, has_bias, ignore_index, device):
    b, t, d, n_vocab = shape
    x = torch.randn(b * t, d, device=device).to(dtype).requires_grad_()
    weight = torch.rand(n_vocab, d, device=device).to(dtype).requires_grad_()
    bias = torch.rand(n_vocab, device=device).to(dtype).requires_grad_() if has_bias else None
    labels = torch.randint(n_vocab, (b * t,), device=device)
    labels[torch.randperm(b * t, device=device)[: int(torch.randint(1, b * t // 2, (1,)))]] = ignore_index
    return x, weight, bias, labels


def check_liger(x, weight, bias, labels, precision, *, class_weights=None, ignore_index=-100, z_loss=0.0, label_smoothing=0.0,
                softcap=None):  # fmt: skip
    """Loss, z-loss and gradients; a z-loss is reported by the logsumexp that is returned."""
    reduction, _, atol, rtol = precision
    keep = labels != ignore_index
    logits = eager_logits(x, weight, bias, softcap, FLOAT)
    options = dict(reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing)
    want = F.cross_entropy(logits, labels, class_weights, **options)
    options |= dict(class_weights=class_weights, z_loss=z_loss)

    def z_of(lse):
        z = z_loss * lse.square() * keep
        return z if reduction == "none" else z.sum() / (keep.sum() if reduction == "mean" else 1)

    want_z = z_of(logits.logsumexp(-1))
    head = Head(weight, bias, softcap=softcap)
    for return_lse in (False, True):
        loss, lse = linear_cross_entropy(x, head, labels, return_lse=True, **options) if return_lse else (
            linear_cross_entropy(x, head, labels, **options), None)  # fmt: skip
        if lse is not None:
            torch.testing.assert_close(z_of(lse), want_z, atol=atol, rtol=rtol)
        torch.testing.assert_close(loss, want + want_z, atol=atol, rtol=rtol)
        leaves = [tensor for tensor in (x, weight, bias) if tensor is not None]
        wanted = torch.autograd.grad((want + want_z).sum(), leaves, retain_graph=True)
        for got, expected in zip(torch.autograd.grad(loss.sum(), leaves), wanted):
            torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("shape, precision, has_bias, everything", by_size(LIGER))
def test_liger_correctness(shape, precision, has_bias, everything, device, without_kernels):
    options = {}
    if everything:
        class_weights = torch.rand(shape[-1], device=device)
        options = dict(class_weights=class_weights, label_smoothing=0.1, ignore_index=42, z_loss=1e-4, softcap=30.0)
    inputs = liger_inputs(shape, precision[1], has_bias, options.get("ignore_index", -100), device)
    check_liger(*inputs, precision, **options)


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (9, 7, 41, 41)])
@pytest.mark.parametrize("precision", LIGER_PRECISIONS[:2])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_liger_functional(shape, precision, weighted, has_bias, device, without_kernels):
    """Class weights of either sign."""
    x, weight, bias, labels = liger_inputs(shape, precision[1], has_bias, -100, device)
    class_weights = torch.randn(shape[-1], device=device) if weighted else None
    check_liger(x, weight, bias, labels, precision, class_weights=class_weights, z_loss=1e-4, label_smoothing=0.1, softcap=30.0)


@pytest.mark.parametrize("shape, dtype, has_bias", by_size(AMP))
def test_liger_amp(shape, dtype, has_bias, device, without_kernels):
    """Parameters in fp32 under autocast: the truth is computed from inputs rounded to the dtype of autocast."""
    x, weight, bias, labels = liger_inputs(shape, FLOAT, has_bias, -100, device)
    leaves = [tensor for tensor in (x, weight, bias) if tensor is not None]
    with torch.autocast(device.type, dtype=dtype):
        loss = linear_cross_entropy(x, weight, labels, bias=bias)
    rounded = [tensor.to(dtype).float() for tensor in (x, weight)]
    want = F.cross_entropy(F.linear(*rounded, bias), labels)
    torch.testing.assert_close(loss, want, atol=5e-3, rtol=5e-2)
    for got, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves)):
        torch.testing.assert_close(got, expected, atol=5e-3, rtol=5e-2)


JSD_SHAPES = [(4, 423, 167, 1423), (8, 128, 1024, 4096)]  # B, T, D, V; the model's hidden states are half as wide
JSD_SETTINGS = [(1.0, 0.5), (2.0, 0.1), (1.0, 0.0), (1.0, 1.0)]  # temperature, beta; 0 is KL(q || p), 1 is KL(p || q)
JSD_PRECISIONS = [(BRAIN, 5e-3, 5e-2), (FLOAT, 1e-5, 5e-4)]
JSD = list(itertools.product(JSD_SHAPES, JSD_PRECISIONS, JSD_SETTINGS, [None, 2]))
JSD += list(itertools.product([(2, 2, 8, 8), (9, 7, 41, 41)], JSD_PRECISIONS, [(1.0, 0.5), (2.0, 0.1)], [None, 5]))


def check_jsd(shape, precision, setting, ignore_index, device, all_ignored=False, autocast=None):
    """Liger's generalized divergence, as the mean over the tokens that are not ignored, with gradients of states and head."""
    b, t, d, n_vocab = shape
    dtype, atol, rtol = precision
    temperature, beta = setting
    weight, ref_weight = (torch.rand(n_vocab, width, device=device).to(dtype) for width in (d // 2, d))
    hidden, ref_hidden = (torch.rand(b * t, width, device=device).to(dtype) for width in (d // 2, d))
    labels = torch.randint(n_vocab, (b * t,), device=device)
    if ignore_index is not None:
        labels[torch.randperm(b * t, device=device)[: b * t // 3]] = -100
        labels[labels == ignore_index] = -100  # the op has one value of ignored labels: others are replaced before
    if all_ignored:
        labels.fill_(-100)
    keep = labels != -100
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight)]
    kind = {0.0: "kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        head, reference = Head(weight, logit_scale=1 / temperature), Reference(ref_hidden, ref_weight)
        values = linear_kl(hidden, head, labels, reference, kind=kind, beta=beta if kind == "jsd" else 0.5)
    loss = values.sum() / keep.sum().clamp(min=1)
    rounded = [tensor.to(autocast or dtype).float() for tensor in (hidden, weight, ref_hidden, ref_weight)]
    log_p, log_q = ((F.linear(*pair) / temperature).log_softmax(-1) for pair in (rounded[:2], rounded[2:]))
    log_m = {0.0: log_p, 1.0: log_q}.get(beta)
    if log_m is None:
        log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    q_side, p_side = ((log.exp() * (log - log_m)).sum(-1) for log in (log_q, log_p))
    share = {0.0: 1.0, 1.0: 0.0}.get(beta, beta)
    want = ((share * q_side + (1 - share) * p_side) * keep).sum() / keep.sum().clamp(min=1)
    torch.testing.assert_close(loss, want, atol=atol, rtol=rtol)
    for got, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves)):
        torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("shape, precision, setting, ignore_index", [
    case if case[0][0] in (2, 9) else pytest.param(*case, marks=SLOW) for case in JSD
])  # fmt: skip
def test_liger_jsd(shape, precision, setting, ignore_index, device, without_kernels):
    check_jsd(shape, precision, setting, ignore_index, device)


@pytest.mark.slow(reason="the shapes of Liger's cases take seconds each")
@pytest.mark.parametrize("shape", JSD_SHAPES)
@pytest.mark.parametrize("precision", JSD_PRECISIONS)
@pytest.mark.parametrize("setting", JSD_SETTINGS[:2])
def test_liger_jsd_all_ignored(shape, precision, setting, device, without_kernels):
    check_jsd(shape, precision, setting, None, device, all_ignored=True)


@pytest.mark.parametrize("autocast", [BRAIN, HALF])
def test_liger_jsd_amp(autocast, device, without_kernels):
    check_jsd((2, 4, 2048, 3200), (FLOAT, 5e-3, 5e-2), (1.0, 0.5), 2, device, autocast=autocast)
