"""One step of unlearning: the forward pass, the fused loss and the backward pass of each micro-batch, clipping, the update."""

import contextlib
import math

import torch

from soul.distributed.processes import Processes, full, gathered
from soul.models.causal_lm import as_reference, autocast, gnb_loss, has_adapters, head, hidden_states, token_logps, transform
from soul.optim.curvature import GNB
from soul.optim.optimizer import SophiaG
from soul.run.config import norm_limit
from soul_kernels import linear_objective
from soul_kernels.tokens import IGNORE_INDEX


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


def train_step(model, batches, objective, optimizer, config, ref_head=(None, None), whole=None, release=None):
    """Forward, fused loss, backward of each micro-batch; clipping, step.

    Where the objective needs hidden states of a reference, and a batch has none, they are those of a peft model without its
    adapters.

    Args:
        model: changed in place. Where it is in shards, the batches are this process's part of the step.
        batches: iterable of `soul.data.batches.Batch`, the micro-batches; a list of them with ``release``.
        objective: a `soul.losses.Objective`.
        optimizer: of the model's trainable parameters.
        config: `UnlearnConfig`, for ``max_grad_norm`` and ``backend``.
        ref_head: weight and bias of the reference's head, from `soul.models.ref_model.reference_head`.
        whole: the `TokenBatch` of all micro-batches of all processes; None where there is but one.
        release: the `soul.optim.release.GradientRelease` of the optimizer, or None.

    Returns:
        Tensors on the device: the loss, the weighted terms of the objective, the mean negative log-likelihoods of forget and
        retain tokens (for pairs, of the answers that are to be forgotten), and the gradient norm before clipping, but where
        gradients are released.
    """
    optimizer.zero_grad(set_to_none=True)  # before the forward, which forms the gradient of the head: never two of them
    recorded, total, sums, counts = Recorded(objective, whole), 0.0, {}, {}
    for position, batch in enumerate(batches, 1):
        loss, logps = _loss(model, batch, recorded, config, ref_head)
        with contextlib.nullcontext() if release is None or position == len(batches) else release.paused():
            loss.backward()
        total = total + loss.detach()
        for name, kept in _kept_tokens(batch, objective).items():
            sums[name] = sums.get(name, 0.0) - (logps * kept).sum()
            counts[name] = counts.get(name, 0) + kept.sum()
    processes = Processes.of(model)
    norm = _update(optimizer, config)
    terms = processes.totals({"loss": total, **{f"loss_{name}": value for name, value in recorded.sums.items()}})
    sums, counts = processes.totals(sums), processes.totals(counts)
    values = {**terms, **{n: value / counts[n].clamp(min=1) for n, value in sums.items()}}
    return values if norm is None else values | {"grad_norm": norm}


def _update(optimizer, config):
    """Clips and steps; returns the norm of the gradients before, on the device, or None where they are gone."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(optimizer, SophiaG):
        norm = torch.nn.utils.clip_grad_norm_(params, norm_limit(config) or math.inf)
        optimizer.step()
        return full(norm)
    optimizer.step()  # clips by itself, without a pass of its own
    if config.gradient_release:
        return None
    return optimizer.grad_norm()


def _loss(model, batch, objective, config, ref_head):
    """Loss, with its graph, and log-probabilities [B, T] of one micro-batch."""
    (ref_weight, ref_bias), ref_hidden = ref_head, batch.ref_hidden
    if objective.divergence is not None and ref_hidden is None and has_adapters(model):
        with as_reference(model), autocast(model):
            ref_hidden = hidden_states(model, batch)

    def compute():
        weight, bias = head(model)
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
                rows=batch.token_indices,
                return_logps=True,
                backend=config.backend,
                **transform(model),
            )

    return gathered(model, compute)


def _kept_tokens(batch, objective):
    """Masks [B, T] of the tokens that the log tells the likelihood of, by name: of pairs, the answers alone are forgotten."""
    is_answer = batch.is_forget
    if objective.pairs:
        is_answer = is_answer & (torch.arange(len(is_answer), device=is_answer.device) % 2 == 0)
    groups = {"forget_nll": is_answer}
    if batch.has_retain:
        groups["retain_nll"] = ~batch.is_forget
    kept = batch.labels != IGNORE_INDEX
    return {name: kept & group.to(kept.device, non_blocking=True)[:, None] for name, group in groups.items()}


def curvature_loss(model, batches, curvature, config):
    """The loss whose gradient h is taken from, [], with its graph: a mean over all labelled tokens of the batches.

    Args:
        model: gets the gradients of all batches but the last, of which the loss that is returned is a part.
        batches: list of `soul.data.batches.Batch`, of retain sequences; of a model in shards this process's part of them.
        curvature: a `soul.curvature.GNB`, for labels drawn from the model, or a `RetainFisher`, for the true ones.
        config: `UnlearnConfig`, for ``backend``.
    """
    n_tokens = Processes.of(model).total(sum(len(batch.token_indices) for batch in batches))
    generator = curvature.generator() if isinstance(curvature, GNB) else None
    for position, batch in enumerate(batches, 1):
        if generator is not None:
            loss = gnb_loss(model, batch, generator=generator, backend=config.backend) * (len(batch.token_indices) / n_tokens)
        else:
            loss = -token_logps(model, batch, config.backend).sum() / n_tokens
        if position == len(batches):
            return loss
        loss.backward()
