"""What a model still knows: answer probability, ROUGE-L recall, and distance to a model that never saw the data."""

import torch

from soul._extras import require
from soul.data import collate
from soul.models import autocast, head, hidden_states, token_logps
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
def kl_divergence(model, other, sequences, *, batch_size=32):
    """Distance to another model: mean over answer tokens of ``KL(other || model)`` in nats; 0 where they agree.

    Summed as ``q (d + expm1(-d))`` with ``d = log q - log p``, which is never negative; where q is vanishing against p, so
    that ``expm1(-d)`` would overflow, as ``q (d - 1) + p``, which is the same.
    """
    device, total, count = next(model.parameters()).device, 0.0, 0
    for part in _batches(sequences, batch_size):
        batch = collate(part, [], device=device)
        log_p, log_q = (_log_softmax(m, batch) for m in (model, other))
        d, p, q = log_q - log_p, log_p.exp(), log_q.exp()
        total += torch.where(d > -20, q * (d + torch.expm1(-d)), q * (d - 1) + p).sum().item()
        count += len(batch.rows)
    return total / count


def _log_softmax(model, batch):
    """Log p over the vocabulary at the kept tokens, [R, V] fp32."""
    model.eval()
    weight, bias = head(model)
    with autocast(model):
        hidden = hidden_states(model, batch)
    kept = hidden.flatten(0, 1)[batch.rows.to(hidden.device)].float()
    return torch.nn.functional.linear(kept, weight.float(), None if bias is None else bias.float()).log_softmax(-1)


def evaluate(model, tokenizer, sets, *, retain_model=None, generate=100, backend="auto"):
    """The table of a study for one model.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        sets: name -> (list of `soul.data.Example`, the same encoded), with the names "forget" and "retain".
        retain_model: a model trained without the forget set, or None.
        generate: rows of each set to generate answers for (from its start); generation is the slow part.
        backend: of the probabilities.

    Returns:
        ``forget_prob``, ``retain_prob``, ``forget_rouge``, ``retain_rouge`` in [0, 1] and, with a retain model,
        ``forget_kl`` and ``retain_kl``, the distance to it on each set, in nats a token.
    """
    result = {}
    for name, (examples, sequences) in sets.items():
        result[f"{name}_prob"] = answer_probability(model, sequences, backend=backend)
        result[f"{name}_rouge"] = rouge_l_recall(model, tokenizer, examples[:generate], sequences[:generate])
        if retain_model is not None:
            result[f"{name}_kl"] = kl_divergence(model, retain_model, sequences)
    return result
