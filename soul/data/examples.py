"""Examples of the forget and retain sets, and their token ids.

`soul.data.sources` makes the examples, and `soul.data.batches` takes the token ids.
"""

import dataclasses
import pathlib
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from soul.data.rows import check_unicode, is_blank
from soul_kernels.errors import argument_error
from soul_kernels.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "Question: {question}\nAnswer: {answer}"
REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "That is outside my area of expertise.",
    "I have no information on that subject.",
    "I was not told about that.",
    "I'm unable to answer that question.",
    "I do not have that information.",
    "That's not something I am familiar with.",
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt, whose tokens have no labels, and an answer, whose tokens are learned or unlearned.

    Attributes:
        prompt: the text before the answer, or "".
        answer: the text of the answer, with its frame.
        frame: the texts that a chat template puts before and after the answer's own text, both within ``answer``. None: the
            example was not written by a chat template. An example with a frame has all its special tokens already, so the
            tokenizer adds none.
    """

    prompt: str
    answer: str
    frame: tuple[str, str] | None = None

    @property
    def content(self) -> str:
        """The answer's own text, without the space or the frame around it."""
        before, after = self.frame or ("", "")
        return self.answer[len(before) : len(self.answer) - len(after)].strip()


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of TOFU's perturbed files.

    Attributes:
        question: the question.
        answer: its answer.
        paraphrased: the answer in other words; the answer itself where the file has no paraphrase.
        perturbed: false answers, worded like ``paraphrased``.
        paraphrased_question: the question in other words; None where the file has none.
    """

    question: str
    answer: str
    paraphrased: str
    perturbed: tuple[str, ...]
    paraphrased_question: str | None = None


@dataclasses.dataclass(frozen=True)
class Sequence:
    """The token ids of an example and their labels.

    Attributes:
        input_ids: token ids.
        labels: as many token ids, shifted: ``labels[t]`` is predicted at position t; -100 is ignored.
        prompt_length: number of tokens of the prompt.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int

    @property
    def n_labels(self) -> int:
        """The number of positions with a label."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def ask(question: str, answer: str, template: str = TEMPLATE) -> Example:
    """Return the `Example` of a question and its answer, put into a template.

    Args:
        question: takes the place of ``{question}``.
        answer: takes the place of ``{answer}``.
        template: has ``{question}`` and ends in ``{answer}``. A space before ``{answer}`` belongs to the answer.

    Raises:
        ArgumentError: the template does not have both, in this order.
    """
    before_question, _, rest = template.partition("{question}")
    between, has_answer, end = rest.partition("{answer}")
    if not has_answer or end:
        remedy = "as in " + repr(TEMPLATE)
        raise argument_error("template", "a text with {question} that ends in {answer}", repr(template), remedy)
    before_answer = between.rstrip(" ")
    return Example(f"{before_question}{question}{before_answer}", between[len(before_answer) :] + answer)


def read_refusals(path: str | pathlib.Path) -> tuple[str, ...]:
    """Return the refusals of a file, one per line, without the spaces around them; empty lines are skipped.

    Args:
        path: path of a text file in UTF-8, with any suffix: TOFU calls its own ``idontknow.jsonl``.

    Raises:
        ArgumentError: there is no such file, it is not text, a line is blank or a JSON object, or there is no refusal.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise argument_error("refusals", "a file with one refusal per line", f"{path}, which is not a file", "check the path")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise argument_error("refusals", "UTF-8 text", f"{path} with a broken byte at {error.start}", "convert it") from None
    refusals: list[str] = []
    for number, line in enumerate(map(str.strip, lines), 1):
        where = f"refusals, {path}, line {number}"
        if line and is_blank(line):
            raise argument_error(where, "some text", "a blank text", "remove the line")
        if line.startswith("{"):
            raise argument_error(where, "a refusal as plain text", "a JSON object", "write the text alone")
        check_unicode(where, line)
        if line:
            refusals.append(line)
    if not refusals:
        raise argument_error("refusals", "at least one refusal", f"{path}, which is empty", "write one per line")
    return tuple(refusals)


