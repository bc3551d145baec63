"""Unlearn with LoRA adapters: the model stays frozen, and without adapters it is the reference model, if the method needs one.

python examples/lora.py --model DIR --forget FILE --retain FILE --output DIR
"""

import argparse

import soul

parser = argparse.ArgumentParser(description="Make a model forget one file and keep another, by LoRA adapters.")
parser.add_argument("--model", default="out/demo/seed0/full", help="directory or hub name (default: what `soul demo` leaves)")
parser.add_argument("--forget", default="out/demo/forget.jsonl", help="JSON lines with question and answer")
parser.add_argument("--retain", default="out/demo/retain.jsonl", help="the same")
parser.add_argument("--output", default="out/lora", help="new or empty directory for the adapters")
parser.add_argument("--rank", type=int, default=16, help="rank of the adapters (default: %(default)s)")
parser.add_argument("--merge", action="store_true", help="add the adapters to the weights, and save a plain model")
args = parser.parse_args()

# NPO compares with the model before unlearning. That is this model with its adapters switched off: no second one is loaded.
config = soul.UnlearnConfig(
    method="npo",
    method_options={"beta": 0.1, "alpha": 1.0},
    lr=1e-3,  # adapters start at zero and take larger steps than weights do
    epochs=5,
    batch_size=4,
)
unlearner = soul.Unlearner(args.model, args.forget, args.retain, config, adapters={"rank": args.rank})

trained = sum(p.numel() for p in unlearner.model.parameters() if p.requires_grad)
total = sum(p.numel() for p in unlearner.model.parameters())
print(f"training {trained:,} of {total:,} parameters")

before = unlearner.forget_probability()
records = unlearner.run(args.output, merge=args.merge)
after = unlearner.forget_probability()
print(f"probability of the answers to forget: {before:.4f} before, {after:.4f} after {len(records)} steps")
print(f"clipped fraction of the last step: {records[-1]['clip_fraction']:.2f}")
