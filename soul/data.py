"""Forget and retain data: JSON lines -> examples -> token ids -> batches."""

import dataclasses
import json
import pathlib
import random

import torch

from soul_kernels._checks import argument_error
from soul_kernels.reference.token_logprob import IGNORE_INDEX

COLUMNS = (("question", "answer"), ("prompt", "completion"), ("text",))
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
    """A prompt, which is given, and an answer, whose tokens are learned or unlearned."""

    prompt: str
    answer: str


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


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences padded on the right to the longest.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 0 at padding.
        labels: [B, T] int64, shifted, -100 at prompts and padding.
        rows: [R] int64 on the CPU, flat indices of the labelled positions: known here, so the device need not be asked.
        is_forget: [B] bool, on the CPU like ``rows``.
        has_retain: whether there are sequences to retain.
        ref_logps: [B] fp32 or None.
        ref_hidden: [B, T, D] or None.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    is_forget: torch.Tensor
    has_retain: bool
    ref_logps: torch.Tensor | None = None
    ref_hidden: torch.Tensor | None = None


def read_jsonl(path, template=TEMPLATE):
    """Reads examples from JSON lines with the columns question/answer, prompt/completion, or text.

    Questions are put into the template; prompts are taken as they are; a text has no prompt.

    Raises:
        ArgumentError: no such file, a broken line (named by its number), a missing column, or no rows at all.
    """
    examples, columns = [], None
    for where, row in _rows(path):
        columns = columns or next((c for c in COLUMNS if all(name in row for name in c)), None)
        if columns is None:
            known = " or ".join("/".join(c) for c in COLUMNS)
            raise argument_error(where, f"columns {known}", "/".join(row) or "none", "rename the columns")
        for name in columns:
            _check_text(where, row, name, may_be_blank=name != columns[-1])
        examples.append(_example(row, columns, template))
    if not examples:
        raise argument_error(str(path), "at least one row", "an empty file", "there is nothing to learn from it")
    return examples


def read_questions(path):
    """Reads TOFU's perturbed files: JSON lines with question, answer, perturbed_answer (a list) and perhaps paraphrased_answer.

    Returns:
        List of `Question`, all with equally many false answers.

    Raises:
        ArgumentError: as `read_jsonl`.
    """
    questions = []
    for where, row in _rows(path):
        row = {"paraphrased_answer": row.get("answer"), **row}
        perturbed, count = row.get("perturbed_answer"), len(questions[0].perturbed) if questions else None
        if not isinstance(perturbed, list) or not perturbed or len(perturbed) != (count or len(perturbed)):
            got = f"{len(perturbed)} of them" if isinstance(perturbed, list) else type(perturbed).__name__
            expected = f"a list of {f'{count} ' if count else ''}false answers"
            raise argument_error(f"{where}, column 'perturbed_answer'", expected, got, "is this one of TOFU's perturbed files?")
        for name in ("question", "answer", "paraphrased_answer"):
            _check_text(where, row, name)
        for text in perturbed:
            _check_text(where, {"perturbed_answer": text}, "perturbed_answer")
        questions.append(Question(row["question"], row["answer"], row["paraphrased_answer"], tuple(perturbed)))
    if not questions:
        raise argument_error(str(path), "at least one row", "an empty file", "there is nothing to ask")
    return questions


def _rows(path):
    """Yields every row of a JSON-lines file, a dict, with a name for where it stands."""
    path = pathlib.Path(path)
    if not path.exists() or path.is_dir():
        got = "a directory" if path.is_dir() else "no such file"
        raise argument_error(str(path), "a JSON-lines file", got, "check the path")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise argument_error(str(path), "UTF-8 text", f"a broken byte at {error.start}", "convert the file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", type(error).__name__)
            raise argument_error(where, "one JSON object", f"broken JSON ({reason})", "fix the line") from None
        if not isinstance(row, dict):
            raise argument_error(where, "one JSON object", type(row).__name__, "fix the line")
        yield where, row


def _check_text(where, row, name, may_be_blank=False):
    where = f"{where}, column {name!r}"
    if not isinstance(row.get(name), str):
        got = "no such column" if name not in row else type(row[name]).__name__
        raise argument_error(where, "a string", got, "every row needs it")
    if any("\ud800" <= character <= "\udfff" for character in row[name]):
        raise argument_error(where, "valid Unicode", "a lone surrogate", "fix the text")
    if not may_be_blank and not row[name].strip():
        raise argument_error(where, "some text", "a blank one", "drop the line")


