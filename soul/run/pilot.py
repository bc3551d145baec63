"""The pilot of a run with an aim: few steps with several learning rates and alphas, each undone exactly.

It takes the first steps of the run's own order with optimizers of their own, and puts weights, buffers and random generators
back after each try. So the run begins as if there had been no pilot.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, cast

import torch

from soul.checkpoint.format import random_state, set_random_state
from soul.distributed.processes import Processes
from soul.losses import Objective
from soul.optim.curvature import Curvature
from soul.optim.optimizer import SophiaG
from soul.optim.release import release_gradients
from soul.output.progress import task, track
from soul.run.aim import MAX_TRIES, PILOT_SHARE, Search
from soul.run.config import UnlearnConfig, build_curvature, build_optimizer
from soul.run.feed import Feed
from soul.run.measures import Measures
from soul.run.step import curvature_loss, train_step
from soul.run.weights import restore, snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Event = dict[str, Any]  # a line of the log that is no step

TRAINING_PASSES = 3  # over a token of a step: forward, and twice that backward; an evaluation takes one
LONGEST = 4  # steps of a try
REFUSAL_HASTE = 3.0  # refusals are to become certain, and a model says them only then


def run_pilot(
    model: "PreTrainedModel", feed: Feed, objective: Objective, config: UnlearnConfig, measures: Measures, alpha: float
) -> tuple[Search, list[Event]]:
    """Search for learning rate and alpha.

    Args:
        model: in training mode; it is left bit for bit as it was.
        feed: the data of the run.
        objective: that of the run; its alpha is changed.
        config: `UnlearnConfig`; its lr is tried first.
        measures: the `Measures` of the run.
        alpha: is tried first.

    Returns:
        The `Search`, and a line of the log for each try.
    """
    order = feed.order()
    total_steps = len(order)
    firsts = [(examples, retained) for _, (_, examples, retained) in zip(range(min(LONGEST, total_steps)), order)]
    step_passes = TRAINING_PASSES * feed.n_tokens(*firsts[0])
    sequences = [feed.forget_sequences(examples) for examples, _ in firsts]
    check_passes = [sum(len(sequence.input_ids) for sequence in forget) for forget in sequences]
    budget = PILOT_SHARE * total_steps * step_passes

    def cost(steps: int) -> int:
        return steps * step_passes + sum(check_passes[:steps]) + measures.control_part_tokens

    fitting = [n for n in range(1, len(firsts) + 1) if MAX_TRIES * cost(n) + sum(check_passes[:n]) <= budget]
    n_steps = max(fitting, default=1)
    tries = min(MAX_TRIES, int((budget - sum(check_passes[:n_steps])) // cost(n_steps)))
    checked = [sequence for forget in sequences[:n_steps] for sequence in forget]
    before = measures.mean_logp(checked)
    way = -REFUSAL_HASTE * before if objective.relabels else None
    search = Search(measures.target, lr=config.lr, alpha=alpha, steps=total_steps, tries=tries, way=way)
    if search.done:
        return search, []
    start = snapshot(model)
    random_states = random_state()
    events: list[Event] = []
    shown = task("pilot", tries, stays=True)
    while not search.done:
        lr, objective.alpha = search.lr, search.alpha
        response = kept = None
        if _take_steps(model, feed, objective, dataclasses.replace(config, lr=lr), firsts[:n_steps]):
            kept = measures.control_kept()
            fall = (before - measures.mean_logp(checked)) / n_steps
            response = -fall if objective.relabels else fall  # refusals are to become likelier
            if not math.isfinite(response + kept):
                response = None
        restore(model, start)
        set_random_state(random_states)
        search.observe(response, 1.0 if kept is None or response is None else kept)
        events.append({"event": "pilot", "step": 0, "lr": lr, "alpha": objective.alpha, "response": response, "kept": kept})
        shown.update(lr=lr, alpha=objective.alpha, kept=kept)
    shown.close()
    return search, events


def _curvature_loss(
    model: "PreTrainedModel", feed: Feed, retained: list[int], curvature: Curvature, config: UnlearnConfig
) -> torch.Tensor:
    return curvature_loss(model, feed.retain_batches(retained), curvature, config)


def _take_steps(
    model: "PreTrainedModel",
    feed: Feed,
    objective: Objective,
    config: UnlearnConfig,
    steps: list[tuple[list[int], list[int]]],
) -> bool:
    """Take some steps with a new optimizer; tell whether loss, gradients and weights are finite."""
    optimizer = build_optimizer(model, config)
    curvature = build_curvature(optimizer, config)
    release = release_gradients(model, cast(SophiaG, optimizer)) if config.gradient_release else None
    try:
        for examples, retained in track(steps, "steps of a try"):
            batches, whole = feed.step(examples, retained)
            if curvature is not None:
                optimizer.zero_grad(set_to_none=True)
                curvature.step(functools.partial(_curvature_loss, model, feed, retained, curvature, config))
            values = train_step(model, batches, objective, optimizer, config, feed.ref_head, whole, release)
            numbers = [values[name] for name in ("loss", "grad_norm") if name in values]
            if not all(math.isfinite(float(number)) for number in numbers):
                return False
        return Processes.of(model).all_finite(model.parameters())
    finally:
        optimizer.zero_grad(set_to_none=True)
        if release is not None:
            release.remove()
