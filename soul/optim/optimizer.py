"""SophiaG and SOUL: states, groups and checkpoints. The arithmetic is in ``soul_kernels``."""

import functools
import sys
from collections.abc import Mapping

import torch
from torch.optim import Optimizer

from soul.distributed.shards import hidden_sharding, is_sharded, local
from soul.optim.options import (
    check_bs,
    check_group,
    check_momentum,
    check_options,
    check_releasable,
    check_values,
    merged_options,
    option_on,
    published_options,
    rounding_of,
    settle_options,
)
from soul.optim.parts import COUNTERS, Parts
from soul.optim.states import (
    NOISE,
    Fp32Parameters,
    check_fp32,
    check_noise,
    check_not_exported,
    loaded_state,
    new_state,
    published_state,
    store_fp32,
)
from soul_kernels import grad_norm, hessian_ema, sophia_step
from soul_kernels.backends import resolve_backend
from soul_kernels.errors import argument_error
from soul_kernels.reference.rounding import join
from soul_kernels.tensors import check_overlap

HESSIAN_NOISE = 1 << 62  # update_hessian draws other noise than step


class _TrueForGradScaler:
    """True where torch's GradScaler asks, which then leaves its scale and its verdict to the step; False for all others.

    Trainers that ask clip gradients between unscaling and the step. Lightning refuses to do so where the answer is True, even
    in bf16, without a scaler. Where it is False, it unscales first, and the scaler tells the step so.
    """

    def __get__(self, optimizer, owner=None):
        return sys._getframe(1).f_globals.get("__name__") == "torch.amp.grad_scaler"


