"""What a model still knows: TOFU's metrics and logs, and its distance to a model that never saw the data.

Formulas are in `soul.evaluate.metrics`. Here models are run, over statistics of tokens (`soul_kernels.linear_statistics`) and
not over logits.
"""

import dataclasses

import torch

from soul.data.batches import collate
from soul.data.examples import Counts
from soul.data.templates import Template, check_template
from soul.evaluate import metrics
from soul.models.causal_lm import autocast, evaluating, head, hidden_states, token_statistics, transform
from soul.models.encoding import encode_for
from soul_kernels import TokenStatistics, linear_kl
from soul_kernels.backends import BACKENDS
from soul_kernels.errors import argument_error, check_choice, check_whole
from soul_kernels.tokens import IGNORE_INDEX


@dataclasses.dataclass
class EvaluateConfig:
    """How TOFU's questions are asked.

    Attributes:
        template: "plain", "chat" or a text: how question and answer are put into one (`soul.data.templates.Template`), as in
            training.
        system: system message of the chat template, or None.
        max_length: tokens of a sequence; longer ones are cut.
        max_new_tokens: where a generated answer is cut off. TOFU: 200 tokens, the prompt among them; open-unlearning: 200.
        batch_size: sequences a batch.
        min_k: which part of an answer's tokens Min-K% and Min-K%++ look at.
        backend: "auto", "triton", "compile", "torch" or "reference".
    """

    template: str = "plain"
    system: str | None = None
    max_length: int = 512
    max_new_tokens: int = 200
    batch_size: int = 32
    min_k: float = metrics.MIN_K
    backend: str = "auto"
    long_texts = "truncate"  # no option: a log has a number for every row

    def __post_init__(self):
        check_template(self.template, self.system)
        check_choice("backend", self.backend, BACKENDS)
        metrics.check_part(self.min_k)
        for name in ("max_length", "max_new_tokens", "batch_size"):
            check_whole(name, getattr(self, name), "check the options")


@dataclasses.dataclass(frozen=True)
class Asked:
    """The questions of one set, encoded; lists of `soul.data.Sequence`, and ``examples`` for the true answers.

    ``paraphrased`` is the list ``answers`` itself where there are no paraphrases; ``perturbed`` has the m false answers of a
    question one after the other.
    """

    examples: list
    answers: list
    paraphrased: list
    perturbed: list


def encode_questions(model, tokenizer, questions, config, name, counts=None):
    """`Asked` of a list of `soul.data.Question`; ``counts``, a dict, gets a `soul.data.Counts` for every kind of answer.

    Raises:
        ArgumentError: a sequence or the answer to be generated does not fit the model, as `soul.models.encoding.encode_for`.
    """
    template, counts = Template(config.template, tokenizer, config.system), {} if counts is None else counts

    def encoded(pairs, kind):
        label = f"{name}, {kind}"
        examples = [template.ask(*pair, f"{label}, row {index}") for index, pair in enumerate(pairs)]
        counts[label] = Counts(rows=len(examples))
        return examples, encode_for(model, tokenizer, examples, config, label, counts[label])

    examples, answers = encoded([(q.question, q.answer) for q in questions], "answer")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(sequence.prompt_length for sequence in answers)
    if positions and longest + config.max_new_tokens > positions:
        got = f"{config.max_new_tokens} after a prompt of {longest}"
        remedy = f"pass --max-new-tokens {max(1, positions - longest)}"
        raise argument_error("max_new_tokens", f"at most {positions} positions", got, remedy)
    paraphrased = answers
    if any(q.paraphrased != q.answer for q in questions):
        paraphrased = encoded([(q.question, q.paraphrased) for q in questions], "paraphrased_answer")[1]
    perturbed = encoded([(q.question, false) for q in questions for false in q.perturbed], "perturbed_answer")[1]
    return Asked(examples, answers, paraphrased, perturbed)


