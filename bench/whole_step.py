"""One whole step of unlearning, GradDiff on 4 forget and 4 retain sequences: the published recipe against ours.

The published recipe: every sequence padded to 512, 4 micro-batches of one forget and one retain sequence, each in a forward of
its own, loss from eager logits, gradients added up, `clip_grad_norm_`, and SOUL's SophiaG written out operation for operation.
Its means are over all tokens of the step, as ours are (the published code takes a mean of means), so that both are one loss;
the work is the same. Between the two a careful user's plain PyTorch: one batch, eager logits of the labelled tokens only, fused
AdamW.

Before anything is timed, every variant takes two steps on a model of the same widths and two layers: likelihoods, gradient
norms and updates must be those of the published recipe. At full size every first loss must be that of the others.

Each variant is alone on the device, so that its peak memory is its own. Phases come from a step of their own, in which the
device is waited for at every border; together they therefore take longer than a step.
"""

import dataclasses
import functools
import gc

import torch
import torch.nn.functional as F

from bench import _llama
from bench._harness import Case
from bench._optimizers import published_step
from bench._steps import EagerStep, OurStep, sequences_of
from bench.bench_sophia_step import bytes_per_param
from soul.config import UnlearnConfig
from soul.data import collate

N_SEQUENCES = 4  # to forget, and as many to retain
MIN_BYTES_7B = 45e9  # of a card, for the 7B case to run without being asked for
LR = 1e-6  # of timed steps: the model is to stay what it is
GATE_LR = 3e-4  # of checked ones: above what bf16 rounds away
# Likelihoods absolute, the gradient norm relative. fp32: the order of sums. bf16: logits rounded to 8 bits, averaged over some
# hundred tokens, and torch's norm rounded as well; a sequence left out is worth 4e-2 or more in either.
GATES = {torch.float32: {"nll": 1e-4, "norm": 1e-4}, torch.bfloat16: {"nll": 1e-2, "norm": 3e-2}}
# Cosine between updates: a step is a sign wherever it is clipped, so rounding of gradients near 0 turns some around.
MIN_COSINE = {torch.float32: 0.99, torch.bfloat16: 0.8}


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


def published(shape, model, device, *, lr=LR, max_grad_norm=1.0):
    """The published recipe, as an `EagerStep`."""
    forget, retain = data(shape)
    micro = [
        [one_padded([f], [], shape.pad_to, device), one_padded([], [r], shape.pad_to, device)] for f, r in zip(forget, retain)
    ]
    params = list(model.parameters())
    exp_avgs, hessians = ([torch.zeros_like(p) for p in params] for _ in range(2))

    @torch.no_grad()
    def update():
        grads = [p.grad for p in params]
        published_step(params, grads, exp_avgs, hessians, soul=True, lr=lr, b1=0.9, b2=0.95, wd=0.0)

    return EagerStep(model, micro, update, all_logits=True, max_grad_norm=max_grad_norm)


