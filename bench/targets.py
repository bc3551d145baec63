"""``python -m bench --targets``: the targets of the design, each with what results say of it: pass, fail, or not measured.

All rows that a target is about must reach it, and the worst of them is printed. A wrong result fails. A row that did not run
does not count, and a target without rows is not measured: nothing is guessed.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench._harness import WRONG, Row, cost
from bench._heads import BF16_LOGITS

Value = str | Callable[[Row], float | None]

HALF = r"^ours, (nearest|stochastic|compensated), (default|fp32|bf16) states"  # states of 16 bits or more
EIGHT = r"^ours, compensated, 8-bit states"
DEFAULT = r"^ours, compensated, default states"
DEFAULT_32 = r"^ours, exact, default states"
SAME = r"^ours, nearest, bf16 states"  # dtypes and rounding of the published class on bf16 parameters
ONE_B = r"^step, llama-3.2-1b"
BIG_HEAD = r"N (4096|16384), .* trained head"
PUBLISHED_HEAD = r"^CE, N 4096, D 4096, V 128256, .* trained head"  # for which others publish times


@dataclasses.dataclass(frozen=True)
class Target:
    """One line.

    Attributes:
        what: name of the target.
        op: whose rows are judged.
        case: pattern of the names of cases.
        variant: pattern of the names of variants.
        value: key of a row, or function of a row.
        limit: must be reached.
        at_least: the value must not be below the limit; else it must not be above.
        than: pattern of another variant of the same case: what is judged is the other variant's value over this one's where
            ``at_least``, and else this one's over the other's. Of several the least counts. None: the value itself.
        unit: printed after the numbers.
        best: the best variant of a case counts, because they are ways to do the same, and not the worst.
        minus: the other variant's value is subtracted, and nothing is divided.
        aim: for information: "reached" or "short of" instead of "pass" or "fail".
    """

    what: str
    op: str
    case: str
    variant: str
    value: Value
    limit: float
    at_least: bool = False
    than: str | None = None
    unit: str = ""
    best: bool = False
    minus: bool = False
    aim: bool = False


def largest_error(pattern: str) -> Callable[[Row], float | None]:
    """Return a function of a row: the largest of its errors whose names match, or None."""

    def value(row: Row) -> float | None:
        errors = [error for name, error in row.get("errors", {}).items() if re.search(pattern, name)]
        return max(errors) if errors else None

    return value


def times(
    what: str,
    case: str,
    variant: str,
    than: str,
    limit: float,
    op: str = "sophia_step",
    best: bool = False,
    value: Value = "ms",
) -> Target:
    """Return a target of being ``limit`` times as fast as another variant."""
    return Target(what, op, case, variant, value, limit, at_least=True, than=than, unit="x", best=best)


def copy(what: str, case: str, variant: str, limit: float) -> Target:
    """Return a target in percent of copy bandwidth."""
    return Target(what, "sophia_step", case, variant, "percent_of_copy", limit, at_least=True, unit="% of copy")


TARGETS = [
    copy("step, 1.24 B bf16 parameters, states of 16 bits or more, any rounding", r"step, Llama-3.2-1B", HALF, 96),
    copy("SOUL step, 1.24 B, 8-bit states, compensated weights", r"^SOUL.step, Llama-3.2-1B", EIGHT, 90),
    times("the same against SOUL's code", r"^SOUL.step, Llama-3.2-1B", EIGHT, r"^published SOUL, eager", 6),
    copy("step, 124 M in 148 tensors, bf16, states of 16 bits or more", r"step, GPT-2 124M.*bfloat16", HALF, 94),
    copy("step, 124 M in 148 tensors, fp32", r"step, GPT-2 124M, float32", DEFAULT_32, 94),
    times("step, 124 M, bf16, against the published class, same states", r"124M, bf", SAME, r"^published.*, eager", 40),
    Target("step, LoRA, 128 tensors", "sophia_step", r"step, LoRA", DEFAULT, "ms", 0.10, unit=" ms"),
    times("step, LoRA, against the published class", r"step, LoRA", DEFAULT, r"^published.*, eager", 100),
    times("step, LoRA, against torch AdamW, fused", r"step, LoRA", DEFAULT, r"^torch AdamW, fused", 4),
    Target("loss, fp32 logits, trained head, N 4096 and more, default memory", "linear_loss", BIG_HEAD, r"^ours$",
           "percent_of_floor", 115, unit="% of bare GEMMs"),
    Target("the same, chunks of 4 GiB", "linear_loss", BIG_HEAD, r"^ours, chunks of 4 GiB", "percent_of_floor", 115,
           unit="% of bare GEMMs"),
    Target("loss at N = D = 4096, V 128256, fp32 logits", "linear_loss", PUBLISHED_HEAD, r"^ours$", "percent_of_floor", 115,
           unit="% of bare GEMMs"),
    Target("the same, bf16 logits, over the faster of quack and Liger's CuTe", "linear_loss", PUBLISHED_HEAD,
           rf"^{BF16_LOGITS}$", "ms", 1.05, than=r"^(quack|Liger, CuTe)", unit="x", aim=True),
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


# On a CPU a case has one number of threads, and a target holds for all that were measured.
GPT2_32, GPT2_16 = r"^SOUL\.step, GPT-2 124M, float32", r"^SOUL\.step, GPT-2 124M, bfloat16"
SMOLLM2 = r"^step, smollm2-135m.* sequences, \d"  # the case without the published recipe
CHUNK_MIB = 64  # what a loss takes for logits on a CPU by default


def cost_of_a_byte(row: Row) -> float | None:
    """Return `cost` over the bytes that a row must move, in no particular unit."""
    ms = cost(row)
    return ms / (row["gb_per_s"] * row["ms"]) if ms is not None and row.get("gb_per_s") else None


def at_most(
    what: str,
    op: str,
    case: str,
    variant: str,
    than: str,
    limit: float,
    value: Value = cost,
    unit: str = "x",
    **options: Any,
) -> Target:
    """Return a target of a CPU: a variant's value over that of another one in the same run."""
    return Target(what, op, case, variant, value, limit, than=than, unit=unit, **options)


