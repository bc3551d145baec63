"""Forget and retain data: examples -> token ids. Before: `soul.data.sources`; after: `soul.data.batches`."""

import dataclasses
import pathlib
import random

from soul.data.rows import check_unicode, is_blank
from soul_kernels.errors import argument_error
from soul_kernels.tokens import IGNORE_INDEX

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
    """A prompt, which is given, and an answer, whose tokens are learned or unlearned.

    ``frame`` is what a chat template has put before and after the answer's own text, which is within ``answer``; None: no chat
    template wrote this. What it wrote gets no special tokens from the tokenizer.
    """

    prompt: str
    answer: str
    frame: tuple | None = None

    @property
    def content(self):
        """The answer's own text, without the space or the frame around it."""
        before, after = self.frame or ("", "")
        return self.answer[len(before) : len(self.answer) - len(after)].strip()


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of TOFU's perturbed files: a question, its answer put in two ways, and false answers put as the second one is.

    ``paraphrased`` is the answer itself where the file has no paraphrase.
    """

    question: str
    answer: str
    paraphrased: str
    perturbed: tuple


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Token ids of an example, and its labels, shifted: ``labels[t]`` is predicted at position t; -100 is ignored."""

    input_ids: list
    labels: list
    prompt_length: int

    @property
    def n_labels(self):
        """How many tokens have a label."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def ask(question, answer, template=TEMPLATE):
    """An `Example` of a template with ``{question}`` and, at its end, ``{answer}``; a space between the two begins the answer.

    Raises:
        ArgumentError: the template has not both, in this order.
    """
    head, _, rest = template.partition("{question}")
    middle, found, end = rest.partition("{answer}")
    if not found or end:
        remedy = "as in " + repr(TEMPLATE)
        raise argument_error("template", "a text with {question} that ends in {answer}", repr(template), remedy)
    prompt = middle.rstrip(" ")
    return Example(f"{head}{question}{prompt}", middle[len(prompt) :] + answer)


def read_refusals(path) -> tuple:
    """Return the refusals of a file, one a line, without the spaces around them; empty lines are passed over.

    Args:
        path: of a text file in UTF-8, whatever its name ends in: TOFU calls its own ``idontknow.jsonl``.

    Raises:
        ArgumentError: no such file, no text, a line with nothing to be seen or with a JSON object, or no refusal at all.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise argument_error("refusals", "a file with a refusal a line", f"{path}, which is none", "check the path")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise argument_error("refusals", "UTF-8 text", f"{path} with a broken byte at {error.start}", "convert it") from None
    refusals = []
    for number, line in enumerate(map(str.strip, lines), 1):
        where = f"refusals, {path}, line {number}"
        if line and is_blank(line):
            raise argument_error(where, "some text", "a blank one", "remove the line")
        if line.startswith("{"):
            raise argument_error(where, "a refusal as it is", "a JSON object", "write the text alone, without a name")
        check_unicode(where, line)
        refusals += [line] if line else []
    if not refusals:
        raise argument_error("refusals", "at least one refusal", f"{path}, which is empty", "write one a line")
    return tuple(refusals)


def refuse(examples, refusals=REFUSALS, seed=0):
    """The same prompts, answered by refusals drawn at random: the relabelling that `soul.losses.PO` needs.

    Raises:
        ArgumentError: an example has no prompt; an unconditional refusal would unlearn nothing.
    """
    draw = random.Random(seed)
    for index, example in enumerate(examples):
        if not example.prompt:
            remedy = "give question/answer or prompt/completion columns, or choose another method"
            raise argument_error(f"forget, row {index}", "a prompt to refuse", "a text without one", remedy)
    return [_answered(example, draw.choice(refusals)) for example in examples]


def _answered(example, text):
    before, after = example.frame or ("" if example.prompt[-1].isspace() else " ", "")
    return dataclasses.replace(example, answer=before + text + after)


def pair_refusals(examples, refusals=REFUSALS, seed=0):
    """Every example followed by its refusal, as `refuse` draws it: the pairs (2i, 2i + 1) that `soul.losses.DPO` needs.

    Raises:
        ArgumentError: as `refuse`.
    """
    return [example for pair in zip(examples, refuse(examples, refusals, seed)) for example in pair]


