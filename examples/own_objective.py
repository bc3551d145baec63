"""Unlearn with an objective of your own: a function of log-probabilities, whose kernels and gradients come by themselves.

python examples/own_objective.py --model DIR --forget FILE --retain FILE --output DIR
"""

import itertools
import math

import torch
from common import collate, compare, load, options

import soul
from soul_kernels import TokenBatch


class DownToGuess(soul.losses.Objective):
    """Gradient ascent that ends at a guess: ``mean over F of max(log p + log V, 0) + alpha CE(retain)``, V tokens in all."""

    additive = "tokens"  # a sum over tokens, divided by a count of the whole batch: so it can be computed chunk by chunk

    def __init__(self, vocab_size, alpha=1.0):
        super().__init__(alpha=alpha)
        self.log_vocab = math.log(vocab_size)

    def forget(self, logps, batch):
        """Return the forget term; the base class adds the retain term."""
        counted = batch.mask & batch.is_forget[:, None]
        return torch.where(counted, (logps + self.log_vocab).clamp(min=0), 0.0).sum() / batch.n_forget_tokens


def plain_loss():
    """Return the same objective from the logits of all tokens, by autograd."""
    inputs = collate(rows, model.device)
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs).logits[:, :-1].float()
    logps = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where the label is -100
    return objective(logps, TokenBatch.from_labels(labels, torch.arange(8) < 4))


args = options("Unlearn with an objective of your own.", "out/own_objective").parse_args()
model, tokenizer, *sides = load(args)
forget, retain = map(itertools.cycle, sides)
objective = DownToGuess(model.config.vocab_size, alpha=2.0)
optimizer = soul.SOUL(model.parameters(), lr=1e-4, max_grad_norm=1.0)
for step in range(args.steps):
    rows = [next(side) for side in 4 * [forget] + 4 * [retain]]
    batch = {"forget": collate(rows[:4], model.device), "retain": collate(rows[4:], model.device)}
    loss = soul.unlearning_loss(model, batch, objective)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}")

fused = lambda: soul.unlearning_loss(model, batch, objective).backward()  # noqa: E731
compare("loss and gradients", fused, lambda: plain_loss().backward(), model.zero_grad)
model.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
