"""The tables of docs/scaling.md, which ``python -m soul.plan.scaling docs/scaling.md`` rewrites between the page's marks."""

import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from soul.plan.cards import CARDS, NODE
from soul.plan.planner import Plan, plan
from soul.plan.shapes import PRESETS, Shape, llama
from soul.plan.ways import ways
from soul.run.config import UnlearnConfig
from soul_kernels.errors import argument_error

LENGTH = 512
# Meta's configuration of Llama 3.1 405B.
LARGEST = llama("llama-3.1-405b", hidden=16384, intermediate=53248, layers=126, heads=128, kv_heads=8, vocab=128256, tied=False)
SMALLEST: dict[str, Any] = dict(state_dtype="8bit", gradient_release=True, gradient_checkpointing=True, max_grad_norm=math.inf)
OFFLOADED: dict[str, Any] = SMALLEST | dict(state_offload=True)
# Name of a setup in the table -> options of the run.
FULL_PARAMETER: dict[str, dict[str, Any]] = {
    "AdamW, fp32": dict(optimizer="adamw"),
    "SOUL, bf16 + 8 bits": dict(),
    "the same, checkpointing": dict(gradient_checkpointing=True),
    "8-bit states, release, checkpointing": SMALLEST,
    "the same, states offloaded": OFFLOADED,
}
# The same -> options of the run, and whether the base is in 4 bits.
ADAPTERS: dict[str, tuple[dict[str, Any], bool]] = {
    "SOUL": (dict(), False),
    "SOUL, checkpointing": (dict(gradient_checkpointing=True), False),
    "SOUL, checkpointing, base in 4 bits": (dict(gradient_checkpointing=True), True),
}
SHARDED: dict[str, Any] = dict(gradient_checkpointing=True, state_dtype="8bit")


class Layout(NamedTuple):
    """What a run on several cards has beside `SHARDED`.

    Attributes:
        label: its name in the table.
        options: options of the run.
        machines: number of machines over which a copy of the model lies; 0: there is one copy, over all cards.
    """

    label: str
    options: dict[str, Any] = {}
    machines: int = 0


PLAIN = Layout("one copy")
HEAD = Layout("head in shards", dict(head_in_shards=True))
COPIES = Layout("a copy on each machine", machines=1)
HEAD_AND_COPIES = Layout("a copy on each machine, head in shards", dict(head_in_shards=True), machines=1)
STATES = Layout("states in main memory", dict(state_offload=True))
HEAD_AND_STATES = Layout("states in main memory, head in shards", dict(state_offload=True, head_in_shards=True))
IN_MAIN_MEMORY = Layout("a copy in the main memory of each machine", dict(cpu_offload=True), machines=1)
TWICE = Layout("head in shards, twice the batch", dict(head_in_shards=True, batch_size=2 * UnlearnConfig.batch_size))


def full_parameter_table() -> Iterator[str]:
    """Yield the lines of the table of full-parameter runs on a single card."""
    yield "| model | what is trained | GB | peak in | fits on | floor of a step, h100 |"
    yield "|---|---|---|---|---|---|"
    for model in PRESETS:
        for name, options in FULL_PARAMETER.items():
            yield _row(model, name, plan(model, UnlearnConfig(**options), length=LENGTH))


def adapter_table() -> Iterator[str]:
    """Yield the lines of the table of LoRA runs on a single card."""
    yield "| model | adapters of rank 16 on all linear layers | GB | peak in | fits on | floor of a step, h100 |"
    yield "|---|---|---|---|---|---|"
    for model in PRESETS:
        for name, (options, in_codes) in ADAPTERS.items():
            how: dict[str, Any] = dict(adapters=dict(rank=16), load_in_4bit=in_codes)
            yield _row(model, name, plan(model, UnlearnConfig(**options), length=LENGTH, **how))


def sharded_table() -> Iterator[str]:
    """Yield the lines of the table of full-parameter runs under FSDP2."""
    yield from _sharded([
        *(("llama-2-7b", gpus, [PLAIN]) for gpus in (2, 4, 8)),
        ("llama-3.1-8b", 2, [PLAIN, HEAD]),
        ("llama-3.1-8b", 4, [PLAIN]),
        ("llama-3.1-8b", 8, [PLAIN, HEAD]),
        ("llama-3-70b", 8, [PLAIN, HEAD]),
        ("llama-3-70b", 16, [PLAIN, HEAD, COPIES, HEAD_AND_COPIES]),
        ("llama-3-70b", 32, [PLAIN]),
    ])  # fmt: skip


