"""``python -m bench --targets``: the targets of the design, each with what results say of it: pass, fail, or not measured.

All rows that a target speaks of must reach it; the worst of them is told. What is wrong fails. A row that did not run, and a
target of which there is no row, is not measured: nothing is guessed.
"""

import dataclasses
import re

from bench._harness import WRONG

HALF = r"^ours, (nearest|stochastic|compensated), (default|fp32|bf16) states"  # states of 16 bits or more
EIGHT = r"^ours, compensated, 8-bit states"
DEFAULT = r"^ours, compensated, default states"
SAME = r"^ours, nearest, bf16 states"  # in dtypes and rounding like the published class on bf16 parameters
ONE_B = r"^step, llama-3.2-1b"
BIG_HEAD = r"N (4096|16384), .* trained head"


@dataclasses.dataclass(frozen=True)
class Target:
    """One line.

    Attributes:
        what: the line.
        op: whose results tell.
        case: pattern of the names of cases.
        variant: pattern of the names of variants.
        value: key of the row, with a dot for one within another; or function of a row.
        limit: what is to be reached.
        at_least: the limit is one from below.
        than: pattern of another variant of the same case: the value is that one's over this one's where ``at_least``, and this
            one's over that one's elsewhere. None: the value itself.
        unit: after the numbers.
        best: the best variant of a case counts, where they are ways to do the same, and not the worst.
    """

    what: str
    op: str
    case: str
    variant: str
    value: object
    limit: float
    at_least: bool = False
    than: str | None = None
    unit: str = ""
    best: bool = False


def largest_error(pattern):
    """Function of a row: the largest of its errors that are so named, or None."""

    def value(row):
        found = [value for name, value in row.get("errors", {}).items() if re.search(pattern, name)]
        return max(found) if found else None

    return value


def times(what, case, variant, than, limit, op="sophia_step", best=False):
    """A target of being so many times faster."""
    return Target(what, op, case, variant, "ms", limit, at_least=True, than=than, unit="x", best=best)


def copy(what, case, variant, limit):
    """A target in percent of copy bandwidth."""
    return Target(what, "sophia_step", case, variant, "percent_of_copy", limit, at_least=True, unit="% of copy")


TARGETS = [
    copy("step, 1.24 B bf16 parameters, states of 16 bits or more, any rounding", r"step, Llama-3.2-1B", HALF, 96),
    copy("SOUL step, 1.24 B, 8-bit states, compensated weights", r"^SOUL.step, Llama-3.2-1B", EIGHT, 90),
    times("the same against SOUL's code", r"^SOUL.step, Llama-3.2-1B", EIGHT, r"^published SOUL, eager", 6),
    copy("step, 124 M in 148 tensors, bf16, states of 16 bits or more", r"step, GPT-2 124M.*bfloat16", HALF, 94),
    copy("step, 124 M in 148 tensors, fp32", r"step, GPT-2 124M, float32", r"^ours, exact, default states", 94),
    times("step, 124 M, bf16, against the published class, same states", r"124M, bf", SAME, r"^published.*, eager", 40),
    Target("step, LoRA, 128 tensors", "sophia_step", r"step, LoRA", DEFAULT, "ms", 0.10, unit=" ms"),
    times("step, LoRA, against the published class", r"step, LoRA", DEFAULT, r"^published.*, eager", 100),
    times("step, LoRA, against torch AdamW, fused", r"step, LoRA", DEFAULT, r"^torch AdamW, fused", 4),
    Target("loss, fp32 logits, trained head, N 4096 and more, default memory", "linear_loss", BIG_HEAD, r"^ours$",
           "percent_of_floor", 115, unit="% of bare GEMMs"),
    Target("the same, chunks of 4 GiB", "linear_loss", BIG_HEAD, r"^ours, chunks of 4 GiB", "percent_of_floor", 115,
           unit="% of bare GEMMs"),
    Target("loss, extra memory against torch.compile's", "linear_loss", rf"^CE, {BIG_HEAD}", r"^ours$", "extra_mib", 0.6,
           than=r"^torch.compile of eager", unit="x"),
    Target("log-probabilities, absolute", "linear_loss", r"", r"^ours$", largest_error(r"^log p"), 2e-5),
    # Coefficients of 1 / N are exact in bf16; others, and 1 - p of memorised tokens, are rounded with the gradient of logits.
    Target("dW of CE before it is rounded to bf16, flat inputs", "linear_loss", r"^CE, .* trained head", r"^ours$",
           largest_error(r"^dW before rounding flat"), 1e-4),
    Target("1 - p, relative, down to 1e-10", "token_logprob", r"", r"^ours", largest_error(r"^1 - p"), 1e-3),
    Target("GNB pass against the plain loss", "linear_gnb", r"", r"^ours$", "ms", 1.03, than=r"^ours, plain cross-entropy",
           unit="x"),
    times("whole SOUL step, 1B, against the published recipe", ONE_B, r"^ours", r"^published recipe", 15, op="step", best=True),
    times("the same, the second aim", ONE_B, r"^ours", r"^published recipe", 24, op="step", best=True),
    Target("whole SOUL step, 1B, over its bytes and FLOPs", "step", ONE_B, r"^ours", "times_model", 1.3, unit="x", best=True),
    Target("LLaMA-2-7B, full-parameter SOUL, peak", "step", r"^step, llama-2-7b", r"^ours",
           lambda row: None if row.get("peak_mib") is None else row["peak_mib"] * 2**20 / 1e9, 40, unit=" GB"),
]  # fmt: skip


