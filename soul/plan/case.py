"""The input of a plan, checked: a model's shape, the options of a run, its batches, and the hardware."""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from soul.distributed.processes import check_layout
from soul.losses import OBJECTIVES, Objective
from soul.models.adapters import check_rank, is_named
from soul.models.loading import DTYPES
from soul.models.quantized import four_bit_bytes
from soul.plan.cards import NETWORK, Card
from soul.plan.shapes import Shape
from soul.run.config import UnlearnConfig
from soul_kernels.chunks import ResolvedOptions, chunk_rows, memory_share, round_rows
from soul_kernels.errors import argument_error, check_choice, check_whole

ATTENTIONS = ("sdpa", "eager")


def numel_of(sizes: Mapping[tuple[int, ...], int]) -> int:
    """Return the number of elements of some tensors: shape -> number of such ones."""
    return sum(math.prod(size) * count for size, count in sizes.items())


def check_hardware(attention: str, gpus: int, network: float, host_bandwidth: float | None = None) -> None:
    """Raise `ArgumentError` unless a `Case` takes these values of ``attention``, ``gpus`` and the two bandwidths."""
    check_choice("attention", attention, ATTENTIONS)
    check_whole("gpus", gpus, "1 is a single card")
    if not 0 < network < math.inf:
        raise argument_error("network", "bytes a second, a positive number", network, f"{NETWORK:g} is the default")
    if host_bandwidth is not None and not 0 < host_bandwidth < math.inf:
        raise argument_error("host_bandwidth", "bytes a second, a positive number", host_bandwidth, "None is the card's")