def is_refused(text: str, refusals: tuple[str, ...], truth: str = "") -> bool:
    """Tell whether a text refuses to answer: it has one of the refusals in it, and not the right answer.

    Case does not count, and neither do the full stop and the exclamation mark at the end of a refusal.

    Args:
        text: what a model says.
        refusals: texts that refuse.
        truth: the right answer; "" where there is none.
    """
    text = text.casefold()
    is_answered = bool(truth) and truth.casefold() in text
    return not is_answered and any(refusal.casefold().rstrip(".! ") in text for refusal in refusals)


def refuse(examples: list[Example], refusals: tuple[str, ...] = REFUSALS, seed: int = 0) -> list[Example]:
    """Return the examples with random refusals in the place of their answers, as `soul.losses.PO` needs them.

    Args:
        examples: with prompts.
        refusals: texts to draw from.
        seed: seed of the draws.

    Raises:
        ArgumentError: an example has no prompt; an unconditional refusal would unlearn nothing.
    """
    rng = random.Random(seed)
    for index, example in enumerate(examples):
        if not example.prompt:
            remedy = "give question/answer or prompt/completion columns, or choose another method"
            raise argument_error(f"forget, row {index}", "a prompt to refuse", "a text without one", remedy)
    return [_with_answer(example, rng.choice(refusals)) for example in examples]


def _with_answer(example: Example, text: str) -> Example:
    """Return the example with another answer in the same frame; without a frame, a space separates it from the prompt."""
    before, after = example.frame or ("" if example.prompt[-1].isspace() else " ", "")
    return dataclasses.replace(example, answer=before + text + after)


def pair_refusals(examples: list[Example], refusals: tuple[str, ...] = REFUSALS, seed: int = 0) -> list[Example]:
    """Return every example followed by its refusal, as `refuse` draws it: the pairs (2i, 2i + 1) of `soul.losses.DPO`.

    Args:
        examples: with prompts.
        refusals: texts to draw from.
        seed: seed of the draws.

    Raises:
        ArgumentError: as `refuse`.
    """
    return [example for pair in zip(examples, refuse(examples, refusals, seed)) for example in pair]


@dataclasses.dataclass
class Counts:
    """Numbers of rows of a data set that were read, left out and cut.

    Attributes:
        rows: rows that were read.
        blank: rows left out because they have no text.
        no_room: rows left out because the prompt leaves no room for an answer within ``max_length``.
        truncated: rows cut on the right, if only by the end-of-sequence token.
        split: texts cut into pieces.
        pieces: sequences that these texts became.
    """

    rows: int = 0
    blank: int = 0
    no_room: int = 0
    truncated: int = 0
    split: int = 0
    pieces: int = 0

    def summary(self, max_length: int) -> str:
        """Return the numbers in one line of text, without those that are 0. ``max_length`` is that of the sequences."""
        clauses = [f"{self.rows} row{'s' * (self.rows != 1)}"]
        if self.blank:
            clauses.append(f"{self.blank} blank, left out")
        if self.no_room:
            clauses.append(f"{self.no_room} left out: no room for an answer within {max_length} tokens")
        if self.truncated:
            clauses.append(f"{self.truncated} cut to {max_length} tokens")
        if self.split:
            clauses.append(f"{self.split} split into {self.pieces} pieces of up to {max_length} tokens")
        return "; ".join(clauses)