def plain(shape, model, device, *, lr=LR):
    """One batch, logits of labelled tokens, fused AdamW: an `EagerStep`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    return EagerStep(model, [[collate(*data(shape), device=device)]], optimizer.step, all_logits=False)


def ours(shape, model, device, *, lr=LR, **options):
    """Ours, with options of `UnlearnConfig`."""
    config = UnlearnConfig(method="graddiff", lr=lr, published_code=True, batch_size=N_SEQUENCES, **options)
    return OurStep(model, collate(*data(shape), device=device), config)


def data(shape):
    """Forget and retain sequences."""
    sequences = _llama.make_sequences(shape, 2 * N_SEQUENCES)
    return sequences[:N_SEQUENCES], sequences[N_SEQUENCES:]


def two_steps(make, shape, device, dtype):
    """Values of two steps of a variant on a new model, as floats, and the update of both together, [P] in fp32."""
    model = _llama.make_model(shape, device, dtype)
    before = [p.detach().clone() for p in model.parameters()]
    step = make(shape, model, device, lr=GATE_LR)
    values = [{name: float(value) for name, value in step().items()} for _ in range(2)]
    moved = torch.cat([(p.detach().float() - old.float()).flatten() for p, old in zip(model.parameters(), before)])
    return step, values, moved


def check(variants, reference, shape, device, dtype):
    """Two steps of every variant of ours on two layers: values and updates are those of the published recipe."""
    shape = dataclasses.replace(shape, n_layers=min(2, shape.n_layers))
    gates, worst = GATES[dtype], {}
    known, wanted, want = two_steps(reference, shape, device, dtype)
    for name, make in variants.items():
        if not name.startswith("ours"):
            continue
        step, values, moved = two_steps(make, shape, device, dtype)
        assert step.sequences == known.sequences and step.kept == known.kept, f"{name}: not the same work"
        for number, (a, b) in enumerate(zip(values, wanted), 1):
            nll = max(abs(a[key] - b[key]) for key in ("forget_nll", "retain_nll"))
            worst["nll"] = max(worst.get("nll", 0.0), nll)
            # After a step the models differ by what was turned around.
            assert nll < gates["nll"] * (1 if number == 1 else 5), f"{name}, step {number}: likelihoods are off by {nll:.1e}"
            assert abs(a["loss"] - (a["retain_nll"] - a["forget_nll"])) < gates["nll"], f"{name}: the loss is not GradDiff's"
        if "grad_norm" in values[0] and "grad_norm" in wanted[0]:
            norm = abs(values[0]["grad_norm"] / wanted[0]["grad_norm"] - 1)
            worst["gradient norm"] = max(worst.get("gradient norm", 0.0), norm)
            assert norm < gates["norm"], f"{name}: the gradient norm is off by {norm:.1e}"
        cosine = F.cosine_similarity(moved, want, dim=0).item()
        worst["1 - cosine of updates"] = max(worst.get("1 - cosine of updates", 0.0), 1 - cosine)
        assert cosine > MIN_COSINE[dtype], f"{name}: cosine {cosine:.2f} between its update and the published one"
        del step, moved
        gc.collect()
    return worst


def make_case(shape, variants, reference, state, device, dtype, *, default=True, checkpointing=False):
    """The case of one model.

    Args:
        shape: of the model.
        variants: name -> function of shape, model and device that makes a step.
        reference: like a variant, that says what is right.
        state: keyword arguments of `bytes_per_param` for the states of ours.
        device: where.
        dtype: of the parameters.
        default: runs without being asked for.
        checkpointing: ours does.
    """
    first = {}  # the first loss at full size, that of whoever came first

    def start(name):
        step = variants[name](shape, _llama.make_model(shape, device, dtype), device)
        assert (step.sequences, step.kept) == (sequences, kept), f"{name}: not the same work"
        loss = {key: float(value) for key, value in step().items()}
        for key in ("forget_nll", "retain_nll"):
            known = first.setdefault(key, loss[key])
            assert abs(loss[key] - known) < 2 * GATES[dtype]["nll"], f"{name}: {key} {loss[key]}, others {known}"
        return step

    forget, retain = data(shape)
    batch = collate(forget, retain)
    sequences, kept, tokens = sequences_of([batch]), len(batch.rows), int(batch.attention_mask.sum())
    model = {}
    for name in variants:
        eager, half = name.startswith("published"), dtype.itemsize
        n_tokens, n_rows = (2 * N_SEQUENCES * shape.pad_to,) * 2 if eager else (batch.labels.numel(), kept)
        per_param = bytes_per_param(dtype, True, **state) if name.startswith("ours") else 7 * half
        flops = shape.flops(n_tokens, n_rows, checkpointing=checkpointing and name.startswith("ours"))
        model[name] = flops, (per_param + half) * shape.n_params  # the norm reads the gradients once more
    size = f"{shape.n_params / 1e6:.4g} M parameters, {str(dtype)[6:]}"
    return Case(
        f"step, {shape.name}, {size}, {N_SEQUENCES} + {N_SEQUENCES} sequences",
        {name: functools.partial(start, name) for name in variants},
        functools.partial(check, variants, reference, shape, device, dtype),
        tokens=tokens,
        model=model,
        alone=True,
        default=default,
        at={"kept tokens": kept, "sequences": len(sequences)},
    )


def cases(device, quick):
    """Functions that make the cases."""
    gpu = device.type == "cuda"
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
    shape = _llama.LLAMA_1B if gpu else _llama.TINY if quick else _llama.SMALL
    dtype = torch.bfloat16 if gpu else torch.float32
    yield functools.partial(make_case, shape, variants, published, {}, device, dtype)
    # 7B: with gradient release there is no norm to clip by, so the published recipe is checked against without one.
    lean = dict(state_dtype="8bit", gradient_release=True, gradient_checkpointing=True, max_grad_norm=None)
    variants = {
        "published recipe": published,
        "ours, 8-bit states, gradient release, checkpointing": functools.partial(ours, **lean),
    }
    shape = _llama.LLAMA_7B if gpu else dataclasses.replace(shape, name=f"{shape.name}, untied", tied=False)
    default = not gpu or torch.cuda.get_device_properties(device).total_memory >= MIN_BYTES_7B
    reference = functools.partial(published, max_grad_norm=None)
    state, dtype = dict(state_dtype="8bit"), torch.bfloat16
    yield functools.partial(make_case, shape, variants, reference, state, device, dtype, default=default, checkpointing=True)


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
        told = f"{row['ms'] / row['model_ms']:.2f}x its bytes and FLOPs at the ceilings"
        if known:
            ratio = speedups.setdefault(row["case"], {})[row["variant"]] = known[0]["ms"] / row["ms"]
            told = f"{ratio:.2f}x as fast as the published recipe, {told}"
        lines.append(f"{row['case'].split(', ')[1]}, {row['variant']}: {told}")
    return {"lines": lines, "speedups": speedups} if lines else None
