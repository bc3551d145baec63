"""The ways to run a model on given cards: sets of options that fit, cheapest first, each with its command line.

How it works. `ways` plans what was asked for with every subset of the savings, the options that save memory (`_savings`): for
all parameters and for adapters, on one card, and on 2, 4, 8, ... up to those given. A way is a subset that fits. It saves by
nothing that it could do without: a subset of which a part fits as well is left out, unless it is faster by `FASTER`. Ways are
ordered by the floor of a step, in which every card takes a batch of its own: this is also the order of the cards' time for a
sequence. The first ``LISTED`` are kept of each number of cards, with adapters and without.

A new option that saves memory is a line of `_savings`. Subsets are planned from small to large; a larger one is not planned
where a part of it fits and the other options of it slow a run down, as `Saving.slows` says.
"""

import dataclasses
import itertools
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from soul.distributed.processes import check_supported
from soul.plan.cards import NODE
from soul.plan.case import objective_of
from soul.plan.planner import Plan, gigabytes, in_words, plan, tokens_of
from soul.plan.shapes import PRESETS, SHORT_NAMES, shape_of
from soul.run.config import UnlearnConfig
from soul_kernels.errors import ArgumentError

ROOM = 1e9  # bytes that a way leaves on each card, for the CUDA context and fragments
FASTER = 0.95  # of the time of a step, with which a way is listed that saves more than it must
LISTED = 2  # ways on each number of cards, with adapters and without
RANK = 16  # of adapters, if none is given

# Field of `UnlearnConfig` -> flag; each is written where it differs from the default.
FLAGS = {
    "optimizer": "--optimizer",
    "state_dtype": "--state-dtype",
    "state_offload": "--state-offload",
    "param_rounding": "--param-rounding",
    "batch_size": "--batch-size",
    "accumulate": "--accumulate",
    "gradient_checkpointing": "--gradient-checkpointing",
    "gradient_release": "--gradient-release",
    "max_grad_norm": "--max-grad-norm",
    "head_in_shards": "--head-in-shards",
    "cpu_offload": "--cpu-offload",
    "replicas": "--replicas",
}


class Saving(NamedTuple):
    """Options that save memory, or time without taking much of it, and what to call them.

    Attributes:
        label: name in the table.
        fields: fields of `UnlearnConfig`, and ``load_in_4bit``.
        slows: whether no run is faster with them.
    """

    label: str
    fields: dict[str, Any]
    slows: bool = True


class Way(NamedTuple):
    """A run that may fit.

    Attributes:
        plan: its `Plan`.
        savings: labels of what it saves memory by, beside what was asked for.
        command: its command line; files have names to be replaced.
    """

    plan: Plan
    savings: tuple[str, ...]
    command: str

    @property
    def fits(self) -> bool:
        """Whether it leaves room on each card."""
        return self.excess_bytes <= 0

    @property
    def excess_bytes(self) -> float:
        """Bytes on each card by which it misses; negative if it fits."""
        return self.plan.peak_bytes + ROOM - self.plan.case.card.memory

    def cells(self) -> list[str]:
        """Return its cells of a table."""
        case = self.plan.case
        trained = f"adapters of rank {case.adapters['rank']}" if case.adapters else "all parameters"
        host = gigabytes(self.plan.host_bytes)
        by = ", ".join(self.savings) or "nothing"
        return [f"{case.gpus}", trained, by, gigabytes(self.plan.peak_bytes), host, in_words(self.plan.step_seconds)]


