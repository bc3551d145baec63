"""Teach a model with TRL's SFTTrainer, its data handling, a fused loss and SOUL's optimizer.

python examples/trl_sft.py --model DIR --retain FILE --output DIR
"""

import json

import transformers
import trl
from common import compare, load, options
from datasets import Dataset

import soul
from soul.integrations.hf import SOULTrainerMixin


class FusedSFTTrainer(SOULTrainerMixin, trl.SFTTrainer):
    """TRL's trainer with SOUL's optimizer, without TRL's metrics of logits, which a patched model does not make."""

    def compute_loss(self, *args, **kwargs):
        """Return the loss of the model."""
        return transformers.Trainer.compute_loss(self, *args, **kwargs)


args = options("Teach a model with TRL's SFTTrainer.", "out/trl_sft").parse_args()
model, tokenizer, _, _ = load(args)
with open(args.retain, encoding="utf-8") as lines:
    rows = [json.loads(line) for line in lines]
pairs = [{"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"} for row in rows]
training = trl.SFTConfig(
    args.output,
    max_steps=args.steps,
    per_device_train_batch_size=4,
    learning_rate=1e-4,
    max_grad_norm=0,  # the step clips
    logging_steps=5,
    report_to="none",
    bf16=False,
)
trainer = FusedSFTTrainer(
    model, training, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, soul_args={"max_grad_norm": 1.0}
)
soul.patch(model)  # after the trainer is made, which gives the model a forward of TRL's
batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
fused = lambda: trainer.compute_loss(model, dict(batch)).backward()  # noqa: E731
plain = lambda: trl.SFTTrainer.compute_loss(trainer, model.forward.plain, dict(batch)).backward()  # noqa: E731  TRL's own way
compare("loss and gradients", fused, plain, model.zero_grad)
trainer.train()
soul.unpatch(model)
trainer.save_model()
