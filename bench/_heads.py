"""Inputs, losses in plain PyTorch, the floor, and errors for the benchmarks of ops on hidden states and a head.

Every variant of a case is a function of the same `Inputs`. It returns the loss, or the loss and a detail: a value of every
token ([B, T] floating point), or the labels that it drew ([B, T] int64). `make_case` turns such functions into a case: it
checks them against fp64 on flat and on peaked inputs, and times forward and backward on the flat ones.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F

from bench._harness import Case, Errors, compiled
from soul.losses import NPO, PO, GradDiff, KLMin, Objective
from soul_kernels import LinearOptions, Reference, TokenBatch, linear_gnb, linear_objective
from soul_kernels.reference.kl_divergence import kl_divergence, ref_log_probabilities
from soul_kernels.reference.token_logprob import token_logprob

FLOOR = "bare GEMMs"
BF16_LOGITS = "ours, bf16 logits"
FLOOR_ROWS = 4096  # of a chunk: more are not faster
EXACT_ROWS = 512  # of a chunk in fp64: half a GiB a tensor at V 128256
SLICE = 8192  # rows of dW that are compared at a time
SHAPES = ((2048, 128256), (4096, 32000), (4096, 128256))  # D, V: Llama-3.2-1B, LLaMA-2-7B, Llama-3-8B
SIZES = (4096, 512, 16384)  # N: tokens of a batch
SMALL, QUICK = (256, 128, 4000), (32, 64, 1000)  # N, D, V where there is no GPU
# Each is over all tokens of the batch; GradDiff and NPO need forget and retain sequences, and get half of each.
LOSSES: dict[str, Objective] = {
    "CE": PO(alpha=0.0),
    "GradDiff": GradDiff(),
    "NPO": NPO(),
    "KL": KLMin(gamma=0.0),
    "GNB": PO(alpha=0.0),
}


@dataclasses.dataclass
class Inputs:
    """Inputs of a loss. No token is ignored, so that the work is equal whether a variant drops ignored tokens or not.

    Attributes:
        hidden: [B, T, D], requires grad.
        weight: [V, D], requires grad unless the head is frozen.
        labels: [B, T] int64.
        is_forget: [B] bool.
        ref_logps: [B] fp32, or None.
        ref_hidden: [B, T, D] of the reference model, close to hidden, or None.
        uniforms: [B, T] fp32, from which labels are drawn, or None.
        keep: [B, T] bool, true for tokens with a label.
        token_indices: [R] int64 on the CPU, their flat indices: ours need not wait for the device to find them.
        is_forget_on_cpu: ``is_forget`` on the CPU, for the same reason.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    is_forget: torch.Tensor
    ref_logps: torch.Tensor | None = None
    ref_hidden: torch.Tensor | None = None
    uniforms: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.labels >= 0).all(), "an ignored token would be less work for variants that drop it"
        self.keep = torch.ones_like(self.labels, dtype=torch.bool)
        self.token_indices = torch.arange(self.labels.numel())
        self.is_forget_on_cpu = self.is_forget.cpu()

    @property
    def reference(self) -> Reference:
        """The reference model: its head has the same numbers as the model's, frozen."""
        assert self.ref_hidden is not None, "inputs of a loss without a reference model"
        return Reference(self.ref_hidden, self.weight.detach())

    @property
    def trained(self) -> list[torch.Tensor]:
        """The tensors whose gradients are computed."""
        return [tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad]

    @property
    def flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [N, D] and labels [N]."""
        return self.hidden.flatten(0, 1), self.labels.flatten()


Output: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # a loss, or a loss and a detail
Function: TypeAlias = Callable[[Inputs], Output]
Functions: TypeAlias = Mapping[str, Callable[[], Function]]  # name of a variant -> function that makes it
Exact: TypeAlias = tuple[float, torch.Tensor, float | None, torch.Tensor, torch.Tensor | None]


def make_inputs(
    loss: str, n: int, d: int, n_vocab: int, device: torch.device, dtype: torch.dtype, *, frozen: bool
) -> dict[str, Inputs]:
    """Return ``{"flat": Inputs, "peaked": Inputs}`` for one of `LOSSES`; they share head and labels.

    Flat: logits of standard deviation 2, as before training: p(label) about 1 / V. Peaked: every label has p between 0.98 and
    0.9999 or so, as in memorised text, which is where unlearning starts and where 1 - p is easily lost.
    """
    B = 8
    shape = (B, n // B)
    weight = (torch.randn(n_vocab, d, device=device, dtype=dtype) * (2 / d**0.5)).requires_grad_(not frozen)
    labels = torch.randint(n_vocab, shape, device=device)
    n_forget = {"GradDiff": B // 2, "NPO": B // 2, "KL": 0}.get(loss, B)
    is_forget = torch.arange(B, device=device) < n_forget
    flat = torch.randn(*shape, d, device=device, dtype=dtype)
    at_label = weight.detach()[labels].float()
    gap = torch.empty(*shape, 1, device=device).uniform_(4.0, 9.0)  # log(p / (1 - p))
    share = (math.log(n_vocab) + 0.5 + gap) / at_label.square().sum(-1, keepdim=True)
    inputs_of = {}
    for kind, hidden in (("flat", flat), ("peaked", (0.5 * flat + share * at_label).to(dtype))):
        inputs = Inputs(hidden.requires_grad_(), weight, labels, is_forget)
        if loss == "NPO":  # a little off the model itself, where no sequence is saturated
            inputs.ref_logps = summed_logps(inputs) + 3 * torch.randn(B, device=device)
        if loss == "KL":
            inputs.ref_hidden = (hidden + 0.1 * torch.randn_like(hidden)).detach()
        if loss == "GNB":
            inputs.uniforms = torch.rand(*shape, device=device)
        inputs_of[kind] = inputs
    return inputs_of


@torch.no_grad()
def summed_logps(inputs: Inputs) -> torch.Tensor:
    """Return the log-probability of each sequence, [B] fp32."""
    x, labels = inputs.flat
    chunks = zip(x.split(EXACT_ROWS), labels.split(EXACT_ROWS))
    logps = [-F.cross_entropy((x @ inputs.weight.T).float(), labels, reduction="none") for x, labels in chunks]
    return torch.cat(logps).view(inputs.labels.shape).sum(1)


def eager_objective(inputs: Inputs, objective: Objective) -> Output:
    """Apply an objective as a careful user writes it: logits rounded to the dtype of the inputs, then fp32; log-softmax."""
    x, labels = inputs.flat
    logits = (x @ inputs.weight.T).float()
    logps = -F.cross_entropy(logits, labels, reduction="none").view(inputs.labels.shape)
    return objective(logps, TokenBatch.from_labels(inputs.labels, inputs.is_forget, inputs.ref_logps)), logps.detach()


def eager_kl(inputs: Inputs) -> Output:
    """Return the mean of ``KL(reference model || model)`` from fp32 log-softmaxes of both."""
    x, _ = inputs.flat
    log_p = (x @ inputs.weight.T).float().log_softmax(-1)
    with torch.no_grad():
        log_q = (inputs.reference.hidden.flatten(0, 1) @ inputs.weight.detach().T).float().log_softmax(-1)
    values = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return values.mean(), values.detach().view(inputs.labels.shape)


def eager_gnb(inputs: Inputs) -> Output:
    """Return the cross-entropy with labels from ``torch.multinomial``."""
    x, _ = inputs.flat
    logits = (x @ inputs.weight.T).float()
    labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
    return F.cross_entropy(logits, labels), labels.view(inputs.labels.shape)


def bare_gemms(inputs: Inputs, with_ref: bool) -> None:
    """Compute the matrix products alone, in chunks, in the dtype of the inputs: the floor.

    There are 3 with a trained head (logits, dX, dW), 2 with a frozen one, and 1 more for the logits of a reference model.
    """
    x, _ = inputs.flat
    x = x.detach()
    w = inputs.weight.detach()
    ref_x = inputs.reference.hidden.flatten(0, 1) if with_ref else None
    rows = min(len(x), FLOOR_ROWS)
    logits = torch.empty(rows, w.shape[0], device=x.device, dtype=x.dtype)
    dx = torch.empty_like(x)
    dw = torch.empty_like(w) if inputs.weight.requires_grad else None
    for start in range(0, len(x), rows):
        chunk = x[start : start + rows]
        z = logits[: len(chunk)]
        if ref_x is not None:
            torch.mm(ref_x[start : start + rows], w.T, out=z)
        torch.mm(chunk, w.T, out=z)
        torch.mm(z, w, out=dx[start : start + rows])
        if dw is not None:
            torch.mm(z.T, chunk, out=dw)


def train(function: Function, inputs: Inputs) -> None:
    """Run forward and backward once; all gradients are formed anew and dropped."""
    assert inputs.hidden.grad is None and inputs.weight.grad is None
    loss, _ = split(function(inputs))
    try:
        loss.backward()
        assert inputs.hidden.grad is not None and (inputs.weight.grad is not None) == inputs.weight.requires_grad
    finally:  # a peer may run out of memory half-way; the next variant starts without gradients all the same
        inputs.hidden.grad = inputs.weight.grad = None


def split(output: Output) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return loss and detail of an output; the detail may be None."""
    return output if isinstance(output, tuple) else (output, None)


