"""The unlearning loop: one forward over forget and retain sequences, one fused loss, one fused step."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import sys
import time

import torch

from soul import losses
from soul._extras import require
from soul.checkpoint import Stopped, describe
from soul.curvature import GNB, RetainFisher
from soul.data import Order, collate, encode, pair_refusals, refuse
from soul.models import (
    as_reference,
    autocast,
    check_checkpointing,
    checkpointing,
    evaluating,
    gnb_loss,
    has_adapters,
    head,
    hidden_states,
    token_logps,
    transform,
)
from soul.optimizer import SOUL, SophiaG
from soul.reference import check_cache, reference_head, reference_hidden, reference_logps
from soul_kernels import TokenBatch, grad_norm, linear_objective
from soul_kernels._checks import argument_error, check_choice, check_range
from soul_kernels._launch import BACKENDS, resolve_backend
from soul_kernels.reference.token_logprob import IGNORE_INDEX

OPTIMIZERS = ("soul", "adamw")
CURVATURES = ("unlearn", "retain", "gnb")
RUN_FILE = "soul_config.json"  # by which the command knows an output directory of its own


class Diverged(RuntimeError):
    """The loss is not finite any more; the model is worthless."""


@dataclasses.dataclass
class UnlearnConfig:
    """Everything that decides a run.

    Attributes:
        method: name of the objective, one of ``soul.losses.OBJECTIVES``.
        method_options: its keyword arguments (gamma, alpha, retain, beta, ...).
        optimizer: "soul" or "adamw".
        lr: peak learning rate.
        betas: decays of the optimizer; None takes (0.9, 0.95) for SOUL and (0.9, 0.999) for AdamW.
        rho: SOUL's clipping threshold.
        clip_target: rho moves, from 0.04 on, until this fraction of the coordinates is clipped; None: rho stays as it is.
        bs: number of predictions behind h.
        curvature: what h is taken from: "unlearn", the gradient of every step, as in SOUL's code; "retain", that of the
            cross-entropy of the step's retain tokens; or "gnb", the same with labels drawn from the model. The last two by
            `soul.SophiaG` with bias correction, before the step; ``bs`` should then be the number of those tokens.
        curvature_every: steps from one refresh of h to the next, with "retain" and "gnb".
        published_code: SOUL with the momentum of its published code.
        weight_decay: decoupled.
        epochs: passes over the forget set.
        batch_size: forget examples a micro-batch (each with its refusal for DPO); as many retain sequences go with them.
        accumulate: micro-batches a step. Loss and gradient are those of one batch of all of them, but for rounding: every mean
            is over the whole step. Gradients are added up in the dtype of the parameters.
        max_grad_norm: gradients are scaled down to this global L2 norm; None or inf: never. SOUL does it within its step.
        gradient_checkpointing: keep one hidden state a layer, and compute the rest again in the backward pass.
        warmup_ratio: part of the steps over which lr rises linearly; then it falls linearly to 0.
        max_length: tokens of a sequence.
        eval_every: steps from one evaluation to the next; 0: none. The log then has ``forget_prob`` and ``retain_prob``, the
            probabilities of the answers (`soul.evaluate.answer_probability`) of all forget examples and of the first as many
            retain examples.
        stop_forget_prob: end the run once ``forget_prob`` is at or below it; None: never.
        stop_retain_prob: end the run, and say so, once ``retain_prob`` is below it; None: never.
        seed: of the data order and the refusals.
        backend: "auto", "triton" or "reference".
        reference_cache: directory to keep what `soul.reference` computes in, or None.
    """

    method: str = "graddiff"
    method_options: dict = dataclasses.field(default_factory=dict)
    optimizer: str = "soul"
    lr: float = 1e-5
    betas: tuple | None = None
    rho: float = 0.04
    clip_target: float | None = None
    bs: int = 5120
    curvature: str = "unlearn"
    curvature_every: int = 10
    published_code: bool = False
    weight_decay: float = 0.0
    epochs: int = 5
    batch_size: int = 4
    accumulate: int = 1
    max_grad_norm: float | None = 1.0
    gradient_checkpointing: bool = False
    warmup_ratio: float = 0.1
    max_length: int = 512
    eval_every: int = 0
    stop_forget_prob: float | None = None
    stop_retain_prob: float | None = None
    seed: int = 0
    backend: str = "auto"
    reference_cache: str | None = None

    def __post_init__(self):
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("backend", self.backend, BACKENDS)
        check_range("warmup_ratio", self.warmup_ratio, high=1.0)
        for name in ("lr", "rho", "weight_decay"):
            check_range(name, getattr(self, name))
        if self.max_grad_norm is not None:
            if not 0 < self.max_grad_norm:
                raise argument_error("max_grad_norm", "a positive number", self.max_grad_norm, "pass inf not to clip")
        for name in ("epochs", "batch_size", "accumulate", "max_length", "bs", "curvature_every"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) > 0):
                raise argument_error(name, "a positive whole number", getattr(self, name), "check the options")
        check_choice("curvature", self.curvature, CURVATURES)
        if self.clip_target is not None:
            check_range("clip_target", self.clip_target, high=1.0)
        if self.optimizer != "soul" and (self.curvature != "unlearn" or self.clip_target is not None):
            remedy = "curvature and clip_target belong to it"
            raise argument_error("optimizer", "'soul'", repr(self.optimizer), remedy)
        if self.published_code and self.curvature != "unlearn":
            raise argument_error("published_code", "False with another curvature", True, "it is a way of SOUL's own step")
        if isinstance(self.eval_every, bool) or not (isinstance(self.eval_every, int) and self.eval_every >= 0):
            raise argument_error("eval_every", "a whole number >= 0", self.eval_every, "0 evaluates nothing")
        for name in ("stop_forget_prob", "stop_retain_prob"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise argument_error(name, "a probability in [0, 1]", value, "check the options")
            if value is not None and not self.eval_every:
                raise argument_error("eval_every", f"a positive number with {name}", 0, "say how often to look")

    def decisive(self):
        """The options that decide the numbers, as a dict: a run goes on with the same ones only."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "reference_cache"}

    def objective(self):
        """The objective of ``method`` with ``method_options``."""
        return losses.get(self.method, **self.method_options)


