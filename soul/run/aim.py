"""The aim of a run, and the controller that steers towards it: numbers only, no model and no clock.

An aim has two halves. **Forget**: the probability of the forget rows' answers falls to the aim or below. **Keep**: the
probability of control rows, which are never trained on, stays at or above a fraction of what it was. `Target` holds these
numbers, `Controller` chooses learning rate and weight of the retain term from one evaluation to the next, and `Search` finds
where both begin.

How the controller works: alpha is the multiplier of the constraint "keep". At every evaluation it is raised while the control
rows are below their level, and lowered while there is room and not enough is forgotten, both by factors (dual ascent on a
logarithmic scale). Where the retain rows are known by heart, their term holds nothing back, whatever its weight: there alpha
stays, and the learning rate falls by the factor by which alpha would have risen. The learning rate rises linearly, stays, and
falls once the forget rows come near their aim, and also where the control rows stay below their level. Where much is lost of
the control rows, or the forget rows fall far faster than wanted (rows known by heart give way all at once), the model goes back
to the nearest point with a lower learning rate and a new optimizer: what is lost in such a fall takes long to come back. Once
both halves hold at two evaluations in a row, the second of which measures all rows, the aim is reached. Everything is a
function of the evaluations, so a resumed run decides alike.

Safe to change: the constants below; runs of tests/run/test_aim.py show what they do. Not safe: whatever `state_dict` returns,
on which a resumed run rests.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from soul_kernels.errors import argument_error

AUTO = "auto"  # the aim is chance
OFF = "off"
NAME = "forget_prob"

EVALUATION_SHARE = 0.1  # of the passes over tokens: evaluation against training
PILOT_SHARE = 0.1  # of the passes of the whole run: the search for the learning rate
MAX_TRIES = 4  # of the pilot
NEAR = 0.25  # fraction of the way, in log-probability, from which on the learning rate falls
SLOWEST = 0.3  # fraction of the learning rate at the aim, and at the last step
RECOVERY = 0.5  # fraction of it near the aim while the control rows are below their level
SETTLE = 0.7  # of the fraction at one more evaluation beyond the aim with the control rows below their level
TREND = 0.5  # of the last change of the control probability: how much of it is expected to come again
END = 0.25  # fraction of all steps over which the learning rate falls at the end
CALM = 0.8  # of the learning rate, at every evaluation that finds the control rows below their level without recovering
CALM_GAIN = 0.9  # of what was missing: more than this is no recovery
KNOWN = 0.01  # nats a token: retain rows with a smaller loss are known by heart
LONGEST_CALM = 10.0  # to this fraction of the first learning rate, at least
LOST = 1.1  # distance from which the run goes back; the model before unlearning has 1
LOST_ROOMS = 2.0  # and so does one that is this far below the level, in rooms between the level and the start
BACK_FACTOR = 2.0  # between the learning rates before and after going back
MAX_BACKS = 4
RAISE = 2.0  # alpha doubles this often at most at one evaluation; once for every room below the level
LOWER = 1.0  # alpha is halved this often at most at one evaluation
WAY_STEPS = 6.0  # the way, in log-probability, is to take one in so many of all steps, at the pace of the pilot's steps
PACES = (0.01, 0.2)  # of the way that a step of the pilot is to forget
CLOSE = 1.5  # a try within this factor of it ends the search
LR_FACTOR = 10.0  # between the learning rates of two tries, at most
ALPHA_FACTOR = 4.0  # between the alphas of two tries
ALPHA_RANGE = (1 / 16, 64.0)  # of alpha, relative to its start
BEYOND = 4.0  # times that, once the forget rows are at the aim: then nearly all of a step may go to what is kept
FADING = 0.5  # fraction of the way from which on alpha may fall below its start, since forget terms fade as they succeed
HURRY = 1.3  # of the learning rate, at an evaluation with room that finds the forget rows too slow to come in time
MOST_HURRY = 10.0  # times the first learning rate, at most
LOWER_IF_SLOW = 0.25  # of a halving of alpha, at least, at an evaluation with room that finds them so
LIKELY = 1.1  # of the aim: so high an estimate of the forget probability may be where the aim holds
MARGIN = 0.01  # of the start of the control rows: so far below their level an estimate may be where it does
HASTE = 3.0  # times the wanted pace: what is faster goes back too, since the next steps would go too far
IN_TIME = 0.5  # fraction of the steps to come within which the forget rows should come to their aim
FURTHER = 0.5  # times the aim, where the model still says what its probability says it has forgotten
KEEP_WEIGHT = 4.0  # of a loss of control probability against what is left to forget, in `Target.distance`


def wanted_pace(steps: int) -> float:
    """Return the fraction of the way that a step is to forget at first, in a run of so many steps."""
    slowest, fastest = PACES
    return min(fastest, max(slowest, WAY_STEPS / steps))


def parse_aim(text: str | None) -> float | str | None:
    """Return an aim: None without one, "auto", or the probability that "forget_prob=X" names.

    Raises:
        ArgumentError: it is none of these.
    """
    if text is None or text in (AUTO, OFF):
        return None if text != AUTO else AUTO
    name, equals, number = str(text).partition("=")
    try:
        value = float(number) if name == NAME and equals else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        remedy = f"for instance {NAME}=0.05"
        raise argument_error("aim", f"'{AUTO}', '{OFF}' or {NAME}=X with X between 0 and 1", repr(text), remedy)
    return value


@dataclasses.dataclass(frozen=True)
class Target:
    """The numbers of an aim.

    Attributes:
        aim: the probability of the forget rows that is to be reached, or fallen below.
        source: where the aim comes from, in words.
        forget_start: the probability of the forget rows before unlearning.
        control_start: that of the control rows; None if there are none, and only forgetting counts.
        keep: fraction of ``control_start`` that must be kept.
        measure: "probability", of the answers; or "answered", the fraction of the questions that are not refused.
    """

    aim: float
    source: str
    forget_start: float
    control_start: float | None
    keep: float
    measure: str = "probability"

    @property
    def level(self) -> float:
        """The probability of the control rows that must be kept; 0 without control rows."""
        return 0.0 if self.control_start is None else self.keep * self.control_start

    def left(self, forget_prob: float) -> float:
        """Return the fraction of the way that is left to forget, in log-probability: 1 at the start, <= 0 at the aim."""
        way = math.log(self.forget_start / self.aim)
        return math.log(max(forget_prob, 1e-30) / self.aim) / way

    def slack(self, control_prob: float | None) -> float:
        """Return how far the control rows are above their level, as a fraction of their start; negative below it."""
        if control_prob is None or not self.control_start:
            return 1.0 - self.keep
        return control_prob / self.control_start - self.keep

    def holds(self, forget_prob: float, control_prob: float | None) -> bool:
        """Tell whether both halves of the aim hold."""
        return forget_prob <= self.aim and (control_prob is None or control_prob >= self.level)

    def nearly_holds(self, forget_prob: float, control_prob: float | None) -> bool:
        """Tell whether both halves of the aim may hold, by estimates of the two probabilities."""
        return forget_prob <= LIKELY * self.aim and self.slack(control_prob) >= -MARGIN

    def distance(self, forget_prob: float, control_prob: float | None) -> float:
        """Return the distance from the aim: 0 where it holds, 1 at the start; a quarter of the control probability weighs 1."""
        return max(0.0, self.left(forget_prob)) + KEEP_WEIGHT * max(0.0, -self.slack(control_prob))


class Controller:
    """Learning rate and alpha of a run, from its evaluations.

    Args:
        target: what is to be reached.
        lr: the highest learning rate.
        alpha: the weight of the retain term at the start.
        warmup: steps over which the learning rate rises.
        steps: steps of the whole run, at most.
        interval: steps from one evaluation to the next, as a rule; alpha moves less after fewer.

    Attributes:
        lr: the highest learning rate; the pilot may set it before the first step.
        alpha: the weight of the retain term now.
        fall: the fraction of ``lr`` that is used after the warm-up.
        in_a_row: number of the last evaluations at which the aim held.
        backs: number of times that the run went back.
        further: number of times that the aim was lowered, by ``FURTHER`` each.
    """

    _CHANGING = (
        "lr",
        "lr_start",
        "alpha",
        "alpha_start",
        "fall",
        "in_a_row",
        "backs",
        "further",
        "_is_exact",
        "_risen_from",
        "_slack",
        "_left",
        "_step",
    )

    def __init__(self, target: Target, *, lr: float, alpha: float, warmup: int, steps: int, interval: float = 1.0) -> None:
        self._target = target
        self.further = 0
        self.interval = interval
        self.begin(lr, alpha)
        self.warmup = warmup
        self.steps = steps
        self.fall = 1.0
        self.in_a_row = 0
        self.backs = 0
        self._is_exact = False  # of the last evaluation
        self._slack = target.slack(target.control_start)  # at the last evaluation, like the two that follow
        self._left: float | None = 1.0  # None after going back
        self._step = 0
        self._risen_from = 0  # the step after which the learning rate began to rise

    @property
    def target(self) -> Target:
        """What is to be reached now."""
        return dataclasses.replace(self._target, aim=self._target.aim * FURTHER**self.further)

    def go_further(self) -> None:
        """Lower the aim: it was reached, and the model still says what is to be forgotten."""
        self.further += 1
        self.in_a_row = 0

    def begin(self, lr: float, alpha: float) -> None:
        """Set learning rate and alpha, before the first step."""
        self.lr = self.lr_start = lr
        self.alpha = self.alpha_start = alpha

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        rise = min(1.0, (step - self._risen_from) / max(1, self.warmup))
        end = min(1.0, max(SLOWEST, (self.steps - step) / (END * self.steps)))
        return self.lr * min(rise * self.fall, end)

    def observe(
        self,
        step: int,
        forget_prob: float,
        control_prob: float | None,
        *,
        exact: bool = True,
        nearest_control: float | None = None,
        retain_nll: float = math.inf,
    ) -> bool:
        """Take an evaluation into account: choose alpha and learning rate of the steps that follow.

        Args:
            step: the step after which the model was evaluated.
            forget_prob: probability of the forget rows.
            control_prob: that of the control rows.
            exact: whether both were measured on all rows of the model as it is, and not estimated; only then is the run over.
            nearest_control: probability of the control rows at the nearest point so far; None: as before unlearning.
            retain_nll: negative log-likelihood of the retain rows in the batches since the last evaluation, in nats a token.

        Returns:
            Whether the run is to go back to the nearest point, with a new optimizer.
        """
        target = self.target
        left = target.left(forget_prob)
        slack = target.slack(control_prob)
        room = max(1.0 - target.keep, 0.02)
        low, high = (factor * self.alpha_start for factor in ALPHA_RANGE)
        if left > FADING:
            low = self.alpha_start
        elif left <= 0:
            high *= BEYOND
        is_known = retain_nll < KNOWN
        pace = 0.0 if self._left is None else (self._left - left) / max(1, step - self._step)
        is_lost = left > NEAR and pace > HASTE * wanted_pace(self.steps)
        is_lost |= target.distance(forget_prob, control_prob) > LOST
        is_lost |= slack < -LOST_ROOMS * room and target.slack(nearest_control) >= slack + room
        if is_lost and self.backs < MAX_BACKS:
            self.backs += 1
            self.lr /= BACK_FACTOR
            self.alpha = self.alpha if is_known else min(high, 2 * self.alpha)
            self.fall = 1.0
            self.in_a_row = 0
            self._risen_from = step
            self._slack = room
            self._left = None
            self._step = step
            return True
        doublings = 0.0
        expected = slack + TREND * (slack - self._slack)
        recovers = slack >= CALM_GAIN * self._slack
        too_slow = self._left is not None and left > 0 and expected > 0 and pace * IN_TIME * (self.steps - step) < left
        if slack < 0:
            doublings = min(RAISE, max(0.25 if left > 0 else 1.0, -expected / room))
        elif left > 0:
            doublings = max(-LOWER, min(RAISE, -LOWER * expected / room))
            if too_slow and step >= self._risen_from + self.warmup:
                doublings = min(doublings, -LOWER_IF_SLOW)
                if left > NEAR:
                    self.lr = min(self.lr * HURRY, self.lr_start * MOST_HURRY)
        else:  # to forget beyond the aim costs rows that nobody measures
            doublings = RAISE * min(1.0, -left / NEAR)
        doublings *= min(1.0, (step - self._step) / self.interval)  # what the last change has done must show before the next
        if slack < 0 and not recovers:  # long steps cost control rows whatever alpha is, since their noise does
            calm = 2.0**-doublings if is_known else CALM
            self.lr = max(self.lr * calm, self.lr_start / LONGEST_CALM)
        if is_known:
            doublings = min(0.0, doublings)
        self._slack = slack
        self._left = left
        self.alpha = min(high, max(low, self.alpha * 2.0**doublings))
        self._step = step
        if left > NEAR:
            self.fall = 1.0
        elif slack >= 0:
            self.fall = max(SLOWEST, left / NEAR)
        elif left > 0:
            self.fall = max(RECOVERY, left / NEAR)
        else:
            self.fall = max(SLOWEST, SETTLE * min(self.fall, RECOVERY))
        holds = target.holds(forget_prob, control_prob) if exact else target.nearly_holds(forget_prob, control_prob)
        self.in_a_row = self.in_a_row + 1 if holds else 0
        self._is_exact = exact
        return False

    @property
    def reached(self) -> bool:
        """Whether the aim held at two evaluations in a row, and the second was exact."""
        return self.in_a_row >= 2 and self._is_exact

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers that change during a run, for a checkpoint."""
        return {name: getattr(self, name) for name in self._CHANGING}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a ``state_dict()``."""
        for name in self._CHANGING:
            setattr(self, name, state_dict[name])


class Try(NamedTuple):
    """One try of the pilot, as `Search.observe` takes it."""

    lr: float
    alpha: float
    response: float | None
    kept: float


class Search:
    """The pilot's search for learning rate and alpha: few steps from the start, tried with different numbers.

    The response of a model to few steps is nearly proportional to the learning rate, so each try takes the wanted response over
    the last one's, within a factor of 10; between two tries with one alpha it follows a power law, since rows that a model
    knows by heart give way late and then at once. A try that diverged bounds the search from above.

    Where the control rows fell, the next try depends on the ones before. If they were kept with the same alpha and a lower
    rate, the rate is what costs them, and the next one lies between the two. Otherwise alpha is raised fourfold. If that kept
    no more of them than the try before it, alpha is put back, and the rate is lowered. The run begins with the best pair that
    was tried: among those that kept the control rows the one whose response is nearest to the wanted one, by its ratio; or,
    where all of them lost some, the one that kept the most.

    Args:
        target: what is to be reached.
        lr: the first learning rate.
        alpha: the first alpha.
        steps: steps of the whole run, at most.
        tries: number of tries, at most.
        way: nats a token from the start to the aim; None: those between their probabilities.

    Attributes:
        tries: every `Try`.
        lr: the learning rate to try next, and at the end the one to run with.
        alpha: the same of alpha.
        done: whether the search has ended.
    """

    def __init__(
        self, target: Target, *, lr: float, alpha: float, steps: int, tries: int = MAX_TRIES, way: float | None = None
    ) -> None:
        way = math.log(target.forget_start / target.aim) if way is None else way
        self.wanted = way * wanted_pace(steps)
        self.max_tries = tries
        self.lowest_kept = 1.0 - (1.0 - target.keep) / 2
        self.tries: list[Try] = []
        self.lr = _rounded(lr)
        self.alpha = alpha
        self.done = tries < 1

    @property
    def diverged(self) -> bool:
        """Whether there were tries, and all of them diverged."""
        return bool(self.tries) and all(each.response is None for each in self.tries)

    def observe(self, response: float | None, kept: float = 1.0) -> None:
        """Take a try with ``lr`` and ``alpha`` into account.

        Args:
            response: nats a step by which the mean log-probability of a forget token has fallen; None: the try diverged.
            kept: control probability after the try, over that before.
        """
        self.tries.append(Try(self.lr, self.alpha, response, kept))
        self.lr, self.alpha = self._next()
        is_tried = (self.lr, self.alpha) in ((each.lr, each.alpha) for each in self.tries)
        self.done = len(self.tries) >= self.max_tries or is_tried
        if self.done and not self.diverged:
            self.lr, self.alpha, *_ = self._best()

    def _next(self) -> tuple[float, float]:
        """Return the learning rate and alpha to try next: those of the last try if nothing is left to find out."""
        lr, alpha, response, kept = self.tries[-1]
        if response is None or response > CLOSE * self.wanted:
            return self._guess(lr, alpha, response), alpha
        alike = [each for each in self.tries if each.alpha == alpha and each.response is not None]
        if kept >= self.lowest_kept:
            if response * CLOSE >= self.wanted:
                return lr, alpha
            losing = [each.lr for each in alike if each.lr > lr and each.kept < self.lowest_kept]
            return (_rounded(math.sqrt(lr * min(losing))) if losing else self._guess(lr, alpha, response)), alpha
        keeping = [each.lr for each in alike if each.lr < lr and each.kept >= self.lowest_kept]
        if keeping:
            return _rounded(math.sqrt(lr * max(keeping))), alpha
        lower = [each for each in self.tries if each.lr == lr and each.alpha < alpha and each.kept >= kept]
        if lower:
            return _rounded(lr / math.sqrt(LR_FACTOR)), lower[-1].alpha
        return lr, ALPHA_FACTOR * alpha

    def _best(self) -> Try:
        """Return the best of the tries that did not diverge."""
        finite = [each for each in self.tries if each.response is not None]
        keeping = [each for each in finite if each.kept >= self.lowest_kept]
        if not keeping:
            return max(finite, key=lambda each: each.kept)
        return min(keeping, key=lambda each: abs(math.log(max(each.response or 0.0, 1e-9) / self.wanted)))

    def _guess(self, lr: float, alpha: float, response: float | None) -> float:
        """Return the learning rate with the wanted response, from the last try and the others with its alpha."""
        answers = [(each.lr, each.response) for each in self.tries if each.alpha == alpha and each.response is not None]
        lower = max(((rate, value) for rate, value in answers if 0 < value < self.wanted), default=None)
        higher = min(((rate, value) for rate, value in answers if value >= self.wanted), default=None)
        if lower is not None and higher is not None and lower[0] < higher[0]:
            slope = math.log(higher[1] / lower[1]) / math.log(higher[0] / lower[0])
            return _rounded(lower[0] * (self.wanted / lower[1]) ** (1 / slope))
        if response is None:
            return _rounded(lr / LR_FACTOR if lower is None else math.sqrt(lr * lower[0]))
        return _rounded(lr * min(LR_FACTOR, max(1 / LR_FACTOR, self.wanted / max(response, 1e-9))))


def _rounded(value: float) -> float:
    """Return a number with two significant digits, as it is shown."""
    return float(f"{value:.1e}")


def verdict(
    target: Target, forget_prob: float, control_prob: float | None, step: int, reason: str, steered: bool
) -> dict[str, Any]:
    """Return the verdict on a run, as ``verdict.json`` has it (docs/running.md has the names).

    Args:
        target: what was to be reached.
        forget_prob: probability of the forget rows under the saved model.
        control_prob: that of the control rows.
        step: the step whose weights were saved.
        reason: why the run ended there, in words.
        steered: whether a `Controller` chose the learning rate and alpha.
    """
    reached = target.holds(forget_prob, control_prob)
    return {
        "reached": reached,
        "forget_prob": forget_prob,
        "forget_prob_start": target.forget_start,
        "aim": target.aim,
        "aim_source": target.source,
        "measure": target.measure,
        "control_prob": control_prob,
        "control_prob_start": target.control_start,
        "keep": target.keep,
        "step": step,
        "reason": reason,
        "advice": "" if reached else advice(target, forget_prob, control_prob, steered),
    }


def advice(target: Target, forget_prob: float, control_prob: float | None, steered: bool) -> str:
    """Return what to try after a run that has not reached its aim."""
    forgotten = forget_prob <= target.aim
    kept = target.slack(control_prob) >= 0
    if not steered:
        if not forgotten and kept:
            return "forget more: raise --epochs or --lr"
        return "lower --lr or --epochs, or choose a method with a retain term, such as npo, and a retain set"
    if forgotten and not kept:
        return "keep more: give more retain rows, raise --epochs, or accept less with --keep-retain"
    if kept and not forgotten:
        return "go on longer with --epochs, give more retain rows, or accept less with --aim forget_prob=X"
    return "give more retain rows that resemble what must be kept, raise --epochs, or accept less with --keep-retain or --aim"


def advice_on(findings: Mapping[str, Any], by_probability: str) -> str:
    """Return what to try after a run whose model failed when it was asked.

    Args:
        findings: ``forgotten``, ``kept`` and ``fluent`` of `soul.run.judge.Judge.findings`.
        by_probability: `advice` by the probabilities; "" if these are as they should be.
    """
    forgotten, kept, fluent = (findings[name] for name in ("forgotten", "kept", "fluent"))
    if by_probability:
        return by_probability
    if not fluent["holds"]:
        return "lower --lr: the model no longer writes as before"
    if not kept["holds"]:
        return "keep more: give more retain rows that resemble those that were lost, or accept less with --keep-retain"
    if forgotten["too_far"]:
        return "forget less: raise --aim"
    return (
        "forget more: lower the probability to be reached with --aim forget_prob=X, and add the failing questions to --forget"
    )


def summary(result: Mapping[str, Any]) -> list[str]:
    """Return a verdict in lines of text, the last lines of the command; the first one is the outcome.

    Args:
        result: of `verdict`, with the findings of `soul.run.judge` where the model was asked.
    """
    name = "probability" if result["measure"] == "probability" else "questions answered,"
    forget = f"{result['forget_prob_start']:.3f} -> {result['forget_prob']:.3f}, to be at most {result['aim']:.3f}"
    control = ""
    if result["control_prob"] is not None:
        level = result["keep"] * result["control_prob_start"]
        control = f"; control {result['control_prob_start']:.3f} -> {result['control_prob']:.3f}, to be at least {level:.3f}"
    lines = ["aim reached" if result["reached"] else f"aim not reached: {result['reason']}; {result['advice']}"]
    if "sentences" in result:
        outcomes = [f"{name}: {'yes' if result[name]['holds'] else 'no'}" for name in ("forgotten", "kept", "fluent")]
        lines = [f"{'aim reached' if result['reached'] else 'aim not reached'} ({', '.join(outcomes)})"]
        lines[0] += f"; {result['advice']}" if result["advice"] else ""
        lines += result["sentences"]
    if result.get("not_judged"):
        lines.append(f"Judged by {name.rstrip(',')} alone, not by what the model says: {result['not_judged']}.")
    lines.append(f"Forget {name} {forget}{control}.")
    return lines
