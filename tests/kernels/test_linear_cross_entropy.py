import pytest
import torch
import torch.nn.functional as F

import soul_kernels
from soul_kernels import Head, LinearOptions
from soul_kernels.reference import linear_cross_entropy as reference
from soul_kernels.reference.token_logprob import transformed
from tests.kernels.test_linear_loss import HeadRows, make, recorded, use_mutant
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, assert_rows_close, loose, mutant

linear_cross_entropy = loose(soul_kernels.linear_cross_entropy)
reference_cross_entropy = loose(reference.linear_cross_entropy)
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
TENSORS = ("hidden", "weight", "bias", "class_weights")
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "weighted": True}


def make_case(device, dtype=FLOAT, bias=True, weighted=False, n_vocab=131):
    case = make(device, dtype, bias=bias, n_vocab=n_vocab)
    del case["is_forget"], case["ref_logps"]
    return case | {"class_weights": torch.rand(n_vocab, device=device) * 2 if weighted else None}


def fp64(case):
    return {name: value if value is None or name not in TENSORS else value.detach().double().requires_grad_(value.requires_grad)
            for name, value in case.items()}  # fmt: skip


def definition(hidden, weight, labels, bias=None, class_weights=None, label_smoothing=0.0, z_loss=0.0, reduction="mean",
               ignore_index=-100, logit_scale=1.0, softcap=None):  # fmt: skip
    """The loss by torch, and the logsumexp, without any code of the library but scale and cap."""
    logits = transformed(F.linear(hidden, weight, bias), logit_scale, softcap)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), class_weights, reduction=reduction,
                           label_smoothing=label_smoothing, ignore_index=ignore_index)  # fmt: skip
    keep = labels != ignore_index
    lse = logits.logsumexp(-1) * keep
    if reduction == "none":
        return loss.view(labels.shape) + z_loss * lse.square(), lse, logits
    return loss + z_loss * lse.square().sum() / (keep.sum() if reduction == "mean" else 1), lse, logits


def check(device, op=linear_cross_entropy, *, backend="triton", dtype=FLOAT, bias=True, weighted=False, chunk_rows=1000,
          frozen=(), return_lse=False, **options):  # fmt: skip
    """Loss, logsumexp, predictions and gradients against torch's own cross-entropy in fp64."""
    case = make_case(device, dtype, bias, weighted)
    for name in frozen:
        case[name].requires_grad_(False)
    double = fp64(case)
    sweep = dict(backend=backend, chunk_bytes=chunk_rows * 192 * 4)
    got, *others = op(**case, return_lse=return_lse, return_predictions=True, **sweep, **options)
    want, want_lse, logits = definition(**double, **options)
    assert got.dtype == FLOAT
    assert_close(got, want, tol.GRAD_OBJECTIVE, "loss")
    predictions = others[-1]
    keep = case["labels"] != -100
    assert torch.equal(predictions.ids, torch.where(keep, logits.argmax(-1), -100))
    assert_close(predictions.accuracy, (logits.argmax(-1) == case["labels"])[keep].double().mean(), 1e-6, "accuracy")
    upstream = torch.randn(want.shape, device=device).double()
    total, want_total = (got * upstream).sum(), (want * upstream).sum()
    if return_lse:
        assert_close(others[0], want_lse, tol.GRAD_OBJECTIVE, "logsumexp")
        weights = torch.randn(keep.shape, device=device).double()
        total, want_total = total + (others[0] * weights).sum(), want_total + (want_lse * weights).sum()
    leaves = [name for name in ("hidden", "weight", "bias") if case[name] is not None and name not in frozen]
    got_all = torch.autograd.grad(total, [case[name] for name in leaves])
    want_all = torch.autograd.grad(want_total, [double[name] for name in leaves])
    for name, a, b in zip(leaves, got_all, want_all):
        assert a.dtype == dtype
        assert_close(a, b, tol.GRAD_OBJECTIVE if dtype == FLOAT else tol.GRAD_BF16, name)
        if name != "bias":
            assert_rows_close(a, b, tol.WORST_ROW_FP32 if dtype == FLOAT else tol.WORST_ROW_BF16, name)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF])