def build_optimizer(model, config):
    """The optimizer of a config over all trainable parameters of a model."""
    params = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        betas = config.betas or (0.9, 0.999)
        fused = params[0].is_cuda
        return torch.optim.AdamW(params, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=fused)
    options = dict(
        lr=config.lr,
        betas=config.betas or (0.9, 0.95),
        rho=config.rho if config.clip_target is None else "auto",
        clip_target=config.clip_target,
        bs=config.bs,
        weight_decay=config.weight_decay,
        max_grad_norm=_limit(config),
        backend=config.backend,
    )
    if config.curvature == "unlearn":
        return SOUL(params, published_code=config.published_code, **options)
    return SophiaG(params, bias_correction=True, **options)


def build_curvature(optimizer, config):
    """What refreshes the optimizer's h beside the step, or None where the step does it."""
    if config.curvature == "unlearn":
        return None
    if config.curvature == "retain":
        return RetainFisher(optimizer, config.curvature_every)
    return GNB(optimizer, config.curvature_every, seed=config.seed)


def curvature_loss(model, batches, curvature, config):
    """The loss whose gradient h is taken from, [], with its graph: a mean over all labelled tokens of the batches.

    Args:
        model: gets the gradients of all batches but the last, of which the loss that is returned is a part.
        batches: list of `soul.data.Batch`, of retain sequences.
        curvature: a `soul.curvature.GNB`, for labels drawn from the model, or a `RetainFisher`, for the true ones.
        config: `UnlearnConfig`, for ``backend``.
    """
    n_tokens = sum(len(batch.rows) for batch in batches)
    generator = curvature.generator() if isinstance(curvature, GNB) else None
    for position, batch in enumerate(batches, 1):
        if generator is not None:
            loss = gnb_loss(model, batch, generator=generator, backend=config.backend) * (len(batch.rows) / n_tokens)
        else:
            loss = -token_logps(model, batch, config.backend).sum() / n_tokens
        if position == len(batches):
            return loss
        loss.backward()