def tofu_logs(model, tokenizer, sets, config, *, holdout=(), progress=print, counts=None):
    """Runs a model over TOFU's sets.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        sets: "forget", "retain", "real_authors", "world_facts" -> list of `soul.data.Question`.
        config: `EvaluateConfig`.
        holdout: list of `soul.data.Example` that the model was never trained on, for the membership metrics.
        progress: called with a line of text for every set, and for what was cut.
        counts: a dict that gets a `soul.data.Counts` for every set and kind of answer; or None.

    Returns:
        Set -> log, in the layout of TOFU's files (`soul.evaluate.logs`), with columns of its own beside TOFU's:
        ``exact_memorization``, ``extraction_strength``, ``min_k``, ``min_k_plus_plus``.

    Raises:
        ArgumentError: as `encode_questions`, before the model runs.
    """
    counts = {} if counts is None else counts
    asked = {name: encode_questions(model, tokenizer, part, config, name, counts) for name, part in sets.items()}
    if holdout:
        counts["holdout"] = Counts(rows=len(holdout))
    held_out = encode_for(model, tokenizer, holdout, config, "holdout", counts.get("holdout"))
    for name, count in counts.items():
        if count.truncated:
            progress(f"{name}: {count.summary(config.max_length)}")
    logs = {}
    for name, of in asked.items():
        progress(f"{name}: {len(of.answers)} questions")
        log = answer_columns(model, tokenizer, of.answers, config)
        texts = generate(model, tokenizer, of.answers, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens)
        truths = [example.content for example in of.examples]
        log["generated_text"] = [[e.prompt, text, truth] for e, text, truth in zip(of.examples, texts, truths)]
        log |= metrics.rouge_recall(truths, texts)
        log |= ratio_columns(model, of, config, log)
        if name in metrics.OPTION_SETS:
            log["normalized_gt_loss"] = metrics.option_loss(log["avg_gt_loss"], log["average_perturb_loss"])
        logs[name] = _by_row(log)
    if held_out:
        progress(f"holdout: {len(held_out)} texts")
        logs["holdout"] = _by_row(answer_columns(model, tokenizer, held_out, config))
    return logs


def retain_log(model, tokenizer, questions, config):
    """The part of a retain model's forget log that forget quality needs: the columns of the truth ratio."""
    asked = encode_questions(model, tokenizer, questions, config, "forget")
    return _by_row(ratio_columns(model, asked, config))


def _by_row(log):
    """``{column: {row: value}}`` of columns that are tensors or lists."""
    lists = {name: column.tolist() if isinstance(column, torch.Tensor) else column for name, column in log.items()}
    return {name: {str(row): value for row, value in enumerate(column)} for name, column in lists.items()}


def answer_columns(model, tokenizer, sequences, config):
    """Columns of answers: losses, and what is remembered of them, token by token; tensors and lists of one value a sequence."""
    found = sequence_statistics(model, sequences, batch_size=config.batch_size, backend=config.backend)
    log = _losses(found, "gt")
    memory = {name: [] for name in (*metrics.MEMORIZATION, *metrics.MEMBERSHIP)}
    for sequence, statistics in zip(sequences, found):
        logps, _, hits, entropies, variances = _without_end(statistics, sequence, tokenizer.eos_token_id)
        memory["exact_memorization"].append(metrics.exact_memorization(hits))
        memory["extraction_strength"].append(metrics.extraction_strength(hits))
        memory["min_k"].append(metrics.min_k(logps, config.min_k))
        normalized = metrics.normalized_logps(logps, entropies, variances)
        memory["min_k_plus_plus"].append(metrics.min_k(normalized, config.min_k))
    return log | memory


def ratio_columns(model, asked, config, log=None):
    """Losses of paraphrased and perturbed answers; those of the answers in ``log`` serve where there is no paraphrase."""
    options = dict(batch_size=config.batch_size, backend=config.backend)
    if asked.paraphrased is asked.answers and log is not None:
        columns = {f"{before}paraphrased{after}": log[f"{before}gt{after}"]
                   for before, after in (("avg_", "_loss"), ("", "_loss"), ("num_token_", ""))}  # fmt: skip
    else:
        columns = _losses(sequence_statistics(model, asked.paraphrased, **options), "paraphrased")
    flat = _losses(sequence_statistics(model, asked.perturbed, **options), "perturb")
    perturbed = {name: values.view(len(asked.answers), -1) for name, values in flat.items()}
    perturbed["average_perturb_loss"] = perturbed.pop("avg_perturb_loss")  # TOFU's name
    ratio = metrics.truth_ratio(columns["avg_paraphrased_loss"], perturbed["average_perturb_loss"])
    return columns | perturbed | {"truth_ratio": ratio}


