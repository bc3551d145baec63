"""One whole step of unlearning, GradDiff on 4 forget and 4 retain sequences: the published recipe against ours.

The published recipe: every sequence padded to 512, 4 micro-batches of one forget and one retain sequence, each in a forward of
its own, loss from eager logits, gradients added up, `clip_grad_norm_`, and SOUL's SophiaG written out operation for operation.
Its means are over all tokens of the step, as ours are (the published code takes a mean of means), so that both are one loss;
the work is the same. Between the two a careful user's plain PyTorch: one batch, eager logits of the labelled tokens only, fused
AdamW.

Before anything is timed, every variant takes two steps on a model of the same widths and two layers: likelihoods, gradient
norms and updates must be those of the published recipe. At full size every first loss must be that of the others.

On a GPU each variant is alone on the device, so that its peak memory is its own; on a CPU they take turns, because others may
use the machine as well. Phases come from a step of their own, in which the device is waited for at every border; together they
therefore take longer than a step.
"""

import dataclasses
import functools
import gc
import math
import re

import torch
import torch.nn.functional as F

from bench._harness import Case, failure
from bench._llama import LLAMA_1B, LLAMA_7B, SMOLLM2, TINY, make_model, make_sequences
from bench._optimizers import published_step
from bench._steps import EagerStep, OurStep, sequences_of
from soul.data.batches import collate
from soul.plan import Tokens, plan
from soul.plan.time import flops, optimizer_bytes
from soul.run.config import UnlearnConfig

N_SEQUENCES = 4  # to forget, and as many to retain
MIN_BYTES_7B = 45e9  # of a card, for the 7B case to run without being asked for
RHO = 0.04  # of SOUL's code
LR = 1e-6  # of timed steps: the model is to stay what it is
GATE_LR = 3e-4  # of checked ones: bf16 does not round it away
# Likelihoods absolute, the gradient norm relative. fp32: the order of sums. bf16: logits rounded to 8 bits, averaged over some
# hundred tokens, and torch's norm rounded as well; a sequence left out is worth 4e-2 or more in either. Cosine: a step is a
# sign wherever it is clipped, so rounding of gradients near 0 turns some around; a wrong sign would be 2, no relation 1.
GATES = {
    torch.float32: {"nll": 1e-4, "norm": 1e-4, "cosine": 0.01},
    torch.bfloat16: {"nll": 1e-2, "norm": 3e-2, "cosine": 0.1},
}


def padded(sequence, length):
    """The sequence, padded on the right to a length, with its padding masked by `collate`."""
    return dataclasses.replace(
        sequence,
        input_ids=sequence.input_ids + [0] * (length - len(sequence.input_ids)),
        labels=sequence.labels + [-100] * (length - len(sequence.labels)),
    )


def one_padded(forget, retain, length, device):
    """A `Batch` of one sequence padded to a length."""
    (sequence,) = [*forget, *retain]
    batch = collate([padded(s, length) for s in forget], [padded(s, length) for s in retain], device=device)
    batch.attention_mask[:, len(sequence.input_ids) :] = 0
    return batch


def published(setup, model, device, *, lr=LR, rho=RHO, max_grad_norm=1.0):
    """The published recipe, as an `EagerStep`."""
    forget, retain = data(setup)
    pad = functools.partial(one_padded, length=setup.pad_to, device=device)
    params = list(model.parameters())
    exp_avgs, hessians = ([torch.zeros_like(p) for p in params] for _ in range(2))

    @torch.no_grad()
    def update():
        grads = [p.grad for p in params]
        published_step(params, grads, exp_avgs, hessians, soul=True, lr=lr, rho=rho, b1=0.9, b2=0.95, wd=0.0)

    micro_batches = [[pad([f], []), pad([], [r])] for f, r in zip(forget, retain)]
    return EagerStep(model, micro_batches, update, all_logits=True, max_grad_norm=max_grad_norm)