@dataclasses.dataclass
class Counts:
    """What became of the rows of a set: numbers of them.

    Attributes:
        rows: that were read.
        blank: left out, as there is no text.
        no_room: left out, as the prompt leaves no room for an answer within ``max_length``.
        truncated: cut on the right, if only the end-of-sequence token.
        split: texts cut into pieces.
        pieces: sequences that these became.
    """

    rows: int = 0
    blank: int = 0
    no_room: int = 0
    truncated: int = 0
    split: int = 0
    pieces: int = 0

    def told(self, max_length):
        """All of it in one line of text."""
        parts = [f"{self.rows} row{'s' * (self.rows != 1)}"]
        parts += [f"{self.blank} blank, left out"] * bool(self.blank)
        parts += [f"{self.no_room} left out: no room for an answer within {max_length} tokens"] * bool(self.no_room)
        parts += [f"{self.truncated} cut to {max_length} tokens"] * bool(self.truncated)
        parts += [f"{self.split} split into {self.pieces} pieces of up to {max_length} tokens"] * bool(self.split)
        return "; ".join(parts)


def encode(examples, tokenizer, *, vocab_size, max_length=512, name="data", split=False, counts=None):
    """Tokenizes examples; labels are the tokens of the answer and the end-of-sequence token.

    Prompt and answer are tokenized as one text, as the model will meet them. The prompt's tokens are those that its own
    tokenization shares with the whole; where the two melt into one token, it belongs to the answer.

    Args:
        examples: list of `Example`.
        tokenizer: a Hugging Face tokenizer.
        vocab_size: rows of the model's head; every token id must be below it.
        max_length: longer sequences are cut on the right, in tokens.
        name: what to call the examples in errors.
        split: cut longer texts, examples without a prompt, into pieces instead. Each begins with the tokenizer's start token
            or, where it has none, with the last token before it, so that every token is a label once.
        counts: `Counts`, which gets the numbers of rows that were cut.

    Returns:
        List of `Sequence`, as long as the examples, unless some were split.

    Raises:
        ArgumentError: a token id lies outside the vocabulary, a prompt leaves no room for its answer, or its tokens under a
            chat template do not begin those of the whole.
    """
    sequences, counts = [], Counts() if counts is None else counts
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for index, example in enumerate(examples):
        where = f"{name}, row {index}"
        whole, prompt_length = _tokens(example, tokenizer, where)
        pieces = [whole + end]
        if split and not example.prompt and len(whole) > max_length > max(1, prompt_length):
            pieces = _pieces(whole, prompt_length, max_length)
            pieces[-1] += end  # where there is room
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


def answerable(examples, tokenizer, *, max_length=512, name="data", counts=None):
    """The examples whose prompts leave room for a label within ``max_length`` tokens; `encode` raises for the others.

    Args:
        examples: list of `Example`.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens of a sequence.
        name: what to call the examples in errors.
        counts: `Counts`, which gets the number of those that are left out.

    Raises:
        ArgumentError: no prompt leaves room, or as `encode`.
    """
    end = tokenizer.eos_token_id is not None
    kept = []
    for index, example in enumerate(examples):
        whole, prompt_length = _tokens(example, tokenizer, f"{name}, row {index}")
        if _has_room([*whole, *[0] * end], prompt_length, max_length):
            kept.append(example)
    if not kept:
        raise argument_error(name, f"a row with room for an answer within {max_length} tokens", "none", "raise --max-length")
    if counts is not None:
        counts.no_room += len(examples) - len(kept)
    return kept


def _has_room(ids, prompt_length, max_length):
    return min(len(ids), max_length) > max(prompt_length, 1)  # the first token of all is never predicted


def _tokens(example, tokenizer, where):
    """Token ids of an example, without an end-of-sequence token at the end, and how many of them are the prompt's."""
    text = example.prompt + example.answer
    # What a chat template wrote has all special tokens already; what a user has rendered shows it by its first one.
    special = example.frame is None and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    options = dict(add_special_tokens=special, verbose=False)  # which would warn of long texts before they are cut
    prompt, whole = ([*tokenizer(t, **options).input_ids] for t in (example.prompt, text))
    for tokens in (prompt, whole) if special else (whole,):
        # Some tokenizers close every text themselves, and some texts are closed already.
        while tokenizer.eos_token_id is not None and tokens[-1:] == [tokenizer.eos_token_id]:
            tokens.pop()
    shared = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole)))
    if example.frame is not None and shared < len(prompt):
        expected = f"the {len(prompt)} tokens of its prompt to begin those of the whole"
        remedy = "under this chat template prompt and answer melt into one token: choose another template"
        raise argument_error(where, expected, f"{shared} that do", remedy)
    return whole, shared


def _pieces(ids, start, length):
    """Cuts ids into pieces of at most ``length``, each beginning with the first ``start`` of them, or with the token before."""
    if start:
        room = length - start
        return [ids[:start] + ids[i : i + room] for i in range(start, len(ids), room)]
    return [ids[i : i + length] for i in range(0, len(ids) - 1, length - 1)]