def test_everything_against_fp64(dtype, return_lse, backend, device):
    check(device, backend=backend, dtype=dtype, return_lse=return_lse, **EVERYTHING)


# Each alone, because a row kernel leaves out what is not asked for.
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3}, {"z_loss": 0.1}, {"weighted": True},
                                     {"weighted": True, "label_smoothing": 1.0}], ids=str)  # fmt: skip
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options_against_fp64(reduction, options, backend, device):
    check(device, backend=backend, reduction=reduction, **options)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_against_fp64(reduction, options, device):
    check(device, backend="reference", reduction=reduction, return_lse=True, **options)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 4, 7])  # each token on its own; sequences cut; several sequences
def test_chunks_do_not_change_the_result(chunk_rows, return_lse, backend, device):
    check(device, backend=backend, chunk_rows=chunk_rows, return_lse=return_lse, **EVERYTHING)


# A frozen head forms the gradient of each token in forward if there is one value of it only; a frozen body needs none.
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",)])
def test_frozen_parts(frozen, return_lse, backend, device):
    check(device, backend=backend, frozen=frozen, return_lse=return_lse, **EVERYTHING)


def test_capped_and_scaled_logits(backend, device):
    check(device, backend=backend, return_lse=True, logit_scale=-0.5, softcap=2.0, **EVERYTHING)


def test_the_reference_by_name(device):
    """The function of the definition itself, which the op calls by its parts."""
    double = fp64(make_case(device, weighted=True))
    options = {"label_smoothing": 0.1, "z_loss": 1e-2}
    loss, lse, ids = reference_cross_entropy(**double, **options)
    want, want_lse, logits = definition(**double, **options)
    assert_close(loss, want, 1e-12, "loss")
    assert_close(lse, want_lse, 1e-12, "logsumexp")
    assert torch.equal(ids, torch.where(double["labels"] != -100, logits.argmax(-1), -100))


def test_the_gradient_of_a_memorised_token_is_not_lost(backend, device):
    """1 - p is 1e-9, where softmax - 1 in fp32 is 0: see `test_token_logprob`."""
    hidden = torch.ones(1, 1, 1, device=device, requires_grad=True)
    logits = torch.zeros(1000, 1, device=device)
    logits[3] = 27.6
    labels = torch.tensor([[3]], device=device)
    loss = linear_cross_entropy(hidden=hidden, weight=logits, labels=labels, backend=backend)
    want, *_ = definition(hidden.double(), logits.double(), labels)
    assert_close(loss, want, tol.ONE_MINUS_P, "loss")
    gradients = [torch.autograd.grad(value, hidden)[0] for value in (loss, want)]
    assert_close(*gradients, tol.ONE_MINUS_P, "dX")


@pytest.mark.parametrize("ignore_index", [-1, 5, 131])  # no label, a label like any other, a token that was added
@pytest.mark.parametrize("shift", [0, 1, 2, True])
def test_shifted_labels_and_another_ignored_label(shift, ignore_index, backend, device):
    case = make_case(device)
    case["labels"] = torch.where(case["labels"] == -100, ignore_index, case["labels"])
    double = fp64(case)
    n = int(shift)
    double["hidden"], double["labels"] = double["hidden"][:, : 9 - n], double["labels"][:, n:]
    losses = linear_cross_entropy(**case, shift=shift, ignore_index=ignore_index, reduction="none", backend=backend)
    want, *_ = definition(**double, ignore_index=ignore_index, reduction="none")
    assert losses.shape == (5, 9) and (losses[:, 9 - n :] == 0).all()
    assert_close(losses[:, : 9 - n], want, tol.GRAD_OBJECTIVE, "losses")
    assert_close(linear_cross_entropy(**case, shift=shift, ignore_index=ignore_index, backend=backend),
                 definition(**double, ignore_index=ignore_index)[0], tol.GRAD_OBJECTIVE, "loss")  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_all_labels_ignored(backend, device):
    case = make_case(device, weighted=True)
    case["labels"].fill_(-100)
    options = dict(label_smoothing=0.1, z_loss=0.1, return_lse=True, return_predictions=True, backend=backend)
    for reduction in ("mean", "sum", "none"):
        loss, lse, predictions = linear_cross_entropy(**case, reduction=reduction, **options)
        assert (loss == 0).all() and (lse == 0).all() and predictions.accuracy == 0 and (predictions.ids == -100).all()
        for gradient in torch.autograd.grad(loss.sum(), [case["hidden"], case["weight"]]):
            assert (gradient == 0).all()
    plain = linear_cross_entropy(**case, backend=backend)
    assert plain == 0 and (torch.autograd.grad(plain, case["hidden"])[0] == 0).all()


