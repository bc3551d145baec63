"""Metrics during a run, and the best of its points: ``--eval-metrics`` and ``--keep-best``.

At every evaluation `Dynamics` measures the numbers that were asked for: of the run's own rows, or those of `soul evaluate` on
TOFU's files. With a rule (`soul.run.rule`) it keeps the weights of the best point so far, in main memory and in every
checkpoint, so that a run that was killed ends with the same best point.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from soul.data.examples import Example, Sequence
from soul.data.sources import perturbed, read_questions
from soul.models.causal_lm import evaluating
from soul.run.rule import ALWAYS, OWN, QUANTITIES, SETS, TOFU, metrics_of, parse_rule
from soul.run.weights import Tensors, restore, snapshot
from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from soul.run.config import UnlearnConfig


class Dynamics:
    """What a run measures beside the probabilities of its answers, and the best point by its rule.

    Args:
        model: the model before its first step.
        tokenizer: its tokenizer.
        examples: "forget" and "retain" -> the examples whose answers are evaluated.
        answers: the same as token ids.
        config: `UnlearnConfig` with metrics or a rule.

    Attributes:
        names: the numbers that are measured.
        start: their values before the first step; {} until `begin`.
        best_step: step of the best point so far, or None.
        best: its numbers.

    Raises:
        ArgumentError: a file cannot be read, rows have no prompts to answer, or a number is asked of a set that is empty.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        examples: Mapping[str, list[Example]],
        answers: Mapping[str, list[Sequence]],
        config: "UnlearnConfig",
    ) -> None:
        self.names = metrics_of(config)
        self.rule = None if config.keep_best is None else parse_rule(config.keep_best)
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._truths = {name: [example.content for example in rows] for name, rows in examples.items()}
        self._has_prompts = {name: [bool(example.prompt) for example in rows] for name, rows in examples.items()}
        self._answers = answers
        self._check_rows()
        self._tofu = _Tofu(config) if any(name in TOFU for name in self.names) else None
        self.start: dict[str, float] = {}
        self.best_step: int | None = None
        self.best: dict[str, float] = {}
        self._weights: Tensors = {}

    def _check_rows(self) -> None:
        """Raise unless every number can be measured on the run's own rows."""
        for name in self.names:
            of_set, _, quantity = name.partition("_")
            if name not in (*ALWAYS, *OWN):
                continue
            if not self._answers.get(of_set):
                raise argument_error("eval_metrics", f"rows to {of_set} for {name}", "none", "give a retain set")
            if quantity == "rouge" and not all(self._has_prompts[of_set]):
                remedy = "ROUGE needs questions and answers: ask for exact_memorization or extraction_strength"
                raise argument_error("eval_metrics", f"prompts to answer for {name}", "a row without one", remedy)

    def measure(self) -> dict[str, float]:
        """Return the numbers of the model as it is now, without ``ALWAYS``. In several processes all of them must call this."""
        with evaluating(self._model):
            numbers = self._own()
            if self._tofu is not None:
                numbers |= self._tofu.measure(self._model, self._tokenizer)
        return {name: numbers[name] for name in self.names if name not in ALWAYS}

    def _own(self) -> dict[str, float]:
        """Return the numbers of the run's own rows that are asked for."""
        from soul.evaluate.metrics import rouge_recall
        from soul.evaluate.model import EvaluateConfig, answer_columns, generate

        config = self._config
        asking = EvaluateConfig(max_length=config.max_length, batch_size=config.batch_size, backend=config.backend)
        numbers: dict[str, float] = {}
        for name, sequences in self._answers.items():
            asked = [quantity for quantity in QUANTITIES if f"{name}_{quantity}" in self.names]
            if "rouge" in asked:
                texts = generate(self._model, self._tokenizer, sequences, batch_size=config.batch_size)
                numbers[f"{name}_rouge"] = rouge_recall(self._truths[name], texts)["rougeL_recall"].mean().item()
            if set(asked) - {"rouge"}:
                columns = answer_columns(self._model, self._tokenizer, sequences, asking)
                for quantity in set(asked) - {"rouge"}:
                    numbers[f"{name}_{quantity}"] = _mean(columns[quantity])
        return numbers

    def begin(self, numbers: Mapping[str, float]) -> None:
        """Take the numbers of the model before its first step."""
        self.start = dict(numbers)

    def observe(self, step: int, numbers: Mapping[str, float]) -> bool:
        """Keep the weights if this point is the best so far; tell whether it is.

        Args:
            step: number of steps taken.
            numbers: all numbers of the rule at this point.
        """
        if self.rule is None or not self.rule.allows(numbers, self.start):
            return False
        if self.best_step is not None and not self.rule.is_better(numbers, self.best):
            return False
        self.best_step = step
        self.best = {name: numbers[name] for name in self.rule.names}
        self._weights = snapshot(self._model)
        return True

    def end(self, step: int) -> dict[str, Any] | None:
        """Put the best point back, and return its line for the log; None without a rule.

        Args:
            step: number of steps taken.
        """
        if self.rule is None:
            return None
        if self.best_step is not None and self.best_step != step:
            restore(self._model, self._weights)
        return {"event": "best", "step": step, "best_step": self.best_step, "rule": self._config.keep_best, **self.best}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides what follows, for a checkpoint."""
        return {"start": self.start, "best_step": self.best_step, "best": self.best, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a ``state_dict()``."""
        self.start = state_dict["start"]
        self.best_step = state_dict["best_step"]
        self.best = state_dict["best"]
        self._weights = state_dict["weights"]


class _Tofu:
    """The numbers of `soul evaluate` on TOFU's perturbed files.

    Args:
        config: `UnlearnConfig` with ``eval_data``.
    """

    def __init__(self, config: "UnlearnConfig") -> None:
        from soul.evaluate.logs import read_retain_logs
        from soul.evaluate.model import EvaluateConfig

        files = {"forget": config.eval_split, **{name: name for name in SETS[1:]}}
        sources = {name: perturbed(str(config.eval_data), file) for name, file in files.items()}
        self._sets = {name: read_questions(source)[: config.eval_rows] for name, source in sources.items()}
        self._retain: dict[str, dict[str, torch.Tensor]] | None = None
        if config.eval_retain_logs is not None:
            self._retain = read_retain_logs(config.eval_retain_logs, len(self._sets["forget"]))
        names = ("template", "system", "max_length", "batch_size", "backend")
        self._asking = EvaluateConfig(**{name: getattr(config, name) for name in names})

    def measure(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> dict[str, float]:
        """Return all numbers of ``TOFU``."""
        from soul.evaluate.logs import check_logs
        from soul.evaluate.metrics import summarize
        from soul.evaluate.model import tofu_logs

        logs = tofu_logs(model, tokenizer, self._sets, self._asking, progress=lambda line: None)
        return summarize(check_logs(logs, {name: name for name in logs}), self._retain)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