class SophiaG(Optimizer):
    """Sophia with the published two calls, each one pass over memory, per element in fp32::

        step():           m = b1 m + (1 - b1) g
                          p = p - lr (weight_decay p + clamp(m / (rho bs max(h, 0) + eps), -1, 1))
        update_hessian(): h = b2 h + (1 - b2) g g

    Liu et al. 2023 (arXiv 2305.14342), algorithm 3, as coded in the published class, whose checkpoints load here. Call
    ``update_hessian()`` every k steps while the gradients are those of a loss with labels sampled from the model, or let
    ``soul.curvature`` do it.

    Nothing in ``step()`` waits for the device.

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
        max_grad_norm: the gradients, all groups' together, are scaled to this L2 norm where theirs is larger, as
            ``clip_grad_norm_`` does, but within the step: they are not changed, and nothing is rounded in between. Under
            DeepSpeed's ZeRO and FSDP1 the optimizer sees one process's piece of the gradients: there this option, rho="auto"
            and ``skip_nonfinite`` are refused. Under torch's ZeroRedundancyOptimizer, which cannot be told from a whole model,
            leave them out as well.
        param_rounding: how parameters below fp32 are stored: "nearest", "stochastic" or "compensated" (8 more bits in the state
            ``low_bits``; see `export_fp32`). "auto" is "compensated". fp32 parameters are stored exactly in any case. Where
            you write other values into a parameter, what is left in ``low_bits`` adds up to half a unit in its last place.
        state_dtype: torch.float32, torch.bfloat16 or "8bit" for both states. None: h in fp32, and m in bf16 for bf16
            parameters, else in fp32. h in bf16, and both in 8 bits, are rounded stochastically.
        backend: "auto" (Triton on a GPU; on a CPU "compile" from 16.8 million parameters on; else the reference), "triton",
            "compile" (the reference under torch.compile, the same bits) or "reference". See docs/running.md.
        skip_nonfinite: a step whose gradients, of any group, are not all finite changes nothing, and is counted in `telemetry`.
            False lets NaN and inf through, as torch does.
        clip_target: fraction of the coordinates to be clipped, with rho="auto" only (default 0.5).
        bias_correction: h is divided by ``1 - b2^t``, t the number of its updates, where it is used.
        eps_mode: "add" as published, or "max" as in the papers: ``m / max(rho bs h, eps)``.
        seed: of the noise of stochastic rounding, which is a hash of (seed, tensor, step, element). Shards of rows (FSDP2) draw
            what one process draws. Checkpoints carry the version of the noise in their groups' ``noise``.

    Raises:
        ValueError: naming the argument, what was expected, what came, and the remedy.
    """

    _step_supports_amp_scaling = _TrueForGradScaler()  # the scale and the verdict are then in grad_scale and found_inf

    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.965, 0.99),
        rho=0.04,
        weight_decay=0.1,
        *,
        bs=5120,
        eps=1e-15,
        maximize=False,
        capturable=False,
        max_grad_norm=None,
        param_rounding="auto",
        state_dtype=None,
        backend="auto",
        skip_nonfinite=False,
        clip_target=None,
        bias_correction=False,
        eps_mode="add",
        seed=0,
    ):
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
            noise=NOISE,  # no choice: checkpoints carry the version
        )
        check_values(defaults)  # an option that is wrong is named even where the parameters are wrong as well
        self._reset()
        super().__init__(params, defaults)

    def _reset(self):
        """Forgets what was derived from groups and states."""
        self._parts = Parts(self)
        self._stepped = {}  # group index -> parts of the last step, for telemetry
        self._norms = {}  # device -> the norm of the gradients in the last step there, always in the same place
        self._norm = self._skipped = None
        self._versions = []  # of the parts' tables, when parameters were last checked for overlap
        self._release = None  # the GradientRelease that steps this optimizer
        self._numel = None  # elements of all parameters

    def __getstate__(self):
        derived = ("_parts", "_stepped", "_norm", "_norms", "_skipped", "_versions", "_release", "_numel")
        return {name: value for name, value in super().__getstate__().items() if name not in derived}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._reset()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch has put it there, and no checkpoint has it
                    group.setdefault(name, value)

    def add_param_group(self, param_group):
        """Adds a group, as in ``torch.optim.Optimizer``; its options and parameters are checked."""
        super().add_param_group(param_group)
        self._numel = None
        group = self.param_groups[-1]
        try:
            check_group(group, len(self.param_groups) - 1)
            settle_options(group)
        except ValueError:
            self.param_groups.pop()  # nothing is changed by a refused group
            raise

    @torch._disable_dynamo  # torch.compile does not look inside: there is nothing in it to fuse
    @torch.no_grad()
    def step(self, closure=None, bs=None):
        """One optimization step.

        Args:
            closure: recomputes the loss and the gradients, and returns the loss.
            bs: overrides the groups' ``bs`` for this step.

        Returns:
            What the closure returned, or None.

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
            if self._release is not None:
                self._check_released_step(bs)
            work = self._parts.collect(bs)
            if self._release is None or any(parts for _, parts in work):
                try:
                    self._run(work, bs)
                except ValueError:
                    self._parts.check_gradients()  # the ops know positions in lists; this names the parameter, where it is one
                    raise
                self._stepped = {index: [part for part, _ in parts] for index, (_, parts) in enumerate(work)}
        except Exception:
            for name in ("grad_scale", "found_inf"):  # GradScaler takes them back after a step that succeeds
                self.__dict__.pop(name, None)
            raise
        return loss

    def _check_released_step(self, bs):
        if getattr(self, "found_inf", None) is not None:
            got = "one, and all parameters have been stepped with scaled gradients"
            raise argument_error("GradScaler", "no scaler with gradient release", got, "train in bf16, which needs none")
        if bs is not None:
            raise argument_error("bs", "None with gradient release", bs, "the steps have been taken: set the groups' bs")

    @torch.no_grad()
    def _step_of(self, param):
        """Steps one parameter, whose gradient has just arrived, for `release_gradients`."""
        work = self._parts.of(param)
        part = work[0][1][0][0]
        stepped = self._stepped.setdefault(self._parts.place(param)[0], [])
        if part in stepped:  # the first parameter of another backward pass
            stepped.clear()
        stepped.append(part)
        self._run(work)

    def _run(self, work, bs=None):
        """Steps the parts in ``work``: [(group, [(part, gradients)])]."""
        norm, skip = self._norm_and_skip(work)
        calls, params = [], []
        for group, parts in work:
            for part, grads in parts:
                in_step = self._beta2_in_step(group)
                corrections = None
                if group["bias_correction"]:
                    updates = part.count("hessian_step") if in_step is None else part.count("step") + 1
                    corrections = part.corrections(group["betas"][1], updates)
                part.telemetry.zero_()
                params.append(part.params_in())
                call = functools.partial(
                    sophia_step,
                    params[-1],
                    grads,
                    **part.lists(),
                    lr=option_on(group["lr"], part.device),
                    weight_decay=option_on(group["weight_decay"], part.device),
                    rho=option_on(group["rho"], part.device),
                    bs=option_on(group["bs"] if bs is None else bs, part.device),
                    beta1=self._beta1(group),
                    beta2=in_step,
                    eps=group["eps"],
                    maximize=group["maximize"],
                    eps_mode=group["eps_mode"],
                    param_rounding=rounding_of(group),
                    corrections=corrections,
                    seed=group["seed"],
                    tensor_ids=part.tensor_ids,
                    tensor_offsets=part.tensor_offsets,
                    steps=part.count("step"),
                    grad_factor=self._factor(group, norm, part.device),
                    skip=_move(skip, part.device),
                    telemetry=part.telemetry,
                    table=part.table,
                    backend=self._backend(group, part),
                )
                calls.append(call)
        if len(calls) > 1:
            for call in calls:
                call(check_only=True)
            versions = [part.table.version for _, parts in work for part, _ in parts]
            if versions != self._versions:  # the op has seen the tensors of one part at a time
                check_overlap({"parameters": [p for tensors in params for p in tensors]})
                self._versions = versions
        for call in calls:
            call()
        self._norm = self._keep(norm)
        for group, parts in work:
            for part, _ in parts:
                part.copy_back()
                part.count("step").add_(1 if skip is None else 1 - _move(skip, part.device))
            if group["clip_target"] is not None and parts:
                self._steer(group, [part for part, _ in parts], skip)
        if skip is not None:
            if self._skipped is None:
                self._skipped = torch.zeros_like(skip, dtype=torch.float64)
            self._skipped.add_(_move(skip, self._skipped.device))  # in place: a replay adds as well

    @torch._disable_dynamo
    @torch.no_grad()
    def update_hessian(self, *, probes=None, grad_scale=None):
        """Moves every h towards the square of the gradient that its parameter holds now: ``h = b2 h + (1 - b2) g g``.

        With ``skip_nonfinite`` it changes nothing where a gradient is not finite. ``max_grad_norm`` plays no part here:
        clipping would change h by the square of the factor.

        Args:
            probes: parameter -> tensor u of its shape; the gradients are then products H u with the Hessian, and
                ``h = b2 h + (1 - b2) u Hu`` (Hutchinson).
            grad_scale: what the gradients are divided by first: a GradScaler's scale, a float or a tensor, unless
                ``unscale_`` has been called. None: 1.

        Raises:
            ValueError: an option or a gradient does not fit; nothing was changed.
        """
        work = self._parts.collect()
        try:
            self._update_hessian(work, probes, grad_scale)
        except ValueError:
            self._parts.check_gradients()  # as in step
            raise

    @torch.no_grad()
    def _update_hessian_of(self, param):
        """Updates h of one parameter, whose gradient has just arrived, for `soul.curvature`."""
        self._update_hessian(self._parts.of(param))

    def _update_hessian(self, work, probes=None, grad_scale=None):
        skip = None
        if grad_scale is not None or any(group["skip_nonfinite"] for group, _ in work):  # scaled gradients overflow as a matter
            skip = self._not_finite(self._total_norm(work))  # of course, and inf would stay in h for good
        calls = []
        for group, parts in work:
            for part, grads in parts:
                factor = None
                if grad_scale is not None:
                    factor = torch.ones((), dtype=torch.float32, device=part.device) / _move(grad_scale, part.device)
                call = functools.partial(
                    hessian_ema,
                    **part.lists("hessian", "hessian_scale"),
                    grads=grads,
                    probes=None if probes is None else part.locals([self._probe(probes, p) for p in part.params]),
                    beta2=group["betas"][1],
                    seed=HESSIAN_NOISE + group["seed"],
                    tensor_ids=part.tensor_ids,
                    tensor_offsets=part.tensor_offsets,
                    steps=part.count("hessian_step"),
                    grad_factor=factor,
                    skip=_move(skip, part.device),
                    table=part.hessian_table,
                    backend=self._backend(group, part),
                )
                calls.append(call)
        if len(calls) > 1:
            for call in calls:
                call(check_only=True)
        for call in calls:
            call()
        for _, parts in work:
            for part, _ in parts:
                part.count("hessian_step").add_(1 if skip is None else 1 - _move(skip, part.device))

    def _probe(self, probes, param):
        if param not in probes:
            index, position = self._parts.place(param)
            got = f"none for parameter {position} in group {index}"
            raise argument_error("probes", "one for every parameter with a gradient", got, "clear its gradient, or add a probe")
        return probes[param]

    def clip_fraction(self):
        """Fraction of the coordinates that the last ``step()`` clipped, so that they moved by the full lr: the number to tune
        ``rho`` by. Sophia's authors advise 0.5 to 0.9. Waits for the device; with DTensors every process must call it.

        Returns:
            One float a group; NaN where the last step had no gradients, 0 where it was skipped.

        Raises:
            ArgumentError: as in `telemetry`.
        """
        return [group["clip_fraction"] for group in self.telemetry()["groups"]]

    def telemetry(self):
        """What the last step left on the device; reading it waits for the device. With DTensors every process must call it: it
        adds up over shards.

        Returns:
            A dict: ``groups``, for each group a dict of ``clip_fraction``, ``update_norm`` (the L2 norm of what was to be
            subtracted), ``lost_fraction`` (coordinates where rounding to nearest lost it; 0 with other roundings) and ``rho``;
            ``skipped_steps`` since the optimizer was made or loaded; and ``grad_norm``, before clipping, or None where the step
            did not need it. NaN for a group without gradients in the last step.

        Raises:
            ArgumentError: under DeepSpeed's ZeRO or FSDP1 the optimizer counts its own process's piece alone.
        """
        for part in (part for parts in self._stepped.values() for part in parts):
            framework = hidden_sharding(part.params)
            if framework is not None:
                got, remedy = f"one process's piece under {framework}", "measure in one process, or under FSDP2"
                raise argument_error("telemetry", "an optimizer of whole parameters or DTensors", got, remedy)
        groups = []
        for index, group in enumerate(self.param_groups):
            parts = self._stepped.get(index, [])
            totals = sum(
                (part.sum_over_shards(part.telemetry.clone()).cpu() for part in parts),
                torch.zeros(3, dtype=torch.float64, device="cpu"),
            )
            clipped, lost, squares = totals.tolist()
            numel = sum(part.numel for part in parts) or float("nan")
            groups.append(
                {
                    "clip_fraction": clipped / numel,
                    "update_norm": squares**0.5 if parts else float("nan"),
                    "lost_fraction": lost / numel,
                    "rho": float(group["rho"]),
                }
            )
        skipped = 0 if self._skipped is None else int(self._skipped)
        return {"groups": groups, "skipped_steps": skipped, "grad_norm": None if self._norm is None else float(self._norm)}

    def export_fp32(self):
        """The parameters in fp32: with the 8 more bits that "compensated" keeps, else as they are.

        Returns:
            A dict, parameter -> fp32 tensor, that is also a context manager: ``with optimizer.export_fp32():
            evaluate(model)`` puts the fp32 values into the model and takes them out again; to save them, ``{n: fp32[p] for
            n, p in named_parameters()}``. Values for shards (DTensors) are those of this process's shard.
        """
        exported = Fp32Parameters()
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    value, low = local(param.detach()), self.state[param].get("low_bits") if param in self.state else None
                    check_not_exported("export_fp32", param, self.state.get(param, {}))
                    if low is not None:
                        exported[param] = join(value, local(low))
                    else:
                        exported[param] = value.to(torch.float32, copy=True)
        return exported

    @torch.no_grad()
    def import_fp32(self, values):
        """Puts fp32 values into the parameters and, with "compensated", their next 8 bits into the states.

        What `export_fp32` has returned comes back exactly. Anything else is rounded to the nearest 24-bit weight, or, with
        other roundings, to the nearest number of the parameter's dtype.

        Args:
            values: a dict, parameter -> fp32 tensor of its shape; for a DTensor of the shape of this process's shard.
                Parameters that are not in it keep their values.

        Raises:
            ValueError: a value does not fit its parameter, or is of a parameter that is not this optimizer's; nothing was
                changed.
        """
        if not isinstance(values, Mapping):
            remedy = "pass what export_fp32() has returned"
            raise argument_error("import_fp32", "a dict, parameter -> fp32 tensor", type(values).__name__, remedy)
        places = {p: (i, j, group) for i, group in enumerate(self.param_groups) for j, p in enumerate(group["params"])}
        for param, value in values.items():
            if param not in places:
                got = f"a value for {'a tensor' if isinstance(param, torch.Tensor) else repr(param)} that is none of them"
                raise argument_error("import_fp32", "parameters of this optimizer as keys", got, "pass {parameter: value}")
            index, position, _ = places[param]
            name = f"import_fp32 of parameter {position} in group {index}"
            check_fp32(name, param, self.state.get(param, {}), value)
        for param, value in values.items():
            group = places[param][2]
            if param.dtype != torch.float32 and rounding_of(group) == "compensated" and not self.state.get(param):
                self.state[param] = new_state(param, group, self._counters(group))
            store_fp32(param, self.state.get(param, {}), value)

    def export_published(self):
        """A checkpoint for the published class, Sophia's or SOUL's, as ``state_dict()`` is one for this class.

        8-bit states are decoded; in a plain ``state_dict()`` the published class would take their codes for values. The options
        are those of the published class, as numbers. It has none for ``bs``, which goes to its ``step(bs=...)``, and none for
        what else this class can do, such as ``bias_correction``. SOUL's code averages the momentum with beta1 squared: of a
        `SOUL` without ``published_code`` the square root of beta1 is exported. The low bits of weights belong to `export_fp32`.

        Returns:
            A dict of its own memory: ``state`` (``step``, ``exp_avg``, ``hessian``, the latter fp32 or bf16) and
            ``param_groups``.
        """
        checkpoint = self.state_dict()
        groups = [published_options(group, self._published_betas(group), self.defaults) for group in checkpoint["param_groups"]]
        states = {key: published_state(state) for key, state in checkpoint["state"].items()}
        return {"state": states, "param_groups": [group | {"params": list(group["params"])} for group in groups]}

    def load_state_dict(self, state_dict):
        """Loads ``state_dict()`` of this class or of the published one.

        Differs from ``torch.optim.Optimizer``: states keep the dtype that they were saved in, where torch casts them to that
        of their parameter (a published checkpoint is brought to this optimizer's ``state_dtype``); options that the checkpoint
        does not have stay as they are; ``backend`` and ``capturable``, which belong to the machine and to the run, stay in
        any case. Whether a `SOUL` does as its published code does, ``published_code``, is part of the checkpoint, as beta1 is,
        whose meaning it decides. Checkpoints of the published class do not have it: a SOUL loads them with
        ``published_code=True`` only.

        Shards that draw noise do not go on with a version of it that is not the checkpoint's ``noise``.

        Raises:
            ValueError: the checkpoint does not fit the parameters, the class or the noise; nothing was changed.
        """
        current = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        states = {}
        release = self._release  # torch calls __setstate__, which forgets it

        def take_over(optimizer, state_dict):  # runs after the user's own hooks, on what they made of the checkpoint
            saved_groups = state_dict["param_groups"]
            if len(saved_groups) != len(current):
                return state_dict  # torch says what is wrong
            options = [merged_options(c, saved) for c, saved in zip(current, saved_groups)]
            for group, saved_group, merged in zip(self.param_groups, saved_groups, options):
                check_options(merged)
                if release is not None:
                    check_releasable(merged)
                for param, key in zip(group["params"], saved_group["params"]):
                    if state_dict["state"].get(key):
                        cast = "state_dtype" not in saved_group
                        states[param] = loaded_state(param, merged, self._counters(merged), state_dict["state"][key], cast)
                        check_noise(param, merged, saved_group, states[param])
            for group, saved_group in zip(current, saved_groups):
                check_momentum(group, saved_group)
            return state_dict | {"param_groups": options}

        def put_in_place(optimizer):  # runs before the user's own hooks
            self.state.update(states)
            for group in self.param_groups:
                settle_options(group)
            self._reset()

        handle = self.register_load_state_dict_pre_hook(take_over)
        place = self.register_load_state_dict_post_hook(put_in_place, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            place.remove()
            self._release = release

    def _backend(self, group, part):
        """The backend of a part. "auto" goes by all parameters, also where they are stepped one at a time."""
        if group["backend"] != "auto" or part.device.type != "cpu":
            return group["backend"]
        if self._numel is None:
            self._numel = sum(local(param).numel() for each in self.param_groups for param in each["params"])
        return resolve_backend("auto", local(part.params[0]), compiled=self._numel)

    def _keep(self, norm):
        """Copies a norm to where `telemetry` reads it: replays of several CUDA graphs all write there."""
        if norm is None:
            return None
        if norm.device not in self._norms:
            self._norms[norm.device] = torch.empty_like(norm)
        return self._norms[norm.device].copy_(norm)

    def grad_norm(self) -> torch.Tensor | None:
        """Return the L2 norm of all gradients before clipping, fp32 [] on the device of the first ones; None without gradients.

        After a step that needed the norm it is that one, else it is computed from the gradients as they are now. Either way no
        table of tensors is made that the step has not made, so the call may be captured in a CUDA graph.
        """
        return self._total_norm(self._parts.collect()) if self._norm is None else self._norm

    def _total_norm(self, work):
        """The norm of all gradients, fp32 [] on the device of the first part; None without gradients."""
        norms = []
        for group, parts in work:
            for part, grads in parts:
                norm = grad_norm(grads, table=part.norm_table, backend=group["backend"])
                if is_sharded(part.params[0]):
                    norm = part.sum_over_shards(norm.double().square()).sqrt().float()
                norms.append(norm)
        if len(norms) > 1:
            return torch.stack([norm.to(norms[0].device, non_blocking=True) for norm in norms]).double().norm().float()
        return norms[0] if norms else None

    def _norm_and_skip(self, work):
        """The norm of the unscaled gradients, where something needs it, and whether to skip the step: fp32, 0 or 1, or None."""
        scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        # Without gradients GradScaler says 0; otherwise it adds up the verdicts of devices or ranks.
        skip = (skip.reshape(()) != 0).float() if isinstance(skip, torch.Tensor) else None
        norm = None
        if any(group["max_grad_norm"] is not None or group["skip_nonfinite"] for group, _ in work):
            norm = self._total_norm(work)
        if norm is not None and any(group["skip_nonfinite"] for group, _ in work):
            skip = self._not_finite(norm) if skip is None else torch.maximum(self._not_finite(norm), _move(skip, norm.device))
        if norm is not None and scale is not None:
            norm = norm / _move(scale, norm.device)
        return norm, skip

    @staticmethod
    def _not_finite(norm):
        return None if norm is None else 1 - norm.isfinite().float()

    def _factor(self, group, norm, device):
        """What the gradients are multiplied by: clipping and unscaling; None for 1."""
        factor = None
        if group["max_grad_norm"] is not None:
            factor = (group["max_grad_norm"] / (_move(norm, device) + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_; NaN stays
        if getattr(self, "grad_scale", None) is not None:
            factor = (1.0 if factor is None else factor) / _move(self.grad_scale, device)
        return factor

    def _steer(self, group, parts, skip):
        """Moves rho towards the clip target; not in a skipped step, nor with lr = 0, nor before there is a Hessian."""
        rho = group["rho"]
        if not sum(part.numel for part in parts):
            return
        clipped = sum(_move(part.sum_over_shards(part.telemetry[:1].clone()), rho.device) for part in parts)
        change = (clipped[0] / sum(part.numel for part in parts) - group["clip_target"]).float()
        change = change * (option_on(group["lr"], rho.device) != 0)
        if self._beta2_in_step(group) is None:
            change = change * (_move(parts[0].count("hessian_step").amax(), rho.device) > 0)
        if skip is not None:
            change = change * (1 - _move(skip, rho.device))
        rho.mul_(change.exp()).clamp_(1e-12, 1e12)

    def _counters(self, group):
        """Names of the counters that a state has; h refreshed in the step needs none of its own."""
        return COUNTERS if self._beta2_in_step(group) is None else COUNTERS[:1]

    def _beta1(self, group):
        return group["betas"][0]

    def _beta2_in_step(self, group):
        return None

    def _published_betas(self, group):
        return group["betas"]


class SOUL(SophiaG):
    """SOUL's optimizer: Sophia whose h is refreshed inside ``step()``, from the same gradient, in the same pass::

        m = b1 m + (1 - b1) g
        h = b2 h + (1 - b2) g g
        p = p - lr (weight_decay p + clamp(m / (rho bs h + eps), -1, 1))

    Jia et al. 2024 (arXiv 2404.18239). h is then the empirical Fisher diagonal of the unlearning loss itself.

    Args:
        params: parameters or parameter groups, as in `SophiaG`.
        lr: learning rate; SOUL's configurations use 5e-6 to 2e-5 for 7B models.
        betas: decay of the momentum and of the Hessian estimate.
        published_code: do as SOUL's code does, which updates the momentum twice a step: exactly one update with b1 squared
            (0.9 acts as 0.81). False follows the paper.
        **options: those of `SophiaG`.
    """

    @classmethod
    def as_published(cls, params, lr=5e-6, betas=(0.9, 0.95), **options):
        """A `SOUL` that does what SOUL's published code does: its momentum, parameters rounded to nearest, and both states of
        bf16 parameters in bf16. Other states are fp32, those of fp16 parameters as well, of which the published code makes NaN.
        h in bf16 is rounded stochastically all the same.

        Args:
            params: parameters or parameter groups, as in `SophiaG`, each group of one dtype.
            lr: learning rate.
            betas: decay of the momentum, whose square acts, and of the Hessian estimate.
            **options: those of `SophiaG`, without ``param_rounding`` and ``state_dtype``.

        Raises:
            ValueError: an option or a parameter does not fit, or a group has parameters of several dtypes.
        """
        storage = dict(param_rounding="nearest", state_dtype=torch.float32)
        optimizer = cls(params, lr, betas, published_code=True, **storage, **options)
        for index, group in enumerate(optimizer.param_groups):
            dtypes = {param.dtype for param in group["params"]}
            if len(dtypes) > 1:
                got = " and ".join(sorted(map(str, dtypes)))
                raise argument_error("params", f"one dtype in group {index}", got, "make a group for each dtype")
            if dtypes == {torch.bfloat16}:
                group["state_dtype"] = "bfloat16"
        return optimizer

    def __init__(self, params, lr=5e-6, betas=(0.9, 0.95), *, published_code=False, **options):
        if not isinstance(published_code, bool):
            raise argument_error("published_code", "True or False", repr(published_code), "True does as SOUL's code does")
        super().__init__(params, lr, betas, **options)
        self.defaults["published_code"] = published_code  # a group option, so that copies and checkpoints carry it
        for group in self.param_groups:
            group.setdefault("published_code", published_code)

    def update_hessian(self, **options):
        """Refuses: ``step()`` has done it already.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("SOUL refreshes h inside step(); for a curvature of your own choice use SophiaG")

    def _beta1(self, group):
        return group["betas"][0] ** 2 if group["published_code"] else group["betas"][0]

    def _beta2_in_step(self, group):
        return group["betas"][1]

    def _published_betas(self, group):
        beta1, beta2 = group["betas"]
        return (beta1 if group["published_code"] else beta1**0.5, beta2)


def _move(tensor, device):
    return tensor.to(device, non_blocking=True) if isinstance(tensor, torch.Tensor) else tensor
