"""`plan` and its result: bytes and seconds of a case, and the table that is printed."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from soul.distributed.processes import check_supported
from soul.plan.cards import NETWORK, NODE, Card, card_of
from soul.plan.case import Case, Tokens, objective_of
from soul.plan.memory import host_bytes, phases, trained_numel
from soul.plan.shapes import Shape, shape_of
from soul.plan.time import floor_seconds, step_seconds
from soul.run.config import UnlearnConfig, parameter_dtype
from soul_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory and time of a `Case`, computed, not measured.

    The CUDA context, workspaces of libraries and the allocator's fragmentation are not counted.

    Attributes:
        case: what was planned.
        phases: phase of a step -> component -> bytes on each GPU.
        seconds: component of a step -> lower bound of its seconds, see `soul.plan.time`.
        steps: number of steps of the run and lower bound of its seconds; None: its data are not known.
    """

    case: Case
    phases: dict[str, dict[str, int]]
    seconds: dict[str, float]
    steps: tuple[int, float] | None = None

    @property
    def peak_phase(self) -> str:
        """The phase that needs the most memory."""
        return max(self.phases, key=self.phase_bytes)

    @property
    def peak_bytes(self) -> int:
        """Bytes that the peak phase needs on each GPU."""
        return self.phase_bytes(self.peak_phase)

    @property
    def step_seconds(self) -> float:
        """Lower bound of the seconds of a step."""
        return floor_seconds(self.seconds, self.case.config.gradient_release)

    @property
    def host_bytes(self) -> int:
        """Bytes in main memory for each GPU, of states or of all shards, where they are offloaded."""
        return math.ceil(host_bytes(self.case))

    @property
    def fits(self) -> bool:
        """Whether the peak is within the card's memory."""
        return self.peak_bytes <= self.case.card.memory

    def phase_bytes(self, phase: str) -> int:
        """Return the bytes that a phase needs on each GPU."""
        return sum(self.phases[phase].values())

    def table(self) -> str:
        """Return the plan as markdown: a row for each component, a column for each phase, in GB (1e9 bytes); and the time."""
        components = list(dict.fromkeys(name for sizes in self.phases.values() for name in sizes))
        lines = [self.title(), "", f"| GB a GPU | {' | '.join(self.phases)} |", "|---" * (1 + len(self.phases)) + "|"]
        for name in components:
            lines.append(f"| {name} | {' | '.join(gigabytes(sizes.get(name, 0)) for sizes in self.phases.values())} |")
        totals = [gigabytes(self.phase_bytes(phase)) for phase in self.phases]
        totals = [f"**{total}**" if phase == self.peak_phase else total for phase, total in zip(self.phases, totals)]
        lines += [f"| sum | {' | '.join(totals)} |", "", *self._conclusion()]
        return "\n".join(lines)

    def title(self) -> str:
        """Return one line that says what was planned."""
        case = self.case
        tokens = case.tokens
        shape = case.shape
        trained = f"{trained_numel(case):,} trained" if case.adapters else "all trained"
        dtype = f"{case.dtype}, linear layers in 4 bits" if case.load_in_4bit else case.dtype
        accumulated = f" x {case.config.accumulate} micro-batches" if case.config.accumulate > 1 else ""
        layout = "FSDP2" if case.replicas == 1 else f"FSDP2 with {case.replicas} copies of the shards"
        hardware = f"{case.gpus} x {case.card.name}, {layout}" if case.gpus > 1 else f"1 x {case.card.name}"
        run = f"{case.config.method}, {case.config.optimizer}"
        data = f"{tokens.sequences} sequences of {tokens.length} tokens, {tokens.n_labelled:,} labelled{accumulated}"
        return f"{shape.name}: {shape.numel:,} parameters in {dtype}, {trained}; {run}; {data}; {hardware}"

    def _conclusion(self) -> Iterator[str]:
        """Yield the lines below the table: whether the run fits, its time, and what was not counted."""
        card = self.case.card
        left = (card.memory - self.peak_bytes) / 1e9
        verdict = f"{left:.1f} GB of {card.memory / 1e9:g} are left"
        if not self.fits:
            verdict = f"it does not fit: {-left:.1f} GB too much"
        yield f"Peak: {gigabytes(self.peak_bytes)} GB in {self.peak_phase}; {verdict} (CUDA context and fragments not counted)."
        if self.host_bytes:
            what = "shards of parameters, gradients and states" if self.case.cpu_offload else "states"
            yield (
                f"Main memory: {gigabytes(self.host_bytes)} GB of {what} for each GPU (torch rounds each pinned tensor up to a "
                f"power of two); they pass the link at {card.host_bandwidth / 1e9:g} GB/s in each direction."
            )
        times = ", ".join(f"{name} {in_words(seconds)}" for name, seconds in self.seconds.items())
        network = ""
        if self.case.gpus > 1:
            within = f"{(card.peer_bandwidth or self.case.network) / 1e9:g} GB/s between the GPUs of a machine"
            network = f", {within}" + (f", {self.case.network / 1e9:g} GB/s a GPU as given" if self.case.gpus > NODE else "")
        yield (
            f"Floor of a step: {in_words(self.step_seconds)} ({times}), at {card.bandwidth / 1e9:,.0f} GB/s and "
            f"{card.flops / 1e12:,.0f} TFLOP/s ({card.source}){network}: an estimate on paper."
        )
        if self.case.gpus > 1:
            try:
                check_supported(self.case.config)
            except ArgumentError as error:
                yield f"soul unlearn does not run it so: {error}."
        if self.case.config.compile or self.case.config.cuda_graph:
            yield "Not counted: torch.compile keeps other activations, and a CUDA graph memory of its own for each shape."
        if self.steps is not None:
            yield f"Floor of the run: {in_words(self.steps[1])} for {self.steps[0]:,} steps."