def exact(inputs: Inputs, objective: Objective, labels: torch.Tensor) -> Exact:
    """Return a loss and its gradients in fp64 on the same inputs, computed a chunk of rows at a time.

    Returns:
        Loss; log-probabilities (or divergences) of the tokens [B, T]; where there are uniforms, the largest distance of one
        from the interval of its label in the cumulated probabilities, else None; dX [N, D]; dW [V, D], or None for a frozen
        head.
    """
    x = inputs.hidden.detach().flatten(0, 1).double()
    w = inputs.weight.detach().double()
    labels_of = labels.flatten()
    chunks = [slice(start, start + EXACT_ROWS) for start in range(0, len(x), EXACT_ROWS)]

    def log_q(rows: slice) -> torch.Tensor:
        return ref_log_probabilities(inputs.reference.hidden.flatten(0, 1)[rows].double() @ w.T, labels_of[rows])

    def misses(logits: torch.Tensor, uniforms: torch.Tensor, rows: slice) -> torch.Tensor:
        p = logits.softmax(1)
        upper, u = p.cumsum(1), uniforms.flatten()[rows].double()
        at = labels_of[rows, None]
        high, share = upper.gather(1, at)[:, 0], p.gather(1, at)[:, 0]
        return torch.maximum(u - high, high - share - u).clamp(min=0)

    logps: list[torch.Tensor] = []
    divergences: list[torch.Tensor] = []
    missed: list[torch.Tensor] = []
    for rows in chunks:
        logits = x[rows] @ w.T
        logps.append(token_logprob(logits, labels_of[rows]))
        if inputs.ref_hidden is not None:
            divergences.append(kl_divergence(logits, labels_of[rows], log_q(rows)))
        if inputs.uniforms is not None:
            missed.append(misses(logits, inputs.uniforms, rows))
    leaves = [torch.cat(values).view(labels.shape).requires_grad_() for values in (logps, divergences) if values]
    batch = TokenBatch.from_labels(labels, inputs.is_forget, inputs.ref_logps)
    if divergences:
        batch = dataclasses.replace(batch, divergences=leaves[1])
    loss = objective(leaves[0], batch)
    derivatives: tuple[torch.Tensor | None, ...] = torch.autograd.grad(loss, leaves, allow_unused=True)
    coefficients = [c.flatten() if c is not None else torch.zeros(len(x), device=x.device) for c in derivatives]

    dx = torch.empty_like(x)
    dw = torch.zeros_like(w) if inputs.weight.requires_grad else None
    for rows in chunks:
        logits = (x[rows] @ w.T).requires_grad_()
        value = (coefficients[0][rows] * token_logprob(logits, labels_of[rows])).sum()
        if divergences:
            value = value + (coefficients[1][rows] * kl_divergence(logits, labels_of[rows], log_q(rows))).sum()
        (dz,) = torch.autograd.grad(value, logits)
        torch.mm(dz, w, out=dx[rows])
        if dw is not None:
            dw.addmm_(dz.T, x[rows])
    return loss.item(), leaves[-1].detach(), torch.cat(missed).max().item() if missed else None, dx, dw


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the relative error in the Frobenius norm, computed some rows at a time."""
    squares = [((a.double() - b).square().sum(), b.square().sum()) for a, b in zip(got.split(SLICE), want.split(SLICE))]
    wrong, right = (torch.stack(values).sum() for values in zip(*squares))
    return (wrong / right).sqrt().item()


def errors_of(output: Output, inputs: Inputs, objective: Objective, exact_result: Callable[[], Exact]) -> dict[str, float]:
    """Return the errors of one function's output: of the loss and the detail absolute, of the gradients relative.

    The error of the loss is relative where it is above 1. ``exact_result`` returns `exact` for the labels of the inputs.
    """
    loss, detail = split(output)
    gradients = torch.autograd.grad(loss, inputs.trained)
    drawn = detail if detail is not None and detail.dtype == torch.int64 else None
    want, values, missed, *want_gradients = exact_result() if drawn is None else exact(inputs, objective, drawn)
    errors = {"loss": abs(loss.item() - want) / max(1.0, abs(want))}
    if drawn is not None and missed is not None:
        errors["draw"] = missed
    elif detail is not None and drawn is None:
        errors["log p" if inputs.ref_hidden is None else "KL"] = (detail.double() - values).abs().max().item()
    for name, a, b in zip(("dX", "dW"), gradients, want_gradients):
        assert b is not None, "a gradient of a frozen head"
        errors[name] = relative(a.flatten(0, -2), b)
        if name == "dW" and a.dtype != torch.float32:
            errors["dW before rounding"] = before_rounding(a, b, errors[name])
    return errors


def before_rounding(got: torch.Tensor, want: torch.Tensor, error: float) -> float:
    """Return the relative error that ``got`` had before it was rounded: the two are independent, so their squares add up.

    Args:
        got: of a dtype below fp32.
        want: fp64, the same shape.
        error: relative error of ``got``.
    """
    of_rounding = relative(want.to(got.dtype), want)
    return max(error**2 - of_rounding**2, 0.0) ** 0.5


def check(
    functions: Functions, inputs_of: dict[str, Inputs], objective: Objective, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Return the errors of every variant that runs, by its name; raise AssertionError where ours is wrong.

    bf16 gradients are off by 1.7e-3 because they are rounded once. Errors in fp32, and of what is fp32 in either case (loss,
    values of the tokens), come from the order of sums; those of cumulated probabilities are over the whole vocabulary. With
    bf16 logits, eager PyTorch reaches 1.5e-2 in log p and, where p is close to 1, 1.7e-2 in gradients.
    """
    gates = {"loss": 1e-4, "log p": 1e-4, "KL": 1e-4, "draw": 1e-4, "dX": 4e-3, "dW": 4e-3, "dW before rounding": 4e-3}
    if dtype == torch.float32:
        gates |= {"dX": 1e-4, "dW": 1e-4}
    rounded = gates | {"loss": 1e-3, "log p": 6e-2} | dict.fromkeys(("dX", "dW", "dW before rounding"), 0.1)
    errors_by_name: dict[str, dict[str, float]] = {}
    for kind, inputs in inputs_of.items():
        exact_result = functools.cache(functools.partial(exact, inputs, objective, inputs.labels))
        for name, make in functions.items():
            is_ours = name.startswith("ours")
            own_inputs = inputs if is_ours else dataclasses.replace(inputs, uniforms=None)  # a peer draws its own numbers
            try:
                errors = errors_of(make()(own_inputs), own_inputs, objective, exact_result)
            except Exception:  # a peer that does not run here says why when it is to be timed
                if is_ours:
                    raise
                continue
            if is_ours:
                limits = rounded if name == BF16_LOGITS else gates
                wrong = {key: value for key, value in errors.items() if not value < limits[key]}
                assert not wrong, f"{name}, {kind} inputs: {wrong}"
            errors_by_name.setdefault(name, {}).update({f"{key} {kind}": value for key, value in errors.items()})
    return errors_by_name