class Ways(NamedTuple):
    """The ways that fit, cheapest first; the one that comes nearest, which is needed if there are none; and the cards."""

    fitting: list[Way]
    nearest: Way
    gpus: int

    def table(self) -> str:
        """Return them as a table in markdown, with the command lines below it."""
        case = self.nearest.plan.case
        tokens = case.tokens.sequences * case.config.accumulate
        where = f"{case.shape.name} on {self.gpus} x {case.card.name}"
        room = f"{ROOM / 1e9:g} GB a GPU for the CUDA context and fragments"
        each = f"Each GPU takes {tokens} sequences of {case.tokens.length} tokens a step."
        if self.fitting:
            listed = self.fitting
            lines = [f"Ways to run {where} that leave {room}, by the floor of a step. {each}"]
        else:
            listed = [self.nearest]
            missing = f"misses by {self.nearest.excess_bytes / 1e9:.1f} GB a GPU, with {room}"
            lines = [f"No way to run {where} fits. The nearest {missing}. {each}"]
        header = ["", "GPUs", "trained", "saves memory by", "GB a GPU", "main memory, GB a GPU", "floor of a step"]
        lines += ["", _row(header), "|---" * len(header) + "|"]
        lines += [_row([f"{number}", *way.cells()]) for number, way in enumerate(listed, 1)]
        lines += ["", *(f"{way.command}  # {number}" for number, way in enumerate(listed, 1))]
        return "\n".join(lines)


def ways(
    model: str | os.PathLike[str],
    config: UnlearnConfig,
    *,
    length: int = 512,
    labelled: int | None = None,
    gpus: int = 1,
    dtype: str = "auto",
    adapters: dict[str, Any] | None = None,
    load_in_4bit: bool = False,
    **hardware: Any,
) -> Ways:
    """Return the ways to run a model on one card, or on any number of cards up to ``gpus``.

    Args:
        model: name of a preset, directory or hub name.
        config: the options that every way has.
        length: tokens of a sequence.
        labelled: tokens with a label in a micro-batch of the config's size; None: all.
        gpus: number of cards that there are.
        dtype: dtype of the parameters, as in `soul.Unlearner`.
        adapters: arguments of `soul.models.add_adapters`, which every way then has; None: adapters and all parameters.
        load_in_4bit: whether every way has its base in 4 bits, which leaves those with adapters.
        **hardware: ``card``, ``network``, ``host_bandwidth`` and ``attention`` of `soul.plan.plan`.

    Returns:
        `Ways`.

    Raises:
        ArgumentError: an argument is unknown or out of range.
    """
    shape = shape_of(model)
    name = "DIR" if str(model) in (*PRESETS, *SHORT_NAMES) else str(model)
    kinds = [adapters] if adapters is not None else [None, {"rank": RANK, "targets": "all-linear"}]
    fitting: list[Way] = []
    every: list[Way] = []
    refused: ArgumentError | None = None
    for kind, n in itertools.product(kinds, _counts(gpus)):
        found: list[Way] = []
        savings = _savings(config, kind, load_in_4bit, n)
        slow = {saving.label for saving in savings if saving.slows}
        for subset in _subsets(savings):
            labels = tuple(saving.label for saving in subset)
            if any({*way.savings} < {*labels} and {*labels} - {*way.savings} <= slow for way in found if way.fits):
                continue  # a part of it fits, and is not slower
            fields = {field: value for saving in subset for field, value in saving.fields.items()}
            how = {"load_in_4bit": fields.pop("load_in_4bit", load_in_4bit), "dtype": dtype, "adapters": kind, **hardware}
            try:
                changed = dataclasses.replace(config, **fields)
                if n > 1:
                    check_supported(changed)
                fewer = labelled if labelled is None else labelled * changed.batch_size // config.batch_size
                planned = plan(shape, changed, tokens_of(changed, length, fewer), gpus=n, **how)
            except ArgumentError as error:  # for instance a family that cannot recompute its layers
                refused = refused or error
                continue
            found.append(Way(planned, labels, command(name, planned, length, dtype)))
        worth_listing = _worth_listing([way for way in found if way.fits])
        fitting += sorted(worth_listing, key=_cost)[:LISTED]
        every += found
    if not every:
        assert refused is not None
        raise refused
    return Ways(sorted(fitting, key=_cost), min(every, key=lambda way: way.excess_bytes), gpus)


def _cost(way: Way) -> tuple[float, int, int]:
    """Return what ways are ordered by: the floor of a step first."""
    return way.plan.step_seconds, way.plan.case.gpus, len(way.savings)