def plain(setup, model, device, *, lr=LR, rho=None):
    """One batch, logits of labelled tokens, fused AdamW: an `EagerStep`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    return EagerStep(model, [[collate(*data(setup), device=device)]], optimizer.step, all_logits=False)


def ours(setup, model, device, *, lr=LR, rho=RHO, **options):
    """Ours, with options of `UnlearnConfig`."""
    return OurStep(model, collate(*data(setup), device=device), config_of(lr=lr, rho=rho, **options))


def config_of(optimizer="soul", **options):
    """The `UnlearnConfig` of ours, with further options."""
    published_code = optimizer == "soul"
    return UnlearnConfig(
        method="graddiff", optimizer=optimizer, published_code=published_code, batch_size=N_SEQUENCES, **options
    )


def data(setup):
    """Forget and retain sequences."""
    sequences = make_sequences(setup, 2 * N_SEQUENCES)
    return sequences[:N_SEQUENCES], sequences[N_SEQUENCES:]


def two_steps(make, setup, device, dtype, rho):
    """What a variant works on, the values of two steps of it on a new model, as floats, and the update of both, [P] in fp32."""
    model = make_model(setup.shape, device, dtype)
    before = [p.detach().clone() for p in model.parameters()]
    step = make(setup, model, device, lr=GATE_LR, rho=rho)
    values = [{name: float(value) for name, value in step().items()} for _ in range(2)]
    moved = torch.cat([(p.detach().float() - old.float()).flatten() for p, old in zip(model.parameters(), before)])
    return (step.sequences, step.kept), values, moved


def check(variants, max_grad_norm, setup, device, dtype):
    """Two steps of every variant of ours on two layers: values and updates are those of the published recipe; of "ours, AdamW",
    those of plain PyTorch with AdamW.

    As it is published nearly all coordinates are clipped, and h decides nothing. A gradient of norm s has P elements of about
    s / P^1/2; with a rho for that some are clipped, and some are not.

    Returns:
        Variant -> its errors by name or, where it is wrong or does not run, why: the others are timed all the same.
    """
    setup = setup.of(
        layers=min(2, setup.shape.layers), **({"vocab": min(4096, setup.shape.vocab)} if device.type == "cpu" else {})
    )
    norm = two_steps(published, setup, device, dtype, RHO)[1][0]["grad_norm"]
    rho = 4 * setup.shape.numel**0.5 / min(norm, max_grad_norm or math.inf) / 5120  # bs
    reference = functools.partial(published, max_grad_norm=max_grad_norm)
    known_of, errors = functools.cache(lambda make: two_steps(make, setup, device, dtype, rho)), {}
    for name, make in variants.items():
        if name.startswith("ours"):
            try:
                known = known_of(plain if name.startswith("ours, AdamW") else reference)
                errors[name] = compared(two_steps(make, setup, device, dtype, rho), known, GATES[dtype])
            except Exception as error:
                errors[name] = failure(error)
            gc.collect()
    return errors


def compared(steps, known, gates):
    """Errors by name of what `two_steps` has returned; raises AssertionError where one is above its gate."""
    (work, values, moved), (known_work, known, want), worst = steps, known, {}

    def found(what, error, limit):
        worst[what] = max(worst.get(what, 0.0), error)
        assert error <= limit, f"{what} is {error:.2e}, above {limit:.0e}"  # NaN is above everything

    assert work == known_work, "not the same sequences and labels"
    for key in ("forget_nll", "retain_nll"):
        (first, second), (wanted, wanted_second) = ([v[key] for v in of] for of in (values, known))
        found("error of the likelihoods", abs(first - wanted), gates["nll"])
        # One step later they have changed alike, but for what the rounding of gradients near 0 has turned around.
        allowed = gates["nll"] + 0.2 * abs(wanted_second - wanted)
        found("their error after a step", abs(second - wanted_second), allowed)
    for of in values:
        found("error of the loss", abs(of["loss"] - of["retain_nll"] + of["forget_nll"]), gates["nll"])
    if "grad_norm" in values[0] and "grad_norm" in known[0]:
        found("error of the gradient norm", abs(values[0]["grad_norm"] / known[0]["grad_norm"] - 1), gates["norm"])
    found("1 - cosine of updates", 1 - F.cosine_similarity(moved, want, dim=0).item(), gates["cosine"])
    return worst


def make_case(setup, variants, options, device, dtype, *, default=True, once=False):
    """The case of one model.

    Args:
        setup: `Setup`, model and data.
        variants: name -> function of setup, model and device that makes a step.
        options: of `UnlearnConfig`, those of ours that decide memory and FLOPs; where ours does not clip, what is checked
            against does not either.
        device: where.
        dtype: of the parameters.
        default: runs without being asked for.
        once: as in `Case`.
    """
    shape, first = setup.shape, {}  # the first likelihoods at full size, those of whoever came first
    batch = collate(*data(setup))
    work = sequences_of([batch]), len(batch.token_indices)
    config, name_of_dtype = config_of(**options), str(dtype)[6:]
    planned = plan(shape, config, Tokens(*batch.labels.shape, labelled=work[1]), dtype=name_of_dtype)
    one = Tokens(1, setup.pad_to)

    def start(name):
        step = variants[name](setup, make_model(shape, device, dtype), device)
        assert (step.sequences, step.kept) == work, f"{name}: not the same sequences and labels"
        values = {key: float(value) for key, value in step().items()}
        for key in ("forget_nll", "retain_nll"):
            known = first.setdefault(key, values[key])
            assert abs(values[key] - known) < 2 * GATES[dtype]["nll"], f"{name}: {key} {values[key]}, others {known}"
        if name.startswith("ours"):
            step.told = {"planned_mib": planned.peak_bytes / 2**20}
        step.called = True
        return step

    def cost(name):
        """FLOPs and bytes that a variant cannot do without."""
        if name.startswith("ours"):
            return flops(planned.case, planned.case.tokens), optimizer_bytes(planned.case)
        eager = plan(shape, config_of(), dtype=name_of_dtype).case
        passes = 7 * shape.numel * dtype.itemsize + shape.numel * dtype.itemsize  # states like the parameters; the norm
        if name.startswith("published"):
            return 2 * N_SEQUENCES * flops(eager, one), passes
        return flops(eager, planned.case.tokens), passes

    size = f"{shape.numel / 1e6:.4g} M parameters, {name_of_dtype}"
    name_of_case = f"step, {shape.name}, {size}, {N_SEQUENCES} + {N_SEQUENCES} sequences"
    if once:
        name_of_case += ", against the published recipe"
    return Case(
        name_of_case,
        {name: functools.partial(start, name) for name in variants},
        functools.partial(check, variants, config.max_grad_norm, setup, device, dtype),
        tokens=int(batch.attention_mask.sum()),
        model={name: cost(name) for name in variants},
        alone=device.type == "cuda",
        own_memory=True,
        default=default,
        once=once,
        at={"kept tokens": work[1], "sequences": len(work[0])},
    )


def cpu_cases(device):
    """Functions that make the cases of a CPU: SmolLM2-135M in fp32, the published recipe apart, because it takes so long."""
    soul = {"ours, SOUL": ours}
    careful = {"plain PyTorch, one batch, AdamW": plain, "ours, AdamW": functools.partial(ours, optimizer="adamw")}
    yield functools.partial(make_case, SMOLLM2, careful | soul, {}, device, torch.float32)
    yield functools.partial(make_case, SMOLLM2, {"published recipe": published} | soul, {}, device, torch.float32, once=True)


def cases(device, quick):
    """Functions that make the cases."""
    gpu = device.type == "cuda"
    if not gpu and not quick:
        yield from cpu_cases(device)
        return
    variants = {
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
    lean = dict(state_dtype="8bit", gradient_release=True, gradient_checkpointing=True, max_grad_norm=None)
    variants = {
        "published recipe": published,
        "ours, 8-bit states, gradient release, checkpointing": functools.partial(ours, **lean),
    }
    setup = LLAMA_7B if gpu else setup.of(name=f"{setup.shape.name}, untied", tied=False)
    default = not gpu or torch.cuda.get_device_properties(device).total_memory >= MIN_BYTES_7B
    yield functools.partial(make_case, setup, variants, lean, device, torch.bfloat16, default=default)


def summary(rows, limits):
    """How much faster than the published recipe each variant is, and by how much the model from bytes and FLOPs is wrong.

    Returns:
        Dict of ``lines``, to be printed, and ``speedups``, case -> variant -> ratio; or None where there is nothing to compare.
    """
    lines, speedups = [], {}
    for row in rows:
        known = [r for r in rows if r["case"] == row["case"] and r["variant"] == "published recipe" and "ms" in r]
        if "ms" not in row:
            continue
        told = f"{row['times_model']:.2f}x its bytes and FLOPs at the ceilings"
        if known:
            ratio = speedups.setdefault(row["case"], {})[row["variant"]] = known[0]["ms"] / row["ms"]
            told = f"{ratio:.2f}x as fast as the published recipe, {told}"
        if row.get("peak_mib") and "planned_mib" in row:
            told += f"; peak {row['peak_mib'] / 1024:.2f} GiB, planned {row['planned_mib'] / 1024:.2f}"
        of = ", ".join([row["case"].split(", ")[1], *re.findall(r"\d+ threads?$", row["case"])])
        lines.append(f"{of}, {row['variant']}: {told}")
    return {"lines": lines, "speedups": speedups} if lines else None
