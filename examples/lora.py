"""Unlearn with LoRA adapters: the model stays frozen, and without adapters it is the reference model, if the method needs one.

python examples/lora.py --model DIR --forget FILE --retain FILE --output DIR
"""

import copy
import functools

from common import collate, compare, load, options

import soul

parser = options("Make a model forget one file and keep another, by LoRA adapters.", "out/lora", steps=None)
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

# One step of each kind. The plain way trains all weights, and keeps a copy of the model as the reference model.
whole, _, forget_rows, retain_rows = load(args)
whole.to(unlearner.model.dtype)
copied = functools.cache(lambda: copy.deepcopy(whole))
batch = {"forget": collate(forget_rows[:4], whole.device), "retain": collate(retain_rows[:4], whole.device)}


def take_step(model, optimizer, ref_model=lambda: None):
    """Take a step that moves nothing, lr being 0."""
    soul.unlearning_loss(model, batch, config.objective(), ref_model=ref_model()).backward()
    optimizer.step()
    optimizer.zero_grad()


small = soul.SOUL([p for p in unlearner.model.parameters() if p.requires_grad], lr=0.0)
large = soul.SOUL(whole.parameters(), lr=0.0)
compare("a step", lambda: take_step(unlearner.model, small), lambda: take_step(whole, large, copied))

before = unlearner.forget_probability()
records = unlearner.run(args.output, merge=args.merge)
after = unlearner.forget_probability()
print(f"probability of the answers to forget: {before:.4f} before, {after:.4f} after {len(records)} steps")
print(f"clipped fraction of the last step: {records[-1]['clip_fraction']:.2f}")
