"""One whole step of unlearning, GradDiff on 4 forget and 4 retain sequences: the published recipe against ours.

The published recipe: every sequence padded to 512, 4 micro-batches of one forget and one retain sequence, each in a forward of
its own, loss from eager logits, gradients added up, `clip_grad_norm_`, and SOUL's SophiaG written out operation for operation.
Its means are over all tokens of the step, as ours are (the published code takes a mean of means), so that both compute the
same loss; the work is the same. Between the two stands a careful user's plain PyTorch: one batch, eager logits of the labelled
tokens only, fused AdamW.

Before anything is timed, every variant takes two steps on a model of the same widths and two layers: likelihoods, gradient
norms and updates must be those of the published recipe. At full size every first loss must be that of the others.

On a GPU each variant is alone on the device, so that its peak memory is its own; on a CPU they take turns, because others may
use the machine as well. Phases are timed in a separate step, which waits for the device at the end of every phase; together
they therefore take longer than a step.
"""

import dataclasses
import functools
import gc
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from bench._harness import Case, Limits, Row, failure
from bench._llama import LLAMA_1B, LLAMA_7B, SMOLLM2, TINY, Setup, make_model, make_sequences
from bench._optimizers import gradients, published_step
from bench._steps import EagerStep, OurStep, mask_of, sequences_of
from soul.data.batches import Batch, collate
from soul.data.examples import Sequence
from soul.plan import Tokens, plan
from soul.plan.time import flops, optimizer_share
from soul.run.config import UnlearnConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MakeStep = Callable[..., Any]  # of setup, model, device and options -> `EagerStep` or `OurStep`
N_SEQUENCES = 4  # to forget, and as many to retain
MIN_BYTES_7B = 45e9  # of a card, for the 7B case to run without being asked for
RHO = 0.04  # of SOUL's code
LR = 1e-6  # of timed steps, which should hardly change the model
GATE_LR = 3e-4  # of checked steps: bf16 does not round it away
# Errors of likelihoods are absolute, that of the gradient norm is relative. In fp32 they come from the order of sums; in bf16
# from logits rounded to 8 bits, averaged over some hundred tokens. A sequence left out is worth 4e-2 or more in either. Cosine:
# a step is a sign wherever it is clipped, so rounding of gradients near 0 turns some around; with the wrong sign 1 - cosine
# would be 2, without any relation 1.
GATES = {
    torch.float32: {"nll": 1e-4, "norm": 1e-4, "cosine": 0.01},
    torch.bfloat16: {"nll": 1e-2, "norm": 3e-2, "cosine": 0.1},
}


def padded(sequence: Sequence, length: int) -> Sequence:
    """Return the sequence, padded on the right to a length."""
    return dataclasses.replace(
        sequence,
        input_ids=sequence.input_ids + [0] * (length - len(sequence.input_ids)),
        labels=sequence.labels + [-100] * (length - len(sequence.labels)),
    )


def one_padded(forget: list[Sequence], retain: list[Sequence], length: int, device: torch.device) -> Batch:
    """Return a batch of one sequence padded to a length, with its padding masked; one of the lists is empty."""
    (sequence,) = forget + retain
    batch = collate([padded(s, length) for s in forget], [padded(s, length) for s in retain], device=device)
    mask_of(batch)[:, len(sequence.input_ids) :] = 0
    return batch


def published(
    setup: Setup,
    model: "PreTrainedModel",
    device: torch.device,
    *,
    lr: float = LR,
    rho: float = RHO,
    max_grad_norm: float | None = 1.0,
    exact_norm: bool = False,
) -> EagerStep:
    """Return a step of the published recipe."""
    forget, retain = data(setup)
    pad = functools.partial(one_padded, length=setup.pad_to, device=device)
    params = list(model.parameters())
    exp_avgs, hessians = ([torch.zeros_like(p) for p in params] for _ in range(2))

    @torch.no_grad()
    def update() -> None:
        published_step(params, gradients(params), exp_avgs, hessians, soul=True, lr=lr, rho=rho, b1=0.9, b2=0.95, wd=0.0)

    micro_batches = [[pad([f], []), pad([], [r])] for f, r in zip(forget, retain)]
    return EagerStep(model, micro_batches, update, all_logits=True, max_grad_norm=max_grad_norm, exact_norm=exact_norm)


