"""Attacks on a model that has forgotten, and what it says afterwards.

`durability` asks a model the questions of the forget and the retain set, attacks it, and asks again. Every attack ends in an
`Outcome`. An attack on the weights is undone bit for bit before the next one; one on the questions leaves the model alone.
"""

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from soul._extras import require
from soul.data.templates import Template, check_template
from soul.durability import attacks
from soul.durability.rows import Row, have_paraphrases
from soul.evaluate import metrics
from soul.evaluate.model import EvaluateConfig, answer_columns, generate
from soul.models.causal_lm import sampled
from soul.models.encoding import encode_for
from soul_kernels.backends import BACKENDS
from soul_kernels.errors import argument_error, check_choice, check_positive, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from soul.data.examples import Example

ATTACKS = {  # name -> what is done
    "relearn": "fine-tuned on some of the forget rows; the others are asked",
    "relearn_retain": "fine-tuned on retain rows only",
    "int8": "weights of the linear layers rounded to 8 bits",
    "int4": "weights of the linear layers rounded to 4 bits",
    "jailbreak": "questions after sentences that ask to ignore instructions; the best answer of each question counts",
    "paraphrase": "questions in other words",
    "sample": "answers drawn at temperature 1; the best of each question counts",
}
ON_WEIGHTS = ("relearn", "relearn_retain", "int8", "int4")
QUANTITIES = ("prob", "rouge", "extraction_strength")

Scores = dict[str, torch.Tensor]  # quantity -> [n] fp64, one number a row