def test_weights_that_add_up_to_zero(backend, device):
    case = make_case(device) | {"class_weights": torch.zeros(131, device=device)}
    loss = linear_cross_entropy(**case, backend=backend)
    assert loss == 0 and (torch.autograd.grad(loss, case["hidden"])[0] == 0).all()


def test_token_indices_and_no_grad(backend, device):
    """The collator's path, with token indices on the CPU, padded with an ignored token."""
    case = make_case(device, weighted=True)
    options = dict(label_smoothing=0.1, z_loss=0.1, backend=backend)
    want, want_lse = linear_cross_entropy(**case, return_lse=True, **options)
    rows = (case["labels"].flatten() != -100).nonzero()[:, 0].cpu()
    padded = torch.cat([rows, torch.full((3,), case["labels"].numel() - 1)])
    for token_indices in (rows, padded, padded.to(device), torch.arange(case["labels"].numel())):
        with torch.no_grad():
            loss, lse, predictions = linear_cross_entropy(
                **case, token_indices=token_indices, return_lse=True, return_predictions=True, **options
            )
        assert not loss.requires_grad and not lse.requires_grad
        assert_close(loss, want, 1e-6, "loss")
        assert_close(lse, want_lse, 1e-6, "logsumexp")
        assert (predictions.ids == -100).equal(case["labels"] == -100)
        trained = linear_cross_entropy(**case, token_indices=token_indices, **options)
        for a, b in zip(torch.autograd.grad(trained, [case["hidden"], case["weight"]]),
                        torch.autograd.grad(want, [case["hidden"], case["weight"]], retain_graph=True)):  # fmt: skip
            assert_close(a, b, 1e-6, "gradient")


def test_a_loss_is_one_sweep_and_a_plain_one_is_one_read(backend, device, monkeypatch):
    calls = []
    for method in ("load", "measure", "gradient", "measured_gradient"):
        monkeypatch.setattr(HeadRows, method, recorded(method, getattr(HeadRows, method), calls))
    case = make_case(device, weighted=True)
    for options, want in (
        ({}, ["load", "measured_gradient"]),
        ({"z_loss": 0.1, "label_smoothing": 0.1}, ["load", "measure", "gradient"]),
    ):
        calls.clear()
        linear_cross_entropy(**case, backend=backend, **options).backward()
        assert calls == want


def flat(case):
    """Return the same tokens as hidden states [N, D] and labels [N], as leaves."""
    hidden = case["hidden"].detach().flatten(0, 1).requires_grad_()
    return case | {"hidden": hidden, "labels": case["labels"].flatten()}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_flat_inputs(reduction, backend, device):
    case = make_case(device, weighted=True)
    options = dict(reduction=reduction, label_smoothing=0.1, z_loss=0.1, return_lse=True, return_predictions=True)
    want, want_lse, want_predictions = linear_cross_entropy(**case, backend=backend, **options)
    other = flat(case)
    got, lse, predictions = linear_cross_entropy(**other, backend=backend, **options)
    assert torch.equal(got, want.flatten() if reduction == "none" else want) and torch.equal(lse, want_lse.flatten())
    assert torch.equal(predictions.ids, want_predictions.ids.flatten()) and predictions.accuracy == want_predictions.accuracy
    gradients = torch.autograd.grad(got.sum(), [other["hidden"], case["weight"]])
    want_gradients = torch.autograd.grad(want.sum(), [case["hidden"], case["weight"]])
    assert torch.equal(gradients[0], want_gradients[0].flatten(0, 1)) and torch.equal(gradients[1], want_gradients[1])


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("op_backend", ["torch", "reference"])
def test_under_torch_compile(op_backend, return_lse, device):
    """One graph without a break; the same loss and gradients."""
    case = make_case(device, weighted=True)
    options = LinearOptions(backend=op_backend, token_indices=(case["labels"].flatten() != -100).nonzero()[:, 0])

    def loss_of(hidden, weight, class_weights):
        results = soul_kernels.linear_cross_entropy(
            hidden, weight, case["labels"], class_weights=class_weights, label_smoothing=0.1, z_loss=0.1,
            return_lse=return_lse, return_predictions=True, options=options,
        )  # fmt: skip
        return results[0] + (results[1].mean() if return_lse else 0.0), results[-1].ids

    inputs = case["hidden"], case["weight"], case["class_weights"]
    want, want_ids = loss_of(*inputs)
    torch._dynamo.reset()
    got, ids = torch.compile(loss_of, backend="aot_eager", fullgraph=True)(*inputs)
    assert torch.equal(ids, want_ids)
    assert_close(got, want, 1e-6, "loss")
    for a, b in zip(torch.autograd.grad(got, inputs[:2]), torch.autograd.grad(want, inputs[:2])):
        assert_close(a, b, 1e-6, "gradient")