def _losses(found, name):
    sums = -torch.stack([statistics.logps.sum() for statistics in found])
    counts = torch.tensor([len(statistics.logps) for statistics in found], device="cpu")
    return {f"avg_{name}_loss": sums / counts, f"{name}_loss": sums, f"num_token_{name}": counts}


def _without_end(statistics, sequence, end):
    """Statistics of a sequence without those of the token that ends it, unless there is no other."""
    labels = [label for label in sequence.labels if label != IGNORE_INDEX]
    count = len(labels) - (labels[-1] == end and len(labels) > 1)
    return TokenStatistics(*(values[:count] for values in statistics))


def _batches(sequences, size):
    return [sequences[i : i + size] for i in range(0, len(sequences), size)]


def sequence_statistics(model, sequences, *, batch_size=32, backend="auto"):
    """Statistics of the labelled tokens of every sequence: a list of `soul_kernels.TokenStatistics`, [n] fp64 on the CPU.

    The longest go first, in batches of like length.
    """
    device, found = next(model.parameters()).device, [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].input_ids))
    with evaluating(model):
        for part in _batches(order, batch_size):
            batch = collate([sequences[i] for i in part], [], device=device)
            rows = batch.token_indices.to(device)
            packed = torch.stack([values.view(-1).index_select(0, rows) for values in token_statistics(model, batch, backend)])
            counts = [sequences[i].n_labels for i in part]
            for i, piece in zip(part, packed.cpu().double().split(counts, 1)):
                found[i] = TokenStatistics(*piece)
    return found


def answer_probability(model, sequences, *, batch_size=32, backend="auto"):
    """Return the mean over sequences of `metrics.probability`, the length-normalised probability of TOFU (arXiv 2401.06121)."""
    found = sequence_statistics(model, sequences, batch_size=batch_size, backend=backend)
    return metrics.probability(_losses(found, "gt")["avg_gt_loss"]).mean().item()


def generate(model, tokenizer, sequences, *, batch_size=32, max_new_tokens=96):
    """The greedy answers to the prompts of encoded examples, a list of texts.

    Raises:
        ArgumentError: a sequence has no prompt.
    """
    device, texts = next(model.parameters()).device, [None] * len(sequences)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0  # fills up answers that have ended
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].prompt_length)
    for part in _batches(order, batch_size):
        prompts = [sequences[i].input_ids[: sequences[i].prompt_length] for i in part]
        width = max(len(p) for p in prompts)
        if not all(prompts):
            raise argument_error("sequences", "prompts to answer", "a row without one", "ROUGE needs questions and answers")
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # generation pads on the left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        with evaluating(model), autocast(model):
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=end
            )
        for i, text in zip(part, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)):
            texts[i] = text
    return texts


def kl_divergence(model, other, sequences, *, batch_size=32, backend="auto"):
    """Distance to another model: mean over answer tokens of ``KL(other || model)`` in nats; 0 where they agree.

    Raises:
        ArgumentError: the two models do not scale and cap their logits alike.
    """
    if transform(other) != transform(model):
        remedy = "compare models of one family"
        raise argument_error("other", f"logits with {transform(model)}", transform(other), remedy)
    (weight, bias), (ref_weight, ref_bias) = head(model), head(other)
    device, total, count = next(model.parameters()).device, 0.0, 0
    with evaluating(model), evaluating(other), autocast(model):
        for part in _batches(sequences, batch_size):
            batch = collate(part, [], device=device)
            values = linear_kl(
                hidden_states(model, batch), weight, batch.labels, hidden_states(other, batch), ref_weight=ref_weight,
                bias=bias, ref_bias=ref_bias, rows=batch.token_indices, backend=backend, **transform(model),
            )  # fmt: skip
            total += values.sum().item()
            count += len(batch.token_indices)
    return total / count
