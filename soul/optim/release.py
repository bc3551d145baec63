"""Gradient release: each parameter is stepped in the backward pass, as its gradient arrives, and the gradient is freed."""

import contextlib

import torch

from soul.distributed.shards import is_sharded
from soul.optim.optimizer import SophiaG
from soul.optim.options import check_releasable
from soul_kernels.errors import argument_error


def release_gradients(model, optimizer):
    """Makes ``loss.backward()`` step every parameter as soon as its gradient is complete, and free the gradient.

    The memory of the gradients is then that of the largest few instead of all. ``optimizer.step()`` may be called as before;
    it finds nothing left to do. Each step is the same, bit for bit, as without release.

    Args:
        model: the module whose parameters ``optimizer`` steps.
        optimizer: a `SophiaG` or `SOUL`.

    Returns:
        A `GradientRelease`: ``with release.paused():`` gradients accumulate as usual (for the micro-batches before the last
        one, and for passes whose gradients are not meant for a step), ``release.remove()`` ends it.

    Raises:
        ValueError: something needs all gradients at once: ``max_grad_norm`` and ``skip_nonfinite`` (a norm over all of
            them), ``rho="auto"`` (the clipped fraction of a whole step), DistributedDataParallel (it reduces gradients in
            buckets, after the hooks); or the optimizer has parameters that are not the model's. A GradScaler is refused too,
            but only in its ``step``, when parameters have already been stepped with scaled gradients: use none.
    """
    if not isinstance(optimizer, SophiaG):
        raise argument_error("optimizer", "a SophiaG or SOUL", type(optimizer).__name__, "other optimizers step all at once")
    if optimizer._release is not None:
        raise argument_error("optimizer", "one whose gradients are not released", "one that is", "call remove() first")
    wrapped = [m for m in model.modules() if isinstance(m, torch.nn.parallel.DistributedDataParallel)]
    if wrapped:
        reason = "it averages gradients in buckets, after they were released; use FSDP"
        raise argument_error("model", "no DistributedDataParallel", "one", reason)
    for group in optimizer.param_groups:
        check_releasable(group)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = set(params) - set(model.parameters())
    if foreign:
        raise argument_error(
            "model", "the module of all the optimizer's parameters", f"{len(foreign)} are not in it", "pass it"
        )
    world = torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1
    if world > 1 and not all(map(is_sharded, params)):
        got = f"plain parameters in {world} processes"
        raise argument_error(
            "model", "one process, or sharded parameters", got, "nothing would average their gradients; use FSDP"
        )
    return GradientRelease(optimizer, params)


class GradientRelease:
    """The hooks of `release_gradients`."""

    def __init__(self, optimizer, params):
        self._optimizer = optimizer
        self._pauses = 0
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in dict.fromkeys(params) if p.requires_grad]
        optimizer._release = self

    def _arrived(self, param):
        if self._pauses == 0:
            self._optimizer._step_of(param)
            param.grad = None

    @contextlib.contextmanager
    def paused(self):
        """Gradients stay, and add up, while the block runs; the next gradient outside of it brings the sum into the step."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def remove(self):
        """Ends the release; gradients stay again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._optimizer._release = None