def first_step_s(row: Row) -> float | None:
    """Return the seconds of the first step, by the clock that `cost` takes."""
    return row.get("first_step_processor_s" if row.get("threads") == 1 else "first_step_s")


def beyond_gradients(row: Row) -> float | None:
    """Return the memory that a loss takes beyond the gradients, over that of a chunk of logits."""
    known = row.get("extra_mib") is not None and "gradients_mib" in row
    return (row["extra_mib"] - row["gradients_mib"]) / CHUNK_MIB if known else None


CPU_TARGETS = [
    at_most("step, fp32, over torch AdamW, foreach", "sophia_step", GPT2_32, DEFAULT_32, r"^torch AdamW, foreach", 1.0),
    at_most("the same over the published code, eager", "sophia_step", GPT2_32, DEFAULT_32, r"^published SOUL, eager", 0.2),
    at_most("the same over torch AdamW, fused", "sophia_step", GPT2_32, DEFAULT_32, r"^torch AdamW, fused", 1.5, aim=True),
    at_most("step, bf16 nearest, over the published code, eager", "sophia_step", GPT2_16, SAME, r"^published SOUL, eager", 0.5),
    at_most("step, bf16 compensated, over the same", "sophia_step", GPT2_16, DEFAULT, r"^published SOUL, eager", 1.0),
    Target("step, memory beyond parameters, gradients and states", "sophia_step", r"^SOUL\.step", r"^ours", "extra_mib", 64,
           unit=" MiB"),
    at_most("step, cost of a parameter, 496 M over 124 M", "sophia_step", r"over sizes", r"496 M parameters",
            r"124 M parameters", 1.15, cost_of_a_byte),
    at_most("loss, 1,024 of 4,096 tokens, V 49152, over bare GEMMs", "linear_loss", r"^CE, N 1024 of", r"^ours$",
            r"^bare GEMMs", 1.15),
    Target("the same, memory beyond gradients over a chunk of 64 MiB", "linear_loss", r"^CE, N 1024 of", r"^ours$",
           beyond_gradients, 1.2, unit="x"),
    at_most("whole step, AdamW here over plain PyTorch's", "step", SMOLLM2, r"^ours, AdamW", r"^plain PyTorch", 1.0),
    at_most("whole step, SOUL here over plain PyTorch with AdamW", "step", SMOLLM2, r"^ours, SOUL", r"^plain PyTorch", 1.1),
    at_most("the same, peak memory", "step", SMOLLM2, r"^ours", r"^plain PyTorch", 1.1, "peak_mib"),
    times("whole SOUL step against the published recipe", r"^step, smollm2-135m", r"^ours, SOUL", r"^published recipe", 8,
          op="step", value=cost),
    at_most("import soul, beyond torch's own", "start", r"", r"^ours, import", r"^import torch", 300, unit=" ms", minus=True),
    Target("first step, compiled before", "start", r"", r"^ours, first step", first_step_s, 5, unit=" s"),
]  # fmt: skip


