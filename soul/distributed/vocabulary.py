"""Head and embeddings of a model in shards of rows, which no process ever gathers.

How it works: both are tables with a row for every token of the vocabulary. `cut_vocabulary` cuts them over all processes, and
FSDP2 then cuts everything else. The fused loss computes with a head in shards (`soul_kernels.Head.own_tokens`), and tokens are
looked up in shards of embeddings (`soul_kernels.lookup`). A process has the gradients of its own rows alone. They are complete,
so nothing is left for FSDP2 to add up.

Embeddings that are tied to the head have its parameter. Those that are not tied are cut if they are torch's own layer; what
another layer computes is not known, so FSDP2 gathers it as before. Other tables, of positions or of single layers, are no input
embeddings, and are gathered too.

Safe to change: which embeddings are cut, in `can_look_up`, which the planner asks too.
"""

import functools
from typing import TYPE_CHECKING

import torch

from soul_kernels.errors import argument_error
from soul_kernels.lookup import look_up

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def can_look_up(embeddings: torch.nn.Module) -> bool:
    """Tell whether a layer does nothing but look up rows, so that `soul_kernels.lookup.look_up` can take its place."""
    return type(embeddings) is torch.nn.Embedding and embeddings.max_norm is None and not embeddings.scale_grad_by_freq


def vocabulary_layers(model: "PreTrainedModel") -> list[torch.nn.Linear | torch.nn.Embedding]:
    """Return the layers of a model that `cut_vocabulary` cuts: the head, and the embeddings if they can be looked up in shards.

    Raises:
        ArgumentError: the head is no ``torch.nn.Linear``; or embeddings that are tied to it cannot be looked up.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    remedy = "what another layer computes is not known: leave head_in_shards out"
    if type(head) is not torch.nn.Linear:
        raise argument_error("head_in_shards", "a torch.nn.Linear", repr(head), remedy)
    if can_look_up(embeddings):
        return [head, embeddings]
    if embeddings.weight is head.weight:
        raise argument_error("head_in_shards", "a torch.nn.Embedding", repr(embeddings), remedy)
    return [head]


def cut_vocabulary(model: "PreTrainedModel", mesh: "DeviceMesh") -> set[torch.nn.Parameter]:
    """Cut head and embeddings of a model along the vocabulary, in place, and return their parameters.

    The head's own forward pass, which only generation calls, then takes the same hidden states in all processes, and returns
    all logits in each.

    Raises:
        ArgumentError: as `vocabulary_layers`.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    head, *others = vocabulary_layers(model)
    is_tied = any(embeddings.weight is head.weight for embeddings in others)
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()))
    for embeddings in others:
        assert isinstance(embeddings, torch.nn.Embedding)
        weight = head.weight
        if not is_tied:
            whole = embeddings.weight
            weight = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]), requires_grad=whole.requires_grad)
        embeddings.weight = weight
        embeddings.forward = functools.partial(_embedded, embeddings)  # type: ignore[method-assign]
    return {parameter for layer in (head, *others) for parameter in layer.parameters()}


def _embedded(embeddings: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    """Return what the forward pass of embeddings in shards returns for this process's tokens."""
    return look_up(ids, embeddings.weight, embeddings.padding_idx)
