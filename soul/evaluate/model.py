"""Runs of a model for TOFU's metrics and logs, and its distance to a model that never saw the data.

The formulas are in `soul.evaluate.metrics`. Here questions are encoded (`encode_questions`), models are run over them
(`sequence_statistics`, `generate`), and the results are put into the columns of TOFU's logs (`tofu_logs`). Every number but
ROUGE comes from statistics of single tokens (`soul_kernels.linear_statistics`), so logits of whole sequences are never kept.
"""

import collections.abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from soul.data.batches import collate
from soul.data.examples import Counts, Example, Question, Sequence
from soul.data.templates import Template, check_template
from soul.evaluate import metrics
from soul.evaluate.attacks import CostlyAttacks, costly_columns, without_end
from soul.models.causal_lm import (
    autocast,
    device_of,
    evaluating,
    greedy,
    head,
    hidden_states,
    lm_head,
    token_statistics,
    transform,
)
from soul.models.encoding import encode_for
from soul.output.progress import track
from soul_kernels import LinearOptions, Reference, TokenStatistics, linear_kl
from soul_kernels.backends import BACKENDS
from soul_kernels.errors import argument_error, check_choice, check_whole
from soul_kernels.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
Log = dict[str, dict[str, Any]]  # {column: {row: value}}, as JSON has it: numbers, lists of numbers, lists of texts
Columns = dict[str, Any]  # column -> tensor [n] or [n, m], or list of n values


@dataclasses.dataclass
class EvaluateConfig:
    """How TOFU's questions are asked.

    Attributes:
        template: "plain", "chat" or a text: how question and answer become one text (`soul.data.templates.Template`). It should
            be that of training.
        system: system message of the chat template, or None.
        max_length: tokens of a sequence; longer ones are cut.
        max_new_tokens: tokens of a generated answer, at most. TOFU: 200 with the prompt; open-unlearning: 200 without.
        batch_size: sequences per batch.
        min_k: fraction of an answer's tokens that Min-K% and Min-K%++ look at.
        backend: "auto", "triton", "compile", "torch" or "reference".
    """

    template: str = "plain"
    system: str | None = None
    max_length: int = 512
    max_new_tokens: int = 200
    batch_size: int = 32
    min_k: float = metrics.MIN_K
    backend: str = "auto"
    long_texts = "truncate"  # neither a field nor an option, since a log has one number for every row

    def __post_init__(self) -> None:
        check_template(self.template, self.system)
        check_choice("backend", self.backend, BACKENDS)
        metrics.check_fraction(self.min_k)
        for name in ("max_length", "max_new_tokens", "batch_size"):
            check_whole(name, getattr(self, name), "check the options")


@dataclasses.dataclass(frozen=True)
class EncodedQuestions:
    """The n questions of one set, encoded.

    Attributes:
        examples: [n], the questions with their true answers as texts.
        answers: [n], the same as token ids.
        paraphrased: [n], with the paraphrased answers; the list ``answers`` itself if there are no paraphrases.
        perturbed: [n m], with the false answers, the m of one question after the m of another.
    """

    examples: list[Example]
    answers: list[Sequence]
    paraphrased: list[Sequence]
    perturbed: list[Sequence]


def encode_questions(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: list[Question],
    config: EvaluateConfig,
    name: str,
    counts: dict[str, Counts] | None = None,
) -> EncodedQuestions:
    """Encode the questions of one set with every kind of answer.

    Args:
        model: the causal language model that will be asked; its vocabulary and its positions bound the sequences.
        tokenizer: its tokenizer.
        questions: questions of one of TOFU's perturbed files.
        config: template and lengths.
        name: name of the set, for errors and counts.
        counts: gets a `soul.data.Counts` for every kind of answer; or None.

    Raises:
        ArgumentError: a sequence, or the answer to be generated, does not fit the model, as `soul.models.encoding.encode_for`.
    """
    template = Template(config.template, tokenizer, config.system)

    def encode(pairs: list[tuple[str, str]], kind: str) -> tuple[list[Example], list[Sequence]]:
        label = f"{name}, {kind}"
        examples = [template.ask(*pair, f"{label}, row {index}") for index, pair in enumerate(pairs)]
        count = Counts(rows=len(examples))
        if counts is not None:
            counts[label] = count
        return examples, encode_for(model, tokenizer, examples, config, label, count)

    examples, answers = encode([(q.question, q.answer) for q in questions], "answer")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(sequence.prompt_length for sequence in answers)
    if positions and longest + config.max_new_tokens > positions:
        got = f"{config.max_new_tokens} after a prompt of {longest}"
        remedy = f"pass --max-new-tokens {max(1, positions - longest)}"
        raise argument_error("max_new_tokens", f"at most {positions} positions", got, remedy)
    paraphrased = answers
    if any(q.paraphrased != q.answer for q in questions):
        _, paraphrased = encode([(q.question, q.paraphrased) for q in questions], "paraphrased_answer")
    _, perturbed = encode([(q.question, false) for q in questions for false in q.perturbed], "perturbed_answer")
    return EncodedQuestions(examples, answers, paraphrased, perturbed)