def judge(target: Target, rows: Sequence[Row]) -> tuple[str, float | None, str | None]:
    """Judge a target by rows.

    Returns:
        Verdict ("pass", "fail" or "not measured"; of an aim "reached" or "short of" in place of the first two); the worst value
        or None; case and variant of that value, or of a wrong result with the reason, or None.
    """
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("op") == target.op and re.search(target.case, row["case"]):
            cases.setdefault(row["case"], []).append(row)
    values: list[tuple[float, str]] = []  # with the names of case and variant
    wrong = []
    for case, of_case in cases.items():
        values_of_case = []
        for row in of_case:
            # A case that is wrong as a whole has one row, of the variant "ours".
            judged_here = row["variant"] == "ours" or re.search(target.variant, row["variant"])
            if judged_here and row.get("reason", "").startswith(WRONG):
                wrong.append(f"{case}: {row['variant']}: {row['reason']}")
            value = _value(target, row) if re.search(target.variant, row["variant"]) else None
            if value is not None and target.than is not None:
                other = [_value(target, peer) for peer in of_case if re.search(target.than, peer["variant"])]
                value = _against(target, value, [peer for peer in other if peer])
            if value is not None:
                values_of_case.append((value, f"{case}: {row['variant']}"))
        if values_of_case and target.best:
            values_of_case = [max(values_of_case) if target.at_least else min(values_of_case)]
        values += values_of_case
    if wrong and not (target.best and values):
        return "fail", None, wrong[0]
    if not values:
        return "not measured", None, None
    value, where = min(values) if target.at_least else max(values)
    reached = value >= target.limit if target.at_least else value <= target.limit
    good, bad = ("reached", "short of") if target.aim else ("pass", "fail")
    return good if reached else bad, value, where


def _against(target: Target, value: float, others: Sequence[float]) -> float | None:
    """Return a value as the target compares it with that of another variant, or None."""
    if not others or not value:
        return None
    other = min(others)
    if target.minus:
        return value - other
    return other / value if target.at_least else value / other


def _value(target: Target, row: Row) -> float | None:
    return target.value(row) if callable(target.value) else row.get(target.value)


def main(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Print one line for each target, from results as `bench.results.read` returns them.

    Args:
        results: each of one device; may be empty.

    Returns:
        The verdicts of `TARGETS`, then those of `CPU_TARGETS`.
    """
    rows: dict[str, list[Row]] = {"cuda": [], "cpu": []}
    for one in results:
        environment = one["environment"]
        line = f"{environment['device']}, torch {environment['torch']}, {environment['date']}, commit {environment['commit']}"
        if environment["kind"] == "cpu":
            line += f", threads {environment.get('threads')}, load {environment.get('load')}"
        rows[environment["kind"]] += one["rows"]
        print(line)
    verdicts = []
    for kind, title, chosen in (("cuda", "GPU", TARGETS), ("cpu", "CPU", CPU_TARGETS)):
        print(f"\n{title}")
        of_kind = [print_verdict(target, rows[kind]) for target in chosen]
        print(", ".join(f"{of_kind.count(word)} {word}" for word in ("pass", "fail", "not measured")))
        verdicts += of_kind
    return verdicts


def print_verdict(target: Target, rows: Sequence[Row]) -> str:
    """Print the line of a target and return the verdict."""
    verdict, value, where = judge(target, rows)
    line = f"{verdict:<14}{target.what}: {'>=' if target.at_least else '<='} {target.limit:g}{target.unit}"
    if value is not None:
        line += f"  got {value:.4g}{target.unit}"
    if where is not None:
        line += f"   [{where}]"
    print(line)
    return verdict
