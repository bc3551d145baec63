"""The tables of docs/scaling.md, which ``python -m soul.plan.scaling docs/scaling.md`` rewrites between the page's marks."""

import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from soul.plan.cards import CARDS
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
    yield from _sharded([("llama-2-7b", (2, 4, 8)), ("llama-3.1-8b", (2, 4, 8)), ("llama-3-70b", (8, 16, 32, 64))])


def many_cards_table() -> Iterator[str]:
    """Yield the lines of the table of full-parameter runs on 64 to 1,024 cards."""
    yield from _sharded([("llama-3-70b", (64, 256, 1024)), (LARGEST, (64, 256, 1024))])


def _sharded(counts: Sequence[tuple[str | Shape, Sequence[int]]]) -> Iterator[str]:
    """Yield the lines of a table of runs of models on several numbers of cards."""
    yield "| model | h100s | GB on each | of these gathered from shards | fits | matrix products | network | floor of a step |"
    yield "|---|---|---|---|---|---|---|---|"
    for model, numbers in counts:
        name = model if isinstance(model, str) else model.name
        for gpus in numbers:
            planned = plan(model, UnlearnConfig(**SHARDED), length=LENGTH, gpus=gpus)
            gathered = planned.phases[planned.peak_phase]["gathered from shards"]
            seconds = [planned.seconds["matrix products"], planned.seconds["network"], planned.step_seconds]
            times = " | ".join(f"{1000 * value:,.0f} ms" for value in seconds)
            cells = f"{planned.peak_bytes / 1e9:.1f} | {gathered / 1e9:.1f} | {'yes' if planned.fits else 'no'} | {times}"
            yield f"| {name} | {gpus:,} | {cells} |"


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
