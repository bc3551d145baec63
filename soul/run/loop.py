"""The unlearning loop: one forward over forget and retain sequences, one fused loss, one fused step."""

import contextlib
import json
import math
import os
import sys
import time

import torch

from soul._extras import require
from soul.checkpoint.format import versions
from soul.checkpoint.local import Stopped, describe, describe_inputs
from soul.distributed.processes import Processes
from soul.models.causal_lm import checkpointing, compiled, evaluating
from soul.models.encoding import encode_for
from soul.optim.optimizer import SophiaG
from soul.optim.release import release_gradients
from soul.output.console import safe_stream
from soul.output.directory import no_follow
from soul.run.config import build_curvature, build_optimizer, build_scheduler
from soul.run.feed import Feed
from soul.run.graph import GraphedStep
from soul.run.influence import Influence, unlearn_once
from soul.run.prepare import prepare
from soul.run.step import curvature_loss, train_step

MUST_BE_FINITE = {"loss": "the loss", "grad_norm": "the norm of the gradient"}  # in every record


class Diverged(RuntimeError):
    """The loss, its gradient or a weight is not finite any more; the model is worthless."""


def unlearn(model, tokenizer, forget, retain, config, *, log=None, progress=True, checkpoints=None):
    """Unlearns ``forget`` while keeping ``retain``; the model is changed in place.

    Args:
        model: a Hugging Face causal language model on its device, as it was before unlearning, also where a run is resumed:
            what the method needs of the reference comes from it. Where peft has wrapped it, the adapters are trained, and the
            reference is the model without them. Where `soul.distributed.shard` has put it in shards, every process
            calls this, with the same arguments, and takes its part of every step.
        tokenizer: its tokenizer.
        forget: list of `soul.data.Example`.
        retain: list of `soul.data.Example`; may be empty for objectives without a retain term.
        config: `UnlearnConfig`.
        log: an open text file, or the path of one, which may be no link, that gets one JSON line a step, those before a resume
            included; or None.
        progress: show a progress bar on stderr.
        checkpoints: `soul.checkpoint.local.Checkpoints`, where the run is saved and, where it says so, resumed from; or None.

    Returns:
        The log as a list of dicts: step, epoch, loss and its terms, negative log-likelihoods, grad_norm, lr, clip_fraction
        (SOUL) and rho (with clip_target), tokens_per_s, peak_memory_gib; forget_prob and retain_prob where it was evaluated;
        and in the last one ``stopped``, a sentence, where a criterion has ended the run. Of the method "influence" it has one
        dict, with what `soul.run.influence.unlearn_once` returns.

    Raises:
        ArgumentError: the data do not fit the model, the checkpoint is not of this run, another process writes there, or the
            processes of a sharded model are not to do the same; nothing was changed.
        Diverged: the loss, its gradient or a weight is not finite any more.
        Stopped: by SIGTERM, or ``checkpoints.stop``, after a checkpoint was written.
        OSError: log or checkpoint could not be written; earlier checkpoints are as they were.
    """
    objective = config.objective()
    answers = (forget, retain[: len(forget)])
    forget, retain = prepare(model, tokenizer, forget, retain, config)
    processes = Processes.of(model)
    if processes.size > 1:
        processes.check_alike({**describe_inputs(model, forget, retain, config.decisive()), **versions()})
    if isinstance(objective, Influence):
        return _influence(model, forget, retain, objective, config, log)
    if config.eval_every:
        answers = {n: encode_for(model, tokenizer, part, config, n) for n, part in zip(("forget", "retain"), answers) if part}
    run = None
    with contextlib.ExitStack() as stack:
        if checkpoints is not None:
            run = describe(model, forget, retain, config.decisive())
            if processes.size > 1:
                run["several processes"] = True
            checkpoints.check(run)
            processes.on_first(lambda: stack.enter_context(checkpoints.alone()))
            checkpoints.clear()
        feed = Feed(model, tokenizer, forget, retain, objective, config)

        model.train()
        order, optimizer = feed.order(), build_optimizer(model, config)
        scheduler = build_scheduler(optimizer, len(order), config.warmup_ratio, config.schedule)
        parts = {"optimizer": optimizer, "scheduler": scheduler, "order": order}
        curvature = build_curvature(optimizer, config)
        if curvature is not None:
            parts["curvature"] = curvature
        records = [] if checkpoints is None else checkpoints.load(model, parts, run)
        bar = require("tqdm", "hf").tqdm(
            total=len(order),
            initial=len(records),
            disable=not (progress and processes.first),
            desc=f"unlearn ({config.optimizer})",
            file=safe_stream(sys.stderr),
        )
        graphed = None
        if config.cuda_graph:
            device = next(model.parameters()).device
            graphed = GraphedStep(lambda batch: train_step(model, [batch], objective, optimizer, config, feed.ref_head), device)
        release = None
        stack.callback(bar.close)
        stack.callback(optimizer.zero_grad, set_to_none=True)
        if config.gradient_release:
            release = release_gradients(model, optimizer)
            stack.callback(release.remove)
        if config.compile:
            stack.enter_context(compiled(model))
        if not processes.first:
            log = None
        if isinstance(log, (str, os.PathLike)):
            log = stack.enter_context(open(log, "w", encoding="utf-8", opener=no_follow))
        if checkpoints is not None:
            stack.enter_context(checkpoints.listening())
        if config.gradient_checkpointing:
            stack.enter_context(checkpointing(model))
        for record in records:
            _write_line(log, record)
        ended = bool(records) and "stopped" in records[-1]  # in the checkpoint of its last step
        for epoch, examples, kept in () if ended else order:
            begun = time.perf_counter()
            batches, whole = feed.step(examples, kept)
            if curvature is not None:
                optimizer.zero_grad(set_to_none=True)  # never two sets of them
                curvature.step(lambda kept=kept: curvature_loss(model, feed.retained(kept), curvature, config))
            lr = float(scheduler.get_last_lr()[0])
            if graphed is not None:
                values = graphed(next(batches))
            else:
                batches = batches if release is None else list(batches)
                values = train_step(model, batches, objective, optimizer, config, feed.ref_head, whole, release)
            scheduler.step()
            record = {"step": len(records) + 1, "epoch": epoch, "lr": lr, **_told(values, optimizer, config)}
            record["tokens_per_s"] = _rate(feed.n_tokens(examples, kept), time.perf_counter() - begun)
            record["peak_memory_gib"] = peak_memory_gib(next(model.parameters()).device)
            if config.eval_every and record["step"] % config.eval_every == 0:
                record |= _evaluated(model, answers, config)
            records.append(record)
            _write_line(log, record)
            bar.update()
            bar.set_postfix(forget_nll=f"{record['forget_nll']:.3f}")
            for name, what in MUST_BE_FINITE.items():
                if not math.isfinite(record.get(name, 0.0)):  # a norm of inf: clipping has made the step 0
                    text = f"{what} became {record[name]} at step {record['step']}"
                    raise Diverged(f"{text}; {_advice(records, objective)}")
            if checkpoints is not None and checkpoints.due(len(records)):
                _check_finite(model, records, objective)  # what is broken takes no place of what is not
                checkpoints.save(len(records), model, parts, records, run)
                checkpoints.restart_clock()
                if checkpoints.stopping and len(records) < len(order) and "stopped" not in record:
                    raise Stopped(f"stopped after step {len(records)} of {len(order)}")
            if "stopped" in record:
                break
    _check_finite(model, records, objective)
    return records


