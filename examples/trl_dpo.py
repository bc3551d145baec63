"""Unlearn by preference with TRL's DPOTrainer: its data and its reference model, with a fused loss and SOUL's optimizer.

python examples/trl_dpo.py --model DIR --forget FILE --output DIR
"""

import copy
import json

import trl
from common import compare, load, options
from datasets import Dataset

import soul
from soul.integrations.hf import SOULTrainerMixin


class FusedDPOTrainer(SOULTrainerMixin, trl.DPOTrainer):
    """TRL's trainer with SOUL's optimizer, and with DPO's loss from hidden states, of the model and of the reference model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return TRL's loss. The first half of its batch has the chosen answers, the second half the rejected ones."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        columns = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
        chosen, rejected = ({name: value.chunk(2)[half] for name, value in columns.items()} for half in (0, 1))
        batch = {"forget": {"original": rejected, "alternate": chosen}}
        objective = soul.losses.DPO(beta=self.args.beta, factor="1", alpha=0.0)
        return soul.unlearning_loss(model, batch, objective, ref_model=self.ref_model, return_outputs=return_outputs)


args = options("Unlearn with TRL's DPOTrainer.", "out/trl_dpo").parse_args()
model, tokenizer, _, _ = load(args)
with open(args.forget, encoding="utf-8") as lines:
    rows = [json.loads(line) for line in lines]
prompts = [f"Question: {row['question']}\nAnswer:" for row in rows]
pairs = [{"prompt": p, "chosen": " I do not know.", "rejected": f" {row['answer']}"} for p, row in zip(prompts, rows)]
training = trl.DPOConfig(
    args.output,
    max_steps=args.steps,
    per_device_train_batch_size=4,
    learning_rate=1e-4,
    max_grad_norm=0,  # the step clips
    logging_steps=5,
    report_to="none",
    bf16=False,
)
trainer = FusedDPOTrainer(
    model,
    ref_model=copy.deepcopy(model),
    args=training,
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
    soul_args={"max_grad_norm": 1.0},
)
batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
fused = lambda: trainer.compute_loss(model, dict(batch)).backward()  # noqa: E731
plain = lambda: trl.DPOTrainer.compute_loss(trainer, model, dict(batch)).backward()  # noqa: E731  TRL's own way
compare("loss and gradients", fused, plain, model.zero_grad)
trainer.train()
trainer.save_model()