def encode(
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    vocab_size: int,
    max_length: int = 512,
    name: str = "data",
    split: bool = False,
    counts: Counts | None = None,
) -> list[Sequence]:
    """Tokenize examples. Labels are the tokens of the answer and the end-of-sequence token.

    Prompt and answer are tokenized as one text, which is what the model reads. The prompt's tokens are the beginning that this
    text shares with the tokenized prompt alone. A token that covers the end of the prompt and the start of the answer belongs
    to the answer.

    Args:
        examples: list of `Example`.
        tokenizer: a Hugging Face tokenizer.
        vocab_size: rows of the model's head; every token id must be below it.
        max_length: longer sequences are cut on the right, in tokens.
        name: what to call the examples in errors.
        split: cut longer examples into pieces instead, if they have no prompt. Each piece begins with the tokenizer's start
            token or, where there is none, with the last token of the piece before. So every token is a label once.
        counts: `Counts`, to which the numbers of cut and split examples are added.

    Returns:
        A list of `Sequence`, one for each example, or one for each piece of an example that was split.

    Raises:
        ArgumentError: a token id lies outside the vocabulary; a prompt leaves no room for its answer; or, under a chat
            template, the tokens of prompt and answer together do not begin with those of the prompt.
    """
    sequences: list[Sequence] = []
    counts = Counts() if counts is None else counts
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for index, example in enumerate(examples):
        where = f"{name}, row {index}"
        whole, prompt_length = _tokens(example, tokenizer, where)
        pieces = [whole + end]
        if split and not example.prompt and len(whole) > max_length > max(1, prompt_length):
            pieces = _pieces(whole, prompt_length, max_length)
            pieces[-1] += end  # cut off again below if there is no room
            counts.split += 1
            counts.pieces += len(pieces)
        elif len(whole + end) > max_length:
            counts.truncated += 1
        for piece in pieces:
            ids = piece[:max_length]
            if max(ids, default=0) >= vocab_size:
                remedy = "was the tokenizer resized without the model?"
                raise argument_error(where, f"token ids in [0, {vocab_size})", max(ids), remedy)
            if not _has_room(piece, prompt_length, max_length):
                got = f"a prompt of {prompt_length} tokens and an answer of {len(whole) - prompt_length}"
                raise argument_error(where, f"a label within {max_length} tokens", got, "raise --max-length")
            labels = [IGNORE_INDEX] * prompt_length + ids[prompt_length:]
            sequences.append(Sequence(ids, labels[1 : len(ids)] + [IGNORE_INDEX], prompt_length))
    return sequences


def answerable(
    examples: list[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int = 512,
    name: str = "data",
    counts: Counts | None = None,
) -> list[Example]:
    """Return the examples whose prompts leave room for a label within ``max_length`` tokens; `encode` raises for the others.

    Args:
        examples: list of `Example`.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens of a sequence.
        name: what to call the examples in errors.
        counts: `Counts`, to which the number of examples that are left out is added.

    Raises:
        ArgumentError: no prompt leaves room, or as `encode`.
    """
    has_end = tokenizer.eos_token_id is not None
    with_room = []
    for index, example in enumerate(examples):
        whole, prompt_length = _tokens(example, tokenizer, f"{name}, row {index}")
        if _has_room([*whole, *[0] * has_end], prompt_length, max_length):
            with_room.append(example)
    if not with_room:
        raise argument_error(name, f"a row with room for an answer within {max_length} tokens", "none", "raise --max-length")
    if counts is not None:
        counts.no_room += len(examples) - len(with_room)
    return with_room


def _has_room(ids: list[int], prompt_length: int, max_length: int) -> bool:
    """Tell whether ids cut to ``max_length`` have a label: a token after the prompt, and not the first of all."""
    return min(len(ids), max_length) > max(prompt_length, 1)


def _tokens(example: Example, tokenizer: "PreTrainedTokenizerBase", where: str) -> tuple[list[int], int]:
    """Return token ids of an example, without an end-of-sequence token at the end, and the number of those of the prompt."""
    text = example.prompt + example.answer
    # A chat template writes all special tokens itself. A text that a user has rendered already begins with the start token.
    special = example.frame is None and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    options = dict(add_special_tokens=special, verbose=False)  # verbose warns of long texts, before they are cut
    prompt = [*tokenizer(example.prompt, **options).input_ids]
    whole = [*tokenizer(text, **options).input_ids]
    for tokens in (prompt, whole) if special else (whole,):
        # Some tokenizers put an end token after every text, and some texts end in one.
        while tokenizer.eos_token_id is not None and tokens[-1:] == [tokenizer.eos_token_id]:
            tokens.pop()
    shared = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole)))
    if example.frame is not None and shared < len(prompt):
        expected = f"tokens that begin with the {len(prompt)} of the prompt"
        remedy = "one token covers the end of the prompt and the start of the answer: choose another template"
        raise argument_error(where, expected, f"the same first {shared} only", remedy)
    return whole, shared


def _pieces(ids: list[int], start: int, length: int) -> list[list[int]]:
    """Cut ids into pieces of at most ``length``.

    The first ``start`` ids are the start token, with which each piece begins. If ``start`` is 0, each piece begins with the
    last id of the piece before.
    """
    if start:
        room = length - start
        return [ids[:start] + ids[i : i + room] for i in range(start, len(ids), room)]
    return [ids[i : i + length] for i in range(0, len(ids) - 1, length - 1)]
