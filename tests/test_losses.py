"""Every objective against its definition on logits in fp64, written out here once more from the papers; from a flat guess to
memorised text, where unlearning starts."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import soul_kernels
from soul import losses
from soul_kernels import TokenBatch, TokenStatistics
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, assert_rows_close, loose, mutant

linear_logprob = loose(soul_kernels.linear_logprob)
linear_objective = loose(soul_kernels.linear_objective)
B, T, V = 6, 5, 1009  # an odd vocabulary
LENGTHS = [4, 2, 3, 3, 2, 3]  # ragged; two pairs of forget sequences, two retain sequences
IS_FORGET = torch.tensor([True] * 4 + [False] * 2)


def row_bytes(objective):
    """Scratch of a row in fp32: 1024 padded logits, which their gradient overwrites, and those of the reference."""
    return 1024 * (4 if objective.divergence is None else 8)


def labels_of(lengths=LENGTHS):
    """A prompt token first, then labels, then padding."""
    labels = torch.randint(V, (B, T + 1))
    labels[0, 1] = V - 1  # the last vocabulary entry
    for b, n in enumerate(lengths):
        labels[b, 0], labels[b, n + 1 :] = -100, -100
    return labels


def case_of(p, labels, device, anisotropic=False, dtype=torch.float32):
    """Hidden states and heads, of model and reference, for which every label has about the probability ``p``.

    The hidden states are rows of an orthogonal matrix, so that the logits can be chosen. In an anisotropic head all rows share
    a mean much larger than their spread, as real heads do: the gradient by hidden must not feel it.
    """
    labelled = (labels != -100).reshape(-1)
    n = int(labelled.sum())
    D = 32
    q = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0][:n]
    case = {}
    for name, noise in (("", 0.0), ("ref_", 0.3)):
        logits = torch.randn(n, V, dtype=torch.float64)
        if p is not None:
            others = logits.scatter(1, labels.reshape(-1)[labelled][:, None], -torch.inf).logsumexp(1)
            at_label = others + math.log1p(-(1 - p)) - math.log(1 - p) + noise * torch.randn(n, dtype=torch.float64)
            logits.scatter_(1, labels.reshape(-1)[labelled][:, None], at_label[:, None])
        else:
            logits *= 0  # flat: 1 / V
        weight = logits.T @ q
        if anisotropic:
            weight = weight + 4 * weight.norm(dim=1).mean() * F.normalize(torch.randn(D, dtype=torch.float64), dim=0)
        hidden = torch.randn(labels.numel(), D, dtype=torch.float64)
        hidden[labelled] = q
        case[f"{name}hidden"] = hidden.view(*labels.shape, D).to(device, dtype)
        case[f"{name}weight"] = weight.to(device, dtype)
    for name in ("hidden", "weight"):
        case[name].requires_grad_()
    return case | {"labels": labels.to(device), "is_forget": IS_FORGET.to(device)}


def logits_of(case):
    return tuple(case[f"{name}hidden"].double() @ case[f"{name}weight"].double().T for name in ("", "ref_"))


def mean(values, mask):
    return (values * mask).sum() / mask.sum()


class Definitions:
    """What the papers say, on logits z and z_ref [B, T, V] in fp64: S_b, F and R as in ``soul.losses``."""

    def __init__(self, case):
        z, z_ref = logits_of(case)
        labels = case["labels"].clamp(min=0)[..., None]
        self.mask = case["labels"] != -100
        self.forget, self.retain = (self.mask & flag[:, None] for flag in (case["is_forget"], ~case["is_forget"]))
        self.sequences = case["is_forget"] & self.mask.any(1)
        rest = z.scatter(-1, labels, -torch.inf)
        self.lse_rest = rest.logsumexp(-1)
        at_label = z.gather(-1, labels)[..., 0]
        self.logp = F.logsigmoid(at_label - self.lse_rest)
        self.log_rest = F.logsigmoid(self.lse_rest - at_label)
        self.S = (self.logp * self.mask).sum(1)
        self.log_ps = z.log_softmax(-1)
        self.log_qs = z_ref.log_softmax(-1)
        self.ref = (z_ref.log_softmax(-1).gather(-1, labels)[..., 0] * self.mask).sum(1).detach()
        self.z_ref = z_ref.detach()
        self.labels = labels
        self.rest = rest

    def ce(self, which):
        return -mean(self.logp, which)

    def kl(self):
        q = self.log_qs.exp()
        return mean((q * (self.log_qs - self.log_ps)).sum(-1), self.retain)

    def kl_terms(self, hidden):
        """The sizes [V] of what cancels in the rows of dW: both probabilities of an entry, times the hidden states."""
        both = (self.log_ps.exp() + self.log_qs.exp())[self.retain]
        return (both.T @ hidden[self.retain].abs()).norm(dim=1) / self.retain.sum()

    def soul_kl(self):
        return mean(-(self.log_ps.exp() * torch.log(self.log_qs.exp() + 1e-12)).sum(-1), self.retain)

    def npo(self, beta):
        odds = torch.exp(beta * (self.S - self.ref))  # (pi / pi_ref)^beta
        return (2 / beta) * torch.log1p(odds)[self.sequences].mean()

    def npo_token_mean(self, beta):
        ratio = (self.S - self.ref)[self.sequences].sum() / self.forget.sum()
        return (2 / beta) * torch.log1p(torch.exp(beta * ratio))

    def simnpo(self, beta, delta):
        per_token = self.S / self.mask.sum(1).clamp(min=1)
        return -(2 / beta) * F.logsigmoid(-beta * (per_token + delta))[self.sequences].mean()

    def dpo(self, beta, factor):
        ratios = self.S - self.ref
        both = self.sequences[0:4:2] & self.sequences[1:4:2]
        return -factor * F.logsigmoid(beta * (ratios[1:4:2] - ratios[0:4:2]))[both].mean()

    def wga(self, beta):
        return mean(self.logp.detach().exp() ** beta * self.logp, self.forget)

    def satimp(self, beta1, beta2):
        weight = self.logp.detach().exp() ** beta1 * self.log_rest.detach().exp() ** beta2
        return mean(weight * self.logp, self.forget)

    def ceu(self, first):
        counted = self.forget & (self.mask.cumsum(1) > first)
        q = (self.rest - self.lse_rest[..., None]).exp().detach()
        return mean(-(q * self.log_ps).sum(-1), counted)

    def undial(self, beta):
        lowered = self.z_ref.scatter_add(-1, self.labels, torch.full_like(self.z_ref[..., :1], -beta))
        return mean(-(lowered.softmax(-1) * self.log_ps).sum(-1), self.forget)


# Weights other than 1, so that a dropped one shows.
W = dict(gamma=0.7, alpha=1.3)
OBJECTIVES = {
    "ga": (losses.GradAscent(gamma=0.7), lambda d: -0.7 * d.ce(d.forget)),
    "graddiff": (losses.GradDiff(**W), lambda d: -0.7 * d.ce(d.forget) + 1.3 * d.ce(d.retain)),
    "graddiff, kl": (losses.GradDiff(**W, retain="kl"), lambda d: -0.7 * d.ce(d.forget) + 1.3 * d.kl()),
    "graddiff, soul_kl": (losses.GradDiff(**W, retain="soul_kl"), lambda d: -0.7 * d.ce(d.forget) + 1.3 * d.soul_kl()),
    "klmin": (losses.KLMin(**W), lambda d: -0.7 * d.ce(d.forget) + 1.3 * d.kl()),
    "po": (losses.PO(**W), lambda d: 0.7 * d.ce(d.forget) + 1.3 * d.ce(d.retain)),
    "npo": (losses.NPO(beta=0.2, **W), lambda d: 0.7 * d.npo(0.2) + 1.3 * d.ce(d.retain)),
    "npo, kl": (losses.NPO(beta=0.2, **W, retain="kl"), lambda d: 0.7 * d.npo(0.2) + 1.3 * d.kl()),
    "npo, token_mean": (
        losses.NPO(beta=0.2, **W, reduction="token_mean"),
        lambda d: 0.7 * d.npo_token_mean(0.2) + 1.3 * d.ce(d.retain),
    ),
    "simnpo": (losses.SimNPO(beta=2.5, delta=0.4, **W), lambda d: 0.7 * d.simnpo(2.5, 0.4) + 1.3 * d.ce(d.retain)),
    "dpo": (losses.DPO(beta=0.2, **W), lambda d: 0.7 * d.dpo(0.2, 10.0) + 1.3 * d.ce(d.retain)),
    "dpo, factor 1": (losses.DPO(beta=0.2, factor="1", **W), lambda d: 0.7 * d.dpo(0.2, 1.0) + 1.3 * d.ce(d.retain)),
    "wga": (losses.WGA(beta=1.5, **W), lambda d: 0.7 * d.wga(1.5) + 1.3 * d.ce(d.retain)),
    "satimp": (losses.SatImp(beta1=5.0, beta2=0.5, **W), lambda d: 0.7 * d.satimp(5.0, 0.5) + 1.3 * d.ce(d.retain)),
    "ceu": (losses.CEU(ignore_first=1, **W), lambda d: 0.7 * d.ceu(1) + 1.3 * d.ce(d.retain)),
    "undial": (losses.UNDIAL(beta=3.0, **W), lambda d: 0.7 * d.undial(3.0) + 1.3 * d.ce(d.retain)),
    "undial, kl": (losses.UNDIAL(beta=3.0, **W, retain="kl"), lambda d: 0.7 * d.undial(3.0) + 1.3 * d.kl()),
}
# None: uniform, 1 / V. 1 - 1e-7, 1 - 1e-10: beyond what softmax - 1 can say in fp32.
PROBABILITIES = [None, 0.5, 0.99, 0.9999, 1 - 1e-7, 1 - 1e-10]


def copy_of(objective, module):
    """Return the same objective from another version of the module."""
    options = {name: value for name, value in vars(objective).items() if name != "key"}
    if isinstance(objective, (losses.GradAscent, losses.KLMin)):
        options = {"gamma": objective.gamma} | ({} if isinstance(objective, losses.GradAscent) else {"alpha": objective.alpha})
    return getattr(module, type(objective).__name__)(**options)


def check(name, p, device, *, module=losses, anisotropic=False, backend="triton", lengths=LENGTHS, chunk_rows=1000):
    """Value and gradients of an objective against its definition; raises AssertionError if they are off."""
    objective, define = OBJECTIVES[name]
    if module is not losses:  # a mutant: the same objective from there
        objective = copy_of(objective, module)
    torch.manual_seed(1)
    case = case_of(p, labels_of(lengths), device, anisotropic)
    double = {name: v.detach().double() if v.is_floating_point() else v for name, v in case.items()}
    for leaf in ("hidden", "weight"):
        double[leaf].requires_grad_()
    definitions = Definitions(double)
    want = define(definitions)
    ref_logps = definitions.ref.float()
    want_grads = torch.autograd.grad(want, [double["hidden"], double["weight"]])
    loss = linear_objective(
        **case, objective=objective, ref_logps=ref_logps, backend=backend, chunk_bytes=chunk_rows * row_bytes(objective)
    )
    memorised = p is not None and p > 1 - 1e-6
    limit = tol.ONE_MINUS_P if memorised else tol.GRAD_OBJECTIVE
    assert_close(loss, want, limit, f"{name}: loss")
    for which, got, expected in zip(("dX", "dW"), torch.autograd.grad(loss, [case["hidden"], case["weight"]]), want_grads):
        assert_close(got, expected, limit, f"{name}: {which}")
        if "kl" not in name:
            assert_rows_close(got, expected, tol.WORST_ROW_FP32 + limit, f"{name}: {which}")
        elif which == "dX":
            assert_rows_close(got, expected, tol.WORST_ROW_KL, f"{name}: dX")
        else:
            assert_rows_close(got, expected, tol.GRAD_OBJECTIVE, f"{name}: dW", definitions.kl_terms(double["hidden"]))


# The objectives are the same code whatever sweeps over the rows: without kernels the ends and one probability between them.
@pytest.mark.parametrize("p, backend", [
    pytest.param(p, backend, marks=[] if backend == "triton" or p in (None, 0.99, 1 - 1e-10) else
                 pytest.mark.slow(reason="probabilities between those that are always tested"))
    for backend in ("triton", "torch") for p in PROBABILITIES
], indirect=["backend"])  # fmt: skip
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_from_uniform_predictions_to_memorised_text(name, p, backend, device):
    check(name, p, device, backend=backend)


# An anisotropic head, and chunks of 7 rows: some objectives are cut within sequences, some between, some between pairs.
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_anisotropic_head_in_chunks(name, backend, device):
    check(name, 0.5, device, backend=backend, anisotropic=True, chunk_rows=7)


# 0: a sequence that is ignored as a whole (and with it, for DPO, its pair); one kept token; 5 tokens in chunks of 4: a sequence
# longer than a chunk takes two sweeps.
@pytest.mark.parametrize("lengths", [[4, 2, 0, 3, 0, 3], [1, 1, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5]])
@pytest.mark.parametrize("name", ["npo, kl", "dpo", "simnpo", "ceu", "undial, kl"])
def test_ragged_batches(name, lengths, backend, device):
    if name == "ceu" and max(lengths) == 1:
        lengths = [2, 1, 1, 1, 1, 1]  # the first token of each sequence does not count: one is left
    check(name, 0.99, device, backend=backend, lengths=lengths, chunk_rows=4)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.covers("objectives that are sums over sequences", "one process")
@pytest.mark.covers("NPO with one ratio of the batch", "one process")
def test_references_agree_with_the_definitions(name, device):
    for p in (0.5, 1 - 1e-7):  # there -log p is below what log_softmax can say
        check(name, p, device, backend="reference")


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_labels_ignored(name, backend, device):
    case = case_of(None, labels_of(), device)
    case["labels"].fill_(-100)
    ref_logps = torch.zeros(B, device=device)
    loss = linear_objective(**case, objective=OBJECTIVES[name][0], ref_logps=ref_logps, backend=backend)
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, [case["hidden"], case["weight"]]):
        assert (gradient == 0).all()


def derivative_at(objective, logps):
    """Return the value of an objective at log-probabilities, and its derivatives by them."""
    batch = TokenBatch.from_labels(labels_of(), IS_FORGET, torch.zeros(B))
    divergences = torch.zeros_like(logps) if objective.divergence else None
    entropies = TokenStatistics(*(torch.ones_like(logps) for _ in TokenStatistics._fields))
    batch = dataclasses.replace(batch, divergences=divergences, ref_entropies=divergences, statistics=entropies)
    leaf = logps.requires_grad_()
    value = objective(leaf, batch)
    if not value.requires_grad:
        return value, torch.zeros_like(logps)
    return value, torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_linear_exactly_if_it_says_so(name):
    """At log-probabilities of 0 it is 0, and its derivatives are those at any others, constants that it detaches included."""
    objective = OBJECTIVES[name][0]
    value, want = derivative_at(objective, torch.zeros(B, T + 1))
    _, got = derivative_at(objective, -torch.rand(B, T + 1))
    independent = torch.equal(got, want)
    assert independent == (objective.linear or "undial" in name)  # whose derivatives by divergences are no less constant
    assert value == 0.0 or not objective.linear


def test_another_formula_does_not_inherit_that_it_is_linear():
    class Weighted(losses.GradDiff):
        def forget(self, logps, batch):
            return -super().forget(logps.detach().exp() * logps, batch)

    class Renamed(losses.GradDiff):
        pass

    class Claimed(Weighted):
        linear = True

    assert [cls.linear for cls in (losses.GradDiff, Weighted, Renamed, Claimed, losses.KLMin, losses.WGA)] == [
        True, False, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("name, value", [
    ("npo", 0.7 * (2 / 0.2) * math.log(2)),
    ("npo, token_mean", 0.7 * (2 / 0.2) * math.log(2)),
    ("dpo", 0.7 * (2 / 0.2) * math.log(2)),
    ("dpo, factor 1", 0.7 * math.log(2)),
])  # fmt: skip
def test_at_the_reference_the_ratio_is_exactly_zero(name, value, backend, device):
    """The reference's log-probabilities come from the same kernels: logsigmoid(0), to the last bit."""
    case = case_of(0.9999, labels_of(), device)
    case = {key: tensor for key, tensor in case.items() if not key.startswith("ref_")}
    head = {key: case[key] for key in ("hidden", "weight", "labels")}
    ref_logps = linear_logprob(**head, backend=backend).detach().sum(1)
    objective = copy.copy(OBJECTIVES[name][0])
    objective.alpha = 0.0
    loss = linear_objective(**case, objective=objective, ref_logps=ref_logps, backend=backend)
    assert loss.item() == torch.tensor(value, dtype=torch.float64).float().item()


