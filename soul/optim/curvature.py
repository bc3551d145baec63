"""Sources of curvature: the estimates that the optimizer's h averages, and the steps in which h is refreshed.

h is a running average ``h = b2 h + (1 - b2) d`` of estimates d of a Hessian's diagonal. The choice of d, and of the loss behind
it, matters more than anything else about the optimizer (with the estimate of SOUL's code, 93 to 99% of the coordinates are
clipped):

| estimate d | loss | how |
|---|---|---|
| empirical Fisher, ``g g`` of the unlearning gradient, at every step | the unlearning loss; SOUL's code | `soul.SOUL` alone |
| empirical Fisher of the **retain** gradient | the loss that must stay low, as SOUL's derivation asks | `RetainFisher` |
| Gauss-Newton-Bartlett, ``g g`` with labels drawn from the model | cross-entropy of those labels; Sophia-G | `GNB` |
| Hutchinson, ``u Hu`` with u = +-1 | any loss that can be differentiated twice; Sophia-H | `Hutchinson` |

All but the first are objects that are used beside a `soul.SophiaG`::

    curvature = soul.curvature.RetainFisher(optimizer, every=10)
    for forget, retain in batches:
        optimizer.zero_grad()
        objective(model, forget, retain).backward()
        optimizer.step()
        curvature.step(lambda: cross_entropy(model, retain))
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator

import torch

from soul.distributed.shards import hidden_sharding, is_sharded, local, wait_for_offload
from soul.optim.optimizer import SophiaG
from soul_kernels.errors import argument_error


class Schedule:
    """The training steps in which h is refreshed: the first one, and every ``every``-th after it.

    Args:
        every: number of training steps from one refresh to the next, >= 1.
    """

    def __init__(self, every: int = 10) -> None:
        if not (isinstance(every, int) and every >= 1):
            raise argument_error("every", "an integer >= 1", repr(every), "Sophia refreshes every 10 steps")
        self.every = every
        self.calls = 0

    def tick(self) -> bool:
        """Count one training step; tell whether h is to be refreshed in it."""
        due = self.calls % self.every == 0
        self.calls += 1
        return due

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps that were counted, for a checkpoint."""
        return {"calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a ``state_dict()``."""
        self.calls = int(state_dict["calls"])


class Curvature:
    """A refresh of an optimizer's h every k steps, from the gradients of a loss that the caller provides.

    Args:
        optimizer: a `SophiaG`. A `SOUL` is refused: it has its own estimate.
        every: number of training steps from one refresh to the next, the first step being a refresh; or a `Schedule`.
        in_backward: update each h in the backward pass, as its gradient arrives, and free the gradient: no second set of
            gradients is ever held. A refresh must then be a single ``backward()``, without micro-batches.

    Raises:
        ValueError: ``optimizer`` is not a `SophiaG`, or ``every`` is not a positive integer.
    """

    def __init__(self, optimizer: SophiaG, every: int | Schedule = 10, *, in_backward: bool = False) -> None:
        if not isinstance(optimizer, SophiaG):
            remedy = "pass the SophiaG itself; DeepSpeed's ZeRO hides the gradients that it needs: use soul.SOUL or FSDP2 there"
            raise argument_error("optimizer", "a SophiaG", type(optimizer).__name__, remedy)
        if optimizer.hessian_in_step:
            remedy = "SOUL refreshes h itself, from the unlearning gradient"
            raise argument_error("optimizer", "a SophiaG", type(optimizer).__name__, remedy)
        self.optimizer = optimizer
        self.in_backward = in_backward
        self.schedule = every if isinstance(every, Schedule) else Schedule(every)

    def step(self, closure: Callable[[], torch.Tensor]) -> bool:
        """Refresh h if it is due; call this once in every training step.

        Gradients that the parameters hold are set aside for the refresh, and restored after it.

        Args:
            closure: returns the scalar loss, with its graph; only called when h is due.

        Returns:
            Whether h was refreshed.

        Raises:
            ArgumentError: the optimizer is under DeepSpeed's ZeRO.
        """
        self._check_gradients_are_shown()
        if not self.schedule.tick():
            return False
        params = list(dict.fromkeys(p for group in self.optimizer.param_groups for p in group["params"]))
        grads = [p.grad for p in params]
        release = self.optimizer.gradient_release
        with contextlib.nullcontext() if release is None else release.paused(), torch.enable_grad():
            for p in params:
                p.grad = None
            try:
                self._refresh(closure, params)
            finally:
                for p, grad in zip(params, grads):
                    p.grad = grad
        return True

    def _check_gradients_are_shown(self) -> None:
        """Raise if DeepSpeed's ZeRO has put its pieces into the optimizer's groups, or with stage 3 nothing at all."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        if not any(groups) or any(hidden_sharding(params) == "DeepSpeed" for params in groups):
            remedy = "it adds the gradients of all backward passes up, and shows them in its step only: use soul.SOUL, or FSDP2"
            raise argument_error("optimizer", "one whose parameters hold their gradients", "pieces of DeepSpeed's ZeRO", remedy)

    def _refresh(self, closure: Callable[[], torch.Tensor], params: list[torch.Tensor]) -> None:
        """Form the gradients of the loss, and move every h towards their squares."""
        with self._updates_in_backward(params):
            closure().backward()
        if not self.in_backward:
            self.optimizer.update_hessian()

    @contextlib.contextmanager
    def _updates_in_backward(self, params: list[torch.Tensor]) -> Iterator[None]:
        """Update every h as its gradient arrives, for the duration of the block, if ``in_backward`` asks for it."""
        handles = []
        if self.in_backward:
            handles = [p.register_post_accumulate_grad_hook(self._update_one) for p in params if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _update_one(self, param: torch.Tensor) -> None:
        wait_for_offload(param)
        self.optimizer.update_parameter_hessian(param)
        param.grad = None

    def state_dict(self) -> dict[str, int]:
        """Return the state of the schedule, for a checkpoint; h itself is in the optimizer's state."""
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a ``state_dict()``."""
        self.schedule.load_state_dict(state_dict)


class RetainFisher(Curvature):
    """Empirical Fisher of the retain loss: ``d = g g``, g the gradient of the mean cross-entropy of a retain batch.

    SOUL is derived (Jia et al. 2024, section 4) from an influence function with the Hessian of the loss that must stay low. The
    closure returns that loss on true labels. ``bs`` of the optimizer is the number of tokens in the retain batch.
    """


class GNB(Curvature):
    """Gauss-Newton-Bartlett estimate: ``d = g g``, g the gradient of the mean cross-entropy with labels drawn from the model.

    ``bs d`` is an unbiased estimate of the Gauss-Newton diagonal, where ``bs`` is the number of drawn labels (Liu et al. 2023,
    algorithm 2). The step multiplies by ``bs``, an option of the optimizer.

    The closure draws the labels and returns the loss: `soul_kernels.linear_gnb` does both in one sweep::

        gnb.step(lambda: soul.models.gnb_loss(model, batch, generator=gnb.generator()))

    Args:
        optimizer: a `SophiaG`.
        every: as in `Curvature`.
        in_backward: as in `Curvature`.
        seed: seed of the drawn labels; see `generator`.
    """

    def __init__(self, optimizer: SophiaG, every: int | Schedule = 10, *, in_backward: bool = False, seed: int = 0) -> None:
        super().__init__(optimizer, every, in_backward=in_backward)
        self.seed = seed

    def generator(self) -> torch.Generator:
        """Return a ``torch.Generator`` on the parameters' device, whose seed is a hash of (seed, training step, rank).

        So replicas draw different labels for their different tokens, and a resumed run draws the labels that it would have
        drawn without the interruption.
        """
        rank = torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
        digest = hashlib.blake2b(repr((self.seed, self.schedule.calls, rank)).encode(), digest_size=8).digest()
        device = local(self.optimizer.param_groups[0]["params"][0]).device
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)  # 63 bits


class Hutchinson(Curvature):
    """Hutchinson's estimate (Liu et al. 2023, algorithm 1): ``d = u * (H u)``, u of +-1; unbiased, may be negative.

    h keeps the sign of its average, and the step divides by ``max(h, 0)``. 8-bit states, which have no sign, are refused. The
    operations of the closure's loss must be differentiable twice: among attention kernels only "math" is, and this library's
    losses only with ``LinearOptions(backend="reference")``; the others raise. The estimate is that of the mean loss itself:
    use ``bs=1`` in the optimizer.

    Args:
        optimizer: a `SophiaG`.
        every: as in `Curvature`.
        generator: torch.Generator on the parameters' device, for reproducible probes.
    """

    def __init__(self, optimizer: SophiaG, every: int | Schedule = 10, *, generator: torch.Generator | None = None) -> None:
        super().__init__(optimizer, every)
        self.generator = generator

    def _refresh(self, closure: Callable[[], torch.Tensor], params: list[torch.Tensor]) -> None:
        """Form the products of the Hessian with random probes, and move every h towards probe times product."""
        if any(group["state_dtype"] == "8bit" for group in self.optimizer.param_groups):
            remedy = "8-bit states have no sign, and cutting negative estimates off would bias h upwards; use bf16"
            raise argument_error("state_dtype", "fp32 or bf16 with Hutchinson's estimate", "'8bit'", remedy)
        params = [p for p in params if p.requires_grad]
        if any(is_sharded(p) for p in params):
            raise argument_error("parameters", "whole tensors", "DTensors", "use GNB: FSDP cannot differentiate twice")
        grads = torch.autograd.grad(closure(), params, create_graph=True, allow_unused=True)
        probes = {p: self._probe(p) for p, g in zip(params, grads) if g is not None}
        curved = {p: g for p, g in zip(params, grads) if g is not None and g.requires_grad}  # H u is 0 for the others
        products: dict[torch.Tensor, torch.Tensor | None] = {}
        if curved:
            hessian_probes = torch.autograd.grad(
                list(curved.values()), list(curved), [probes[p] for p in curved], allow_unused=True
            )
            products = dict(zip(curved, hessian_probes))
        for p in probes:
            product = products.get(p)
            p.grad = torch.zeros_like(p) if product is None else product
        self.optimizer.update_hessian(probes=probes)

    def _probe(self, param: torch.Tensor) -> torch.Tensor:
        """Return a tensor of random signs in the shape and dtype of a parameter."""
        bits = torch.randint(0, 2, param.shape, device=param.device, generator=self.generator)
        return (2 * bits - 1).to(param.dtype)