def plan(
    model: "Shape | str | os.PathLike[str] | Mapping[str, Any] | PretrainedConfig | torch.nn.Module",
    config: UnlearnConfig | None = None,
    tokens: Tokens | None = None,
    *,
    length: int = 512,
    card: Card | str = "h100",
    gpus: int = 1,
    network: float = NETWORK,
    host_bandwidth: float | None = None,
    dtype: str = "auto",
    adapters: dict[str, Any] | None = None,
    attention: str = "sdpa",
    load_in_4bit: bool = False,
    steps: Sequence[Sequence[Tokens]] | None = None,
) -> Plan:
    """Plan a run: its memory on each GPU, and a lower bound of its time::

        plan = soul.plan.plan("llama-2-7b", soul.UnlearnConfig(state_dtype="8bit"), length=512, card="h100")
        print(plan.table())
        plan.peak_bytes, plan.peak_phase, plan.step_seconds

    Args:
        model: anything that `soul.plan.shape_of` takes: a preset's name, a directory, a configuration, or a model.
        config: `UnlearnConfig`; None: its defaults.
        tokens: `Tokens` of the largest micro-batch on each GPU; None: as many forget and retain sequences as the config asks
            for, of ``length`` tokens, all of them with a label.
        length: tokens of a sequence.
        card: a `Card`, a name in ``CARDS``, or "GB:GB/s:TFLOP/s".
        gpus: number of GPUs over which FSDP2 shards parameters, gradients and states, each with a micro-batch of its own.
        network: bytes a second into each GPU from other machines, and within one if the card does not know that rate.
        host_bandwidth: bytes a second between main memory and each GPU, in each direction, for ``state_offload``; None: the
            card's.
        dtype: dtype of the parameters, as in `soul.Unlearner`.
        adapters: arguments of `soul.models.add_adapters`, or None.
        attention: "sdpa" or "eager", as transformers calls them.
        load_in_4bit: store the linear layers below adapters in 4 bits, as in `soul.Unlearner`.
        steps: list of `Tokens` for each step, for the time of the whole run; or None.

    Returns:
        `Plan`.

    Raises:
        ArgumentError: an argument is unknown or out of range, or two of them do not go together.
    """
    config = UnlearnConfig() if config is None else config
    objective_of(config)  # checks that the run can be planned
    tokens = tokens_of(config, length) if tokens is None else tokens
    dtype = parameter_dtype(dtype, config, adapters)
    card = card_of(card)
    if host_bandwidth is not None:
        card = card._replace(host_bandwidth=host_bandwidth)
    case = Case(shape_of(model), config, tokens, dtype, adapters, attention, card, gpus, network, load_in_4bit=load_in_4bit)
    steps_and_seconds = None
    if steps is not None:
        floors = (floor_seconds(step_seconds(case, batches), config.gradient_release) for batches in steps)
        steps_and_seconds = len(steps), sum(floors)
    return Plan(case, phases(case), step_seconds(case), steps_and_seconds)


def tokens_of(config: UnlearnConfig, length: int, labelled: int | None = None) -> Tokens:
    """Return the `Tokens` of a micro-batch in which all sequences have one length.

    Args:
        config: `UnlearnConfig`, for the batch size, and for the objective, which decides whether there are pairs and retain
            sequences.
        length: tokens of a sequence.
        labelled: number of tokens with a label in the micro-batch; None: all.

    Raises:
        ArgumentError: the method has no steps, or a number is out of range.
    """
    objective = objective_of(config)
    kinds = (2 if objective.pairs else 1) + (1 if objective.alpha else 0)
    return Tokens(config.batch_size * kinds, length, labelled)


def gigabytes(size: float) -> str:
    """Return bytes in GB, as a cell of a table; nothing is left empty."""
    return "" if not size else f"{size / 1e9:,.2f}"


def in_words(seconds: float) -> str:
    """Return a time with its unit."""
    for unit, length in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{1000 * seconds:.2g} ms" if seconds < 1e-2 else f"{1000 * seconds:.0f} ms"
