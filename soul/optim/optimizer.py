"""The optimizer `SophiaG`: its options, its two calls, telemetry and checkpoints. The arithmetic is in ``soul_kernels``.

The class holds what torch and users see: groups, states, checkpoints. A `soul.optim.stepper.Stepper` takes the steps, and holds
all that is derived from groups and states. It is never pickled; ``_reset`` replaces it by a new one. `soul.optim.soul.SOUL`
overrides three things: `hessian_in_step`, `momentum_decay`, and the betas that are exported.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, overload

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from soul.optim.checkpoints import loaded_checkpoint
from soul.optim.fp32 import Fp32Parameters, check_fp32, joined, store_fp32
from soul.optim.options import (
    Backend,
    EpsMode,
    Number,
    ParamGroup,
    ParamRounding,
    StateDtype,
    check_bs,
    check_group,
    check_values,
    published_options,
    rounding_of,
    settle_options,
)
from soul.optim.state_dicts import State
from soul.optim.states import NOISE, new_state, published_state
from soul.optim.step_groups import counters_of
from soul.optim.stepper import Stepper
from soul_kernels.errors import argument_error


class _TrueForGradScaler:
    """An attribute that is True for torch's GradScaler, and False for everyone else who reads it.

    The GradScaler then hands the step its scale and its verdict (whether a gradient has overflowed). Trainers read the
    attribute too, since they clip gradients between unscaling and the step: Lightning refuses to clip if it is True, even in
    bf16 without a scaler. If it is False, a trainer unscales the gradients first, and the scaler hands the step no scale.
    """

    def __get__(self, optimizer: Optimizer | None, owner: type | None = None) -> bool:
        return sys._getframe(1).f_globals.get("__name__") == "torch.amp.grad_scaler"


class PausableRelease(Protocol):
    """A release of gradients that can be paused: a `soul.optim.release.GradientRelease`."""

    def paused(self) -> AbstractContextManager[None]:
        """Return a context in which gradients accumulate."""


class SophiaG(Optimizer):
    """Sophia with the two calls of the published class, each one pass over memory; per element, in fp32::

        step():           m = b1 m + (1 - b1) g
                          p = p - lr (weight_decay p + clamp(m / (rho bs max(h, 0) + eps), -1, 1))
        update_hessian(): h = b2 h + (1 - b2) g g

    g is the gradient, m the state ``exp_avg`` and h the state ``hessian``; b1 and b2 are the betas. Liu et al. 2023 (arXiv
    2305.14342), algorithm 3, as coded in the published class, whose checkpoints can be loaded. Call ``update_hessian()`` every
    k steps while the gradients are those of a loss with labels sampled from the model, or let ``soul.curvature`` do it.

    Parameters and states are changed in place, gradients are not. Nothing in ``step()`` waits for the device.

    Args:
        params: parameters or parameter groups: fp32, bf16 or fp16 tensors on any devices, or DTensors. Those with gaps in
            memory, such as a slice of columns, are stepped in dense copies, which the optimizer keeps.
        lr: learning rate, a float or a tensor of one element.
        betas: decay of the momentum and of the Hessian estimate, each in [0, 1).
        rho: scale of the clipping threshold: the larger, the fewer coordinates are clipped; see `clip_fraction`. "auto"
            moves it, on the device, until the clipped fraction is ``clip_target``: ``rho *= exp(fraction - clip_target)``
            after each step. The group then holds it as a tensor, and checkpoints carry it.
        weight_decay: decoupled weight decay.
        bs: number of predictions (tokens, for a language model) in the batch behind ``update_hessian``.
        eps: added to the denominator.
        maximize: ascend instead of descend.
        capturable: the step can be captured in a CUDA graph: lr, weight_decay, rho and bs become fp32 tensors on the device in
            the groups, where a scheduler fills them and a replay reads them. Run one step before the capture.
        max_grad_norm: L2 norm that the gradients of all groups together are scaled down to, as ``clip_grad_norm_`` does, but
            within the step: the gradients themselves stay as they are, and nothing is rounded in between. This option and
            ``skip_nonfinite`` are refused under FSDP1, where the optimizer sees one process's piece of the gradients, and under
            DeepSpeed's ZeRO if it steps several groups or sub-groups, one after the other. Under torch's
            ZeroRedundancyOptimizer, which looks like a whole model, leave both and rho="auto" out as well.
        param_rounding: how parameters below fp32 are stored: "nearest", "stochastic" or "compensated" (8 more bits in the state
            ``low_bits``; see `export_fp32`). "auto" is "compensated". fp32 parameters are stored exactly in any case. If you
            write other values into a parameter, its old ``low_bits`` still add up to half a unit in the last place.
        state_dtype: torch.float32, torch.bfloat16 or "8bit" for both states. None: h in fp32, and m in bf16 for bf16
            parameters, else in fp32. h in bf16, and in 8 bits with a beta2 above 0.99, is rounded stochastically. "8bit" is for
            tensors whose rows have a multiple of 32 elements; others, such as biases and norms, keep fp32 states.
        backend: "auto" (Triton on a GPU; on a CPU "compile" from 16.8 million parameters on; else the reference), "triton",
            "compile" (the reference under torch.compile, the same bits) or "reference". See docs/running.md.
        skip_nonfinite: if a gradient of any group is not finite, the step changes nothing, and is counted in `telemetry`. False
            lets NaN and inf through, as torch does.
        clip_target: fraction of the coordinates to be clipped, with rho="auto" only (default 0.5).
        bias_correction: the step uses h divided by ``1 - b2^t``, t the number of its updates.
        eps_mode: "add" as published, or "max" as in the papers: ``m / max(rho bs h, eps)``.
        seed: seed of the noise of stochastic rounding, which is a hash of (seed, tensor, step, element). Shards of rows (FSDP2)
            draw what one process draws. Checkpoints carry the version of the noise in their groups, as ``noise``.
        state_offload: keep m, h and low bits in main memory, pinned if the parameters are on a GPU, and pass them over the
            device in every step, two buckets of 64 MiB at a time, with copies beside computation: the same bits as without. Not
            with ``capturable``. Checkpoints do not depend on it. Before you read ``optimizer.state`` yourself, wait for the
            device; methods of this class do.

    Attributes:
        hessian_in_step: whether ``step()`` itself refreshes h, from the same gradient: True for `SOUL` only.
        gradient_release: the `soul.optim.release.GradientRelease` that steps this optimizer, or None.

    Raises:
        ValueError: an option or a parameter does not fit. The message names it, what was expected, what came, and the remedy.
    """

    hessian_in_step = False
    gradient_release: PausableRelease | None
    _step_supports_amp_scaling = _TrueForGradScaler()  # the scale and the verdict are then in grad_scale and found_inf

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: Number | Literal["auto"] = 0.04,
        weight_decay: Number = 0.1,
        *,
        bs: Number = 5120,
        eps: float = 1e-15,
        maximize: bool = False,
        capturable: bool = False,
        max_grad_norm: float | None = None,
        param_rounding: ParamRounding = "auto",
        state_dtype: StateDtype = None,
        backend: Backend = "auto",
        skip_nonfinite: bool = False,
        clip_target: float | None = None,
        bias_correction: bool = False,
        eps_mode: EpsMode = "add",
        seed: int = 0,
        state_offload: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=tuple(betas) if hasattr(betas, "__iter__") else betas,
            rho=rho,
            weight_decay=weight_decay,
            bs=bs,
            eps=eps,
            maximize=maximize,
            capturable=capturable,
            max_grad_norm=max_grad_norm,
            param_rounding=param_rounding,
            state_dtype=state_dtype,
            backend=backend,
            skip_nonfinite=skip_nonfinite,
            clip_target=clip_target,
            bias_correction=bias_correction,
            eps_mode=eps_mode,
            seed=seed,
            state_offload=state_offload,
            noise=NOISE,  # not an option: checkpoints carry the version
        )
        check_values(defaults)  # first: a wrong option is named even if the parameters are wrong as well
        self._reset()
        super().__init__(params, defaults)

    def _reset(self) -> None:
        """Forget what was derived from groups and states."""
        self._stepper = Stepper(self)
        self.gradient_release = None

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Return torch's wrapper of ``step``, which calls hooks and names the step in profiles, for when there is any need.

        It takes a tenth of a step of many small tensors.
        """
        wrapped = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: "SophiaG", *args: Any, **options: Any) -> Any:
            if (
                self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or torch.autograd._profiler_enabled()
            ):
                return wrapped(self, *args, **options)
            return func(self, *args, **options)

        return step

    def __getstate__(self) -> dict[str, Any]:
        self._stepper.wait()
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in ("_stepper", "gradient_release")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # an entry of torch's own, which checkpoints of this class lack
                    group.setdefault(name, value)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a parameter group, as in ``torch.optim.Optimizer``.

        Raises:
            ValueError: an option or a parameter does not fit; the group is not added.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, len(self.param_groups) - 1)
            settle_options(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._stepper.group_added()

    @overload
    def step(self, closure: None = None, bs: Number | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], bs: Number | None = None) -> float: ...

    @torch._disable_dynamo  # torch.compile does not look inside: there is nothing in it to fuse
    def step(self, closure: Callable[[], float] | None = None, bs: Number | None = None) -> float | None:
        """Take one optimization step.

        Args:
            closure: recomputes the loss and the gradients, and returns the loss.
            bs: overrides the groups' ``bs`` for this step.

        Returns:
            The value of the closure, or None.

        Raises:
            ValueError: an option or a gradient does not fit; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            if bs is not None:
                check_bs(bs)
            if self.gradient_release is not None:
                self._check_released_step(bs)
            with torch.no_grad():
                self._stepper.step(bs, *self._scaler(), released=self.gradient_release is not None)
        except Exception:
            for name in ("grad_scale", "found_inf"):  # a GradScaler takes them back after a step that succeeds
                self.__dict__.pop(name, None)
            raise
        return loss

    def _check_released_step(self, bs: Number | None) -> None:
        """Raise for a GradScaler and for a ``bs``: both come too late, after the steps of the backward pass."""
        if getattr(self, "found_inf", None) is not None:
            got = "one, and all parameters have been stepped with scaled gradients"
            raise argument_error("GradScaler", "no scaler with gradient release", got, "train in bf16, which needs none")
        if bs is not None:
            raise argument_error("bs", "None with gradient release", bs, "the steps have been taken: set the groups' bs")

    @torch.no_grad()
    def step_parameter(self, param: torch.Tensor) -> None:
        """Step one parameter with the gradient that it holds; `soul.release_gradients` calls this in the backward pass.

        Telemetry covers the parameters of one backward pass. A new pass begins when a parameter is stepped for the second time.

        Args:
            param: a parameter of this optimizer, with its gradient.

        Raises:
            ValueError: an option or the gradient does not fit; nothing was changed.
        """
        self._stepper.step_one(param, *self._scaler())

    def _scaler(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the scale and the verdict that torch's GradScaler leaves to the step in attributes of the optimizer."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    @torch._disable_dynamo
    @torch.no_grad()
    def update_hessian(
        self, *, probes: Mapping[torch.Tensor, torch.Tensor] | None = None, grad_scale: Number | None = None
    ) -> None:
        """Move every h towards the square of the gradient that its parameter holds now: ``h = b2 h + (1 - b2) g g``.

        With ``skip_nonfinite`` nothing changes if a gradient is not finite. ``max_grad_norm`` has no effect here: clipping
        would change h by the square of the factor.

        Args:
            probes: parameter -> tensor u of its shape; the gradients are then products H u with the Hessian, and
                ``h = b2 h + (1 - b2) u Hu`` (Hutchinson).
            grad_scale: a float or a tensor that the gradients are divided by first: the scale of a GradScaler whose
                ``unscale_`` has not been called. None: 1.

        Raises:
            ValueError: an option or a gradient does not fit; nothing was changed.
        """
        self._stepper.update_hessian(probes, grad_scale)

    @torch.no_grad()
    def update_parameter_hessian(self, param: torch.Tensor) -> None:
        """Update h of one parameter from the gradient that it holds; `soul.curvature` calls this in the backward pass.

        Args:
            param: a parameter of this optimizer, with its gradient.

        Raises:
            ValueError: an option or the gradient does not fit; nothing was changed.
        """
        self._stepper.update_hessian_of_one(param)

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor | None:
        """Return the L2 norm of all gradients before clipping, fp32 [] on the device, without waiting for it.

        If an option needed the norm in the last step, this is the norm of that step. Otherwise it is computed from the
        gradients that the parameters hold now: one pass over them, by the optimizer's own tables, so that a CUDA graph can
        capture it. With DTensors every process must call this.

        Returns:
            The norm, or None if no parameter has a gradient. The next step may overwrite the tensor.
        """
        return self._stepper.grad_norm()

    def clip_fraction(self) -> list[float]:
        """Return the fraction of the coordinates that the last ``step()`` clipped, so that they moved by the full lr.

        It is the number to tune ``rho`` by; Sophia's authors advise 0.5 to 0.9. This waits for the device. With DTensors every
        process must call it.

        Returns:
            One float a group: NaN if the last step had no gradients there, 0 if the step was skipped.

        Raises:
            ArgumentError: as in `telemetry`.
        """
        return [group["clip_fraction"] for group in self.telemetry()["groups"]]

    def telemetry(self) -> dict[str, Any]:
        """Return the telemetry of the last step; wait for the device.

        With DTensors, and under DeepSpeed's ZeRO, every process must call this: it adds up over shards or pieces. ZeRO fills
        pieces up to one size, and what it fills them up with is among the coordinates.

        Returns:
            A dict: ``groups``, for each group a dict of ``clip_fraction``, ``update_norm`` (the L2 norm of the update before
            rounding; NaN under ZeRO-3), ``lost_fraction`` (of the coordinates, those whose update was lost in rounding to
            nearest; 0 with other roundings), ``rho`` and ``numel``, the coordinates; ``skipped_steps`` since the optimizer was
            made or loaded; and ``grad_norm``, before clipping, or None if the step did not need it. NaN for a group without
            gradients in the last step.

        Raises:
            ArgumentError: under FSDP1 the optimizer counts its own process's piece alone.
        """
        return self._stepper.telemetry()

    @torch.no_grad()
    def export_fp32(self) -> Fp32Parameters:
        """Return the parameters in fp32, with the 8 more bits that "compensated" keeps of each weight.

        Returns:
            A dict, parameter -> fp32 tensor, that is also a context manager: ``with optimizer.export_fp32():
            evaluate(model)`` puts the fp32 values into the model and takes them out again; to save them, ``{n: fp32[p] for
            n, p in named_parameters()}``. The value of a DTensor is that of this process's shard.
        """
        self._stepper.wait()
        params = [param for group in self.param_groups for param in group["params"]]
        return Fp32Parameters({param: joined(param, self.state.get(param, {})) for param in params})

    @torch.no_grad()
    def import_fp32(self, values: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Put fp32 values into the parameters and, with "compensated", their next 8 bits into the states.

        The values that `export_fp32` has returned are restored exactly. Others are rounded to the nearest 24-bit weight, or,
        without "compensated", to the nearest number of the parameter's dtype.

        Args:
            values: a dict, parameter -> fp32 tensor of its shape; for a DTensor, of the shape of this process's shard.
                Parameters that are not in it keep their values.

        Raises:
            ValueError: a value does not fit its parameter, or belongs to a parameter of another optimizer; nothing was
                changed.
        """
        if not isinstance(values, Mapping):
            remedy = "pass the return value of export_fp32()"
            raise argument_error("import_fp32", "a dict, parameter -> fp32 tensor", type(values).__name__, remedy)
        positions = {p: (i, j) for i, group in enumerate(self.param_groups) for j, p in enumerate(group["params"])}
        for param, value in values.items():
            if param not in positions:
                got = f"{'a tensor' if isinstance(param, torch.Tensor) else repr(param)} that is none of them"
                raise argument_error("import_fp32", "parameters of this optimizer as keys", got, "pass {parameter: value}")
            index, position = positions[param]
            name = f"import_fp32 of parameter {position} in group {index}"
            check_fp32(name, param, self.state.get(param, {}), value)
        self._stepper.wait()
        for param, value in values.items():
            group = self.param_groups[positions[param][0]]
            if param.dtype != torch.float32 and rounding_of(group) == "compensated" and not self.state.get(param):
                self.state[param] = State(new_state(param, group, counters_of(self.hessian_in_step)))
            store_fp32(param, self.state.get(param, {}), value)

    def export_published(self) -> dict[str, Any]:
        """Return a checkpoint for the published class, Sophia's or SOUL's.

        8-bit states are decoded; the published class would take the codes in a plain ``state_dict()`` for values. The options
        are those of the published class, as numbers. It has no option ``bs``, which goes to its ``step(bs=...)``, and none for
        other features of this class, such as ``bias_correction``. SOUL's code averages the momentum with beta1 squared: a
        `SOUL` without ``published_code`` exports the square root of its beta1. The low bits of weights are not exported: see
        `export_fp32`.

        Returns:
            A dict that shares no memory with the optimizer: ``state`` (``step``, ``exp_avg``, ``hessian``, the last two fp32 or
            bf16) and ``param_groups``.
        """
        checkpoint = self.state_dict()
        groups = [published_options(group, self._published_betas(group), self.defaults) for group in checkpoint["param_groups"]]
        states = {key: published_state(state) for key, state in checkpoint["state"].items()}
        return {"state": states, "param_groups": [group | {"params": list(group["params"])} for group in groups]}

    def state_dict(self) -> dict[str, Any]:
        """Return the states and the options, as ``torch.optim.Optimizer`` does, which `load_state_dict` takes."""
        self._stepper.wait()
        checkpoint = super().state_dict()
        states = {key: dict(state) if isinstance(state, State) else state for key, state in checkpoint["state"].items()}
        return checkpoint | {"state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict()`` of this class or of the published one.

        States keep the dtype in which they were saved, whereas ``torch.optim.Optimizer`` casts them to that of their parameter;
        those of a published checkpoint are brought to this optimizer's ``state_dtype``. Options that the checkpoint does not
        have stay as they are. ``backend``, ``capturable`` and ``state_offload``, which belong to the machine and to the run,
        stay in any case.

        ``published_code`` of a `SOUL`, which decides the meaning of beta1, is taken from the checkpoint together with beta1.
        Checkpoints of the published class do not have it: a SOUL loads them with ``published_code=True`` only. The groups of a
        checkpoint carry the version of the noise as ``noise``: shards that draw noise refuse another version.

        Raises:
            ValueError: the checkpoint does not fit the parameters, the class or the noise; nothing was changed.
        """
        release = self.gradient_release  # torch calls __setstate__, which forgets it
        states: dict[torch.Tensor, dict[str, Any]] = {}

        def merge(optimizer: Optimizer, checkpoint: dict[str, Any]) -> dict[str, Any]:
            """Check and merge the checkpoint as the user's own hooks, which run before, have left it."""
            if len(checkpoint["param_groups"]) != len(self.param_groups):
                return checkpoint  # torch raises, and says why
            counters = counters_of(self.hessian_in_step)
            options, loaded = loaded_checkpoint(self.param_groups, checkpoint, counters, released=release is not None)
            states.update(loaded)
            keys = {key for group in checkpoint["param_groups"] for key in group["params"]}
            others = {key: value for key, value in checkpoint["state"].items() if key not in keys}
            return checkpoint | {"param_groups": options, "state": others}  # torch would move all states to the device

        def put_states(optimizer: Optimizer) -> None:
            """Put in the loaded states; the user's own hooks run after this."""
            self.state.update({param: State(state) for param, state in states.items()})
            for group in self.param_groups:
                settle_options(group)
            self._reset()

        before = self.register_load_state_dict_pre_hook(merge)
        after = self.register_load_state_dict_post_hook(put_states, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
            self.gradient_release = release

    def momentum_decay(self, group: ParamGroup) -> float:
        """Return the decay of the momentum that acts in a group: its beta1, unless a subclass overrides this."""
        return group["betas"][0]

    def _published_betas(self, group: ParamGroup) -> tuple[float, float]:
        """Return the betas with which the published class averages as this one does."""
        return group["betas"]
