"""Unlearn with Lightning: a patched model, whose loss is fused, and SOUL with a scheduler from configure_optimizers.

python examples/lightning_module.py --model DIR --forget FILE --retain FILE --output DIR
"""

import itertools

import lightning
import torch
from common import collate_pairs, compare_patched, load, options

import soul


class Unlearning(lightning.LightningModule):
    """A language model that unlearns."""

    def __init__(self, model, n_steps):
        super().__init__()
        self.model = model
        self.n_steps = n_steps

    def training_step(self, batch, index):
        """Return the loss of the patched model."""
        return self.model(**batch).loss

    def configure_optimizers(self):
        """Return SOUL, with a learning rate that falls to 0."""
        optimizer = soul.SOUL(self.parameters(), lr=1e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.n_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


args = options("Unlearn with Lightning.", "out/lightning").parse_args()
model, tokenizer, forget, retain = load(args)
objective = soul.losses.GradDiff(gamma=1.0, alpha=2.0)  # -CE of the forget tokens + 2 CE of the retain tokens
soul.patch(model, objective)
pairs = list(zip(forget, itertools.cycle(retain)))
loader = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True, collate_fn=collate_pairs)
trainer = lightning.Trainer(max_steps=args.steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False, devices=1)
trainer.fit(Unlearning(model, args.steps), loader)
soul.unpatch(model)
model.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
compare_patched(model, objective, pairs[:4])
