"""What curvature the optimizer's h is taken from, and when it is refreshed.

h is a running average ``h = b2 h + (1 - b2) d`` of estimates d of a Hessian's diagonal. Of what they are taken matters more
than anything else about the optimizer (with what SOUL's code uses, 93 to 99% of the coordinates are clipped):

| estimate d | of which loss | how |
|---|---|---|
| empirical Fisher, ``g g`` of the unlearning gradient, at every step | forgetting itself; SOUL's code | `soul.SOUL` alone |
| empirical Fisher of the **retain** gradient | what must be kept; what SOUL's derivation asks for | `RetainFisher` |
| Gauss-Newton-Bartlett, ``g g`` with labels drawn from the model | the model's own predictions; Sophia-G | `GNB` |
| Hutchinson, ``u Hu`` with u = +-1 | any loss twice differentiable; Sophia-H | `Hutchinson` |

All but the first are objects beside a `soul.SophiaG`::

    curvature = soul.curvature.RetainFisher(optimizer, every=10)
    for forget, retain in batches:
        optimizer.zero_grad()
        objective(model, forget, retain).backward()
        optimizer.step()
        curvature.step(lambda: cross_entropy(model, retain))
"""

import contextlib
import hashlib

import torch

from soul.distributed.shards import is_sharded, local
from soul.optim.optimizer import SOUL, SophiaG
from soul_kernels.errors import argument_error


class Schedule:
    """Says when: at the first call, and at every ``every``-th from there.

    Args:
        every: number of training steps from one refresh to the next, >= 1.
    """

    def __init__(self, every=10):
        if not (isinstance(every, int) and every >= 1):
            raise argument_error("every", "an integer >= 1", repr(every), "Sophia refreshes every 10 steps")
        self.every, self.calls = every, 0

    def tick(self):
        """Counts one training step; tells whether h is to be refreshed in it."""
        due = self.calls % self.every == 0
        self.calls += 1
        return due

    def state_dict(self):
        """The number of steps seen, for a checkpoint."""
        return {"calls": self.calls}

    def load_state_dict(self, state_dict):
        """Goes on where ``state_dict`` was taken."""
        self.calls = int(state_dict["calls"])


class Curvature:
    """Refreshes an optimizer's h every k steps from the gradients of a loss that the caller provides.

    Args:
        optimizer: a `SophiaG`; a `SOUL` refuses, it has its own estimate.
        every: refresh at the first step and at every ``every``-th from there; or a `Schedule`.
        in_backward: update each h in the backward pass, as its gradient arrives, and free the gradient: no second set of
            gradients is ever held. For one ``backward()`` a refresh, whose loss is not split into micro-batches.
    """

    def __init__(self, optimizer, every=10, *, in_backward=False):
        if not isinstance(optimizer, SophiaG) or isinstance(optimizer, SOUL):
            remedy = "pass the SophiaG itself; DeepSpeed's ZeRO hides the gradients that it needs: use soul.SOUL or FSDP2 there"
            if isinstance(optimizer, SOUL):
                remedy = "SOUL refreshes h itself, from the unlearning gradient"
            raise argument_error("optimizer", "a SophiaG", type(optimizer).__name__, remedy)
        self.optimizer, self.in_backward = optimizer, in_backward
        self.schedule = every if isinstance(every, Schedule) else Schedule(every)

    def step(self, closure):
        """Call once in every training step; refreshes h when it is due.

        Gradients that the parameters hold are put aside meanwhile, and are there again afterwards.

        Args:
            closure: returns the scalar loss, with its graph; only called when h is due.

        Returns:
            True where h was refreshed.
        """
        if not self.schedule.tick():
            return False
        params = list(dict.fromkeys(p for group in self.optimizer.param_groups for p in group["params"]))
        kept = [p.grad for p in params]
        release = self.optimizer._release
        with contextlib.nullcontext() if release is None else release.paused(), torch.enable_grad():
            for p in params:
                p.grad = None
            try:
                self._refresh(closure, params)
            finally:
                for p, grad in zip(params, kept):
                    p.grad = grad
        return True

    def _refresh(self, closure, params):
        with self._hooks(params):
            closure().backward()
        if not self.in_backward:
            self.optimizer.update_hessian()

    @contextlib.contextmanager
    def _hooks(self, params):
        handles = []
        if self.in_backward:
            handles = [p.register_post_accumulate_grad_hook(self._update_one) for p in params if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _update_one(self, param):
        self.optimizer._update_hessian_of(param)
        param.grad = None

    def state_dict(self):
        """The schedule's place, for a checkpoint; h itself is the optimizer's."""
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict):
        """Goes on where ``state_dict`` was taken."""
        self.schedule.load_state_dict(state_dict)


