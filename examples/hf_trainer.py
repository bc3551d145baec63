"""Unlearn with the Hugging Face Trainer as it is: one call gives the model a fused loss, and one argument SOUL's optimizer.

python examples/hf_trainer.py --model DIR --forget FILE --retain FILE --output DIR
"""

import itertools

from common import collate_pairs, compare_patched, load, options
from transformers import Trainer, TrainingArguments

import soul
from soul.integrations.hf import optimizer_of

args = options("Unlearn with the Hugging Face Trainer.", "out/hf_trainer").parse_args()
model, tokenizer, forget, retain = load(args)
objective = soul.losses.GradDiff(gamma=1.0, alpha=2.0)  # -CE of the forget tokens + 2 CE of the retain tokens
soul.patch(model, objective)
pairs = list(zip(forget, itertools.cycle(retain)))
training = TrainingArguments(
    args.output,
    max_steps=args.steps,
    per_device_train_batch_size=4,
    learning_rate=1e-4,
    max_grad_norm=0,  # the step clips
    remove_unused_columns=False,  # the rows are pairs, which the collator makes inputs of the model
    logging_steps=5,
    report_to="none",
)
trainer = Trainer(
    model,
    training,
    train_dataset=pairs,
    data_collator=collate_pairs,
    optimizer_cls_and_kwargs=optimizer_of({"max_grad_norm": 1.0}, training),  # soul.SOUL, with the lr of the arguments
)
trainer.train()
soul.unpatch(model)
trainer.save_model()
tokenizer.save_pretrained(args.output)
compare_patched(model, objective, pairs[:4])