def _limit(config):
    return None if config.max_grad_norm == math.inf else config.max_grad_norm


def build_scheduler(optimizer, steps, warmup_ratio):
    """Linear warm-up, then linear decay to 0."""
    warmup = max(1, round(steps * warmup_ratio))

    def factor(step):
        return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Recorded:
    """An objective that adds up its terms as it is evaluated, over all chunks of a batch.

    Args:
        objective: a `soul.losses.Objective`.
        whole: the `TokenBatch` of which the batches are parts, or None: the batch is whole.

    Attributes:
        sums: name -> the term, [] without gradient, once the batch has been through.
    """

    def __init__(self, objective, whole=None):
        self.objective, self.whole, self.sums = objective, whole, {}
        self.additive, self.divergence = objective.additive, objective.divergence
        self.needs_statistics = objective.needs_statistics

    def __call__(self, logps, batch):
        """The objective's loss, []."""
        terms = self.objective.terms(logps, batch if self.whole is None else batch.within(self.whole))
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + term.detach()
        return sum(terms.values())


def train_step(model, batches, objective, optimizer, scheduler, config, ref_head=(None, None), whole=None):
    """Forward, fused loss, backward of each micro-batch; clipping, step.

    Where the objective needs hidden states of a reference, and a batch has none, they are those of a peft model without its
    adapters.

    Args:
        model: changed in place.
        batches: iterable of `soul.data.Batch`, the micro-batches.
        objective: a `soul.losses.Objective`.
        optimizer: of the model's trainable parameters.
        scheduler: of the optimizer's learning rate.
        config: `UnlearnConfig`, for ``max_grad_norm`` and ``backend``.
        ref_head: weight and bias of the reference's head, from `soul.reference.reference_head`.
        whole: the `TokenBatch` of all micro-batches; None where there is but one.

    Returns:
        Tensors on the device: the loss, the weighted terms of the objective, the mean negative log-likelihoods of forget and
        retain tokens (for pairs, of the answers that are to be forgotten), and the gradient norm before clipping.
    """
    optimizer.zero_grad(set_to_none=True)  # before the forward, which forms the gradient of the head: never two of them
    recorded, total, sums, counts = Recorded(objective, whole), 0.0, {}, {}
    for batch in batches:
        loss, logps = _loss(model, batch, recorded, config, ref_head)
        loss.backward()
        total = total + loss.detach()
        for name, kept in _kept_tokens(batch, objective).items():
            sums[name] = sums.get(name, 0.0) - (logps * kept).sum()
            counts[name] = counts.get(name, 0) + kept.sum()
    norm = _step(optimizer, config)
    scheduler.step()
    terms = {f"loss_{name}": value for name, value in recorded.sums.items()}
    return {"loss": total, **terms, **{n: value / counts[n].clamp(min=1) for n, value in sums.items()}, "grad_norm": norm}


