"""Unlearn in a training loop of your own: fused loss from hidden states, second-order optimizer.

python examples/own_loop.py --model DIR --forget FILE --retain FILE --output DIR
"""

import argparse
import itertools
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import soul
from soul_kernels import linear_objective

parser = argparse.ArgumentParser(description="Make a model forget the answers in one file and keep those in another.")
parser.add_argument("--model", default="out/demo/seed0/full", help="directory or hub name (default: what `soul demo` leaves)")
parser.add_argument("--forget", default="out/demo/forget.jsonl", help="JSON lines with question and answer")
parser.add_argument("--retain", default="out/demo/retain.jsonl", help="the same")
parser.add_argument("--output", default="out/own_loop", help="where to save the model")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).train()
tokenizer = AutoTokenizer.from_pretrained(args.model)
body, head = model.base_model, model.get_output_embeddings()


def read(path):
    """Yield token ids and labels of every row. The question has no label (-100): only the answer is forgotten or kept."""
    for row in map(json.loads, open(path, encoding="utf-8")):
        question = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        answer = tokenizer(f" {row['answer']}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        yield torch.tensor(question + answer), torch.tensor([-100] * len(question) + answer)


forget, retain = (itertools.cycle(list(read(path))) for path in (args.forget, args.retain))
is_forget = torch.arange(8) < 4  # a batch has 4 sequences to forget, then 4 to retain
optimizer = soul.SOUL(model.parameters(), lr=1e-4, max_grad_norm=1.0)
objective = soul.losses.GradDiff(gamma=1.0, alpha=2.0)  # -CE of the forget tokens + 2 CE of the retain tokens

for step in range(args.steps):
    ids, labels = zip(*[next(forget) for _ in range(4)], *[next(retain) for _ in range(4)])
    lengths = torch.tensor([len(sequence) for sequence in ids])
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).to(device)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)
    hidden = body(input_ids=ids, attention_mask=mask).last_hidden_state
    # The hidden state at t predicts the token at t + 1. Logits of the whole batch never exist. For a model that scales or caps
    # its logits (Cohere, Granite, Gemma 2) pass soul_kernels.Head in place of weight and bias; soul.unlearning_loss does so.
    loss = linear_objective(hidden[:, :-1], head.weight, labels[:, 1:], objective, bias=head.bias, is_forget=is_forget)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}, clipped {optimizer.clip_fraction()[0]:.2f}")

model.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
