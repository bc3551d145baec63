"""Unlearn in several processes with a loop of your own: model and optimizer in shards (FSDP2), other rows in each process.

torchrun --nproc-per-node 2 examples/torchrun_loop.py --model DIR --forget FILE --retain FILE --output DIR
"""

import contextlib
import itertools

import torch
from common import collate, compare, load, options
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import soul
from soul.distributed import exit_process

args = options("Unlearn in several processes; start this with torchrun.", "out/torchrun").parse_args()
torch.distributed.init_process_group()  # gloo for CPUs and NCCL for GPUs
rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
if torch.cuda.is_available():
    torch.cuda.set_device(torch.distributed.get_node_local_rank())
model, tokenizer, *sides = load(args)  # the same in all processes
whole = sum(parameter.nbytes for parameter in model.parameters())
for layer in model.base_model.layers:
    fully_shard(layer)
fully_shard(model)
forget, retain = (itertools.cycle(rows[rank::size]) for rows in sides)  # every process has rows of its own
optimizer = soul.SOUL(model.parameters(), lr=1e-4, max_grad_norm=1.0)  # clips by the norm over all shards
objective = soul.losses.GradDiff(gamma=1.0, alpha=2.0)


def plain_loss():
    """Return the same loss from the logits of all tokens."""
    return 2 * model(**batch["retain"]).loss - model(**batch["forget"]).loss


for step in range(args.steps):
    batch = {name: collate(itertools.islice(rows, 2), model.device) for name, rows in (("forget", forget), ("retain", retain))}
    loss = soul.unlearning_loss(model, batch, objective)
    loss.backward()  # averages the gradients over the processes
    optimizer.step()
    optimizer.zero_grad()
    fraction = optimizer.clip_fraction()[0]  # adds up over the processes: all of them must call it
    if rank == 0:
        print(f"step {step + 1}: loss of this process {loss.item():.4f}, clipped {fraction:.2f}")

with contextlib.redirect_stdout(None) if rank else contextlib.nullcontext():
    held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    print(f"each of {size} processes holds {held / whole:.2f} of the weights, and as much of the optimizer's states")
    fused = lambda: soul.unlearning_loss(model, batch, objective).backward()  # noqa: E731
    compare("loss and gradients", fused, lambda: plain_loss().backward(), model.zero_grad)
whole_model = StateDictOptions(full_state_dict=True, cpu_offload=True)
state = get_model_state_dict(model, options=whole_model)  # gathers: all processes must call it
if rank == 0:
    model.save_pretrained(args.output, state_dict=state)
    tokenizer.save_pretrained(args.output)
torch.distributed.destroy_process_group()
exit_process(0)