def tofu_logs(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sets: Mapping[str, list[Question]],
    config: EvaluateConfig,
    *,
    holdout: collections.abc.Sequence[Example] = (),
    attacks: CostlyAttacks | None = None,
    progress: Callable[[str], object] = print,
    counts: dict[str, Counts] | None = None,
) -> dict[str, Log]:
    """Run a model over TOFU's sets and return its logs.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        sets: "forget", "retain", "real_authors", "world_facts" -> questions.
        config: how they are asked.
        holdout: examples that the model was never trained on, for the membership attacks.
        attacks: those attacks that need another pass than the one over the answers; None: no such attack.
        progress: called with a line of text for every set, and for every kind of answer with sequences that were cut.
        counts: gets a `soul.data.Counts` for every set and kind of answer; or None.

    Returns:
        Set -> log, in the layout of TOFU's files (`soul.evaluate.logs`), with these columns beside TOFU's:
        ``exact_memorization``, ``extraction_strength``, ``rougeL_f1``, and the scores of membership attacks, ``zlib``,
        ``min_k``, ``min_k_plus_plus``, ``reference`` and ``gradnorm``.

    Raises:
        ArgumentError: as `encode_questions`, before the model runs.
    """
    counts = {} if counts is None else counts
    encoded = {name: encode_questions(model, tokenizer, rows, config, name, counts) for name, rows in sets.items()}
    if holdout:
        counts["holdout"] = Counts(rows=len(holdout))
    held_out = encode_for(model, tokenizer, list(holdout), config, "holdout", counts.get("holdout"))
    for name, count in counts.items():
        if count.truncated:
            progress(f"{name}: {count.summary(config.max_length)}")

    def costly(sequences: list[Sequence], log: Columns, name: str) -> Columns:
        end = tokenizer.eos_token_id
        return costly_columns(model, sequences, log["avg_gt_loss"], attacks or CostlyAttacks(), name, end, config.backend)

    logs = {}
    for name, questions in encoded.items():
        answers = questions.answers
        progress(f"{name}: {len(answers)} questions")
        log = answer_columns(model, tokenizer, answers, config)
        if held_out and name == "forget":
            log |= costly(answers, log, name)
        texts = generate(model, tokenizer, answers, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens)
        truths = [example.content for example in questions.examples]
        log["generated_text"] = [[e.prompt, text, truth] for e, text, truth in zip(questions.examples, texts, truths)]
        log |= metrics.rouge_scores(truths, texts)
        log |= ratio_columns(model, questions, config, log)
        if name in metrics.OPTION_SETS:
            log["normalized_gt_loss"] = metrics.option_loss(log["avg_gt_loss"], log["average_perturb_loss"])
        logs[name] = by_row(log)
    if held_out:
        progress(f"holdout: {len(held_out)} texts")
        log = answer_columns(model, tokenizer, held_out, config)
        logs["holdout"] = by_row(log | costly(held_out, log, "holdout"))
    return logs


def retain_logs(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: list[Question],
    config: EvaluateConfig,
    holdout: collections.abc.Sequence[Example] = (),
) -> dict[str, Log]:
    """Return what is needed of a retain model: its log of the forget set with the columns of the truth ratio, for the forget
    quality; with a holdout set also the columns of answers on both sets, for the privacy leakage.
    """
    encoded = encode_questions(model, tokenizer, questions, config, "forget")
    if not holdout:
        return {"forget": by_row(ratio_columns(model, encoded, config))}
    held_out = encode_for(model, tokenizer, list(holdout), config, "holdout")
    log = answer_columns(model, tokenizer, encoded.answers, config)
    logs = {"forget": ratio_columns(model, encoded, config, log) | log}
    logs["holdout"] = answer_columns(model, tokenizer, held_out, config)
    return {name: by_row(log) for name, log in logs.items()}