def _example(row, columns, template):
    if columns == ("text",):
        return Example("", row["text"])
    if columns == ("prompt", "completion"):
        return Example(row["prompt"], row["completion"])
    return ask(row["question"], row["answer"], template)


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
    return [Example(e.prompt, ("" if e.prompt[-1].isspace() else " ") + draw.choice(refusals)) for e in examples]


def pair_refusals(examples, refusals=REFUSALS, seed=0):
    """Every example followed by its refusal, as `refuse` draws it: the pairs (2i, 2i + 1) that `soul.losses.DPO` needs.

    Raises:
        ArgumentError: as `refuse`.
    """
    return [example for pair in zip(examples, refuse(examples, refusals, seed)) for example in pair]


def encode(examples, tokenizer, *, vocab_size, max_length=512, name="data"):
    """Tokenizes examples; labels are the tokens of the answer and the end-of-sequence token.

    Prompt and answer are tokenized as one text, as the model will meet them. The prompt's tokens are those that its own
    tokenization shares with the whole; where the two melt into one token, it belongs to the answer.

    Args:
        examples: list of `Example`.
        tokenizer: a Hugging Face tokenizer.
        vocab_size: rows of the model's head; every token id must be below it.
        max_length: longer sequences are cut on the right, in tokens.
        name: what to call the examples in errors.

    Returns:
        List of `Sequence`, as long as the examples.

    Raises:
        ArgumentError: a token id lies outside the vocabulary, or a prompt leaves no room for its answer.
    """
    sequences = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for index, example in enumerate(examples):
        text = example.prompt + example.answer
        # What a chat template wrote begins with its own begin-of-sequence token.
        options = dict(add_special_tokens=not (tokenizer.bos_token and text.startswith(tokenizer.bos_token)))
        prompt, whole = ([*tokenizer(t, **options).input_ids] for t in (example.prompt, text))
        for tokens in (prompt, whole):  # some tokenizers close every text themselves, and some texts are closed already
            while end and tokens[-1:] == end:
                tokens.pop()
        prompt_length = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole)))
        ids = (whole + end)[:max_length]
        if max(ids, default=0) >= vocab_size:
            remedy = "was the tokenizer resized without the model?"
            raise argument_error(f"{name}, row {index}", f"token ids in [0, {vocab_size})", max(ids), remedy)
        labels = [IGNORE_INDEX] * prompt_length + ids[prompt_length:]
        labels = labels[1 : len(ids)] + [IGNORE_INDEX]
        if all(label == IGNORE_INDEX for label in labels):
            got = f"a prompt of {prompt_length} tokens and an answer of {len(whole) - prompt_length}"
            raise argument_error(f"{name}, row {index}", f"a label within {max_length} tokens", got, "raise --max-length")
        sequences.append(Sequence(ids, labels, prompt_length))
    return sequences


def collate(forget, retain, *, device="cpu", ref_logps=None, ref_hidden=None):
    """Puts forget and retain sequences into one `Batch`, the forget ones first, padded to the longest.

    Padding is masked, and its token id is 0: a padding token may have been added to the tokenizer without a row in the model.

    Args:
        forget: list of `Sequence`; for `soul.losses.DPO` of pairs, each refusal right after its answer.
        retain: list of `Sequence`.
        device: where the batch goes; ``rows`` and ``is_forget`` stay on the CPU.
        ref_logps: reference log-probabilities of the forget sequences, list of floats, or None.
        ref_hidden: the reference's hidden states of all sequences at their labelled positions, from `soul.reference_hidden`: a
            list of [n, D] tensors, with None for a sequence whose states are not needed; or None.

    Raises:
        ArgumentError: ``ref_logps`` or ``ref_hidden`` do not fit the sequences.
    """
    sequences = [*forget, *retain]
    shape = (len(sequences), max(len(s.input_ids) for s in sequences))
    padded = [[], [], []]
    for sequence in sequences:
        length, rest = len(sequence.input_ids), shape[1] - len(sequence.input_ids)
        padded[0].append(sequence.input_ids + [0] * rest)
        padded[1].append(sequence.labels + [IGNORE_INDEX] * rest)
        padded[2].append([1] * length + [0] * rest)
    input_ids, labels, attention_mask = (torch.tensor(rows, dtype=torch.int64, device="cpu") for rows in padded)
    if ref_logps is not None:
        if len(ref_logps) != len(forget):
            raise argument_error("ref_logps", f"{len(forget)} values", len(ref_logps), "pass one a forget sequence")
        ref_logps = torch.tensor([*ref_logps, *[0.0] * len(retain)], dtype=torch.float32, device=device)
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        labels=labels.to(device),
        rows=(labels.view(-1) != IGNORE_INDEX).nonzero()[:, 0],
        is_forget=torch.arange(len(sequences), device="cpu") < len(forget),
        has_retain=bool(retain),
        ref_logps=ref_logps,
        ref_hidden=None if ref_hidden is None else _pad_hidden(ref_hidden, labels, device),
    )