class RetainFisher(Curvature):
    """Empirical Fisher of what must be kept: ``d = g g``, g the gradient of the mean cross-entropy of a retain batch.

    The derivation of SOUL (Jia et al. 2024, section 4) is an influence function, whose Hessian is that of the loss which is
    to stay low. The closure returns that loss on true labels. ``bs`` of the optimizer is the number of tokens in that batch.
    """


class GNB(Curvature):
    """Gauss-Newton-Bartlett (Liu et al. 2023, algorithm 2): ``d = g g``, g the gradient of the mean cross-entropy with labels
    drawn from the model's own distribution; ``bs d`` is then an unbiased estimate of the Gauss-Newton diagonal, ``bs`` being
    the number of drawn labels, which enters in the step.

    The closure draws the labels and returns the loss: `soul_kernels.linear_gnb` does both in one sweep::

        gnb.step(lambda: soul.models.gnb_loss(model, batch, generator=gnb.generator()))

    Args:
        optimizer: a `SophiaG`.
        every: as in `Curvature`.
        in_backward: as in `Curvature`.
        seed: of `generator`.
    """

    def __init__(self, optimizer, every=10, *, in_backward=False, seed=0):
        super().__init__(optimizer, every, in_backward=in_backward)
        self.seed = seed

    def generator(self):
        """A ``torch.Generator`` on the parameters' device, whose seed is a hash of (seed, training step, rank): replicas draw
        different labels for their different tokens, and a resumed run those that it would have drawn.
        """
        rank = torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
        digest = hashlib.blake2b(repr((self.seed, self.schedule.calls, rank)).encode(), digest_size=8).digest()
        device = local(self.optimizer.param_groups[0]["params"][0]).device
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)  # 63 bits


class Hutchinson(Curvature):
    """Hutchinson's estimate (Liu et al. 2023, algorithm 1): ``d = u * (H u)``, u of +-1; unbiased, may be negative.

    h keeps the sign of its average, and counts as ``max(h, 0)`` where the step divides by it (8-bit states are refused). The
    closure returns a loss whose operations can be differentiated twice: of the attention kernels the "math" one, and of this
    library's losses those with ``LinearOptions(backend="reference")``; all others refuse. The estimate is of the mean loss
    itself: use ``bs=1`` in the optimizer.

    Args:
        optimizer: a `SophiaG`.
        every: as in `Curvature`.
        generator: torch.Generator on the parameters' device, for reproducible probes.
    """

    def __init__(self, optimizer, every=10, *, generator=None):
        super().__init__(optimizer, every)
        self.generator = generator

    def _refresh(self, closure, params):
        if any(group["state_dtype"] == "8bit" for group in self.optimizer.param_groups):
            remedy = "8-bit states have no sign, and cutting negative estimates off would bias h upwards; use bf16"
            raise argument_error("state_dtype", "fp32 or bf16 with Hutchinson's estimate", "'8bit'", remedy)
        params = [p for p in params if p.requires_grad]
        if any(is_sharded(p) for p in params):
            raise argument_error("parameters", "whole tensors", "DTensors", "use GNB: FSDP cannot differentiate twice")
        grads = torch.autograd.grad(closure(), params, create_graph=True, allow_unused=True)
        probes = {p: self._probe(p) for p, g in zip(params, grads) if g is not None}
        curved = [(p, g) for p, g in zip(params, grads) if g is not None and g.requires_grad]
        products = {}
        if curved:  # the gradient of a linear loss depends on nothing
            inputs, outputs = zip(*curved)
            found = torch.autograd.grad(outputs, inputs, [probes[p] for p in inputs], allow_unused=True)
            products = dict(zip(inputs, found))
        for p in probes:
            product = products.get(p)
            p.grad = torch.zeros_like(p) if product is None else product
        self.optimizer.update_hessian(probes=probes)

    def _probe(self, param):
        bits = torch.randint(0, 2, param.shape, device=param.device, generator=self.generator)
        return (2 * bits - 1).to(param.dtype)
