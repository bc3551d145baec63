"""One step of unlearning: the forward pass, the fused loss and the backward pass of each micro-batch; clipping; the update.

A step of several micro-batches equals that of one batch of all of them: every mean is over the whole step
(`RecordedObjective`), and gradients add up. The fused loss forms the gradient of the head in the forward pass already, so old
gradients are dropped before that pass.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from soul.data.batches import Batch
from soul.distributed.processes import Processes, full, gathered
from soul.distributed.shards import device_and_sharding
from soul.losses import Objective
from soul.models.causal_lm import (
    as_reference,
    autocast,
    device_of,
    gnb_loss,
    has_adapters,
    hidden_states,
    lm_head,
    token_logps,
)
from soul.optim.curvature import GNB, Curvature
from soul.optim.optimizer import SophiaG
from soul.optim.release import GradientRelease
from soul.run.config import UnlearnConfig, norm_limit
from soul_kernels import LinearOptions, Reference, TokenBatch, linear_objective
from soul_kernels.chunks import default_chunk_bytes
from soul_kernels.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ChunkBytes:
    """The scratch memory for one chunk of the fused losses of a run: that of the processes' smallest GPU.

    It decides how rows are cut into chunks, and with that the last bits of gradients. So it is the same in all processes, and a
    checkpoint keeps it for a run that goes on on another card.

    Args:
        model: on its device, whole or in shards.

    Attributes:
        value: bytes.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        device = device_of(model)
        self.value = min(Processes.of(model).gather(default_chunk_bytes(device)))

    def state_dict(self) -> dict[str, int]:
        """Return the number of bytes."""
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Set the number of bytes."""
        self.value = state_dict["value"]


class RecordedObjective:
    """An objective that adds up its terms as it is evaluated, over all chunks of a batch.

    Args:
        objective: a `soul.losses.Objective`.
        whole: the `TokenBatch` of all batches of the step; None if there is only one batch.
        add_up: adds a number up over the processes that take the step, each with its own batches; None: there is one.

    Attributes:
        sums: name -> the term, [] without gradient, once all chunks of the batch have been evaluated.
    """

    def __init__(
        self, objective: Objective, whole: TokenBatch | None = None, add_up: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.objective = objective
        self.whole = whole
        self.add_up = add_up
        self.sums: dict[str, Tensor] = {}
        self.additive = objective.additive
        self.linear = objective.linear  # at log-probabilities of 0, where the sweep evaluates it first, its terms are 0
        self.divergence = objective.divergence
        self.needs_statistics = objective.needs_statistics

    def __call__(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return the objective's loss, []."""
        terms = self.objective.terms(logps, batch if self.whole is None else batch.within(self.whole, self.add_up))
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + term.detach()
        return cast(Tensor, sum(terms.values()))


def train_step(
    model: "PreTrainedModel",
    batches: Iterable[Batch],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    config: UnlearnConfig,
    ref_head: tuple[Tensor | None, Tensor | None] = (None, None),
    whole: TokenBatch | None = None,
    release: GradientRelease | None = None,
    chunk_bytes: int | None = None,
) -> dict[str, Tensor]:
    """Take one step: forward pass, fused loss and backward pass of each micro-batch; clipping; the optimizer's step.

    If the objective needs hidden states of the reference model, and a batch has none, they are computed by the peft model
    without its adapters.

    Args:
        model: changed in place. If it is in shards, the batches are this process's share of the step.
        batches: the micro-batches. With ``release`` all of them are held at once.
        objective: a `soul.losses.Objective`.
        optimizer: of the model's trainable parameters.
        config: `UnlearnConfig`, for ``max_grad_norm``, ``gradient_release`` and ``backend``.
        ref_head: weight and bias of the reference model's head, from `soul.models.ref_model.reference_head`.
        whole: the `TokenBatch` of all micro-batches of all processes; None if there is only one.
        release: the `soul.optim.release.GradientRelease` of the optimizer, or None.
        chunk_bytes: as in `soul_kernels.LinearOptions`.

    Returns:
        Tensors [] on the device: the loss, the weighted terms of the objective, the mean negative log-likelihoods of forget and
        retain tokens in nats (in pairs, only the answers that are to be forgotten count), and the gradient norm before
        clipping, unless gradients are released. With an aim also ``batch_forget_prob``, the mean over the forget rows of
        ``exp(mean log p)``, before the step.
    """
    optimizer.zero_grad(set_to_none=True)  # the forward pass forms the gradient of the head: never hold two of them
    processes = Processes.of(model)
    recorded = RecordedObjective(objective, whole, processes.add_up if processes.size > 1 else None)
    terms: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    n_batches = None
    if release is not None:
        batches = list(batches)
        n_batches = len(batches)
    for position, batch in enumerate(batches, 1):
        loss, logps = _loss(model, batch, recorded, config, ref_head, chunk_bytes)
        with contextlib.nullcontext() if release is None or position == n_batches else release.paused():
            loss.backward()
        terms["loss"] = terms.get("loss", 0.0) + loss.detach()
        for name, mask in _logged_tokens(batch, objective).items():
            sums[name] = sums.get(name, 0.0) - (logps * mask).sum()
            counts[name] = counts.get(name, 0) + mask.sum()
            if name == "forget_nll" and config.aims:
                probabilities, n_rows = _answer_probabilities(logps, mask)
                sums["batch_forget_prob"] = sums.get("batch_forget_prob", 0.0) + probabilities
                counts["batch_forget_prob"] = counts.get("batch_forget_prob", 0) + n_rows
    norm = _update(optimizer, config)
    terms |= {f"loss_{name}": value for name, value in recorded.sums.items()}
    terms = processes.totals(terms)
    sums = processes.totals(sums)
    counts = processes.totals(counts)
    values = {**terms, **{name: value / counts[name].clamp(min=1) for name, value in sums.items()}}
    return values if norm is None else values | {"grad_norm": norm}


