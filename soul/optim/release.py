"""Gradient release: each parameter is stepped in the backward pass, as its gradient arrives, and the gradient is freed.

A hook on each parameter takes the step. Autograd calls it for a whole parameter. For one in shards FSDP2 does: autograd forms
the gradients of the gathered copies, to which no hook belongs; after the backward pass of a layer FSDP2 reduces these to the
shards, and then calls the hooks of the shards, on the stream of the reduction and in the same order in all processes. The
shards' gradients of one layer share one storage, which is freed with the last of them.
"""

import contextlib
from collections.abc import Iterator

import torch

from soul.distributed.shards import is_sharded, wait_for_offload
from soul.optim.optimizer import SophiaG
from soul.optim.options import check_releasable
from soul_kernels.errors import argument_error


def release_gradients(model: torch.nn.Module, optimizer: SophiaG) -> "GradientRelease":
    """Make ``loss.backward()`` step every parameter as soon as its gradient is complete, and free the gradient.

    Then only the largest few gradients take memory at a time, instead of all; under FSDP2 those of one call of ``fully_shard``,
    such as a layer. ``optimizer.step()`` may be called as before, and has nothing left to do. Each step is the same, bit for
    bit, as without release.

    Args:
        model: the module whose parameters ``optimizer`` steps, whole or in shards (FSDP2).
        optimizer: a `SophiaG` or `SOUL`.

    Returns:
        A `GradientRelease`. In ``with release.paused():`` gradients accumulate as usual, for the micro-batches before the last
        one, and for passes whose gradients are not meant for a step; ``release.remove()`` ends the release.

    Raises:
        ValueError: all gradients are needed at once, by ``max_grad_norm`` and ``skip_nonfinite`` (a norm over all of them), by
            ``rho="auto"`` (the clipped fraction of a whole step) or by DistributedDataParallel (it reduces gradients in
            buckets, after the hooks); or the optimizer has parameters that are not the model's. A GradScaler cannot be used
            either. It is refused in its ``step`` only, after parameters have been stepped with scaled gradients.
    """
    if not isinstance(optimizer, SophiaG):
        remedy = "others step all parameters at once: use one of these"
        raise argument_error("optimizer", "a SophiaG or SOUL", type(optimizer).__name__, remedy)
    if optimizer.gradient_release is not None:
        remedy = "call remove() of its gradient_release first"
        raise argument_error("optimizer", "one whose gradients are not released", "one whose gradients are", remedy)
    if any(isinstance(module, torch.nn.parallel.DistributedDataParallel) for module in model.modules()):
        remedy = "it averages gradients in buckets, after they were released; use FSDP"
        raise argument_error("model", "no DistributedDataParallel", "one", remedy)
    for group in optimizer.param_groups:
        check_releasable(group)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = set(params) - set(model.parameters())
    if foreign or not params:  # DeepSpeed's ZeRO puts others into the groups, or takes them out
        expected = "a module that has all parameters of the optimizer"
        got = f"one without {len(foreign)} of them" if params else "an optimizer without parameters"
        remedy = "pass the whole model; DeepSpeed adds gradients up over processes out of sight: leave release out there"
        raise argument_error("model", expected, got, remedy)
    world = torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1
    if world > 1 and not all(map(is_sharded, params)):
        got = f"plain parameters in {world} processes"
        remedy = "nothing would average their gradients; use FSDP"
        raise argument_error("model", "one process, or sharded parameters", got, remedy)
    return GradientRelease(optimizer, params)


class GradientRelease:
    """The hooks that `release_gradients` registers.

    Args:
        optimizer: the optimizer, whose attribute ``gradient_release`` this sets.
        params: its parameters.
    """

    def __init__(self, optimizer: SophiaG, params: list[torch.Tensor]) -> None:
        self._optimizer = optimizer
        self._pauses = 0
        trained = [p for p in dict.fromkeys(params) if p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(self._step_and_free) for p in trained]
        optimizer.gradient_release = self

    def _step_and_free(self, param: torch.Tensor) -> None:
        """Step a parameter whose gradient is complete, and free the gradient; torch calls this in the backward pass."""
        if self._pauses == 0:
            wait_for_offload(param)
            self._optimizer.step_parameter(param)
            param.grad = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let gradients accumulate for the duration of the block; the first backward pass after it steps with the sums."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def remove(self) -> None:
        """End the release: gradients then stay until they are cleared."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._optimizer.gradient_release = None