def _told(values, optimizer, config):
    """What a step says of itself, as numbers; waits for the device."""
    record = dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist()))  # once
    if isinstance(optimizer, SophiaG):
        told = optimizer.telemetry()["groups"][0]
        record["clip_fraction"] = told["clip_fraction"]
        if config.clip_target is not None:
            record["rho"] = told["rho"]
    return record


def _influence(model, forget, retain, method, config, log):
    """The log of one second-order step over all data."""
    begun, device = time.perf_counter(), next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(config.seed)
    options = dict(batch_size=config.batch_size, generator=generator, backend=config.backend, **method.options)
    found = unlearn_once(model, forget, retain, **options)
    seconds, n_tokens = time.perf_counter() - begun, sum(len(s.input_ids) for s in (*forget, *retain))
    record = {"step": 1, "epoch": 1, **{"factor" if name == "step" else name: value for name, value in found.items()}}
    record |= {"tokens_per_s": _rate(n_tokens, seconds), "peak_memory_gib": peak_memory_gib(device)}
    with contextlib.ExitStack() as stack:
        if isinstance(log, (str, os.PathLike)):
            log = stack.enter_context(open(log, "w", encoding="utf-8", opener=no_follow))
        _write_line(log, record)
    _check_finite(model, [record], method)
    return [record]


def _evaluated(model, answers, config):
    """What an evaluation adds to the log: probabilities, and why the run ends here, where it does."""
    from soul.evaluate.model import answer_probability

    with evaluating(model):
        options = dict(batch_size=config.batch_size, backend=config.backend)
        found = {f"{name}_prob": answer_probability(model, part, **options) for name, part in answers.items()}
    found = Processes.of(model).of_first(found)  # all end in the same step
    reasons, forget_limit, retain_limit = [], config.stop_forget_prob, config.stop_retain_prob
    if forget_limit is not None and found["forget_prob"] <= forget_limit:
        reasons.append(f"forget probability {found['forget_prob']:.4g} has reached {forget_limit:g}")
    if retain_limit is not None and found["retain_prob"] < retain_limit:
        reasons.append(f"retain probability {found['retain_prob']:.4g} has fallen below {retain_limit:g}")
    return found | ({"stopped": "; ".join(reasons)} if reasons else {})


def _write_line(log, record):
    if log is not None:
        finite = {n: None if isinstance(value, float) and not math.isfinite(value) else value for n, value in record.items()}
        log.write(json.dumps(finite) + "\n")  # JSON knows no NaN
        log.flush()


def _rate(count, seconds):
    """Return the count a second; NaN where the clock has not moved."""
    return count / seconds if seconds > 0 else math.nan


def _check_finite(model, records, objective):
    if not Processes.of(model).all_finite(model.parameters()):
        raise Diverged(f"a weight is not finite after step {len(records)}; {_advice(records, objective)}")


def _advice(records, objective):
    """Return what to change after a run has diverged, in words: what its first record that is not finite points to.

    Losses and gradients of step 1 are those of the model as it was, so no learning rate is the cause. If the likelihoods are
    finite there, and the loss or its gradient is not, a weight of the objective is: from 1e6 on it is named.
    """
    if isinstance(objective, Influence):
        return "raise the damping"
    broken = next((r for r in records if not all(math.isfinite(r.get(name, 0.0)) for name in MUST_BE_FINITE)), None)
    if broken is None:
        return "lower the learning rate"
    weights = {name: getattr(objective, name) for name in ("gamma", "alpha") if hasattr(objective, name)}
    largest = max(weights, key=weights.get, default=None)
    likelihoods = [value for name, value in broken.items() if name.endswith("_nll")]
    if largest is not None and weights[largest] >= 1e6 and all(map(math.isfinite, likelihoods)):
        return f"{largest}={weights[largest]:g} makes the loss or its gradient overflow: lower {largest}"
    if broken["step"] == 1:
        return "no step had been taken, so the learning rate is not the cause: float32 parameters may not overflow (--dtype)"
    return "lower the learning rate"


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
