"""Unlearn in a training loop of your own: fused loss from hidden states, second-order optimizer.

python examples/own_loop.py --model DIR --forget FILE --retain FILE --output DIR
"""

import itertools

import torch
from common import compare, load, options

import soul
from soul_kernels import linear_objective

args = options("Make a model forget the answers in one file and keep those in another.", "out/own_loop").parse_args()
model, tokenizer, *sides = load(args)
body, head = model.base_model, model.get_output_embeddings()
forget, retain = map(itertools.cycle, sides)
is_forget = torch.arange(8) < 4  # a batch has 4 sequences to forget, then 4 to retain
optimizer = soul.SOUL(model.parameters(), lr=1e-4, max_grad_norm=1.0)
objective = soul.losses.GradDiff(gamma=1.0, alpha=2.0)  # -CE of the forget tokens + 2 CE of the retain tokens


def padded(rows, name, value):
    """Return one entry of the rows as a tensor, [B, T]."""
    tensors = [torch.tensor(row[name]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value).to(model.device)


def fused_loss():
    """Return the loss from hidden states. The one at t predicts the token at t + 1."""
    hidden = body(input_ids=ids, attention_mask=mask).last_hidden_state
    # Logits of the whole batch never exist. For a model that scales or caps its logits (Cohere, Granite, Gemma 2) pass
    # soul_kernels.Head in place of weight and bias; soul.unlearning_loss does so.
    return linear_objective(hidden[:, :-1], head.weight, labels[:, 1:], objective, bias=head.bias, is_forget=is_forget)


def plain_loss():
    """Return the same loss from the logits of all tokens."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    forget_loss, retain_loss = (torch.nn.functional.cross_entropy(logits[side].flatten(0, 1), labels[side, 1:].flatten())
                                for side in (slice(4), slice(4, None)))  # fmt: skip
    return 2 * retain_loss - forget_loss


for step in range(args.steps):
    rows = [next(side) for side in 4 * [forget] + 4 * [retain]]
    ids, labels = padded(rows, "input_ids", 0), padded(rows, "labels", -100)
    mask = padded([{"mask": [1] * len(row["input_ids"])} for row in rows], "mask", 0)
    loss = fused_loss()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}, clipped {optimizer.clip_fraction()[0]:.2f}")

compare("loss and gradients", lambda: fused_loss().backward(), lambda: plain_loss().backward(), model.zero_grad)
model.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
