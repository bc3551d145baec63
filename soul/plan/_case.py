"""What is planned: a model, a run's options, its batches, and where it runs."""

import dataclasses
import math

import torch

from soul.losses import OBJECTIVES
from soul.models.adapters import check_rank, is_named
from soul.models.loading import DTYPES
from soul.plan.cards import NETWORK, Card
from soul.plan.shapes import Shape
from soul.run.config import UnlearnConfig
from soul_kernels.chunks import CHUNK_BYTES, ResolvedOptions
from soul_kernels.errors import argument_error, check_choice, check_whole

ATTENTIONS = ("sdpa", "eager")


def check_where(attention: str, gpus: int, network: float) -> None:
    """Raise unless ``attention``, ``gpus`` and ``network`` are what a `Case` takes."""
    check_choice("attention", attention, ATTENTIONS)
    check_whole("gpus", gpus, "1 is a single card")
    if not 0 < network < math.inf:
        raise argument_error("network", "bytes a second, a positive number", network, f"{NETWORK:g} is the default")


def check_plannable(config):
    """Raises for a run that is not made of steps."""
    if config.method == "influence":
        expected, remedy = f"one of {', '.join(OBJECTIVES)}", "influence takes one step over all data, and is not planned"
        raise argument_error("method", expected, "'influence'", remedy)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One micro-batch: forget and retain sequences together.

    Attributes:
        sequences: how many.
        length: tokens of each, padding included.
        labelled: how many tokens of them all have a label; None: every one.
        compared: at how many of those a divergence from the reference is wanted, where the objective has one; None: at those
            of half of the sequences.
        padded: whether some are shorter: attention then takes a mask, and keys and values as many heads as queries.
    """

    sequences: int
    length: int
    labelled: int | None = None
    compared: int | None = None
    padded: bool = True

    def __post_init__(self):
        for name in ("sequences", "length"):
            check_whole(name, getattr(self, name), "check the tokens")
        for name, most in (("labelled", self.n), ("compared", self.n_labelled)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise argument_error(name, f"a number of tokens, at most {most}", value, "check the tokens")

    @property
    def n(self):
        """Tokens, padding included."""
        return self.sequences * self.length

    @property
    def n_labelled(self):
        """Tokens with a label."""
        return self.n if self.labelled is None else self.labelled


@dataclasses.dataclass(frozen=True)
class Case:
    """All that a plan depends on; checked.

    Attributes:
        shape: the model's `Shape`.
        config: the `UnlearnConfig`.
        tokens: the largest micro-batch.
        dtype: of the parameters, a name.
        adapters: arguments of `soul.models.add_adapters`, or None.
        attention: "sdpa" or "eager".
        card: a `Card`.
        gpus: FSDP2 shards parameters, gradients and states over so many.
        network: bytes a second into and out of each.
        autocast: fp32 parameters are multiplied as bf16 copies, as on a GPU.
    """

    shape: Shape
    config: UnlearnConfig
    tokens: Tokens
    dtype: str
    adapters: dict | None
    attention: str
    card: Card
    gpus: int = 1
    network: float = NETWORK
    autocast: bool = True

    def __post_init__(self):
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_where(self.attention, self.gpus, self.network)
        if self.adapters is not None:
            check_rank(self.adapters["rank"])
        targets = None if self.adapters is None else self.adapters.get("targets", "all-linear")
        for target in targets if isinstance(targets, list) else ():
            if not any(_is(name, target) for name in self.shape.linear):
                remedy = f"{self.shape.name} has {', '.join(sorted(_last_names(self.shape)))}"
                raise argument_error("lora_targets", "names of linear layers", repr(target), remedy)
        if self.gpus > 1 and self.config.state_dtype == "8bit" and self.config.optimizer == "soul":
            remedy = "8-bit states cannot be sharded (see soul.SophiaG): use bfloat16"
            raise argument_error("state_dtype", "float32 or bfloat16 with several GPUs", "'8bit'", remedy)
        if self.config.gradient_checkpointing and not self.shape.supports_checkpointing:
            remedy = "leave it out, and lower the batch size"
            raise argument_error("gradient_checkpointing", "a family that supports it", self.shape.name, remedy)

    @property
    def objective(self):
        """The run's objective."""
        return self.config.objective()

    @property
    def compares(self):
        """Whether the objective has a divergence from the reference."""
        return self.objective.divergence is not None

    def n_compared(self, tokens):
        """Tokens of a micro-batch at which that is wanted."""
        if not self.compares:
            return 0
        if tokens.compared is not None:
            return tokens.compared
        return tokens.n_labelled if self.objective.divergence.of == "all" else -(-tokens.n_labelled // 2)

    @property
    def parameter_dtype(self):
        """``torch.dtype`` of the parameters."""
        return DTYPES[self.dtype]

    @property
    def compute_dtype(self):
        """``torch.dtype`` of the factors of the GEMMs."""
        return torch.bfloat16 if self.casts else self.parameter_dtype

    @property
    def casts(self):
        """Whether the matrices are used as bf16 copies."""
        return self.autocast and self.dtype == "float32"

    @property
    def adapted(self):
        """Name -> (out, in) of the linear layers that get adapters."""
        if self.adapters is None:
            return {}
        targets = self.adapters.get("targets", "all-linear")
        if targets == "all-linear":
            return dict(self.shape.linear)
        return {name: size for name, size in self.shape.linear.items() if any(_is(name, target) for target in targets)}

    @property
    def trained(self):
        """Shapes of the parameters that are trained."""
        if self.adapters is None:
            return list(self.shape.parameters.values())
        rank = self.adapters["rank"]
        return [size for out, inside in self.adapted.values() for size in ((rank, inside), (out, rank))]

    @property
    def trained_dtype(self):
        """``torch.dtype`` of the parameters that are trained; adapters are fp32."""
        return torch.float32 if self.adapters else self.parameter_dtype

    @property
    def head_options(self):
        """The `ResolvedOptions` of the fused loss, as the run calls it."""
        return ResolvedOptions(self.compute_dtype, torch.float32, CHUNK_BYTES)


def _is(name, target):
    return is_named(name.removesuffix(".weight"), target)


def _last_names(shape):
    return {name.removesuffix(".weight").split(".")[-1] for name in shape.linear}