def answer_losses(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: collections.abc.Sequence[Example],
    config: EvaluateConfig,
    name: str,
) -> torch.Tensor:
    """Return the mean losses of the answers of n examples, [n] fp64, as a reference model gives them.

    Raises:
        ArgumentError: as `soul.models.encoding.encode_for`; ``name`` is what it calls the examples.
    """
    sequences = encode_for(model, tokenizer, list(examples), config, name)
    statistics = sequence_statistics(model, sequences, batch_size=config.batch_size, backend=config.backend)
    return _losses(statistics, "gt")["avg_gt_loss"]


def by_row(columns: Columns) -> Log:
    """Return ``{column: {row: value}}`` of columns that are tensors or lists."""
    lists = {name: column.tolist() if isinstance(column, torch.Tensor) else column for name, column in columns.items()}
    return {name: {str(row): value for row, value in enumerate(column)} for name, column in lists.items()}


def answer_columns(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", sequences: list[Sequence], config: EvaluateConfig
) -> Columns:
    """Return the columns of answers, one value per sequence: losses as tensors, memorization and membership as lists."""
    statistics = sequence_statistics(model, sequences, batch_size=config.batch_size, backend=config.backend)
    log: Columns = _losses(statistics, "gt")
    scores: dict[str, list[float]] = {name: [] for name in (*metrics.MEMORIZATION, "zlib", *metrics.MEMBERSHIP)}
    for sequence, tokens, loss in zip(sequences, statistics, log["avg_gt_loss"].tolist()):
        count = without_end(sequence, tokenizer.eos_token_id).n_labels
        logps, _, hits, entropies, variances = (values[:count] for values in tokens)
        text = tokenizer.decode([label for label in sequence.labels if label != IGNORE_INDEX], skip_special_tokens=True)
        scores["zlib"].append(-loss / metrics.zlib_bytes(text))
        scores["exact_memorization"].append(metrics.exact_memorization(hits))
        scores["extraction_strength"].append(metrics.extraction_strength(hits))
        scores["min_k"].append(metrics.min_k(logps, config.min_k))
        normalized = metrics.normalized_logps(logps, entropies, variances)
        scores["min_k_plus_plus"].append(metrics.min_k(normalized, config.min_k))
    return log | scores


def ratio_columns(
    model: "PreTrainedModel", questions: EncodedQuestions, config: EvaluateConfig, log: Columns | None = None
) -> dict[str, torch.Tensor]:
    """Return the losses of paraphrased and perturbed answers, and the truth ratios.

    Args:
        model: a causal language model.
        questions: n of them, each with m false answers.
        config: batch size and backend.
        log: columns of the true answers from `answer_columns`, which serve where there are no paraphrases. None: the losses of
            the answers are computed again there.

    Returns:
        ``avg_paraphrased_loss``, ``paraphrased_loss``, ``num_token_paraphrased`` and ``truth_ratio``, [n];
        ``average_perturb_loss``, ``perturb_loss`` and ``num_token_perturb``, [n, m].
    """

    def losses(sequences: list[Sequence], name: str) -> dict[str, torch.Tensor]:
        statistics = sequence_statistics(model, sequences, batch_size=config.batch_size, backend=config.backend)
        return _losses(statistics, name)

    if questions.paraphrased is questions.answers and log is not None:
        columns = {
            "avg_paraphrased_loss": log["avg_gt_loss"],
            "paraphrased_loss": log["gt_loss"],
            "num_token_paraphrased": log["num_token_gt"],
        }
    else:
        columns = losses(questions.paraphrased, "paraphrased")
    flat = losses(questions.perturbed, "perturb")
    perturbed = {name: values.view(len(questions.answers), -1) for name, values in flat.items()}
    perturbed["average_perturb_loss"] = perturbed.pop("avg_perturb_loss")  # TOFU's name
    ratio = metrics.truth_ratio(columns["avg_paraphrased_loss"], perturbed["average_perturb_loss"])
    return columns | perturbed | {"truth_ratio": ratio}


def _losses(statistics: list[TokenStatistics], name: str) -> dict[str, torch.Tensor]:
    """Return mean and summed losses of sequences and their numbers of tokens, [n] each, under the names of TOFU's columns."""
    sums = -torch.stack([tokens.logps.sum() for tokens in statistics])
    counts = torch.tensor([len(tokens.logps) for tokens in statistics], device="cpu")
    return {f"avg_{name}_loss": sums / counts, f"{name}_loss": sums, f"num_token_{name}": counts}


