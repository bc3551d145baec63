"""The tables of docs/scaling.md: ``python -m soul.plan.scaling docs/scaling.md`` writes them anew between its marks."""

import math
import pathlib
import sys

from soul.plan._plan import plan
from soul.plan.cards import CARDS
from soul.plan.shapes import PRESETS
from soul.run.config import UnlearnConfig
from soul_kernels.errors import argument_error

LENGTH = 512
LEAST = dict(state_dtype="8bit", gradient_release=True, gradient_checkpointing=True, max_grad_norm=math.inf)
# What is trained, in the words of the table -> options of the run.
WHOLE = {
    "AdamW, fp32": dict(optimizer="adamw"),
    "SOUL, bf16 + 8 bits": dict(),
    "the same, checkpointing": dict(gradient_checkpointing=True),
    "8-bit states, release, checkpointing": LEAST,
}
ADAPTERS = {"SOUL": dict(), "SOUL, checkpointing": dict(gradient_checkpointing=True)}
SHARDED = dict(gradient_checkpointing=True, state_dtype="bfloat16")


def whole():
    """Full-parameter runs on a single card."""
    yield "| model | what is trained | GB | peak in | fits on | floor of a step, h100 |"
    yield "|---|---|---|---|---|---|"
    for model in PRESETS:
        for name, options in WHOLE.items():
            yield _row(model, name, plan(model, UnlearnConfig(**options), length=LENGTH))


def adapters():
    """LoRA on a single card."""
    yield "| model | adapters of rank 16 on all linear layers | GB | peak in | fits on | floor of a step, h100 |"
    yield "|---|---|---|---|---|---|"
    for model in PRESETS:
        for name, options in ADAPTERS.items():
            found = plan(model, UnlearnConfig(**options), length=LENGTH, adapters=dict(rank=16))
            yield _row(model, name, found)


def sharded():
    """Full-parameter runs under FSDP2."""
    yield "| model | h100s | GB on each | of these gathered from shards | fits | matrix products | network | floor of a step |"
    yield "|---|---|---|---|---|---|---|---|"
    for model, counts in (("llama-2-7b", (2, 4, 8)), ("llama-3.1-8b", (2, 4, 8)), ("llama-3-70b", (8, 16, 32, 64))):
        for gpus in counts:
            found = plan(model, UnlearnConfig(**SHARDED), length=LENGTH, gpus=gpus)
            gathered = found.phases[found.peak_phase]["gathered from shards"]
            seconds = [found.seconds["matrix products"], found.seconds["network"], found.step_seconds]
            times = " | ".join(f"{1000 * value:,.0f} ms" for value in seconds)
            cells = f"{found.peak_bytes / 1e9:.1f} | {gathered / 1e9:.1f} | {'yes' if found.fits else 'no'} | {times}"
            yield f"| {model} | {gpus} | {cells} |"


def least():
    """The full-parameter 7B within 40 GB, part by part."""
    yield from plan("llama-2-7b", UnlearnConfig(**LEAST), length=LENGTH).table().split("\n")


def _row(model, name, found):
    cards = [card for card in CARDS if found.peak_bytes <= CARDS[card].memory]
    cells = f"{found.peak_bytes / 1e9:.1f} | {found.peak_phase} | {', '.join(cards) or 'none'}"
    time = f"{1000 * found.step_seconds:,.0f} ms" if found.fits else ""
    return f"| {model} | {name} | {cells} | {time} |"


TABLES = {"whole": whole, "least": least, "adapters": adapters, "sharded": sharded}


def with_tables(text):
    """The text with every table between ``<!-- NAME -->`` and ``<!-- end -->`` as the planner prints it now.

    Raises:
        ArgumentError: a table has no place in it.
    """
    for name, lines in TABLES.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (begin and end):
            raise argument_error("text", f"<!-- {name} --> and <!-- end -->", "a text without", "put them where the table goes")
        text = before + begin + "\n".join(lines()) + "\n" + end + after
    return text


if __name__ == "__main__":
    path = pathlib.Path(sys.argv[1])
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