@pytest.mark.parametrize("return_lse", [False, True])
def test_without_values(return_lse):
    """On the meta device, where shapes are known and values are not."""
    case = {name: value if value is None else value.detach().to("meta") for name, value in make_case("cpu").items()}
    loss, *others = linear_cross_entropy(**case, return_lse=return_lse, return_predictions=True, backend="torch")
    assert loss.shape == () and others[-1].ids.shape == (5, 9) and all(lse.shape == (5, 9) for lse in others[:-1])


def test_gradients_for_each_sample(device):
    """torch.func: vmap of grad over the sequences."""
    case = make_case(device, weighted=True)
    weight, class_weights = case["weight"].detach(), case["class_weights"]

    def loss(hidden, labels):
        return soul_kernels.linear_cross_entropy(
            hidden, weight, labels, class_weights=class_weights, label_smoothing=0.1, options=LinearOptions(backend="torch")
        )

    got = torch.func.vmap(torch.func.grad(loss))(case["hidden"].detach()[:2, None], case["labels"][:2, None])
    for b in range(2):
        hidden = case["hidden"].detach()[b : b + 1].requires_grad_()
        (want,) = torch.autograd.grad(loss(hidden, case["labels"][b : b + 1]), hidden)
        assert_close(got[b], want, 1e-6, "gradient")