def objective_of(config: UnlearnConfig) -> Objective:
    """Return the objective of a run.

    Raises:
        ArgumentError: the run does not consist of optimizer steps.
    """
    objective = config.objective()
    if not isinstance(objective, Objective):
        expected = f"one of {', '.join(OBJECTIVES)}"
        remedy = "influence takes one step over all data, and is not planned"
        raise argument_error("method", expected, repr(config.method), remedy)
    return objective


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The size of one micro-batch: forget and retain sequences together.

    Attributes:
        sequences: number of sequences.
        length: tokens of each sequence, padding included.
        labelled: number of tokens with a label, of all sequences together; None: every token.
        compared: number of labelled tokens at which a divergence from the reference model is computed, if the objective has
            one; None: those of half of the sequences.
        masked: whether attention takes a mask, and has as many heads of keys and values as of queries. Padding on the right
            does without one (`soul.models.causal_lm.hidden_states`), but for families with attention code of their own.

    Raises:
        ArgumentError: a number is out of range.
    """

    sequences: int
    length: int
    labelled: int | None = None
    compared: int | None = None
    masked: bool = False

    def __post_init__(self) -> None:
        for name in ("sequences", "length"):
            check_whole(name, getattr(self, name), "check the tokens")
        for name, most in (("labelled", self.n), ("compared", self.n_labelled)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise argument_error(name, f"a number of tokens, at most {most}", value, "check the tokens")

    @property
    def n(self) -> int:
        """Number of tokens, padding included."""
        return self.sequences * self.length

    @property
    def n_labelled(self) -> int:
        """Number of tokens with a label."""
        return self.n if self.labelled is None else self.labelled


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything that a plan depends on, checked.

    Attributes:
        shape: the model's `Shape`.
        config: the `UnlearnConfig`.
        tokens: the largest micro-batch.
        dtype: name of the parameters' dtype.
        adapters: arguments of `soul.models.add_adapters`, or None.
        attention: "sdpa" or "eager".
        card: a `Card`.
        gpus: number of GPUs over which FSDP2 shards parameters, gradients and states.
        network: bytes a second into and out of each GPU.
        autocast: whether fp32 parameters are multiplied as bf16 copies, as on a GPU.
        load_in_4bit: whether the linear layers below adapters are stored in 4 bits, whole on each GPU.

    Raises:
        ArgumentError: a value is unknown or out of range, or two of them do not go together.
    """

    shape: Shape
    config: UnlearnConfig
    tokens: Tokens
    dtype: str
    adapters: dict[str, Any] | None
    attention: str
    card: Card
    gpus: int = 1
    network: float = NETWORK
    autocast: bool = True
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_hardware(self.attention, self.gpus, self.network, self.card.host_bandwidth)
        self._check_layout()
        if self.adapters is not None:
            check_rank(self.adapters["rank"])
        targets = None if self.adapters is None else self.adapters.get("targets", "all-linear")
        for target in targets if isinstance(targets, list) else ():
            if not any(_matches(name, target) for name in self.shape.linear):
                remedy = f"{self.shape.name} has {', '.join(sorted(_layer_kinds(self.shape)))}"
                raise argument_error("lora_targets", "names of linear layers", repr(target), remedy)
        if self.config.gradient_checkpointing and not self.shape.supports_checkpointing:
            remedy = "leave it out, and lower the batch size"
            raise argument_error("gradient_checkpointing", "a family that supports it", self.shape.name, remedy)

    def _check_layout(self) -> None:
        """Raise unless the model can be stored as the options say."""
        check_layout(self.config, self.gpus)
        if self.load_in_4bit and self.adapters is None:
            remedy = "codes of 4 bits have no gradient: pass --lora-rank 16"
            raise argument_error("load_in_4bit", "adapters on a quantized model", "all parameters to be trained", remedy)
        if self.head_in_shards and self.shape.tied and not self.looks_up:
            got = f"those of {self.shape.name}, which are tied to the head"
            remedy = "what another layer computes is not known: leave it out"
            raise argument_error("head_in_shards", "embeddings that are a torch.nn.Embedding", got, remedy)

    @property
    def replicas(self) -> int:
        """The number of copies of the shards (HSDP)."""
        return self.config.replicas

    @property
    def cpu_offload(self) -> bool:
        """Whether the shards of parameters, gradients and states are in main memory, where the optimizer steps."""
        return self.config.cpu_offload

    @property
    def head_in_shards(self) -> bool:
        """Whether the head stays in shards of rows, for each of which its own process computes the logits."""
        return self.config.head_in_shards and self.gpus > 1

    @property
    def looks_up(self) -> bool:
        """Whether the embeddings stay in shards of rows too, in which tokens are looked up."""
        return self.head_in_shards and self.shape.embedding is not None

    @functools.cached_property
    def vocabulary(self) -> "collections.Counter[tuple[int, ...]]":
        """Shape -> number of the parameters that stay in shards of rows: head and embeddings.

        Their shards lie over all GPUs, whatever the number of copies of the rest.
        """
        tables: collections.Counter[tuple[int, ...]] = collections.Counter()
        if self.head_in_shards:
            tables[self.shape.vocab, self.shape.head_width] += 1
        if self.looks_up and not self.shape.tied:
            assert self.shape.embedding is not None
            tables[self.shape.embedding] += 1
        return tables

    @property
    def shards(self) -> int:
        """The number of GPUs over which one copy of the model is cut."""
        return self.gpus // self.replicas

    @property
    def cut_numel(self) -> int:
        """The number of parameters, without adapters, that are cut into shards: all but those in 4 bits."""
        return self.shape.numel - (self.shape.linear_numel if self.load_in_4bit else 0)

    @functools.cached_property
    def whole_layer_numel(self) -> float:
        """The number of elements of a layer that FSDP2 gathers, on average, without adapters and weights in 4 bits."""
        sizes = self.shape.sizes["other"] + (collections.Counter() if self.load_in_4bit else self.shape.sizes["linear"])
        return self._padded(sizes) / self.shape.layers

    @functools.cached_property
    def whole_rest_numel(self) -> int:
        """The number of elements outside of the layers that FSDP2 gathers: all but head and embeddings that stay in shards."""
        return self._padded(self.shape.sizes["rest"] - self.vocabulary)

    @functools.cached_property
    def whole_trained_numel(self) -> float:
        """The number of trained elements of a layer whose gradients FSDP2 scatters together, on average."""
        if self.adapters is None:
            return self.whole_layer_numel
        return self._padded(collections.Counter(self.trained_shapes)) / self.shape.layers

    def _padded(self, sizes: Mapping[tuple[int, ...], int]) -> int:
        """Return the number of elements of some tensors, as FSDP2 gathers and scatters them: in shards of equally many rows.

        Args:
            sizes: shape -> number of such tensors.
        """
        rows = {size: -(-size[0] // self.shards) * self.shards for size in sizes}
        return sum(rows[size] * math.prod(size[1:]) * count for size, count in sizes.items())

    @functools.cached_property
    def code_bytes(self) -> int:
        """The bytes of the weights in 4 bits, which are whole on each GPU."""
        if not self.load_in_4bit:
            return 0
        return sum(four_bit_bytes(n_out * n_in) for n_out, n_in in self.shape.linear.values())

    @functools.cached_property
    def objective(self) -> Objective:
        """The run's objective."""
        return objective_of(self.config)

    @property
    def has_divergence(self) -> bool:
        """Whether the objective has a divergence from the reference model."""
        return self.objective.divergence is not None

    def n_compared(self, tokens: Tokens) -> int:
        """Return the number of tokens of a micro-batch at which the divergence is computed; with a head in shards at all."""
        divergence = self.objective.divergence
        if divergence is None:
            return 0
        if self.head_in_shards:
            return tokens.n_labelled
        if tokens.compared is not None:
            return tokens.compared
        return tokens.n_labelled if divergence.of == "all" else -(-tokens.n_labelled // 2)

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return DTYPES[self.dtype]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the operands of the matrix products."""
        return torch.bfloat16 if self.casts else self.parameter_dtype

    @property
    def casts(self) -> bool:
        """Whether the matrices are used as bf16 copies."""
        return self.autocast and self.dtype == "float32"

    @property
    def adapted_layers(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of the linear layers that get adapters."""
        if self.adapters is None:
            return {}
        targets = self.adapters.get("targets", "all-linear")
        if targets == "all-linear":
            return dict(self.shape.linear)
        return {name: size for name, size in self.shape.linear.items() if any(_matches(name, target) for target in targets)}

    @functools.cached_property
    def trained_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the trained parameters."""
        if self.adapters is None:
            return list(self.shape.parameters.values())
        rank = self.adapters["rank"]
        return [size for n_out, n_in in self.adapted_layers.values() for size in ((rank, n_in), (n_out, rank))]

    @functools.cached_property
    def trained_parts(self) -> "tuple[collections.Counter[tuple[int, ...]], collections.Counter[tuple[int, ...]]]":
        """Shape -> number of the trained parameters that FSDP2 cuts; and of those that stay in shards of rows."""
        rows = self.vocabulary if self.adapters is None else collections.Counter()
        return collections.Counter(self.trained_shapes) - rows, rows

    @property
    def trained_dtype(self) -> torch.dtype:
        """The dtype of the trained parameters; adapters are fp32."""
        return torch.float32 if self.adapters else self.parameter_dtype

    @property
    def head_options(self) -> ResolvedOptions:
        """The `ResolvedOptions` of the fused loss, as the run calls it."""
        return ResolvedOptions(self.compute_dtype, torch.float32, memory_share(self.card.memory))

    @property
    def columns(self) -> int:
        """The most columns of logits on a GPU."""
        return -(-self.shape.vocab // self.gpus) if self.head_in_shards else self.shape.vocab

    @property
    def chunk_rows(self) -> int:
        """The most rows that a GPU puts into a chunk of the fused loss."""
        budget = memory_share(self.card.memory)
        if self.head_in_shards:
            width = self.shape.head_width
            return round_rows(self.columns, width, self.head_options, self.has_divergence, budget, self.gpus)
        return chunk_rows(self.columns, self.head_options, self.has_divergence, budget)


def _matches(name: str, target: str) -> bool:
    """Tell whether a weight belongs to a layer that ``target`` names."""
    return is_named(name.removesuffix(".weight"), target)


def _layer_kinds(shape: Shape) -> set[str]:
    """Return the last parts of the names of the linear layers, such as "q_proj"."""
    return {name.removesuffix(".weight").split(".")[-1] for name in shape.linear}
