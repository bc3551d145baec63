"""What may be measured during a run, and the rule by which a run keeps its best point.

A rule names a number that is to be as high or as low as possible, and conditions on others: ``forget_quality subject to
model_utility >= 0.95*start``, or ``min forget_prob subject to retain_prob >= 0.6 and retain_rouge >= 0.9*start``. ``start`` is
the number of the model before its first step.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from soul._extras import require
from soul_kernels.errors import ArgumentError, argument_error, check_choice, check_whole

ALWAYS = ("forget_prob", "retain_prob")  # measured at every evaluation, of the run's own rows
QUANTITIES = ("rouge", "exact_memorization", "extraction_strength")
OWN = tuple(f"{name}_{quantity}" for name in ("forget", "retain") for quantity in QUANTITIES)
SETS = ("forget", "retain", "real_authors", "world_facts")
TOFU = (
    "forget_quality",
    "ks_statistic",
    "model_utility",
    *(f"{name}_truth_ratio" for name in SETS),
    *(f"{name}_{quantity}" for name in SETS[2:] for quantity in ("prob", *QUANTITIES)),
)
NEED_RETAIN_LOGS = ("forget_quality", "ks_statistic")
METRICS = (*ALWAYS, *OWN, *TOFU)
# Numbers that a rule minimises unless it says otherwise; all others it maximises.
LOW = ("forget_prob", "forget_rouge", "forget_exact_memorization", "forget_extraction_strength", "ks_statistic")
EXAMPLE = "for instance 'forget_quality subject to model_utility >= 0.95*start'"
_NAME = r"[a-z]\w*"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_CONDITION = re.compile(rf"({_NAME})\s*(>=|<=)\s*(?:({_NUMBER})\s*(\*\s*start)?|(start))")
_TARGET = re.compile(rf"(?:(max|min)\s+)?({_NAME})")


class EvalOptions(Protocol):
    """The options of a run that say what its evaluations measure, as `soul.UnlearnConfig` has them."""

    eval_every: int
    eval_metrics: tuple[str, ...]
    eval_data: str | None
    eval_rows: int | None
    eval_retain_logs: str | None
    keep_best: str | None

    @property
    def aims(self) -> bool: ...  # noqa: D102


class Condition(NamedTuple):
    """A bound on a number.

    Attributes:
        name: of the number.
        at_least: whether it is a lower bound; else it is an upper one.
        bound: the bound.
        of_start: whether the bound is a multiple of the number's value before the first step.
    """

    name: str
    at_least: bool
    bound: float
    of_start: bool

    def holds(self, numbers: Mapping[str, float], start: Mapping[str, float]) -> bool:
        """Tell whether it holds; a NaN never does."""
        bound = self.bound * start[self.name] if self.of_start else self.bound
        return numbers[self.name] >= bound if self.at_least else numbers[self.name] <= bound


class Rule(NamedTuple):
    """What makes one point of a run better than another.

    Attributes:
        name: the number that counts.
        maximise: whether it should be high.
        conditions: they must all hold.
    """

    name: str
    maximise: bool
    conditions: tuple[Condition, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all numbers in the rule."""
        return tuple(dict.fromkeys([self.name, *(condition.name for condition in self.conditions)]))

    @property
    def needs_start(self) -> bool:
        """Whether a condition refers to the model before its first step."""
        return any(condition.of_start for condition in self.conditions)

    def allows(self, numbers: Mapping[str, float], start: Mapping[str, float]) -> bool:
        """Tell whether a point may be kept: all conditions hold, and the number that counts is finite."""
        return math.isfinite(numbers[self.name]) and all(condition.holds(numbers, start) for condition in self.conditions)

    def is_better(self, numbers: Mapping[str, float], than: Mapping[str, float]) -> bool:
        """Tell whether one allowed point is better than another one; an equal one is not."""
        here, there = numbers[self.name], than[self.name]
        return here > there if self.maximise else here < there


def parse_rule(text: str) -> Rule:
    """Return the rule that a text stands for.

    Raises:
        ArgumentError: the text is no rule.
    """
    target, _, rest = text.strip().partition(" subject to ")
    match = _TARGET.fullmatch(target.strip())
    if match is None:
        raise _error("[max or min] NAME [subject to CONDITION and ...]", text)
    direction, name = match.groups()
    conditions = []
    for part in re.split(r"\s+and\s+", rest.strip()) if rest else ():
        condition = _CONDITION.fullmatch(part.strip())
        if condition is None:
            raise _error("conditions such as 'model_utility >= 0.95*start'", part)
        bounded, sign, number, factor, alone = condition.groups()
        conditions.append(Condition(bounded, sign == ">=", float(number or 1.0), bool(factor or alone)))
    maximise = direction == "max" if direction else name not in LOW
    return Rule(name, maximise, tuple(conditions))


def _error(expected: str, got: str) -> ArgumentError:
    return argument_error("keep_best", expected, repr(got), EXAMPLE)


def metrics_of(config: EvalOptions) -> tuple[str, ...]:
    """Return the names of all numbers that a run measures at an evaluation, those of its rule included."""
    rule = () if config.keep_best is None else parse_rule(config.keep_best).names
    return tuple(dict.fromkeys([*config.eval_metrics, *rule]))


def check_dynamics(config: EvalOptions) -> None:
    """Raise for metrics and rules that are unknown, or that lack the data that they are measured on.

    Raises:
        ArgumentError: an option does not fit.
    """
    if len(set(config.eval_metrics)) < len(config.eval_metrics):
        raise argument_error("eval_metrics", "names, none twice", list(config.eval_metrics), "leave one of them out")
    names = metrics_of(config)
    for name in names:
        check_choice("keep_best" if name not in config.eval_metrics else "eval_metrics", name, METRICS)
    if names and not config.eval_every:
        option = "keep_best" if config.keep_best is not None else "eval_metrics"
        raise argument_error("eval_every", f"a positive number with {option}", 0, "say how often to evaluate")
    if config.keep_best is not None and config.aims:
        raise argument_error("keep_best", "None with an aim", repr(config.keep_best), "an aim keeps its nearest point itself")
    tofu = [name for name in names if name in TOFU]
    if tofu and config.eval_data is None:
        raise argument_error("eval_data", f"TOFU's files for {tofu[0]}", None, "name their folder, or 'tofu' for the hub's")
    if config.eval_retain_logs is None and set(NEED_RETAIN_LOGS) & set(names):
        remedy = "name the logs of a model that never saw the forget set, from soul evaluate"
        raise argument_error("eval_retain_logs", "logs of a retain model for forget_quality", None, remedy)
    for name in ("eval_data", "eval_retain_logs", "eval_rows"):
        if getattr(config, name) is not None and not tofu:
            remedy = f"these metrics need it: {', '.join(TOFU[:3])}, ..."
            raise argument_error(name, "None without metrics of soul evaluate", repr(getattr(config, name)), remedy)
    if config.eval_rows is not None:
        check_whole("eval_rows", config.eval_rows, "leave it out to take all")
    if any(name.endswith("rouge") for name in names) or tofu:
        require("rouge_score", "eval")
    if tofu:
        require("scipy.stats", "eval")
