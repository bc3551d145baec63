"""Refresh the curvature by a schedule of your own: at steps 1, 2, 4, 8, ..., since it changes most in the first steps.

python examples/own_schedule.py --model DIR --forget FILE --retain FILE --output DIR
"""

import itertools

from common import collate, compare, load, options

import soul


class Doubling(soul.curvature.Schedule):
    """A refresh at the first step, and whenever the number of steps has doubled."""

    def tick(self):
        """Count one step; tell whether h is to be refreshed in it. A checkpoint holds ``calls``."""
        self.calls += 1
        return self.calls & (self.calls - 1) == 0


def train(n_steps, schedule, in_backward):
    """Take steps of SophiaG, whose h is the squared gradient of the retain loss; return how often it was refreshed."""
    n_tokens = sum(label != -100 for row in retain_rows for label in row["labels"]) / len(retain_rows)
    # bs is the number of labelled tokens behind h. in_backward: each gradient of a refresh is freed as soon as h has it.
    optimizer = soul.SophiaG(model.parameters(), lr=1e-4, bs=4 * n_tokens, bias_correction=True, max_grad_norm=1.0)
    curvature = soul.curvature.RetainFisher(optimizer, every=schedule, in_backward=in_backward)
    sides = [itertools.cycle(rows) for rows in (forget_rows, retain_rows)]
    refreshes = 0
    for _ in range(n_steps):
        forget, retain = (collate(itertools.islice(side, 4), model.device) for side in sides)
        optimizer.zero_grad()
        soul.unlearning_loss(model, {"forget": forget, "retain": retain}, objective).backward()
        optimizer.step()
        retain_loss = lambda retain=retain: soul.unlearning_loss(model, {"forget": retain}, cross_entropy)  # noqa: E731
        refreshes += curvature.step(retain_loss)
    optimizer.zero_grad()
    return refreshes


args = options("Refresh the curvature by a schedule of your own.", "out/own_schedule").parse_args()
model, tokenizer, forget_rows, retain_rows = load(args)
objective = soul.losses.GradDiff(gamma=1.0, alpha=2.0)
cross_entropy = soul.losses.Memorize()  # of the side named "forget", which gets the retain rows here
print(f"refreshed {train(args.steps, Doubling(), in_backward=True)} times in {args.steps} steps")
model.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
every_step, few = soul.curvature.Schedule(every=1), min(args.steps, 8)
compare(f"{few} steps", lambda: train(few, Doubling(), True), lambda: train(few, every_step, False))