def _step(optimizer, config):
    """Clips and steps; returns the norm of the gradients before, on the device."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(optimizer, SophiaG):
        norm = torch.nn.utils.clip_grad_norm_(params, _limit(config) or math.inf)
        optimizer.step()
        return norm
    optimizer.step()  # clips by itself, without a pass of its own
    norm = optimizer._norm
    return grad_norm([p.grad for p in params if p.grad is not None], backend=config.backend) if norm is None else norm


def _loss(model, batch, objective, config, ref_head):
    """Loss, with its graph, and log-probabilities [B, T] of one micro-batch."""
    (weight, bias), (ref_weight, ref_bias) = head(model), ref_head
    ref_hidden = batch.ref_hidden
    if objective.divergence is not None and ref_hidden is None and has_adapters(model):
        with as_reference(model), autocast(model):
            ref_hidden = hidden_states(model, batch)
    with autocast(model):
        return linear_objective(
            hidden_states(model, batch),
            weight,
            batch.labels,
            objective,
            bias=bias,
            is_forget=batch.is_forget,
            ref_logps=batch.ref_logps,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            rows=batch.rows,
            return_logps=True,
            backend=config.backend,
            **transform(model),
        )


def _kept_tokens(batch, objective):
    """Masks [B, T] of the tokens that the log tells the likelihood of, by name: of pairs, the answers alone are forgotten."""
    is_answer = batch.is_forget
    if objective.pairs:
        is_answer = is_answer & (torch.arange(len(is_answer), device="cpu") % 2 == 0)
    groups = {"forget_nll": is_answer}
    if not batch.is_forget.all():
        groups["retain_nll"] = ~batch.is_forget
    kept = batch.labels != IGNORE_INDEX
    return {name: kept & group.to(kept.device, non_blocking=True)[:, None] for name, group in groups.items()}


def unlearn(model, tokenizer, forget, retain, config, *, log=None, progress=True, checkpoints=None):
    """Unlearns ``forget`` while keeping ``retain``; the model is changed in place.

    Args:
        model: a Hugging Face causal language model on its device, as it was before unlearning, also where a run is resumed:
            what the method needs of the reference comes from it. Where peft has wrapped it, the adapters are trained, and the
            reference is the model without them.
        tokenizer: its tokenizer.
        forget: list of `soul.data.Example`.
        retain: list of `soul.data.Example`; may be empty for objectives without a retain term.
        config: `UnlearnConfig`.
        log: an open text file, or the path of one, that gets one JSON line a step, those before a resume included; or None.
        progress: show a progress bar on stderr.
        checkpoints: `soul.checkpoint.Checkpoints`, where the run is saved and, where it says so, resumed from; or None.

    Returns:
        The log as a list of dicts: step, epoch, loss and its terms, negative log-likelihoods, grad_norm, lr, clip_fraction
        (SOUL) and rho (with clip_target), tokens_per_s, peak_memory_gib; forget_prob and retain_prob where it was evaluated;
        and in the last one ``stopped``, a sentence, where a criterion has ended the run.

    Raises:
        ArgumentError: the data do not fit the model, or the checkpoint is not of this run; nothing was changed.
        Diverged: the loss or a weight is not finite any more.
        Stopped: by SIGTERM, or ``checkpoints.stop``, after a checkpoint was written.
        OSError: log or checkpoint could not be written; earlier checkpoints are as they were.
    """
    objective = config.objective()
    answers = (forget, retain[: len(forget)])
    forget, retain = prepare(model, tokenizer, forget, retain, config)
    if config.eval_every:
        answers = {n: encode_for(model, tokenizer, part, config, n) for n, part in zip(("forget", "retain"), answers) if part}
    device = next(model.parameters()).device
    together = 2 if objective.pairs else 1  # forget sequences that belong to one example
    run = None
    if checkpoints is not None:
        run = describe(model, forget, retain, config.decisive())
        checkpoints.check(run)
        checkpoints.clear()
    ref_logps = None
    options = dict(cache=config.reference_cache, batch_size=config.batch_size * together, tokenizer=tokenizer)
    if objective.needs_reference:
        ref_logps = reference_logps(model, forget, backend=config.backend, **options)
    ref_head, ref_states = (None, None), None
    if objective.divergence is not None and has_adapters(model):
        ref_head = reference_head(model)  # hidden states come from a forward without adapters in each step
    elif objective.divergence is not None:
        ref_states, ref_head = _states(model, objective.divergence.of, forget, retain, options)

    def micro_batch(chosen, kept):
        return collate(
            [forget[i] for i in chosen],
            [retain[i] for i in kept],
            device=device,
            ref_logps=None if ref_logps is None else [ref_logps[i] for i in chosen],
            ref_hidden=ref_states and [ref_states[i] for i in (*chosen, *(len(forget) + i for i in kept))],
        )

    def retained(kept):
        return [collate([retain[i] for i in part], [], device=device) for part in _split(kept, config.batch_size)]

    model.train()
    order = Order(len(forget) // together, len(retain), config.batch_size * config.accumulate, config.epochs, config.seed)
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, len(order), config.warmup_ratio)
    parts = {"optimizer": optimizer, "scheduler": scheduler, "order": order}
    curvature = build_curvature(optimizer, config)
    if curvature is not None:
        parts["curvature"] = curvature
    records = [] if checkpoints is None else checkpoints.load(model, parts, run)
    bar = require("tqdm", "hf").tqdm(
        total=len(order), initial=len(records), disable=not progress, desc=f"unlearn ({config.optimizer})", file=sys.stderr
    )
    with contextlib.ExitStack() as stack:
        stack.callback(bar.close)
        if isinstance(log, (str, os.PathLike)):
            log = stack.enter_context(open(log, "w", encoding="utf-8"))
        if checkpoints is not None:
            stack.enter_context(checkpoints.listening())
        if config.gradient_checkpointing:
            stack.enter_context(checkpointing(model))
        for record in records:
            _write_line(log, record)
        ended = bool(records) and "stopped" in records[-1]  # in the checkpoint of its last step
        for epoch, examples, kept in () if ended else order:
            begun = time.perf_counter()
            chosen = [together * i + j for i in examples for j in range(together)]
            micro = itertools.zip_longest(
                _split(chosen, together * config.batch_size), _split(kept, config.batch_size), fillvalue=[]
            )
            batches = (micro_batch(*part) for part in micro)  # one at a time: states of a reference are large
            whole = None
            if len(examples) > config.batch_size:
                step = collate([forget[i] for i in chosen], [retain[i] for i in kept], device=device)
                whole = TokenBatch.from_labels(step.labels, step.is_forget)
            if curvature is not None:
                optimizer.zero_grad(set_to_none=True)  # never two sets of them
                curvature.step(lambda kept=kept: curvature_loss(model, retained(kept), curvature, config))
            lr = float(scheduler.get_last_lr()[0])
            values = train_step(model, batches, objective, optimizer, scheduler, config, ref_head, whole)
            record = {"step": len(records) + 1, "epoch": epoch, "lr": lr}
            record |= dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist()))  # waits, once
            if isinstance(optimizer, SophiaG):
                told = optimizer.telemetry()["groups"][0]
                record["clip_fraction"] = told["clip_fraction"]
                if config.clip_target is not None:
                    record["rho"] = told["rho"]
            n_tokens = sum(len(s.input_ids) for s in (*(forget[i] for i in chosen), *(retain[i] for i in kept)))
            record["tokens_per_s"] = n_tokens / (time.perf_counter() - begun)
            record["peak_memory_gib"] = peak_memory_gib(device)
            if config.eval_every and record["step"] % config.eval_every == 0:
                record |= _evaluated(model, answers, config)
            records.append(record)
            _write_line(log, record)
            bar.update()
            bar.set_postfix(forget_nll=f"{record['forget_nll']:.3f}")
            if not math.isfinite(record["loss"]):
                raise Diverged(f"the loss became {record['loss']} at step {record['step']}; lower the learning rate")
            if checkpoints is not None and checkpoints.due(len(records)):
                _check_finite(model, len(records))  # what is broken takes no place of what is not
                checkpoints.save(len(records), model, parts, records, run)
                if checkpoints.stop and len(records) < len(order) and "stopped" not in record:
                    raise Stopped(f"stopped after step {len(records)} of {len(order)}")
            if "stopped" in record:
                break
    optimizer.zero_grad(set_to_none=True)
    _check_finite(model, len(records))
    return records


def _evaluated(model, answers, config):
    """What an evaluation adds to the log: probabilities, and why the run ends here, where it does."""
    from soul.evaluate import answer_probability

    with evaluating(model):
        options = dict(batch_size=config.batch_size, backend=config.backend)
        found = {f"{name}_prob": answer_probability(model, part, **options) for name, part in answers.items()}
    reasons, forget_limit, retain_limit = [], config.stop_forget_prob, config.stop_retain_prob
    if forget_limit is not None and found["forget_prob"] <= forget_limit:
        reasons.append(f"forget probability {found['forget_prob']:.4g} has reached {forget_limit:g}")
    if retain_limit is not None and found["retain_prob"] < retain_limit:
        reasons.append(f"retain probability {found['retain_prob']:.4g} has fallen below {retain_limit:g}")
    return found | ({"stopped": "; ".join(reasons)} if reasons else {})


def _split(indices, size):
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _write_line(log, record):
    if log is not None:
        finite = {n: None if isinstance(value, float) and not math.isfinite(value) else value for n, value in record.items()}
        log.write(json.dumps(finite) + "\n")  # JSON knows no NaN
        log.flush()


def _check_finite(model, step):
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise Diverged(f"a weight is not finite after step {step}; lower the learning rate")


def _states(model, of, forget, retain, options):
    """The reference's hidden states of each forget sequence, then of each retain sequence, None where they are not needed; and
    its head.
    """
    needed = {"forget": forget, "retain": retain, "all": [*forget, *retain]}[of]
    found = reference_hidden(model, needed, **options)
    before, after = [None] * len(forget) if of == "retain" else [], [None] * len(retain) if of == "forget" else []
    return [*before, *found.hidden, *after], (found.weight, found.bias)


def prepare(model, tokenizer, forget, retain, config):
    """Encodes both sets for a config: the forget set answered by refusals, or paired with them, as the objective asks.

    Raises:
        ArgumentError: the data do not fit the model or the objective, the backend does not fit the model's device, or there
            can be no cache in the config's directory.
    """
    objective = config.objective()
    if getattr(objective, "alpha", 0) and not retain:
        remedy = "give a retain set, or set alpha to 0"
        raise argument_error("retain", f"examples for {objective}", "none", remedy)
    if config.accumulate > 1 and objective.additive is None:
        expected, remedy = f"1 with {objective}", "its loss is not a sum over sequences: raise --batch-size instead"
        raise argument_error("accumulate", expected, config.accumulate, remedy)
    if config.curvature != "unlearn" and not retain:
        remedy = "give a retain set, or choose the curvature 'unlearn'"
        raise argument_error("retain", f"examples for the curvature {config.curvature!r}", "none", remedy)
    if config.stop_retain_prob is not None and not retain:
        raise argument_error("stop_retain_prob", "None without a retain set", config.stop_retain_prob, "give a retain set")
    if not forget:
        raise argument_error("forget", "at least one example", "none", "there is nothing to unlearn")
    if config.gradient_checkpointing:
        check_checkpointing(model)
    resolve_backend(config.backend, head(model)[0])
    check_cache(config.reference_cache, "reference_cache")
    if objective.pairs:
        paired = pair_refusals(forget, seed=config.seed)
        answers, refusals = (encode_for(model, tokenizer, paired[half::2], config, "forget") for half in (0, 1))
        encoded = [sequence for pair in zip(answers, refusals) for sequence in pair]
    else:
        if objective.relabels:
            forget = refuse(forget, seed=config.seed)
        encoded = encode_for(model, tokenizer, forget, config, "forget")
    return encoded, encode_for(model, tokenizer, retain, config, "retain")


def encode_for(model, tokenizer, examples, config, name):
    """Encodes examples and makes sure that the model has a place for every token.

    Raises:
        ArgumentError: naming the row, or the length that does not fit.
    """
    sequences = encode(examples, tokenizer, vocab_size=head(model)[0].shape[0], max_length=config.max_length, name=name)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(sequence.input_ids) for sequence in sequences), default=0)
    if positions and longest > positions:
        remedy = f"pass --max-length {positions} to cut longer sequences"
        raise argument_error("max_length", f"sequences of at most {positions} tokens", longest, remedy)
    return sequences


def peak_memory_gib(device):
    """Most memory held so far, GiB: of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def check_output(directory, resume=False):
    """Returns the path of an output directory that does not exist yet or is empty; creates nothing.

    Args:
        directory: path of the directory.
        resume: it may also be that of a run of the ``soul unlearn`` command, which is to go on.

    Raises:
        ArgumentError: there is something in it.
    """
    directory = pathlib.Path(directory)
    above = next((parent for parent in directory.absolute().parents if parent.exists()), directory)
    if not above.is_dir():
        raise argument_error("output", "a new or an empty directory", f"a path below the file {above}", "choose another one")
    if resume and (directory / RUN_FILE).is_file():
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if resume:
            got = f"{directory} without {RUN_FILE}"
            raise argument_error("resume", "the output directory of a run, or a new one", got, "check --output")
        raise argument_error("output", "a new or an empty directory", str(directory), "choose another one, or remove it")
    return directory