@pytest.mark.parametrize("change, message", [
    ({"reduction": "avg"}, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
    ({"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
    ({"label_smoothing": -0.1}, "label_smoothing: expected a number >= 0.0, got -0.1"),
    ({"z_loss": float("nan")}, "z_loss: expected a number >= 0.0, got nan"),
    ({"shift": 9}, r"shift: expected a whole number in \[0, 9\), got 9"),
    ({"shift": -1}, r"shift: expected a whole number in \[0, 9\), got -1"),
    ({"class_weights": torch.zeros(130)}, r"class_weights: expected shape \(131,\), got \(130,\)"),
    ({"class_weights": torch.zeros(131, device="meta")}, "class_weights: expected device cpu, as hidden, got meta"),
    ({"labels": torch.zeros(5, 8, dtype=torch.int64)}, r"labels: expected \[B, T\] \(5, 9\), got \(5, 8\)"),
    ({"labels": torch.full((5, 9), 131)}, r"labels: expected values in \[0, 131\) or -100, got 131 at \[0, 0\]"),
    ({"labels": torch.full((5, 9), -100), "ignore_index": 0}, r"labels: expected values in \[0, 131\) or -100, got -1"),
    ({"labels": torch.zeros(45, dtype=torch.int64)}, r"labels: expected \[B, T\] \(5, 9\), got \(45,\)"),
    ({"hidden": torch.zeros(45, 16)}, r"labels: expected \[N\] \(45,\), beside hidden \[N, D\], got \(5, 9\); flatten both"),
    ({"weight": Head(torch.zeros(131, 16)), "bias": torch.zeros(131)}, "bias: expected None beside a Head, .* got a tensor"),
])  # fmt: skip
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**make_case("cpu", bias=False) | change)


@pytest.mark.parametrize("module, old, new", [
    ("reference.linear_cross_entropy", "-logps * _at(self.class_weights, labels)", "-logps"),
    ("reference.linear_cross_entropy", "(mean_weight * lse - means)", "(lse - means)"),
    ("reference.linear_cross_entropy", "(1 - self.label_smoothing) * losses", "losses"),
    ("reference.linear_cross_entropy", "self.token_share * self.z_loss", "self.weight_share * self.z_loss"),
    ("reference.linear_cross_entropy", "(_at(class_weights.double(), labels) * keep).sum()", "count"),
    ("reference.linear_cross_entropy", "lse**2", "lse"),
    ("_head.sweeps", "derivatives[0], None, *derivatives[1:]", "derivatives[0], None, *derivatives[2:], None"),
    ("_head.rows", "self.means[chunk.span], ", "self.means[: chunk.stop - chunk.start], "),
    ("_head.rows", "statistics[ROW_MAX] + statistics[TOTAL].log()", "statistics[ROW_MAX]"),
    ("reference._rows", "best = logits.argmax(1)", "best = logits.argmin(1)"),
    ("reference._rows", "IGNORE_INDEX, best)", "IGNORE_INDEX, best.flip(0))"),
])  # fmt: skip
def test_mutants_do_not_pass(module, old, new, device, tmp_path, monkeypatch):
    use_mutant(module, old, new, tmp_path, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check(device, chunk_rows=7, **EVERYTHING)


@pytest.mark.parametrize("old, new", [
    ("logps, None, *others", "logps, None, *others[::-1]"),
    ("[head_rows.scatter(value) for value in head_rows.values()]",
     "[head_rows.scatter(head_rows.values()[0]) for value in head_rows.values()]"),
])  # fmt: skip
def test_mutants_of_the_values_do_not_pass(old, new, device, tmp_path, monkeypatch):
    use_mutant("_head.sweeps", old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check(device, chunk_rows=7, return_lse=True, **EVERYTHING)


@pytest.mark.parametrize("old, new", [
    ("lse = others[0]", "lse = others[-1]"),
    ("loss = loss.sum()", "loss = loss.mean()"),
    ("hits / count", "hits / hits"),
])  # fmt: skip
def test_mutants_of_the_op_do_not_pass(old, new, device, tmp_path):
    broken = mutant("soul_kernels.linear_cross_entropy", old, new, tmp_path).linear_cross_entropy
    with pytest.raises(AssertionError):
        check(device, loose(broken), return_lse=True, **EVERYTHING)


@pytest.mark.parametrize("old, new", [
    ("means[rows] = token_logprob.mean_logit(z, class_weights)", "means[rows] = token_logprob.mean_logit(z)"),
    ("at_label += (lse_coefficients * statistics[LOGP].exp())[:, None]", "at_label += 0.0"),
    ("coefficients = coefficients - lse_coefficients", "coefficients = coefficients + lse_coefficients"),
    ("mean_coefficients[rows, None], weights", "mean_coefficients[: len(z), None], weights"),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_mutants_without_kernels_do_not_pass(old, new, backend, device, tmp_path, monkeypatch):
    use_mutant("reference._rows", old, new, tmp_path, monkeypatch, BLOCK=300)
    with pytest.raises(AssertionError):
        check(device, backend=backend, chunk_rows=7, reduction="none", **EVERYTHING)  # other coefficients for each token


@pytest.mark.parametrize("old, new", [
    ("addend.share * tl.load(", "0.0 * tl.load("),
    ("coefficient -= lse_coefficient", "coefficient -= 0.0 * lse_coefficient"),
    ("tl.store(means_ptr + row.index, _mean_logit(", "tl.store(means_ptr + row.index, 0.5 * _mean_logit("),
])  # fmt: skip
def test_mutants_of_the_kernels_do_not_pass(old, new, device, tmp_path, monkeypatch):
    use_mutant("token_logprob", old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check(device, chunk_rows=7, **EVERYTHING)