def _pad_hidden(states, labels, device):
    """[n, D] at the labelled positions of each sequence -> [B, T, D], 0 elsewhere; what is moved is not padded."""
    counts = (labels != IGNORE_INDEX).sum(1).tolist()
    got = [None if state is None else len(state) for state in states]
    if len(got) != len(counts) or any(n not in (None, count) for n, count in zip(got, counts)) or got.count(None) == len(got):
        expected = f"states at {counts} labelled positions, or None where they are not needed"
        raise argument_error("ref_hidden", expected, got, "compute them from the same sequences: soul.reference_hidden")
    packed = torch.cat([state for state in states if state is not None]).to(device)
    needed = torch.tensor([state is not None for state in states], device="cpu")[:, None]
    rows = ((labels != IGNORE_INDEX) & needed).view(-1).nonzero()[:, 0].to(device)
    return packed.new_zeros(labels.numel(), packed.shape[1]).index_copy_(0, rows, packed).view(*labels.shape, -1)


def batches_by_length(sequences, batch_size, draw):
    """One epoch of index lists: shuffled, with sequences of like length together, so that little is padded.

    Args:
        sequences: list of `Sequence`.
        batch_size: indices a list; the last may be shorter.
        draw: ``random.Random``.
    """
    order = list(range(len(sequences)))
    draw.shuffle(order)
    pool = 8 * batch_size  # sorted within pools only, so that epochs differ
    order = [i for p in range(0, len(order), pool) for i in sorted(order[p : p + pool], key=lambda i: len(sequences[i].labels))]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    draw.shuffle(batches)
    return batches


class Order:
    """Which examples make each step: every epoch the forget set in a new random order, beside a random one of the retain set
    that runs on over the epochs. Iterating yields (epoch from 1, indices of forget examples, sorted, indices of retain
    examples, as many).

    Args:
        n_forget: examples to forget.
        n_retain: examples to retain; 0: none go with them.
        batch_size: forget examples a step; the last of an epoch may have fewer.
        epochs: passes over the forget set.
        seed: of both orders.
    """

    def __init__(self, n_forget, n_retain, batch_size, epochs, seed):
        self.n_forget, self.n_retain, self.batch_size, self.epochs = n_forget, n_retain, batch_size, epochs
        self.draw, self.epoch = random.Random(seed), 0
        self.forget, self.retain = [], []  # indices that are still to come: of this epoch, of this round

    def __len__(self):
        return self.epochs * -(-self.n_forget // self.batch_size)

    def __iter__(self):
        return self

    def __next__(self):
        if not self.forget:
            if self.epoch == self.epochs:
                raise StopIteration
            self.epoch += 1
            self.forget = self._shuffled(self.n_forget)
        # The whole set, where it is one batch, in the order in which its reference was computed.
        forget, self.forget = sorted(self.forget[: self.batch_size]), self.forget[self.batch_size :]
        while self.n_retain and len(self.retain) < len(forget):
            self.retain += self._shuffled(self.n_retain)
        retain, self.retain = self.retain[: len(forget)], self.retain[len(forget) :]
        return self.epoch, forget, retain

    def _shuffled(self, n):
        order = list(range(n))
        self.draw.shuffle(order)
        return order

    def state_dict(self):
        """The place in the data, for a checkpoint."""
        return {"epoch": self.epoch, "forget": self.forget, "retain": self.retain, "draw": self.draw.getstate()}

    def load_state_dict(self, state_dict):
        """Goes on where ``state_dict`` was taken."""
        self.epoch, self.forget, self.retain = (state_dict[name] for name in ("epoch", "forget", "retain"))
        self.draw.setstate(state_dict["draw"])