@pytest.mark.parametrize("chunk_rows", [1000, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_reference_kl_and_its_gradient_are_exactly_zero(dtype, chunk_rows, backend, device):
    case = case_of(0.99, labels_of(), device, dtype=dtype)
    case["ref_hidden"] = case["hidden"].detach()
    case["ref_weight"] = case["weight"].detach()
    objective = losses.GradDiff(gamma=0.0, retain="kl")
    loss = linear_objective(**case, objective=objective, backend=backend, chunk_bytes=chunk_rows * row_bytes(objective))
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, [case["hidden"], case["weight"]]):
        assert (gradient == 0).all()


def test_limits(backend, device):
    """NPO for beta -> 0, and WGA and SatImp with exponents of 0, are gradient ascent (SatImp, WGA: also in value)."""
    case = case_of(0.5, labels_of([3] * 6), device)
    del case["ref_hidden"], case["ref_weight"]
    ref_logps = torch.full((B,), -3.0, device=device)

    def gradient(objective):
        loss = linear_objective(**case, objective=objective, ref_logps=ref_logps, backend=backend)
        return torch.autograd.grad(loss, case["hidden"])[0]

    ascent = gradient(losses.GradDiff())
    retain = gradient(losses.GradDiff(gamma=0.0))
    assert_close(gradient(losses.WGA(beta=0.0)), ascent, 1e-6, "WGA")
    assert_close(gradient(losses.SatImp(beta1=0.0, beta2=0.0)), ascent, 1e-6, "SatImp")
    # S is a sum over three tokens and the mean is over sequences: three times the mean over tokens
    assert_close(gradient(losses.NPO(beta=1e-4)) - retain, 3 * (ascent - retain), 1e-3, "NPO")


def test_ceu_of_improbable_labels(device):
    """Its coefficient is p / (1 - p), down to p = 1e-9: expm1 alone rounds it to multiples of 6e-8."""
    logps = torch.tensor([[-0.7, -0.69, -9.0, -12.0, -17.0, -20.0]], device=device, requires_grad=True)
    zeros = torch.zeros_like(logps.detach())
    batch = TokenBatch.from_labels(torch.zeros(1, 6, dtype=torch.int64, device=device))
    batch = dataclasses.replace(batch, statistics=TokenStatistics(*[zeros] * 5))
    (got,) = torch.autograd.grad(losses.CEU(ignore_first=0, alpha=0.0)(logps, batch), logps)
    p = logps.detach().double().exp()
    assert ((6 * got.double() * (1 - p) / p - 1).abs() < 1e-6).all()


def test_copies_and_pickles_have_a_number_of_their_own():
    objective = losses.UNDIAL(beta=3.0)
    for twin in (copy.deepcopy(objective), copy.copy(objective), pickle.loads(pickle.dumps(objective))):
        assert (
            twin.key != objective.key and repr(twin) == repr(objective) == "UNDIAL(gamma=1.0, alpha=1.0, retain='ce', beta=3.0)"
        )


def test_to_memorize_is_the_cross_entropy_of_the_rows(device):
    labels = torch.tensor([[3, 4, -100], [5, -100, -100], [6, 7, 8]], device=device)
    logps = torch.where(labels == -100, 0.0, -torch.rand(3, 3, device=device))
    batch = TokenBatch.from_labels(labels, torch.tensor([True, True, False], device=device))
    assert losses.Memorize()(logps, batch) == pytest.approx(-logps[:2].sum().item() / 3)
    assert losses.Memorize(**W)(logps, batch) == losses.PO(**W)(logps, batch)  # whose answers are relabelled beforehand
    assert not losses.Memorize.relabels and losses.Memorize not in losses.OBJECTIVES.values()


def test_get_knows_all_and_names_them():
    for name, objective in losses.OBJECTIVES.items():
        assert isinstance(losses.get(name), objective)
    assert losses.get("dpo", factor="1", retain="kl").divergence.kind == "kl"
    with pytest.raises(ValueError, match="method: expected one of 'ga', .*'undial', got 'rmu'"):
        losses.get("rmu")
    with pytest.raises(ValueError, match=r"method: expected options of WGA \(beta, gamma, alpha, retain\), got delta"):
        losses.get("wga", delta=1.0)


@pytest.mark.parametrize("name, options, message", [
    ("simnpo", {"beta": 0.0}, "beta: expected a positive number, got 0.0"),
    ("dpo", {"factor": 2}, "factor: expected one of '2/beta', '1', got 2"),
    ("dpo", {"beta": float("inf")}, "beta: expected a positive number, got inf"),
    ("ceu", {"ignore_first": -1}, "ignore_first: expected an integer >= 0, got -1"),
    ("undial", {"retain": "soul_kl"}, "retain: expected one of 'ce', 'kl', got 'soul_kl'"),
    ("graddiff", {"retain": "mse"}, "retain: expected one of 'ce', 'kl', 'soul_kl', got 'mse'"),
    ("wga", {"beta": -1.0}, "beta: expected a number >= 0.0, got -1.0"),
    ("satimp", {"beta2": float("nan")}, "beta2: expected a number >= 0.0, got nan"),
    ("klmin", {"gamma": -1.0}, "gamma: expected a number >= 0.0, got -1.0"),
])  # fmt: skip
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        losses.get(name, **options)


def test_an_objective_says_what_it_lacks(device):
    case = case_of(0.5, labels_of(), device)
    without = {key: value for key, value in case.items() if key != "ref_hidden"}
    with pytest.raises(ValueError, match="reference.hidden: expected .* hidden states of the reference model, got None"):
        linear_objective(**without, objective=losses.KLMin())
    without = {key: value for key, value in case.items() if key != "ref_weight"}
    with pytest.raises(
        ValueError, match="reference.weight: expected the head of the reference model beside a weight that is trained"
    ):
        linear_objective(**without, objective=losses.KLMin())
    with pytest.raises(ValueError, match="ref_logps: expected one value per sequence, got None"):
        linear_objective(**case, objective=losses.DPO())


@pytest.mark.parametrize("name, old, new", [
    ("npo, kl", "batch.divergences * (batch.mask & ~", "batch.divergences * (batch.mask & "),  # KL of the forget tokens
    ("simnpo", "mean + self.delta", "mean - self.delta"),
    ("simnpo", "/ batch.lengths.clamp(min=1)", "/ batch.lengths.mean()"),
    ("dpo", "refusal - answer", "answer - refusal"),
    ("dpo", "batch.whole.is_forget & batch.whole.mask", "batch.is_forget & batch.mask"),  # pairs of a part only
    ("wga", "torch.exp(self.beta * logps.detach())", "torch.exp(self.beta * logps)"),  # differentiated
    ("satimp", "self.beta1 * constant", "self.beta2 * constant"),
    ("ceu", "batch.mask.cumsum(1) > self", "batch.mask.cumsum(1) >= self"),
    ("ceu", "entropy - log_rest", "-log_rest"),
    ("ceu", "-torch.expm1(torch.where(likely, logps, -1.0))", "1 - torch.exp(torch.where(likely, logps, -1.0))"),  # softmax - 1
    ("undial", "batch.divergences + batch.ref_entropies", "batch.divergences"),
    ("undial", '"kl", self.beta)', '"kl", 0.0)'),
])  # fmt: skip
def test_mutants_do_not_pass(name, old, new, device, tmp_path):
    broken = mutant("soul.losses", old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(name, 0.9999 if "expm1" in old else 0.5, device, module=broken, chunk_rows=7)
        check(name, 1 - 1e-7, device, module=broken)