def _answer_probabilities(logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over rows of ``exp(mean log p)`` of the tokens in a mask [B, T], and the number of rows that have any."""
    n_tokens = mask.sum(1)
    rows = n_tokens > 0
    return (((logps * mask).sum(1) / n_tokens.clamp(min=1)).exp() * rows).sum(), rows.sum()


def _clip(params: list[Tensor], limit: float) -> Tensor:
    """Clip gradients in place as ``clip_grad_norm_`` does; return their norm before it, a whole tensor.

    It forms no norm over two meshes, which a head in shards beside copies of the rest has.
    """
    alike: dict[object, list[Tensor]] = {}
    for param in params:
        alike.setdefault(device_and_sharding(param)[1], []).append(param)
    grads = ([p.grad for p in same if p.grad is not None] for same in alike.values())
    norms = [full(torch.nn.utils.get_total_norm(some)) for some in grads if some]
    norm = norms[0] if len(norms) == 1 else torch.stack([some.to(norms[0].device) for some in norms]).norm()
    for same in alike.values():
        torch.nn.utils.clip_grads_with_norm_(same, limit, norm)
    return norm


def _update(optimizer: torch.optim.Optimizer, config: UnlearnConfig) -> Tensor | None:
    """Clip and step; return the norm of the gradients before clipping, on the device, or None if they are already freed."""
    if not isinstance(optimizer, SophiaG):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = _clip(params, norm_limit(config) or math.inf)
        optimizer.step()
        return norm
    optimizer.step()  # which clips in the same pass
    return None if config.gradient_release else optimizer.grad_norm()


def _loss(
    model: "PreTrainedModel",
    batch: Batch,
    objective: RecordedObjective,
    config: UnlearnConfig,
    ref_head: tuple[Tensor | None, Tensor | None],
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """Return the loss [], with its graph, and the log-probabilities [B, T] of one micro-batch."""
    ref_weight, ref_bias = ref_head
    ref_hidden = batch.ref_hidden
    if objective.divergence is not None and ref_hidden is None and has_adapters(model):
        with as_reference(model), autocast(model):
            ref_hidden = gathered(model, lambda: hidden_states(model, batch))

    def compute() -> tuple[Tensor, Tensor]:
        with autocast(model):
            return linear_objective(
                hidden_states(model, batch),
                lm_head(model),
                batch.labels,
                objective,
                is_forget=batch.is_forget,
                ref_logps=batch.ref_logps,
                reference=None if ref_hidden is None else Reference(ref_hidden, ref_weight, ref_bias),
                return_logps=True,
                options=LinearOptions(token_indices=batch.token_indices, chunk_bytes=chunk_bytes, backend=config.backend),
            )

    return gathered(model, compute)


def _logged_tokens(batch: Batch, objective: Objective) -> dict[str, Tensor]:
    """Return masks [B, T] of the tokens whose likelihood is logged, by name; in pairs, refusals are not among them."""
    is_answer = batch.is_forget
    if objective.pairs:
        is_answer = is_answer & (torch.arange(len(is_answer), device=is_answer.device) % 2 == 0)
    groups = {"forget_nll": is_answer}
    if batch.has_retain:
        groups["retain_nll"] = ~batch.is_forget
    labelled = batch.labels != IGNORE_INDEX
    return {name: labelled & group.to(labelled.device, non_blocking=True)[:, None] for name, group in groups.items()}


def curvature_loss(
    model: "PreTrainedModel",
    batches: list[Batch],
    curvature: Curvature,
    config: UnlearnConfig,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return the loss that curvature differentiates, [] with its graph: a mean over all labelled tokens of the batches.

    Args:
        model: accumulates the gradients of all batches but the last one; the share of that one is returned.
        batches: micro-batches of retain sequences; if the model is in shards, this process's share of them.
        curvature: a `soul.curvature.GNB`, for labels drawn from the model, or a `RetainFisher`, for the true ones.
        config: `UnlearnConfig`, for ``backend``.
        chunk_bytes: as in `soul_kernels.LinearOptions`.
    """
    n_tokens = Processes.of(model).total(sum(len(batch.token_indices) for batch in batches))
    generator = curvature.generator() if isinstance(curvature, GNB) else None

    def share_of(batch: Batch) -> Tensor:
        if generator is not None:
            return gnb_loss(
                model, batch, generator=generator, n_tokens=n_tokens, backend=config.backend, chunk_bytes=chunk_bytes
            )
        return -token_logps(model, batch, config.backend, chunk_bytes).sum() / n_tokens

    for batch in batches[:-1]:
        share_of(batch).backward()
    return share_of(batches[-1])