def ours(loss: str, chunk_bytes: int | None = None, logits_dtype: torch.dtype = torch.float32) -> Function:
    """Return one of `LOSSES` computed by our ops."""
    objective = LOSSES[loss]

    def options_of(inputs: Inputs) -> LinearOptions:
        return LinearOptions(token_indices=inputs.token_indices, chunk_bytes=chunk_bytes, logits_dtype=logits_dtype)

    def gnb(inputs: Inputs) -> Output:
        return linear_gnb(inputs.hidden, inputs.weight, inputs.keep, uniforms=inputs.uniforms, options=options_of(inputs))

    def kl(inputs: Inputs) -> Output:
        return linear_objective(
            inputs.hidden, inputs.weight, inputs.labels, objective, is_forget=inputs.is_forget_on_cpu,
            reference=inputs.reference, options=options_of(inputs),
        )  # fmt: skip

    def of_logps(inputs: Inputs) -> Output:
        return linear_objective(
            inputs.hidden, inputs.weight, inputs.labels, objective, is_forget=inputs.is_forget, ref_logps=inputs.ref_logps,
            return_logps=True, options=options_of(inputs),
        )  # fmt: skip

    return {"GNB": gnb, "KL": kl}.get(loss, of_logps)


def functions_of(loss: str, device: torch.device, quick: bool) -> dict[str, Callable[[], Function]]:
    """Return ours and plain PyTorch for one of `LOSSES`: name -> function that returns a function of `Inputs`.

    Eager PyTorch is also there under torch.compile, unless ``quick``. Drawing labels is also compared with our plain
    cross-entropy of the same size.
    """
    functions: dict[str, Callable[[], Function]] = {"ours": lambda: ours(loss)}
    if device.type == "cuda":
        functions["ours, chunks of 4 GiB"] = lambda: ours(loss, chunk_bytes=2**32)
        if loss == "CE":  # as several peers have it
            functions[BF16_LOGITS] = lambda: ours(loss, logits_dtype=torch.bfloat16)
    if loss == "GNB":
        functions["ours, plain cross-entropy"] = lambda: ours("CE")
    eager: dict[str, Function] = {"KL": eager_kl, "GNB": eager_gnb}
    plain = eager.get(loss) or functools.partial(eager_objective, objective=LOSSES[loss])
    functions["eager, torch.multinomial" if loss == "GNB" else "eager"] = lambda: plain
    if not quick:
        functions["torch.compile of eager"] = lambda: compiled(plain)
    return functions


