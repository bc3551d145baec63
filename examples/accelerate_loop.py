"""Unlearn with Accelerate: a patched model, SOUL and a scheduler, all prepared as any others, with gradient accumulation.

accelerate launch examples/accelerate_loop.py --model DIR --forget FILE --retain FILE --output DIR
"""

import itertools

import torch
from accelerate import Accelerator
from common import collate_pairs, compare_patched, load, options

import soul

args = options("Unlearn with Accelerate.", "out/accelerate").parse_args()
accelerator = Accelerator(gradient_accumulation_steps=2)
model, tokenizer, forget, retain = load(args)
objective = soul.losses.GradDiff(gamma=1.0, alpha=2.0)  # -CE of the forget tokens + 2 CE of the retain tokens
soul.patch(model, objective)
optimizer = soul.SOUL(model.parameters(), lr=1e-4)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=args.steps)
pairs = list(zip(forget, itertools.cycle(retain)))
loader = torch.utils.data.DataLoader(pairs, batch_size=2, shuffle=True, collate_fn=collate_pairs)
prepared, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

batches = itertools.chain.from_iterable(itertools.repeat(loader))  # epoch after epoch
for index, batch in enumerate(itertools.islice(batches, 2 * args.steps)):
    with accelerator.accumulate(prepared):
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()  # takes a step for every second batch
        scheduler.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        accelerator.print(f"step {index // 2 + 1}: loss {loss.item():.4f}, lr {scheduler.get_last_lr()[0]:.1e}")

model = soul.unpatch(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))
if accelerator.is_main_process:
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    compare_patched(model, objective, pairs[:4])
accelerator.end_training()
