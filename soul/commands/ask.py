"""``soul ask``: the same questions to one model or two, for looking. What a model knows is measured by ``soul evaluate``.

With ``--data`` nothing is generated: the mean probability of the answers in a file is shown, by which runs with an aim judge.
"""

import argparse
import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from soul.commands.device_options import add_device, add_loading
from soul.commands.template_options import add_template
from soul.data import sources
from soul.data.examples import Question
from soul.data.rows import check_unicode, is_blank
from soul.data.templates import Template
from soul.evaluate.model import EvaluateConfig, answer_probability, encode_questions, generate
from soul.models.encoding import encode_for
from soul.models.loading import check_name, load, pick_device
from soul.output.console import print_result
from soul_kernels.errors import ArgumentError, argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = "ask one model, or two side by side, and see how probable an answer is under each"
BETWEEN = " | "  # the columns of two models
NO_ANSWER = "-"  # stands for the answer of a question that has none: only its prompt is read


class Asked(NamedTuple):
    """A model that is asked: its name on the command line, the model, and its tokenizer."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory or hub name of a causal LM, or of adapters")
    add("questions", nargs="*", metavar="QUESTION", help="a question (default: the lines of standard input)")
    add("--against", metavar="MODEL", help="another model, such as the one before unlearning, asked the same")
    add("--answer", metavar="TEXT", help="an answer, whose probability is shown")
    add(
        "--data",
        metavar="DATA",
        help="show the mean probability of the answers in this file (what --forget of soul unlearn takes), and ask nothing",
    )
    add_template(parser)
    add("--max-new-tokens", type=int, default=60, metavar="N", help="tokens of an answer, at most (default: %(default)s)")
    add_loading(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    names = [args.model] if args.against is None else [args.model, args.against]
    fields = ("template", "system", "max_new_tokens", "backend")
    config = EvaluateConfig(**{name: getattr(args, name) for name in fields})
    answers = [] if args.answer is None else [args.answer]
    for what, texts in (("question", args.questions), ("answer", answers)):
        for text in texts:
            _check_text(what, text)
    device = pick_device(args.device)
    for name in names:
        check_name(name)
    rows = [] if args.data is None else _rows(args)
    models = [Asked(name, *load(name, dtype=args.dtype, device=device, load_in_4bit=args.load_in_4bit)) for name in names]
    if rows:
        print_result(f"mean probability of {len(rows)} answer{'s' * (len(rows) > 1)} in {args.data}")
        print_result(*(f"{asked.name}: {_mean_probability(asked, rows, config):.3g}" for asked in models))
        return
    for question in args.questions:
        print_result(*lines_of(models, question, args.answer, config))
    for question in () if args.questions else _typed():
        try:
            print_result(*lines_of(models, question, args.answer, config))
        except ArgumentError as error:
            if not _is_terminal():
                raise
            print(f"soul ask: {error}", file=sys.stderr)  # a person types another one


def lines_of(models: list[Asked], question: str, answer: str | None, config: EvaluateConfig) -> list[str]:
    """Return the question, and the models with what they say, side by side, as lines for a terminal.

    Args:
        models: one or two.
        question: the question.
        answer: the answer whose probability stands beside the name of each model, length-normalised
            (`soul.evaluate.metrics.probability`); or None.
        config: how to ask.

    Raises:
        ArgumentError: the question is blank, or it does not fit the template or a model.
    """
    _check_text("question", question)
    columns = []
    for name, model, tokenizer in models:
        asked = Question(question, answer or NO_ANSWER, answer or NO_ANSWER, ())
        sequences = encode_questions(model, tokenizer, [asked], config, "question").answers
        (said,) = generate(model, tokenizer, sequences, max_new_tokens=config.max_new_tokens)
        title = name
        if answer is not None:
            title += f" (p {answer_probability(model, sequences, backend=config.backend):.3g})"
        columns.append([title, *(said.strip() or "(nothing)").splitlines()])
    return [question, *_side_by_side(columns), ""]


def _rows(args: argparse.Namespace) -> list[sources.Row]:
    """Return the rows of ``--data``.

    Raises:
        ArgumentError: there are questions or an answer beside them, or as `soul.data.sources.rows`.
    """
    for name, value in (("question", args.questions), ("answer", args.answer)):
        if value:
            raise argument_error(name, "none with --data", repr(value), "the file has the questions and the answers")
    return sources.rows(args.data)


def _mean_probability(asked: Asked, rows: list[sources.Row], config: EvaluateConfig) -> float:
    """Return the mean over rows of the length-normalised probability of their answers."""
    examples = sources.examples(rows, Template(config.template, asked.tokenizer, config.system))
    sequences = encode_for(asked.model, asked.tokenizer, examples, config, "data")
    return answer_probability(asked.model, sequences, batch_size=config.batch_size, backend=config.backend)


def _side_by_side(columns: list[list[str]]) -> list[str]:
    """Return texts in columns that share the width of the terminal, 80 characters where there is none."""
    width = max(20, (shutil.get_terminal_size().columns - len(BETWEEN) * (len(columns) - 1)) // len(columns))
    wrapped = [[line for text in texts for line in textwrap.wrap(text, width) or [""]] for texts in columns]
    rows = itertools.zip_longest(*wrapped, fillvalue="")
    return [BETWEEN.join(f"{cell:{width}}" for cell in cells).rstrip() for cells in rows]


def _typed() -> Iterator[str]:
    """Yield the lines of standard input that are not blank; on a terminal, ask for each."""
    while sys.stdin is not None:
        if _is_terminal():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not is_blank(line):
            yield line.strip()


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _check_text(what: str, text: str) -> None:
    """Raise unless a question or an answer is some text."""
    if is_blank(text):
        raise argument_error(what, "some text", repr(text), "write it in quotes")
    check_unicode(what, text)