def make_case(
    loss: str,
    n: int,
    d: int,
    n_vocab: int,
    frozen: bool,
    functions: Functions,
    device: torch.device,
    *,
    op: str | None = None,
    default: bool = True,
) -> Case:
    """Make the case of one loss at one size. Its inputs are made when they are needed.

    Args:
        loss: one of `LOSSES`.
        n: tokens.
        d: width of the hidden states.
        n_vocab: size of the vocabulary.
        frozen: the head has no gradient.
        functions: name -> function that returns a function of `Inputs`.
        device: of the inputs.
        op: name of what is computed, for the name of the case; None: the loss.
        default: runs without being asked for.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = functools.cache(lambda: make_inputs(loss, n, d, n_vocab, device, dtype, frozen=frozen))
    made = {name: functools.cache(make) for name, make in functions.items()}  # compiled once, for errors and times

    def start(name: str) -> Callable[[], None]:
        return functools.partial(train, made[name](), inputs()["flat"])

    variants: dict[str, Callable[[], Callable[[], None]]] = {name: functools.partial(start, name) for name in functions}
    floor = {FLOOR: lambda: functools.partial(bare_gemms, inputs()["flat"], loss == "KL")}
    products = (2 if frozen else 3) + (loss == "KL")

    def check_variants() -> Errors:
        return check({name: make for name, make in made.items() if name in case.variants}, inputs(), LOSSES[loss], dtype)

    case = Case(
        f"{op or loss}, N {n}, D {d}, V {n_vocab}, {str(dtype)[6:]}, {'frozen' if frozen else 'trained'} head",
        floor | variants,
        check_variants,
        flops=products * 2 * n * n_vocab * d,
        floor=FLOOR,
        default=default,
        at={"N": n, "D": d, "V": n_vocab},
    )
    return case