@dataclasses.dataclass
class DurabilityConfig:
    """How a model is attacked and asked.

    Attributes:
        attacks: names in ``ATTACKS``.
        relearn_rows: number of rows that are learned again, drawn with ``seed``.
        relearn_epochs: passes over these rows.
        relearn_lr: learning rate of AdamW.
        tries: number of answers that are drawn to a question.
        template: "plain", "chat" or a text, as in training (`soul.data.templates.Template`).
        system: system message of the chat template, or None.
        max_length: tokens of a sequence; longer ones are cut.
        max_new_tokens: tokens of an answer, at most.
        batch_size: sequences of a batch.
        seed: of the rows that are learned again, of their order and of the answers that are drawn.
        backend: "auto", "triton", "compile", "torch" or "reference".

    Raises:
        ArgumentError: an option is unknown or out of range.
    """

    attacks: tuple[str, ...] = tuple(ATTACKS)
    relearn_rows: int = 20
    relearn_epochs: int = 5
    relearn_lr: float = 1e-5
    tries: int = 8
    template: str = "plain"
    system: str | None = None
    max_length: int = 512
    max_new_tokens: int = 96
    batch_size: int = 32
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        self.attacks = tuple(self.attacks)
        for name in self.attacks:
            check_choice("attacks", name, tuple(ATTACKS))
        if not self.attacks or len(set(self.attacks)) < len(self.attacks):
            raise argument_error(
                "attacks", "names of attacks, none twice", list(self.attacks), f"choose from {', '.join(ATTACKS)}"
            )
        for name in ("relearn_rows", "relearn_epochs", "tries", "max_length", "max_new_tokens", "batch_size"):
            check_whole(name, getattr(self, name), "check the options")
        check_positive("relearn_lr", self.relearn_lr, "for instance 1e-5")
        check_choice("backend", self.backend, BACKENDS)
        check_template(self.template, self.system)

    def asking(self) -> EvaluateConfig:
        """Return how questions are asked."""
        names = ("template", "system", "max_length", "max_new_tokens", "batch_size", "backend")
        return EvaluateConfig(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The numbers of a model, means over rows.

    Attributes:
        name: "unlearned", "before", "retrained", or that of an attack.
        rows: number of forget rows that were asked.
        forget: quantity -> mean over these rows.
        start: quantity -> the same of the unlearned model, before the attack, over the same rows.
        retain: quantity -> mean over the retain rows; empty where an attack is on the forget questions only.
        note: what was done, in numbers.
    """

    name: str
    rows: int
    forget: dict[str, float]
    start: dict[str, float]
    retain: dict[str, float]
    note: str


def check_rows(forget: list[Row], retain: list[Row], config: DurabilityConfig) -> None:
    """Raise unless the attacks can be made with these rows, and their packages are installed.

    Raises:
        ArgumentError: too few rows, or none in other words.
        MissingExtra: a package is not installed.
    """
    for name, rows, extra in (("relearn", forget, 1), ("relearn_retain", retain, 0)):
        if name in config.attacks and len(rows) < config.relearn_rows + extra:
            expected = f"at most {len(rows) - extra} of {len(rows)} rows with the attack {name!r}"
            raise argument_error("relearn_rows", expected, config.relearn_rows, "learn fewer rows, or leave out the attack")
    if "paraphrase" in config.attacks and not have_paraphrases(forget):
        remedy = "TOFU's perturbed files have it; or leave out the attack"
        raise argument_error("attacks", "a column paraphrased_question for 'paraphrase'", "none", remedy)
    if {"int8", "int4"} & set(config.attacks):
        attacks.check_torchao()
    require("rouge_score", "eval")


def durability(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    forget: list[Row],
    retain: list[Row],
    config: DurabilityConfig,
    *,
    progress: Callable[[str], object] = print,
) -> list[Outcome]:
    """Attack a model and ask it again.

    Args:
        model: a causal language model, on its device; it is left as it was. Attacks on its weights need a second copy of them,
            relearning also AdamW's states.
        tokenizer: its tokenizer.
        forget: rows that it has forgotten.
        retain: rows that it should still know.
        config: `DurabilityConfig`.
        progress: called with a line of text for every attack.

    Returns:
        The unlearned model itself, then an outcome for each attack.

    Raises:
        ArgumentError: rows, model and attacks do not fit together; the model was not run.
        MissingExtra: a package is not installed.
    """
    check_rows(forget, retain, config)
    if {"int8", "int4"} & set(config.attacks):
        attacks.check_layers(model)
    asker = _Asker(model, tokenizer, config)
    progress("ask the unlearned model")
    start = asker.ask(forget)
    retained = means(asker.ask(retain))
    outcomes = [Outcome("unlearned", len(forget), means(start), means(start), retained, "")]
    chosen = sorted(random.Random(config.seed).sample(range(len(forget)), min(config.relearn_rows, len(forget))))
    for name in config.attacks:
        progress(f"{name}: {ATTACKS[name]}")
        if name in ON_WEIGHTS:
            outcomes.append(_on_weights(name, asker, forget, retain, chosen, start))
            continue
        attack = {"jailbreak": asker.jailbreak, "paraphrase": asker.paraphrase, "sample": asker.draw}[name]
        scores, indices, note = attack(forget)
        outcomes.append(Outcome(name, len(indices), means(scores), means(start, indices), {}, note))
    return outcomes


def ask_other(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    forget: list[Row],
    retain: list[Row],
    config: DurabilityConfig,
) -> Outcome:
    """Return the numbers of another model, such as that before unlearning, without an attack.

    Args:
        name: of the outcome.
        model: a causal language model.
        tokenizer: its tokenizer.
        forget: rows that the attacked model has forgotten.
        retain: rows that it should still know.
        config: `DurabilityConfig`.
    """
    asker = _Asker(model, tokenizer, config)
    scores = means(asker.ask(forget))
    return Outcome(name, len(forget), scores, {}, means(asker.ask(retain)), "")


def means(scores: Scores, indices: list[int] | None = None) -> dict[str, float]:
    """Return the means of scores over rows: those of some indices, or all."""
    return {name: (values if indices is None else values[indices]).mean().item() for name, values in scores.items()}


def best(tries: list[Scores]) -> Scores:
    """Return the largest of several scores, row by row and quantity by quantity."""
    return {name: torch.stack([scores[name] for scores in tries]).amax(0) for name in tries[0]}


class _Asker:
    """Asks a model questions.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        config: how it is asked.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", config: DurabilityConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.template = Template(config.template, tokenizer, config.system)
        self._asking = config.asking()

    def examples(self, rows: list[Row], prefix: str = "", *, paraphrased: bool = False) -> "list[Example]":
        """Return rows as examples; arguments as in `Row.example`."""
        return [row.example(self.template, prefix, paraphrased=paraphrased) for row in rows]

    def ask(self, rows: list[Row], prefix: str = "", *, paraphrased: bool = False) -> Scores:
        """Return the probability, ROUGE-L recall and extraction strength of each row's answer, asked once."""
        examples = self.examples(rows, prefix, paraphrased=paraphrased)
        sequences = encode_for(self.model, self.tokenizer, examples, self._asking, "rows")
        columns = answer_columns(self.model, self.tokenizer, sequences, self._asking)
        texts = generate(
            self.model, self.tokenizer, sequences, batch_size=self.config.batch_size, max_new_tokens=self.config.max_new_tokens
        )
        return {
            "prob": metrics.probability(columns["avg_gt_loss"]),
            "rouge": self._rouge(examples, texts),
            "extraction_strength": torch.tensor(columns["extraction_strength"], dtype=torch.float64, device="cpu"),
        }

    def jailbreak(self, rows: list[Row]) -> tuple[Scores, list[int], str]:
        """Return the best scores of all ``JAILBREAKS``, the indices of the rows that were asked, and a note."""
        scores = best([self.ask(rows, prefix) for prefix in attacks.JAILBREAKS])
        return scores, list(range(len(rows))), f"{len(attacks.JAILBREAKS)} prefixes"

    def paraphrase(self, rows: list[Row]) -> tuple[Scores, list[int], str]:
        """Return the scores of rows in other words, the indices of those that have other words, and a note."""
        indices = [index for index, row in enumerate(rows) if row.paraphrase is not None]
        return self.ask([rows[index] for index in indices], paraphrased=True), indices, "column paraphrased_question"

    def draw(self, rows: list[Row]) -> tuple[Scores, list[int], str]:
        """Return the best ROUGE-L recall of several drawn answers, the indices of the rows, and a note."""
        config = self.config
        examples = self.examples(rows)
        sequences = encode_for(self.model, self.tokenizer, examples, self._asking, "rows")
        tries = []
        for number in range(config.tries):
            draw = functools.partial(sampled, seed=config.seed * config.tries + number)
            texts = generate(
                self.model,
                self.tokenizer,
                sequences,
                batch_size=config.batch_size,
                max_new_tokens=config.max_new_tokens,
                go_on=draw,
            )
            tries.append({"rouge": self._rouge(examples, texts)})
        return best(tries), list(range(len(rows))), f"{config.tries} tries"

    @staticmethod
    def _rouge(examples: "list[Example]", texts: list[str]) -> torch.Tensor:
        return metrics.rouge_recall([example.content for example in examples], texts)["rougeL_recall"]


def _on_weights(name: str, asker: _Asker, forget: list[Row], retain: list[Row], chosen: list[int], start: Scores) -> Outcome:
    """Attack the weights, ask, and give the model its weights back.

    Args:
        name: of the attack.
        asker: asks the model.
        forget: all rows that the model has forgotten.
        retain: rows that it should still know.
        chosen: indices of the forget rows that "relearn" learns, and that are not asked then.
        start: scores of the forget rows before the attack.
    """
    config = asker.config
    indices = list(range(len(forget)))
    learned: list[Row] = []
    if name == "relearn":
        learned = [forget[index] for index in chosen]
        indices = sorted(set(indices) - set(chosen))
    elif name == "relearn_retain":
        learned = random.Random(config.seed).sample(retain, config.relearn_rows)
    attack: contextlib.AbstractContextManager[float]  # it gives the number of steps, or the fraction that was rounded
    if learned:
        attack = attacks.relearned(
            asker.model,
            asker.tokenizer,
            asker.examples(learned),
            lr=config.relearn_lr,
            epochs=config.relearn_epochs,
            batch_size=4,
            seed=config.seed,
            backend=config.backend,
            max_length=config.max_length,
        )
    else:
        attack = attacks.rounded(asker.model, int(name.removeprefix("int")))
    with attack as done:
        scores = means(asker.ask([forget[index] for index in indices]))
        retained = means(asker.ask(retain))
    note = f"{len(learned)} rows, {done} steps, lr {config.relearn_lr:g}" if learned else f"{done:.0%} of the weights"
    return Outcome(name, len(indices), scores, means(start, indices), retained, note)