def plain(
    setup: Setup, model: "PreTrainedModel", device: torch.device, *, lr: float = LR, rho: float | None = None
) -> EagerStep:
    """Return a step of plain PyTorch: one batch, logits of labelled tokens, fused AdamW, which has no rho."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    return EagerStep(model, [[collate(*data(setup), device=device)]], optimizer.step, all_logits=False)


def ours(
    setup: Setup, model: "PreTrainedModel", device: torch.device, *, lr: float = LR, rho: float = RHO, **options: Any
) -> OurStep:
    """Return a step of ours, with options of `UnlearnConfig`."""
    return OurStep(model, collate(*data(setup), device=device), config_of(lr=lr, rho=rho, **options))


def config_of(optimizer: str = "soul", **options: Any) -> UnlearnConfig:
    """Return the configuration of ours, with further options."""
    published_code = optimizer == "soul"
    return UnlearnConfig(
        method="graddiff", optimizer=optimizer, published_code=published_code, batch_size=N_SEQUENCES, **options
    )


def data(setup: Setup) -> tuple[list[Sequence], list[Sequence]]:
    """Return forget and retain sequences."""
    sequences = make_sequences(setup, 2 * N_SEQUENCES)
    return sequences[:N_SEQUENCES], sequences[N_SEQUENCES:]


class TwoSteps(NamedTuple):
    """Two steps of a variant.

    Attributes:
        work: what they work on: sequences and number of labels.
        values: what each step returned, as floats.
        update: of the parameters in both steps together, [P] fp32.
    """

    work: tuple[list[tuple[int, ...]], int]
    values: list[dict[str, float]]
    update: torch.Tensor


def two_steps(make: MakeStep, setup: Setup, device: torch.device, dtype: torch.dtype, rho: float) -> TwoSteps:
    """Take two steps of a variant on a new model."""
    model = make_model(setup.shape, device, dtype)
    before = [p.detach().clone() for p in model.parameters()]
    step = make(setup, model, device, lr=GATE_LR, rho=rho)
    values = [{name: float(value) for name, value in step().items()} for _ in range(2)]
    update = torch.cat([(p.detach().float() - old.float()).flatten() for p, old in zip(model.parameters(), before)])
    return TwoSteps((step.sequences, step.n_labels), values, update)


def check(
    variants: Mapping[str, MakeStep], max_grad_norm: float | None, setup: Setup, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, float] | str]:
    """Compare two steps of every variant of ours, on two layers, with the published recipe; "ours, AdamW" with plain PyTorch.

    With the published rho nearly all coordinates are clipped, and h decides nothing. A gradient of norm s has P elements of
    about s / P^1/2; with a rho chosen for that, some are clipped and some are not.

    Returns:
        Variant -> its errors by name or, where it is wrong or does not run, the reason: the others are timed all the same.
    """
    setup = setup.of(layers=min(2, setup.shape.layers))
    if device.type == "cpu":
        setup = setup.of(vocab=min(4096, setup.shape.vocab))
    norm = two_steps(published, setup, device, dtype, RHO).values[0]["grad_norm"]
    rho = 4 * setup.shape.numel**0.5 / min(norm, max_grad_norm or math.inf) / 5120  # bs
    # AdamW, ours and torch's, is clipped by torch's own norm.
    recipe = functools.partial(published, max_grad_norm=max_grad_norm, exact_norm=True)
    two_steps_of = functools.cache(lambda make: two_steps(make, setup, device, dtype, rho))
    errors: dict[str, dict[str, float] | str] = {}
    for name, make in variants.items():
        if name.startswith("ours"):
            try:
                known = two_steps_of(plain if name.startswith("ours, AdamW") else recipe)
                errors[name] = compared(two_steps(make, setup, device, dtype, rho), known, GATES[dtype])
            except Exception as error:
                errors[name] = failure(error)
            gc.collect()
    return errors


def compared(steps: TwoSteps, known: TwoSteps, gates: Mapping[str, float]) -> dict[str, float]:
    """Return the errors of two steps by name; raise AssertionError where one is above its gate."""
    worst: dict[str, float] = {}

    def hold(what: str, error: float, limit: float) -> None:
        worst[what] = max(worst.get(what, 0.0), error)
        assert error <= limit, f"{what} is {error:.2e}, above {limit:.0e}"  # NaN is above everything

    assert steps.work == known.work, "not the same sequences and labels"
    for key in ("forget_nll", "retain_nll"):
        first, second = (values[key] for values in steps.values)
        known_first, known_second = (values[key] for values in known.values)
        hold("error of the likelihoods", abs(first - known_first), gates["nll"])
        # After the first step both have changed alike, up to gradients near 0 whose sign rounding has turned around.
        allowed = gates["nll"] + 0.2 * abs(known_second - known_first)
        hold("their error after a step", abs(second - known_second), allowed)
    for values in steps.values:
        hold("error of the loss", abs(values["loss"] - values["retain_nll"] + values["forget_nll"]), gates["nll"])
    if "grad_norm" in steps.values[0] and "grad_norm" in known.values[0]:
        error = abs(steps.values[0]["grad_norm"] / known.values[0]["grad_norm"] - 1)
        hold("error of the gradient norm", error, gates["norm"])
    hold("1 - cosine of updates", 1 - F.cosine_similarity(steps.update, known.update, dim=0).item(), gates["cosine"])
    return worst


def make_case(
    setup: Setup,
    variants: Mapping[str, MakeStep],
    options: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    default: bool = True,
    once: bool = False,
) -> Case:
    """Make the case of one model.

    Args:
        setup: model and data.
        variants: name -> function of setup, model and device that makes a step.
        options: of `UnlearnConfig`, those of ours that decide memory and FLOPs. Where ours does not clip, the recipe that it is
            checked against does not either.
        device: of model and data.
        dtype: of the parameters.
        default: runs without being asked for.
        once: as in `Case`.
    """
    shape = setup.shape
    first: dict[str, float] = {}  # the likelihoods of the first step at full size, of the variant that ran first
    batch = collate(*data(setup))
    work = sequences_of([batch]), len(batch.token_indices)
    config = config_of(**options)
    name_of_dtype = str(dtype)[6:]
    planned = plan(shape, config, Tokens(len(batch.labels), batch.labels.shape[1], labelled=work[1]), dtype=name_of_dtype)
    one = Tokens(1, setup.pad_to)

    def start(name: str) -> EagerStep | OurStep:
        step = variants[name](setup, make_model(shape, device, dtype), device)
        assert (step.sequences, step.n_labels) == work, f"{name}: not the same sequences and labels"
        values = {key: float(value) for key, value in step().items()}
        for key in ("forget_nll", "retain_nll"):
            known = first.setdefault(key, values[key])
            assert abs(values[key] - known) < 2 * GATES[dtype]["nll"], f"{name}: {key} {values[key]}, others {known}"
        if name.startswith("ours"):
            step.row_fields = {"planned_mib": planned.peak_bytes / 2**20}
        step.called = True
        return step

    def cost(name: str) -> tuple[float, float]:
        """Return the FLOPs and bytes that a variant needs at least."""
        if name.startswith("ours"):
            return flops(planned.case, planned.case.tokens), optimizer_share(planned.case).total
        eager = plan(shape, config_of(), dtype=name_of_dtype).case
        passes = 7 * shape.numel * dtype.itemsize + shape.numel * dtype.itemsize  # states like the parameters; the norm
        if name.startswith("published"):
            return 2 * N_SEQUENCES * flops(eager, one), passes
        return flops(eager, planned.case.tokens), passes

    size = f"{shape.numel / 1e6:.4g} M parameters, {name_of_dtype}"
    name_of_case = f"step, {shape.name}, {size}, {N_SEQUENCES} + {N_SEQUENCES} sequences"
    if once:
        name_of_case += ", against the published recipe"

    def check_variants() -> dict[str, dict[str, float] | str]:
        left = {name: make for name, make in variants.items() if name in case.variants}
        return check(left, config.max_grad_norm, setup, device, dtype)

    case = Case(
        name_of_case,
        {name: functools.partial(start, name) for name in variants},
        check_variants,
        tokens=int(mask_of(batch).sum()),
        model={name: cost(name) for name in variants},
        alone=device.type == "cuda",
        own_memory=True,
        default=default,
        once=once,
        at={"kept tokens": work[1], "sequences": len(work[0])},
    )
    return case


def cpu_cases(device: torch.device) -> Iterator[functools.partial[Case]]:
    """Yield functions that make the cases of a CPU: SmolLM2-135M in fp32. The slow published recipe has its own."""
    soul = {"ours, SOUL": ours}
    careful: dict[str, MakeStep] = {
        "plain PyTorch, one batch, AdamW": plain,
        "ours, AdamW": functools.partial(ours, optimizer="adamw"),
    }
    yield functools.partial(make_case, SMOLLM2, careful | soul, {}, device, torch.float32)
    yield functools.partial(make_case, SMOLLM2, {"published recipe": published} | soul, {}, device, torch.float32, once=True)


def cases(device: torch.device, quick: bool) -> Iterator[functools.partial[Case]]:
    """Yield functions that make the cases."""
    gpu = device.type == "cuda"
    if not gpu and not quick:
        yield from cpu_cases(device)
        return
    variants: dict[str, MakeStep] = {
        "published recipe": published,
        "plain PyTorch, one batch, AdamW": plain,
        "ours, eager": ours,
    }
    if gpu:
        variants |= {
            "ours, --compile": functools.partial(ours, compile=True),
            "ours, --cuda-graph": functools.partial(ours, cuda_graph=True),
            "ours, --compile --cuda-graph": functools.partial(ours, compile=True, cuda_graph=True),
        }
    setup = LLAMA_1B if gpu else TINY
    yield functools.partial(make_case, setup, variants, {}, device, torch.bfloat16 if gpu else torch.float32)
    # With gradient release there is no norm to clip by.
    lean: dict[str, Any] = dict(state_dtype="8bit", gradient_release=True, gradient_checkpointing=True, max_grad_norm=None)
    variants = {
        "published recipe": published,
        "ours, 8-bit states, gradient release, checkpointing": functools.partial(ours, **lean),
    }
    setup = LLAMA_7B if gpu else setup.of(name=f"{setup.shape.name}, untied", tied=False)
    default = not gpu or torch.cuda.get_device_properties(device).total_memory >= MIN_BYTES_7B
    yield functools.partial(make_case, setup, variants, lean, device, torch.bfloat16, default=default)


def summary(rows: list[Row], limits: Limits) -> Row | None:
    """Summarize how much faster than the published recipe each variant is, and how far off the model of bytes and FLOPs is.

    Returns:
        Dict of ``lines``, to be printed, and ``speedups``, case -> variant -> ratio; or None where there is nothing to compare.
    """
    lines = []
    speedups: dict[str, dict[str, float]] = {}
    for row in rows:
        recipe = [r for r in rows if r["case"] == row["case"] and r["variant"] == "published recipe" and "ms" in r]
        if "ms" not in row:
            continue
        text = f"{row['times_model']:.2f}x its bytes and FLOPs at the ceilings"
        if recipe:
            ratio = recipe[0]["ms"] / row["ms"]
            speedups.setdefault(row["case"], {})[row["variant"]] = ratio
            text = f"{ratio:.2f}x as fast as the published recipe, {text}"
        if row.get("peak_mib") and "planned_mib" in row:
            text += f"; peak {row['peak_mib'] / 1024:.2f} GiB, planned {row['planned_mib'] / 1024:.2f}"
        model = ", ".join([row["case"].split(", ")[1], *re.findall(r"\d+ threads?$", row["case"])])
        lines.append(f"{model}, {row['variant']}: {text}")
    return {"lines": lines, "speedups": speedups} if lines else None