def _batches(items: list[T], size: int) -> list[list[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def sequence_statistics(
    model: "PreTrainedModel", sequences: list[Sequence], *, batch_size: int = 32, backend: str = "auto"
) -> list[TokenStatistics]:
    """Return the statistics of the n labelled tokens of every sequence, [n] fp64 on the CPU.

    The model runs in evaluation mode, and gets its mode back afterwards. The longest sequences go first, in batches of
    similar length; the results are in the order of ``sequences``.

    Args:
        model: a causal language model.
        sequences: from `soul.data.encode`.
        batch_size: sequences per batch.
        backend: "auto", "triton", "compile", "torch" or "reference".
    """
    device = device_of(model)
    statistics: dict[int, TokenStatistics] = {}
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].input_ids))
    with evaluating(model):
        for indices in track(_batches(order, batch_size), "evaluate"):
            batch = collate([sequences[i] for i in indices], [], device=device)
            rows = batch.token_indices.to(device)
            packed = torch.stack([values.view(-1).index_select(0, rows) for values in token_statistics(model, batch, backend)])
            counts = [sequences[i].n_labels for i in indices]
            for i, values in zip(indices, packed.cpu().double().split(counts, 1)):
                statistics[i] = TokenStatistics(*values)
    return [statistics[i] for i in range(len(sequences))]


def answer_probability(
    model: "PreTrainedModel", sequences: list[Sequence], *, batch_size: int = 32, backend: str = "auto"
) -> float:
    """Return the mean over sequences of their `answer_probabilities`."""
    return answer_probabilities(model, sequences, batch_size=batch_size, backend=backend).mean().item()


def answer_probabilities(
    model: "PreTrainedModel", sequences: list[Sequence], *, batch_size: int = 32, backend: str = "auto"
) -> torch.Tensor:
    """Return `metrics.probability` of n sequences, the length-normalised probability of TOFU (arXiv 2401.06121), [n] fp64.

    Args:
        model: a causal language model; it is left as it was.
        sequences: from `soul.data.encode`.
        batch_size: sequences per batch.
        backend: "auto", "triton", "compile", "torch" or "reference".
    """
    statistics = sequence_statistics(model, sequences, batch_size=batch_size, backend=backend)
    return metrics.probability(_losses(statistics, "gt")["avg_gt_loss"])


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sequences: list[Sequence],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 96,
    go_on: Callable[..., torch.Tensor] = greedy,
) -> list[str]:
    """Return a model's answers to the prompts of encoded examples.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        sequences: from `soul.data.encode`; only their prompts are read.
        batch_size: prompts per batch, those of similar length together.
        max_new_tokens: tokens of an answer, at most.
        go_on: continues prompts: `soul.models.causal_lm.greedy`, or another function of its arguments.

    Raises:
        ArgumentError: a sequence has no prompt.
    """
    device = device_of(model)
    texts = [""] * len(sequences)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0  # pads answers that have ended
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].prompt_length)
    for indices in track(_batches(order, batch_size), "generate answers"):
        prompts = [sequences[i].input_ids[: sequences[i].prompt_length] for i in indices]
        width = max(len(p) for p in prompts)
        if not all(prompts):
            raise argument_error("sequences", "prompts to answer", "a row without one", "ROUGE needs questions and answers")
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # generation pads on the left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        with evaluating(model), autocast(model):
            out = go_on(model, ids, mask, max_new_tokens=max_new_tokens, pad_token_id=end)
        for i, text in zip(indices, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)):
            texts[i] = text
    return texts


def kl_divergence(
    model: "PreTrainedModel",
    other: "PreTrainedModel",
    sequences: list[Sequence],
    *,
    batch_size: int = 32,
    backend: str = "auto",
) -> float:
    """Return the distance to another model: the mean over answer tokens of ``KL(other || model)`` in nats, 0 if they agree.

    Args:
        model: a causal language model.
        other: another one, with the same vocabulary.
        sequences: from `soul.data.encode`.
        batch_size: sequences per batch.
        backend: "auto", "triton", "compile", "torch" or "reference".

    Raises:
        ArgumentError: the two models do not scale and cap their logits alike.
    """
    if transform(other) != transform(model):
        remedy = "compare models of one family"
        raise argument_error("other", f"logits with {transform(model)}", transform(other), remedy)
    ref_weight, ref_bias = head(other)
    device = device_of(model)
    total = 0.0
    count = 0
    with evaluating(model), evaluating(other), autocast(model):
        for sequences_of_batch in track(_batches(sequences, batch_size), "compare"):
            batch = collate(sequences_of_batch, [], device=device)
            reference = Reference(hidden_states(other, batch), ref_weight, ref_bias)
            options = LinearOptions(token_indices=batch.token_indices, backend=backend)
            values = linear_kl(hidden_states(model, batch), lm_head(model), batch.labels, reference, options=options)
            total += values.sum().item()
            count += len(batch.token_indices)
    return total / count
