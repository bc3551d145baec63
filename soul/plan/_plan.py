"""A plan: bytes and seconds of a case, and how they are printed."""

import dataclasses

from soul.distributed.processes import check_supported
from soul.plan._case import Case, Tokens, check_plannable
from soul.plan.cards import NETWORK, card_of
from soul.plan.memory import phases, trained_numel
from soul.plan.shapes import shape_of
from soul.plan.time import floor_seconds, step_seconds
from soul.run.config import UnlearnConfig, parameter_dtype
from soul_kernels.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory and time of a `Case`, computed, not measured.

    Attributes:
        case: what was planned.
        phases: phase of a step -> part -> bytes, on each GPU.
        seconds: part of a step -> least seconds; see `soul.plan.time`.
        steps: steps of the run and its least seconds in all, where its data are known; or None.
    """

    case: Case
    phases: dict
    seconds: dict
    steps: tuple | None = None

    @property
    def peak_phase(self):
        """The phase that needs most memory."""
        return max(self.phases, key=self.phase_bytes)

    @property
    def peak_bytes(self):
        """Bytes that it needs on each GPU."""
        return self.phase_bytes(self.peak_phase)

    @property
    def step_seconds(self):
        """Least seconds of a step."""
        return floor_seconds(self.seconds)

    @property
    def fits(self):
        """Whether the peak is below the card's memory."""
        return self.peak_bytes <= self.case.card.memory

    def phase_bytes(self, phase):
        """Bytes of a phase."""
        return sum(self.phases[phase].values())

    def table(self):
        """The plan as markdown: a row a part, a column a phase, in GB (1e9 bytes); and the time."""
        parts = list(dict.fromkeys(part for found in self.phases.values() for part in found))
        lines = [f"{self.title()}", "", f"| GB a GPU | {' | '.join(self.phases)} |", "|---" * (1 + len(self.phases)) + "|"]
        for part in parts:
            lines.append(f"| {part} | {' | '.join(_gb(found.get(part, 0)) for found in self.phases.values())} |")
        totals = [_gb(self.phase_bytes(phase)) for phase in self.phases]
        totals = [f"**{total}**" if phase == self.peak_phase else total for phase, total in zip(self.phases, totals)]
        lines += [f"| sum | {' | '.join(totals)} |", "", *self._conclusion()]
        return "\n".join(lines)

    def title(self):
        """What was planned, a line."""
        case, tokens, shape = self.case, self.case.tokens, self.case.shape
        trained = f"{trained_numel(case):,} trained" if case.adapters else "all trained"
        accumulated = f" x {case.config.accumulate} micro-batches" if case.config.accumulate > 1 else ""
        place = f"{case.gpus} x {case.card.name}, FSDP2" if case.gpus > 1 else f"1 x {case.card.name}"
        run = f"{case.config.method}, {case.config.optimizer}"
        data = f"{tokens.sequences} sequences of {tokens.length} tokens, {tokens.n_labelled:,} labelled{accumulated}"
        return f"{shape.name}: {shape.numel:,} parameters in {case.dtype}, {trained}; {run}; {data}; {place}"

    def _conclusion(self):
        card = self.case.card
        left = (card.memory - self.peak_bytes) / 1e9
        verdict = f"{left:.1f} GB of {card.memory / 1e9:g} are left"
        if not self.fits:
            verdict = f"it does not fit: {-left:.1f} GB too much"
        yield f"Peak: {_gb(self.peak_bytes)} GB in {self.peak_phase}; {verdict} (CUDA context and fragments not counted)."
        parts = ", ".join(f"{part} {_time(seconds)}" for part, seconds in self.seconds.items())
        network = f", {self.case.network / 1e9:g} GB/s a GPU as given" if self.case.gpus > 1 else ""
        yield (
            f"Floor of a step: {_time(self.step_seconds)} ({parts}), at {card.bandwidth / 1e9:,.0f} GB/s and "
            f"{card.flops / 1e12:,.0f} TFLOP/s ({card.source}){network}: an estimate on paper."
        )
        if self.case.gpus > 1:
            try:
                check_supported(self.case.config, self.case.adapters)
            except ArgumentError as error:
                yield f"soul unlearn does not run it so: {error}."
        if self.case.config.compile or self.case.config.cuda_graph:
            yield "Not counted: torch.compile keeps other activations, and a CUDA graph memory of its own for each shape."
        if self.steps is not None:
            yield f"Floor of the run: {_time(self.steps[1])} for {self.steps[0]:,} steps."


def plan(
    model, config=None, tokens=None, *, length=512, card="h100", gpus=1, network=NETWORK, dtype="auto", adapters=None,
    attention="sdpa", steps=None,
):  # fmt: skip
    """Plans a run.

    Args:
        model: what `soul.plan.shape_of` takes: a preset's name, a directory, a configuration, or a model.
        config: `UnlearnConfig`; None: its defaults.
        tokens: `Tokens` of the largest micro-batch on each GPU; None: as many sequences as the config says, forget and retain,
            of ``length`` tokens, all of them with a label.
        length: tokens of a sequence.
        card: a `Card`, a name in ``CARDS``, or "GB:GB/s:TFLOP/s".
        gpus: FSDP2 shards parameters, gradients and states over so many, each with its own micro-batch.
        network: bytes a second into each GPU.
        dtype: of the parameters, as in `soul.Unlearner`.
        adapters: arguments of `soul.models.add_adapters`, or None.
        attention: "sdpa" or "eager", as transformers calls them.
        steps: list with the list of `Tokens` of each step, for the time of the whole run; or None.

    Returns:
        `Plan`.

    Raises:
        ArgumentError: an argument does not fit.
    """
    config = UnlearnConfig() if config is None else config
    check_plannable(config)
    tokens = tokens_of(config, length) if tokens is None else tokens
    dtype = parameter_dtype(dtype, config, adapters)
    case = Case(shape_of(model), config, tokens, dtype, adapters, attention, card_of(card), gpus, network)
    seconds = step_seconds(case)
    if steps is not None:
        steps = len(steps), sum(floor_seconds(step_seconds(case, batches)) for batches in steps)
    return Plan(case, phases(case), seconds, steps)


def tokens_of(config, length, labelled=None):
    """`Tokens` of a micro-batch of a config whose sequences, to forget and, where there is a retain term, to retain, all have
    one length; ``labelled`` of its tokens have a label, None: all.
    """
    check_plannable(config)
    objective = config.objective()
    kinds = (2 if objective.pairs else 1) + (1 if objective.alpha else 0)
    return Tokens(config.batch_size * kinds, length, labelled)


def _gb(size):
    return "" if not size else f"{size / 1e9:,.2f}"


def _time(seconds):
    for unit, least in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= least:
            return f"{seconds / least:.1f} {unit}"
    return f"{1000 * seconds:.2g} ms" if seconds < 1e-2 else f"{1000 * seconds:.0f} ms"
