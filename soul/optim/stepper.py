"""The steps of an optimizer: one call of an op for each step group, and the telemetry of the last step.

In a step `Stepper` collects the step groups (`soul.optim.step_groups`), computes the norm of all gradients if an option
needs it (`soul.optim.gradients`), and calls one op for each step group. With several step groups all calls are checked before
the first one changes anything. Nothing waits for the device but `Stepper.telemetry`.

A `Stepper` holds nothing that a checkpoint needs. A new one can replace it between any two steps: the next step is slower, and
telemetry starts anew.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from soul.distributed.shards import local
from soul.optim.gradients import gradient_factor, moved, norm_and_skip, not_finite, total_norm
from soul.optim.offload import Transfers
from soul.optim.options import ON_DEVICE, Number, ParamGroup, option_on, rounding_of
from soul.optim.step_groups import GroupedOptimizer, GroupWork, StepGroup, StepGroups
from soul.optim.telemetry import check_counts_all, group_telemetry, steer_rho
from soul_kernels import Guards, StepOptions, StepTensors
from soul_kernels.backends import resolve_backend
from soul_kernels.bundles import NO_GUARDS
from soul_kernels.errors import argument_error
from soul_kernels.tensors import check_overlap

HESSIAN_NOISE = 1 << 62  # update_hessian draws other noise than step


class SteppedOptimizer(GroupedOptimizer, Protocol):
    """What a `Stepper` needs of an optimizer, a `soul.SophiaG`."""

    def momentum_decay(self, group: ParamGroup) -> float:
        """Return the decay of the momentum that acts in a group."""


class Stepper:
    """Steps an optimizer, and keeps what is derived from its groups and states.

    Args:
        optimizer: a `soul.SophiaG`; it is not kept alive.

    Attributes:
        step_groups: the `StepGroups` of the optimizer.
        stepped: id of a parameter group -> its step groups in the last step. ZeRO makes several calls of one step.
        transfers: device -> the way of offloaded states between main memory and this device.
    """

    def __init__(self, optimizer: SteppedOptimizer) -> None:
        self._optimizer = weakref.proxy(optimizer)  # not a cycle, as in `StepGroups`
        self.step_groups = StepGroups(optimizer)
        self.stepped: dict[int, list[StepGroup]] = {}
        self._norms: dict[torch.device, torch.Tensor] = {}  # device -> memory of a norm, which stays the same
        self._norm: torch.Tensor | None = None  # norm of the last step, or None if that step needed none
        self._skipped: torch.Tensor | None = None  # number of skipped steps
        self._versions: list[int] = []  # of the steps of all step groups, when parameters were last checked for overlap
        self._numel: int | None = None  # elements of all parameters
        self.transfers: dict[torch.device, Transfers] = {}

    def group_added(self) -> None:
        """Let groups, and the elements of all parameters, be counted anew."""
        self._numel = None
        self.step_groups.n_groups = len(self._optimizer.param_groups)

    def step(
        self, bs: Number | None, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None, *, released: bool
    ) -> None:
        """Step all parameters that have gradients.

        Args:
            bs: overrides the groups' ``bs``, or None.
            grad_scale: the scale of a GradScaler that has not unscaled the gradients, or None.
            found_inf: the GradScaler's verdict, or None.
            released: whether gradients are released in the backward pass. Then nothing is left to do if no parameter has a
                gradient, and telemetry stays that of the backward pass.

        Raises:
            ArgumentError: an option or a gradient does not fit; nothing was changed.
        """
        work = self.step_groups.collect(bs)
        if released and not any(group_work.step_groups for group_work in work):
            return
        try:
            self._run(work, bs, grad_scale, found_inf)
        except ValueError:
            self.step_groups.check_gradients()  # its errors name parameters; those of the ops name entries of lists
            raise
        if not self._goes_on(work):
            self.stepped = {}
        for group_work in work:
            self.stepped.setdefault(id(group_work.group), []).extend(group_work.step_groups)

    def _goes_on(self, work: list[GroupWork]) -> bool:
        """Tell whether this is more of the last step: DeepSpeed's ZeRO steps its pieces in one call after the other."""
        pieces = [step_group.params[0] for step_group in _step_groups(work) if step_group.is_piece]
        if not pieces:
            return False
        stepped = {id(step_group.params[0]) for step_groups in self.stepped.values() for step_group in step_groups}
        return not any(id(piece) in stepped for piece in pieces)

    def step_one(self, param: torch.Tensor, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
        """Step one parameter; arguments as in `step`."""
        group_work = self.step_groups.collect_one(param)
        (step_group,) = group_work.step_groups
        index, _ = self.step_groups.position_of(param)
        stepped = self.stepped.setdefault(id(self._optimizer.param_groups[index]), [])
        if step_group in stepped:  # another backward pass has begun
            stepped.clear()
        stepped.append(step_group)
        self._run([group_work], None, grad_scale, found_inf)

    def _run(
        self,
        work: list[GroupWork],
        bs: Number | None,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        """Step what was collected; if an op refuses its arguments, nothing is changed."""
        hessian_in_step = self._optimizer.hessian_in_step
        norm, skip = norm_and_skip(work, grad_scale, found_inf)
        all_step_groups = _step_groups(work)
        steps: list[Callable[[], object]] = []
        params = {step_group: step_group.dense_params() for step_group in all_step_groups}
        self._divide(work, params)
        for group, options_version, step_groups, all_grads in work:
            for step_group, grads in zip(step_groups, all_grads):
                corrections = None
                if group["bias_correction"]:
                    updates = step_group.count("step") + 1 if hessian_in_step else step_group.count("hessian_step")
                    corrections = step_group.corrections(group["betas"][1], updates)
                guards = NO_GUARDS
                if norm is not None or skip is not None or grad_scale is not None:
                    guards = Guards(
                        grad_factor=gradient_factor(group, norm, grad_scale, step_group.device),
                        skip=moved(skip, step_group.device),
                    )
                numbers = {name: option_on(group[name], step_group.device) for name in ON_DEVICE}
                if bs is not None:
                    numbers["bs"] = option_on(bs, step_group.device)
                prepared_for = options_version, self._optimizer.momentum_decay(group)
                if step_group.has_same_states() and step_group.prepared_for == prepared_for:
                    step = step_group.step.prepare_again(params[step_group], grads, numbers, guards=guards)
                    if step is not None:
                        steps.append(step)
                        continue
                options = StepOptions(
                    **numbers,
                    beta1=self._optimizer.momentum_decay(group),
                    eps=group["eps"],
                    beta2=group["betas"][1] if hessian_in_step else None,
                    maximize=group["maximize"],
                    eps_mode=group["eps_mode"],
                    param_rounding=rounding_of(group),
                    corrections=corrections,
                )
                others: dict[str, Any] = dict(
                    noise=step_group.noise(group["seed"], "step"),
                    guards=guards,
                    telemetry=step_group.telemetry,
                    backend=self._backend(group, step_group),
                )
                if group["state_offload"]:
                    transfers = self.transfers[step_group.device]
                    steps += step_group.offloaded.steps(transfers, params[step_group], grads, options, **others)
                    continue
                tensors = StepTensors(params[step_group], grads, **step_group.lists())
                steps.append(step_group.step.prepare(tensors, options, **others))
                step_group.prepared_for = prepared_for
        if len(steps) > 1:
            versions = [step_group.version for step_group in all_step_groups]
            if versions != self._versions:  # each step has seen the tensors of its own step group, or bucket, only
                check_overlap({"parameters": [p for tensors in params.values() for p in tensors]})
                self._versions = versions
        _clear([step_group.telemetry for step_group in all_step_groups])
        for call in steps:
            call()
        self._norm = self._in_fixed_memory(norm)
        _count(all_step_groups, "step", skip)
        for group, _, step_groups, _ in work:
            for step_group in step_groups:
                step_group.copy_back()
            if group["clip_target"] is not None and step_groups:
                steer_rho(group, step_groups, skip, hessian_in_step)
        if skip is not None:
            if self._skipped is None:
                self._skipped = torch.zeros_like(skip, dtype=torch.float64)
            self._skipped.add_(moved(skip, self._skipped.device))  # in place, so that replays add to it as well

    def update_hessian(self, probes: Mapping[torch.Tensor, torch.Tensor] | None, grad_scale: Number | None) -> None:
        """Update h of all parameters that have gradients; see `soul.SophiaG.update_hessian`."""
        work = self.step_groups.collect()
        try:
            self._update_hessian(work, probes, grad_scale)
        except ValueError:
            self.step_groups.check_gradients()  # as in step
            raise

    def update_hessian_of_one(self, param: torch.Tensor) -> None:
        """Update h of one parameter."""
        self._update_hessian([self.step_groups.collect_one(param)])

    def _update_hessian(
        self,
        work: list[GroupWork],
        probes: Mapping[torch.Tensor, torch.Tensor] | None = None,
        grad_scale: Number | None = None,
    ) -> None:
        """Update h of what was collected; if an op refuses its arguments, nothing is changed."""
        skip = None
        # Scaled gradients overflow as a matter of course, and inf would stay in h for good.
        if grad_scale is not None or any(group_work.group["skip_nonfinite"] for group_work in work):
            norm = total_norm(work)
            skip = None if norm is None else not_finite(norm)
        updates: list[Callable[[], object]] = []
        offloaded = _step_groups([group_work for group_work in work if group_work.group["state_offload"]])
        params = {step_group: step_group.dense_params() for step_group in offloaded}
        read = {} if probes is None else {each: self._probes(probes, each) for each in _step_groups(work)}
        self._divide(work, params, ("hessian", "hessian_scale"), read)
        for group, _, step_groups, all_grads in work:
            for step_group, grads in zip(step_groups, all_grads):
                factor = None
                if grad_scale is not None:
                    one = torch.ones((), dtype=torch.float32, device=step_group.device)
                    factor = one / moved(grad_scale, step_group.device)
                others: dict[str, Any] = dict(
                    beta2=group["betas"][1],
                    probes=read.get(step_group),
                    noise=step_group.noise(HESSIAN_NOISE + group["seed"], "hessian_step"),
                    guards=Guards(grad_factor=factor, skip=moved(skip, step_group.device)),
                    backend=self._backend(group, step_group),
                )
                if group["state_offload"]:
                    transfers = self.transfers[step_group.device]
                    updates += step_group.offloaded.updates(transfers, params[step_group], grads, **others)
                    continue
                states = step_group.lists("hessian", "hessian_scale")
                scales = states.get("hessian_scales")
                updates.append(step_group.hessian_ema.prepare(states["hessians"], grads, hessian_scales=scales, **others))
        for update in updates:
            update()
        _count(_step_groups(work), "hessian_step", skip)

    def _divide(
        self,
        work: list[GroupWork],
        params: dict[StepGroup, list[torch.Tensor]],
        states: tuple[str, ...] = (),
        probes: Mapping[StepGroup, list[torch.Tensor]] | None = None,
    ) -> None:
        """Check what is offloaded, divide it into buckets, and make room for these on the devices.

        Args:
            work: the work of the step.
            params: the parameters of each step group, dense.
            states: names of the states that are needed; (): all.
            probes: those of each step group, or nothing.
        """
        for group, _, step_groups, all_grads in work:
            if not group["state_offload"]:
                continue
            for step_group, grads in zip(step_groups, all_grads):
                read = {"grads": grads} | ({"probes": probes[step_group]} if probes else {})
                nbytes = step_group.offloaded.divide(params[step_group], read, step_group.lists(*states))
                if step_group.device not in self.transfers:
                    self.transfers[step_group.device] = Transfers(step_group.device)
                self.transfers[step_group.device].reserve(nbytes)

    def wait(self) -> None:
        """Wait until all offloaded states are in main memory."""
        for transfers in self.transfers.values():
            transfers.wait()

    def _probes(self, probes: Mapping[torch.Tensor, torch.Tensor], step_group: StepGroup) -> list[torch.Tensor]:
        """Return the probes of the parameters of a step group."""
        return step_group.locals([self._probe(probes, param) for param in step_group.params])

    def _probe(self, probes: Mapping[torch.Tensor, torch.Tensor], param: torch.Tensor) -> torch.Tensor:
        """Return the probe of a parameter."""
        if param not in probes:
            index, position = self.step_groups.position_of(param)
            got = f"none for parameter {position} in group {index}"
            raise argument_error("probes", "one for every parameter with a gradient", got, "clear its gradient, or add a probe")
        return probes[param]

    def grad_norm(self) -> torch.Tensor | None:
        """Return the norm of the gradients; see `soul.SophiaG.grad_norm`."""
        return total_norm(self.step_groups.collect()) if self._norm is None else self._norm

    def telemetry(self) -> dict[str, Any]:
        """Return the telemetry of the last step; see `soul.SophiaG.telemetry`."""
        for step_groups in self.stepped.values():
            check_counts_all(step_groups)
        param_groups = self._optimizer.param_groups
        return {
            "groups": [group_telemetry(group, self.stepped.get(id(group), [])) for group in param_groups],
            "skipped_steps": 0 if self._skipped is None else int(self._skipped),
            "grad_norm": None if self._norm is None else float(self._norm),
        }

    def _backend(self, group: ParamGroup, step_group: StepGroup) -> str:
        """Return the backend of a step group. "auto" goes by all parameters, even if they are stepped one at a time."""
        if group["backend"] != "auto" or step_group.device.type != "cpu":
            return group["backend"]
        if self._numel is None:
            self._numel = sum(local(param).numel() for each in self._optimizer.param_groups for param in each["params"])
        return resolve_backend("auto", local(step_group.params[0]), compiled=self._numel)

    def _in_fixed_memory(self, norm: torch.Tensor | None) -> torch.Tensor | None:
        """Return a copy of a norm in memory that stays the same, so that replays of several CUDA graphs all write there."""
        if norm is None:
            return None
        if norm.device not in self._norms:
            self._norms[norm.device] = torch.empty_like(norm)
        return self._norms[norm.device].copy_(norm)


def _step_groups(work: list[GroupWork]) -> list[StepGroup]:
    """Return the step groups of all parameter groups."""
    return [step_group for group_work in work for step_group in group_work.step_groups]


def _clear(tensors: list[torch.Tensor]) -> None:
    """Set tensors to 0, in one launch where it can be."""
    if len(tensors) > 1:
        torch._foreach_zero_(tensors)
    else:
        for tensor in tensors:
            tensor.zero_()


def _count(step_groups: list[StepGroup], counter: str, skip: torch.Tensor | None) -> None:
    """Add 1 to a counter of all states, unless ``skip``, from `norm_and_skip`, is 1; one launch where it can be."""
    counts = [step_group.count(counter) for step_group in step_groups]
    if skip is None and len(counts) > 1:
        torch._foreach_add_(counts, 1)
        return
    for count in counts:
        count.add_(1 if skip is None else 1 - moved(skip, count.device))
