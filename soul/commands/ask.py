"""``soul ask``: the same questions to one model or two, for looking. What a model knows is measured by ``soul evaluate``."""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from soul.commands.device_options import add_device
from soul.commands.template_options import add_template
from soul.data.rows import is_blank
from soul.data.templates import Template
from soul.evaluate.model import EvaluateConfig, answer_probability, generate
from soul.models.encoding import encode_for
from soul.models.loading import load, pick_device
from soul.output.console import print_result
from soul.report.words import one_line, probability
from soul_kernels.errors import ArgumentError, argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = "ask one model, or two, the same questions, and see how probable an answer is under each"
ARROW = "=>"  # between a question and an answer


class Asked(NamedTuple):
    """A model that is asked.

    Attributes:
        name: as it was given.
        model: the model.
        tokenizer: its tokenizer.
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="directory or hub name of a causal LM, or of adapters")
    parser.add_argument(
        "questions",
        nargs="*",
        metavar="QUESTION",
        help=f"a question, or 'QUESTION {ARROW} ANSWER' to see how probable the answer is (default: lines of standard input)",
    )
    parser.add_argument("--against", metavar="MODEL", help="another model, asked the same: such as the one before unlearning")
    parser.add_argument("--answer", metavar="TEXT", help=f"answer to all questions that have none after {ARROW}")
    add_template(parser)
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=60, metavar="N", help="tokens of an answer, at most (default: %(default)s)")
    add("--max-length", type=int, default=512, metavar="N", help="tokens of a question and its answer (default: %(default)s)")
    add("--dtype", default="float32", metavar="NAME", help="dtype of the parameters (default: %(default)s)")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    options = [field.name for field in dataclasses.fields(EvaluateConfig) if hasattr(args, field.name)]
    config = EvaluateConfig(**{name: getattr(args, name) for name in options})
    for question in args.questions:
        _check(question)
    device = pick_device(args.device)
    names = [args.model] if args.against is None else [args.model, args.against]
    models = [Asked(name, *load(name, dtype=args.dtype, device=device)) for name in names]
    for question in args.questions:
        print_result(*answers(models, question, args.answer, config))
    for question in () if args.questions else _typed():
        try:
            print_result(*answers(models, question, args.answer, config))
        except ArgumentError as error:  # the next question may be better
            print(f"soul ask: {error}", file=sys.stderr)


def answers(models: list[Asked], question: str, answer: str | None, config: EvaluateConfig) -> list[str]:
    """Return the lines for one question: what each model says, and how probable an answer is under each.

    Args:
        models: the models.
        question: a question, with ``ARROW`` and an answer behind it or without.
        answer: the answer, if the question has none; or None.
        config: how to ask.

    Raises:
        ArgumentError: the question does not fit the template or the model.
    """
    _check(question)
    text, arrow, own_answer = (part.strip() for part in question.partition(ARROW))
    answer = own_answer if arrow else answer
    width = max(len(asked.name) for asked in models)
    lines = [one_line(text)]
    for name, model, tokenizer in models:
        template = Template(config.template, tokenizer, config.system)
        example = template.ask(text, answer or "-", "question")
        sequences = encode_for(model, tokenizer, [example], config, "question")
        said = generate(model, tokenizer, sequences, max_new_tokens=config.max_new_tokens)[0]
        lines.append(f"  {name:{width}}  {one_line(said) or '(nothing)'}")
        if answer:
            value = answer_probability(model, sequences, backend=config.backend)
            lines.append(f"  {'':{width}}  p {probability(value)} of: {one_line(answer)}")
    return lines


def _check(question: str) -> None:
    """Raise for a question without text."""
    if is_blank(question.partition(ARROW)[0]):
        raise argument_error("question", "some text", repr(question), "write one, or none to type them")


def _typed() -> Iterator[str]:
    """Yield the lines of standard input that are not blank; on a terminal, ask for each."""
    prompt = "" if sys.stdin is None or not sys.stdin.isatty() else "> "
    while sys.stdin is not None:
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not is_blank(line):
            yield line