def judge(target, rows):
    """What rows say of a target.

    Returns:
        Verdict ("pass", "fail" or "not measured"), the worst value or None, and the case and variant that it is of; with the
        reason where that is wrong and so has no value.
    """
    cases = {}
    for row in rows:
        if row.get("op") == target.op and re.search(target.case, row["case"]):
            cases.setdefault(row["case"], []).append(row)
    found, wrong = [], []
    for case, of_case in cases.items():
        here = []
        for row in of_case:
            spoken_of = row["variant"] == "ours" or re.search(target.variant, row["variant"])  # "ours": or of the whole case
            if spoken_of and row.get("reason", "").startswith(WRONG):
                wrong.append(f"{case}: {row['variant']}: {row['reason']}")
            value = _value(target, row) if re.search(target.variant, row["variant"]) else None
            if value is not None and target.than is not None:
                other = [_value(target, peer) for peer in of_case if re.search(target.than, peer["variant"])]
                other = [peer for peer in other if peer]
                value = None if not other or not value else other[0] / value if target.at_least else value / other[0]
            if value is not None:
                here.append((value, f"{case}: {row['variant']}"))
        if here and target.best:
            here = [max(here) if target.at_least else min(here)]
        found += here
    if wrong and not (target.best and found):
        return "fail", None, wrong[0]
    if not found:
        return "not measured", None, None
    value, where = min(found) if target.at_least else max(found)
    reached = value >= target.limit if target.at_least else value <= target.limit
    return "pass" if reached else "fail", value, where


def _value(target, row):
    return target.value(row) if callable(target.value) else row.get(target.value)


def main(results):
    """Prints a line a target, from results as `bench.results.read` returns them; returns the verdicts.

    Args:
        results: list of them, each of one device; may be empty.
    """
    rows = []
    for one in results:
        environment = one["environment"]
        told = f"{environment['device']}, torch {environment['torch']}, {environment['date']}, commit {environment['commit']}"
        if environment["kind"] == "cuda":
            rows += one["rows"]
        else:
            told += ": not a GPU, so no target is judged by it"
        print(told)
    verdicts = []
    for target in TARGETS:
        verdict, value, where = judge(target, rows)
        wanted = f"{'>=' if target.at_least else '<='} {target.limit:g}{target.unit}"
        told = "" if where is None else f"   [{where}]"
        told = told if value is None else f"  got {value:.4g}{target.unit}{told}"
        print(f"{verdict:<14}{target.what}: {wanted}{told}")
        verdicts.append(verdict)
    print(", ".join(f"{verdicts.count(word)} {word}" for word in ("pass", "fail", "not measured")))
    return verdicts
