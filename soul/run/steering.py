"""The part of a run that leads it to its aim: evaluations, the controller's choices, the nearest point, and the verdict."""

from typing import TYPE_CHECKING, Any

import torch

from soul.losses import Objective
from soul.run.aim import EVALUATION_SHARE, Controller
from soul.run.config import UnlearnConfig
from soul.run.feed import Feed
from soul.run.measures import SAMPLE, Measures
from soul.run.pilot import TRAINING_PASSES, Event, run_pilot
from soul.run.weights import Tensors, restore, snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Record = dict[str, Any]

ALIKE = 0.5  # of the way: before that the forget rows are alike, and the batches since the last evaluation say most
SUDDEN = 0.2  # of the way, by the batches of two steps: an evaluation is due earlier
FINER = 0.01  # a point must be nearer by this much to be kept in place of another
LONGEST_WARMUP = 10  # steps
REACHED = "the aim held at two evaluations in a row"
SHARED_NEWS = 0.5  # of the change of one part of the control rows: how much of it the others are thought to have changed


class Steering:
    """Steers the run of a model towards its aim.

    Passes over tokens are counted: three for a token of a step, one for a token of an evaluation. An evaluation is due when it
    fits into a tenth of the passes of the steps so far. It takes one part of the control rows after the other, since no part
    falls as all of them do. The forget rows are judged by their probability in the batches of the last steps, as many as show
    each of them once. Where by these estimates the aim may hold for the second time in a row, the forget rows themselves are
    measured and, if they hold, all control rows. The run ends there only if the model, asked a few forget questions, no longer
    answers them; otherwise it goes on to half the probability.

    Args:
        model: the model before its first step.
        objective: that of the run; its alpha is set.
        config: `UnlearnConfig` with an aim.
        measures: made with the same model.
        feed: the data of the run.
        alpha: the weight of the retain term to begin with.

    Attributes:
        went_back: whether the last evaluation has put an earlier point back, so that the optimizer must begin anew.
        events: the lines of the log that are no steps, in order; each has the step after which it stands.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        objective: Objective,
        config: UnlearnConfig,
        measures: Measures,
        feed: Feed,
        alpha: float,
    ) -> None:
        self._model = model
        self._objective = objective
        self._config = config
        self._measures = measures
        self._feed = feed
        self._steps = len(feed.order())
        warmup = min(LONGEST_WARMUP, round(self._steps * config.warmup_ratio))
        _, examples, retained = next(feed.order())
        between = (measures.control_part_tokens or measures.sample_tokens) / (
            EVALUATION_SHARE * TRAINING_PASSES * feed.n_tokens(examples, retained)
        )
        warmup = max(warmup, min(round(2 * between), self._steps // 6))  # two evaluations see it rise
        self._controller = Controller(
            measures.target, lr=config.lr, alpha=alpha, warmup=warmup, steps=self._steps, interval=between
        )
        self.events: list[Event] = []
        self.went_back = False
        self._tokens = 0
        self._evaluated = 0
        epoch = max(1, self._steps // config.epochs)
        self._window = min(epoch, -(-SAMPLE // len(examples)))  # steps that show the forget rows, or SAMPLE of them, once
        self._seen: list[float] = []  # probability of the forget rows of each of these steps
        self._retain_nlls: list[float] = []  # of the retain rows, in the steps since the last evaluation
        self._parts = list(measures.control_parts_start)  # probability of each part of the control rows, as far as it is known
        self._next_part = 0
        self._last_seen = measures.target.forget_start  # of the last step before the last evaluation
        self._nearest: Tensors = {}
        self._nearest_step = 0
        self._nearest_distance = 1.0  # that of the model before unlearning
        self._nearest_parts = list(self._parts)

    def begin(self) -> None:
        """Keep the weights as the first point to go back to, and find learning rate and alpha to begin with.

        Raises:
            FloatingPointError: every try diverged; the model is as it was.
        """
        self._nearest = snapshot(self._model)
        search, self.events = run_pilot(
            self._model, self._feed, self._objective, self._config, self._measures, self._controller.alpha
        )
        if search.diverged:
            tried = ", ".join(f"{each.lr:g}" for each in search.tries)
            raise FloatingPointError(f"every learning rate of the pilot diverged ({tried})")
        self._controller.begin(search.lr, search.alpha)
        self.events.append({"event": "start", "step": 0, "lr": search.lr, "alpha": search.alpha})

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set learning rate and alpha of a step, counted from 1; return the learning rate."""
        lr = self._controller.lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        self._objective.alpha = self._controller.alpha
        return lr

    def after_step(self, record: Record, n_tokens: int) -> Event | None:
        """Count a step and, if an evaluation is due, evaluate and choose the numbers of the steps that follow.

        Args:
            record: of the step; gets ``stopped`` if the aim is reached.
            n_tokens: tokens of the step.

        Returns:
            The line for the log, or None without an evaluation.
        """
        self.went_back = False
        measures = self._measures
        self._tokens += n_tokens
        self._seen = [*self._seen, record["batch_forget_prob"]][-self._window :]
        self._retain_nlls.append(record["retain_nll"])
        is_last = record["step"] == self._steps
        target = self._controller.target
        seen = sum(self._seen) / len(self._seen)
        if target.left(seen) > ALIKE:
            latest = self._seen[self.events[-1]["step"] - record["step"] :]
            seen = sum(latest) / len(latest)
        cost = measures.control_part_tokens or measures.sample_tokens
        if measures.refuses:
            cost = measures.control_part_tokens + measures.sample_tokens
        budget = EVALUATION_SHARE * TRAINING_PASSES * self._tokens
        is_due = self._evaluated + cost <= budget
        is_sudden = (
            not measures.refuses
            and abs(target.left(self._seen[-1]) - target.left(self._last_seen)) > SUDDEN
            and self._evaluated <= budget
        )
        if not (is_last or is_due or is_sudden):
            return None
        forget_prob = seen
        if measures.refuses:  # the batches have refusals for answers
            forget_prob = measures.forget()
            self._evaluated += measures.sample_tokens
        self._measure_next_part()
        control_prob = measures.control_by_parts(self._parts)
        may_hold = self._controller.in_a_row > 0 and target.nearly_holds(forget_prob, control_prob)
        exact = is_last or not measures.control_tokens or may_hold
        if exact:
            forget_prob = measures.forget()
            self._evaluated += measures.sample_tokens
            if is_last or forget_prob <= target.aim:
                control_prob = self._measure_control()
        self._last_seen = self._seen[-1]
        event: Event = {
            "event": "aim",
            "step": record["step"],
            "tokens": self._tokens,
            "forget_prob": forget_prob,
            "control_prob": control_prob,
            "lr": record["lr"],
            "alpha": self._controller.alpha,
            "exact": exact,
            **{name: record[name] for name in ("rho", "clip_fraction") if name in record},
        }
        self._note_nearest(record["step"], target.distance(forget_prob, control_prob))
        nearest_control = measures.control_by_parts(self._nearest_parts)
        is_lost = self._controller.observe(
            record["step"],
            forget_prob,
            control_prob,
            exact=exact,
            nearest_control=nearest_control,
            retain_nll=sum(self._retain_nlls) / len(self._retain_nlls),
        )
        self._retain_nlls.clear()
        if is_lost and not is_last:
            restore(self._model, self._nearest)
            self._parts = list(self._nearest_parts)
            self._seen.clear()  # of weights that were given up
            self.went_back = True
            event["back_to"] = self._nearest_step
        if self._controller.reached:
            asked = measures.asked()
            if asked is None or asked["forgotten"]:
                record["stopped"] = REACHED
                self._nearest = {}  # the model itself is the one to save
            else:
                self._controller.go_further()
                self._nearest_distance = self._controller.target.distance(forget_prob, control_prob)
            event |= {} if asked is None else {"asked": asked}
        self.events.append(event)
        return event

    def _measure_next_part(self) -> None:
        """Measure one part of the control rows; what it tells of the others, which fall with it, is half believed.

        If the probabilities stay, this comes to the value of each part, whatever share of the news the others are given.
        """
        if not self._parts:
            return
        part = self._next_part
        value = self._measures.control_part(part)
        news = value - self._parts[part]
        self._parts = [min(1.0, max(0.0, other + SHARED_NEWS * news)) for other in self._parts]
        self._parts[part] = value
        self._next_part = (part + 1) % len(self._parts)
        self._evaluated += self._measures.control_part_tokens

    def _measure_control(self) -> float | None:
        """Measure all control rows."""
        measures = self._measures
        self._evaluated += measures.control_tokens
        if measures.refuses:
            return measures.control()
        self._parts = [measures.control_part(part) for part in range(len(self._parts))]
        return measures.control_by_parts(self._parts)

    def _note_nearest(self, step: int, distance: float) -> None:
        """Keep the weights if no evaluated point was as near to the aim."""
        if distance < self._nearest_distance - FINER or distance == 0:  # where the aim holds, the last point counts
            self._nearest = snapshot(self._model)
            self._nearest_step = step
            self._nearest_distance = distance
            self._nearest_parts = list(self._parts)

    def end(self, step: int) -> Event:
        """Put the nearest point back if the run has not reached its aim; return the verdict on the model.

        Args:
            step: number of steps taken.
        """
        reason = REACHED
        if not self._controller.reached:
            reason = f"{self._config.epochs} epochs have passed"
            if self._nearest and self._nearest_step != step:
                restore(self._model, self._nearest)
                step = self._nearest_step
                reason += f", and the nearest point was saved, that of step {step}"
        return self._measures.conclude(step, reason, steered=True)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides what follows, for a checkpoint."""
        return {
            "controller": self._controller.state_dict(),
            "events": self.events,
            "tokens": self._tokens,
            "evaluated": self._evaluated,
            "seen": self._seen,
            "retain_nlls": self._retain_nlls,
            "last_seen": self._last_seen,
            "parts": self._parts,
            "next_part": self._next_part,
            "nearest_parts": self._nearest_parts,
            "nearest": self._nearest,
            "nearest_step": self._nearest_step,
            "nearest_distance": self._nearest_distance,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a ``state_dict()``."""
        self._controller.load_state_dict(state_dict["controller"])
        self.events = state_dict["events"]
        self._tokens = state_dict["tokens"]
        self._evaluated = state_dict["evaluated"]
        self._seen = state_dict["seen"]
        self._retain_nlls = state_dict["retain_nlls"]
        self._last_seen = state_dict["last_seen"]
        self._parts = state_dict["parts"]
        self._next_part = state_dict["next_part"]
        self._nearest_parts = state_dict["nearest_parts"]
        self._nearest = state_dict["nearest"]
        self._nearest_step = state_dict["nearest_step"]
        self._nearest_distance = state_dict["nearest_distance"]