def _worth_listing(fitting: Sequence[Way]) -> Iterator[Way]:
    """Yield the ways of which no part fits as well, and those that are faster than all their parts that fit."""
    for way in fitting:
        parts = [part for part in fitting if set(part.savings) < set(way.savings)]
        if all(way.plan.step_seconds < FASTER * part.plan.step_seconds for part in parts):
            yield way


def command(model: str, planned: Plan, length: int, dtype: str = "auto") -> str:
    """Return the command line of a plan, with names of files to be replaced.

    Args:
        model: directory or hub name.
        planned: the plan.
        length: tokens of a sequence at most.
        dtype: as it was asked for.
    """
    config = planned.case.config
    words = ["soul", "unlearn", "--model", model, "--forget", "forget.jsonl"]
    if planned.case.gpus > 1:
        words = [*_torchrun(planned.case.gpus), "-m", *words]
    if objective_of(config).alpha:
        words += ["--retain", "retain.jsonl"]
    words += ["--output", "out/unlearned", "--aim", "off", "--method", config.method, "--max-length", f"{length}"]
    whole = dataclasses.replace(config, batch_size=config.batch_size * planned.case.gpus)  # all processes together divide it
    for field, flag in FLAGS.items():
        value = getattr(whole, field)
        if value != getattr(UnlearnConfig, field):
            words += [flag] if value is True else [flag, f"{value}"]
    adapters = planned.case.adapters
    if adapters is not None:
        words += ["--lora-rank", f"{adapters['rank']}"]
        if adapters.get("targets", "all-linear") != "all-linear":
            words += ["--lora-targets", ",".join(adapters["targets"])]
    if planned.case.load_in_4bit:
        words += ["--load-in-4bit"]
    if dtype != "auto":
        words += ["--dtype", dtype]
    return shlex.join(words)


def _savings(config: UnlearnConfig, adapters: dict[str, Any] | None, load_in_4bit: bool, gpus: int) -> list[Saving]:
    """Return what saves memory with or without adapters on so many cards, and is not asked for already."""
    savings = [
        Saving("checkpointing", {"gradient_checkpointing": True}),
        Saving("8-bit states", {"state_dtype": "8bit"}, slows=False),
        Saving("gradient release", {"gradient_release": True, "max_grad_norm": math.inf}, slows=False),
        Saving("one row at a time", {"batch_size": 1, "accumulate": config.accumulate * config.batch_size}),
        Saving("offload", {"state_offload": True}),
    ]
    if adapters is not None and not load_in_4bit:
        savings.append(Saving("base in 4 bits", {"load_in_4bit": True}, slows=False))  # fewer bytes are gathered
    if gpus > 1:
        savings.append(Saving("parameters in main memory", {"cpu_offload": True}))
        savings.append(Saving("head in shards", {"head_in_shards": True}, slows=False))
    if gpus > NODE and gpus % NODE == 0 and config.replicas == 1:  # saves no memory, but time
        savings.append(Saving(f"{gpus // NODE} copies of the shards", {"replicas": gpus // NODE}, slows=False))
    return [
        saving for saving in savings if any(getattr(config, field, None) != value for field, value in saving.fields.items())
    ]


def _subsets(savings: Sequence[Saving]) -> Iterator[tuple[Saving, ...]]:
    """Yield all subsets, smaller ones first."""
    for size in range(len(savings) + 1):
        yield from itertools.combinations(savings, size)


def _counts(gpus: int) -> list[int]:
    """Return the numbers of cards to plan for: powers of two below ``gpus``, and ``gpus``."""
    return sorted({2**exponent for exponent in range(gpus.bit_length()) if 2**exponent < gpus} | {gpus})


def _torchrun(gpus: int) -> list[str]:
    """Return the start of a command line that runs a process on each card."""
    if gpus <= NODE:
        return ["torchrun", "--nproc-per-node", f"{gpus}"]
    each = math.gcd(gpus, NODE)
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500"]
    return ["torchrun", "--nnodes", f"{gpus // each}", "--nproc-per-node", f"{each}", *rendezvous]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
