"""What a model still knows: answer probability, ROUGE-L recall, and distance to a model that never saw the data."""

import torch

from soul._extras import require
from soul.data import collate
from soul.models import autocast, head, hidden_states, token_logps, transform
from soul_kernels import linear_kl
from soul_kernels._checks import argument_error


def _batches(sequences, size):
    return [sequences[i : i + size] for i in range(0, len(sequences), size)]


@torch.no_grad()
def answer_probability(model, sequences, *, batch_size=32, backend="auto"):
    """Mean over sequences of ``exp(mean_t logp_t)``, the length-normalised probability of TOFU (arXiv 2401.06121)."""
    model.eval()
    device, total = next(model.parameters()).device, 0.0
    for part in _batches(sequences, batch_size):
        batch = collate(part, [], device=device)
        counts = (batch.labels >= 0).sum(1)
        total += (token_logps(model, batch, backend).sum(1) / counts).exp().sum().item()
    return total / len(sequences)


@torch.no_grad()
def rouge_l_recall(model, tokenizer, examples, sequences, *, batch_size=32, max_new_tokens=96):
    """Mean ROUGE-L recall of the greedy answer to each prompt against the true answer, with stemming, as in TOFU.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        examples: list of `soul.data.Example`, for the true answers.
        sequences: the same, encoded, for the prompts.
        batch_size: prompts a batch.
        max_new_tokens: where an answer is cut off.
    """
    scorer = require("rouge_score.rouge_scorer", "eval").RougeScorer(["rougeL"], use_stemmer=True)
    model.eval()
    device, scores = next(model.parameters()).device, []
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0  # fills up answers that have ended
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].prompt_length)
    for part in _batches(order, batch_size):
        prompts = [sequences[i].input_ids[: sequences[i].prompt_length] for i in part]
        width = max(len(p) for p in prompts)
        if not all(prompts):
            raise argument_error("sequences", "prompts to answer", "a row without one", "ROUGE needs questions and answers")
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # generation pads on the left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        with autocast(model):
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=end
            )
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        scores += [scorer.score(examples[i].answer, text)["rougeL"].recall for i, text in zip(part, texts)]
    return sum(scores) / len(scores)


@torch.no_grad()
def kl_divergence(model, other, sequences, *, batch_size=32, backend="auto"):
    """Distance to another model: mean over answer tokens of ``KL(other || model)`` in nats; 0 where they agree.

    Raises:
        ArgumentError: the two models do not scale and cap their logits alike.
    """
    model.eval()
    other.eval()
    if transform(other) != transform(model):
        remedy = "compare models of one family"
        raise argument_error("other", f"logits with {transform(model)}", transform(other), remedy)
    (weight, bias), (ref_weight, ref_bias) = head(model), head(other)
    device, total, count = next(model.parameters()).device, 0.0, 0
    for part in _batches(sequences, batch_size):
        batch = collate(part, [], device=device)
        with autocast(model):
            values = linear_kl(
                hidden_states(model, batch), weight, batch.labels, hidden_states(other, batch), ref_weight=ref_weight,
                bias=bias, ref_bias=ref_bias, rows=batch.rows, backend=backend, **transform(model),
            )  # fmt: skip
        total += values.sum().item()
        count += len(batch.rows)
    return total / count


def evaluate(model, tokenizer, sets, *, retain_model=None, generate=100, backend="auto"):
    """The table of a study for one model.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        sets: name -> (list of `soul.data.Example`, the same encoded), with the names "forget" and "retain".
        retain_model: a model trained without the forget set, or None.
        generate: rows of each set to generate answers for (from its start); generation is the slow part.
        backend: of the probabilities and the distance.

    Returns:
        ``forget_prob``, ``retain_prob``, ``forget_rouge``, ``retain_rouge`` in [0, 1] and, with a retain model,
        ``forget_kl`` and ``retain_kl``, the distance to it on each set, in nats a token.
    """
    result = {}
    for name, (examples, sequences) in sets.items():
        result[f"{name}_prob"] = answer_probability(model, sequences, backend=backend)
        result[f"{name}_rouge"] = rouge_l_recall(model, tokenizer, examples[:generate], sequences[:generate])
        if retain_model is not None:
            result[f"{name}_kl"] = kl_divergence(model, retain_model, sequences, backend=backend)
    return result