def many_cards_table() -> Iterator[str]:
    """Yield the lines of the table of full-parameter runs on 64 to 1,024 cards."""
    fits = Layout("a copy on every 16 machines", machines=16)
    yield from _sharded([
        ("llama-3-70b", 64, [PLAIN, HEAD, COPIES, HEAD_AND_COPIES]),
        ("llama-3-70b", 256, [PLAIN, HEAD, COPIES]),
        ("llama-3-70b", 1024, [PLAIN, HEAD, COPIES]),
        (LARGEST, 64, [PLAIN, HEAD, STATES, HEAD_AND_STATES, IN_MAIN_MEMORY]),
        (LARGEST, 256, [PLAIN, HEAD, TWICE, fits, IN_MAIN_MEMORY]),
        (LARGEST, 1024, [PLAIN, HEAD, IN_MAIN_MEMORY]),
    ])  # fmt: skip


def _sharded(rows: Sequence[tuple[str | Shape, int, Sequence[Layout]]]) -> Iterator[str]:
    """Yield the lines of a table of runs of models on several numbers of cards, in some layouts."""
    columns = ["model", "h100s", "layout", "GB on each", "of these gathered", "main memory, GB for each", "fits",
               "matrix products", "network", "floor of a step"]  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for model, gpus, layouts in rows:
        for label, options, machines in layouts:
            replicas = gpus // (machines * NODE) if machines else 1
            planned = plan(model, UnlearnConfig(**SHARDED, **options, replicas=replicas), length=LENGTH, gpus=gpus)
            gathered = planned.phases[planned.peak_phase]["gathered from shards"]
            seconds = [planned.seconds["matrix products"], planned.seconds["network"], planned.step_seconds]
            cells = [
                planned.case.shape.name, f"{gpus:,}", label, f"{planned.peak_bytes / 1e9:.1f}", f"{gathered / 1e9:.1f}",
                f"{planned.host_bytes / 1e9:.1f}" if planned.host_bytes else "", "yes" if planned.fits else "no",
                *(f"{1000 * value:,.0f} ms" for value in seconds),
            ]  # fmt: skip
            yield f"| {' | '.join(cells)} |"


def smallest_7b_plan() -> Iterator[str]:
    """Yield the lines of the plan of the full-parameter 7B within 40 GB."""
    yield from plan("llama-2-7b", UnlearnConfig(**SMALLEST), length=LENGTH).table().split("\n")


def offloaded_8b_plan() -> Iterator[str]:
    """Yield the lines of the plan of the full-parameter 8B with states in main memory."""
    yield from plan("llama-3.1-8b", UnlearnConfig(**OFFLOADED), length=LENGTH).table().split("\n")


def ways_on_24_gb() -> Iterator[str]:
    """Yield the lines of the ways to run the 8B on a card of 24 GB."""
    before, _, commands = ways("llama-3.1-8b", UnlearnConfig(), length=LENGTH, card="rtx-4090").table().rpartition("\n\n")
    yield from (*before.split("\n"), "", "```", *commands.split("\n"), "```")


def _row(model: str, name: str, planned: Plan) -> str:
    cards = [card for card in CARDS if planned.peak_bytes <= CARDS[card].memory]
    cells = f"{planned.peak_bytes / 1e9:.1f} | {planned.peak_phase} | {', '.join(cards) or 'none'}"
    time = f"{1000 * planned.step_seconds:,.0f} ms" if planned.fits else ""
    return f"| {model} | {name} | {cells} | {time} |"


# Mark in the page -> lines of its table.
TABLES = {
    "whole": full_parameter_table,
    "smallest": smallest_7b_plan,
    "offloaded": offloaded_8b_plan,
    "ways": ways_on_24_gb,
    "adapters": adapter_table,
    "sharded": sharded_table,
    "many": many_cards_table,
}


def with_tables(text: str) -> str:
    """Return the text with every table between ``<!-- NAME -->`` and ``<!-- end -->`` as the planner prints it now.

    Raises:
        ArgumentError: the text lacks the marks of a table.
    """
    for name, lines in TABLES.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (begin and end):
            expected = f"<!-- {name} --> and <!-- end -->"
            raise argument_error("text", expected, "a text without them", "put them where the table belongs")
        text = before + begin + "\n".join(lines()) + "\n" + end + after
    return text


if __name__ == "__main__":
    path = pathlib.Path(sys.argv[1])
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
