"""SophiaG and SOUL: states, groups and checkpoints. The arithmetic is in ``soul_kernels``."""

import torch
from torch.optim import Optimizer

from soul_kernels import hessian_ema, sophia_step
from soul_kernels._checks import (
    PARAM_DTYPES,
    STATE_DTYPES,
    argument_error,
    check_choice,
    check_gradient,
    check_range,
    is_dense,
    same_layout,
)
from soul_kernels._launch import BACKENDS, resolve_backend
from soul_kernels.rounding import ROUNDINGS

STATES = ("exp_avg", "hessian")


class SophiaG(Optimizer):
    """Sophia with the published two calls, each one pass over memory, per element in fp32::

        step():           m = b1 m + (1 - b1) g
                          p = p - lr (weight_decay p + clamp(m / (rho bs h + eps), -1, 1))
        update_hessian(): h = b2 h + (1 - b2) g g

    Liu et al. 2023 (arXiv 2305.14342), algorithm 3, as coded in the published class, whose checkpoints load here. Call
    ``update_hessian()`` every k steps while the gradients are those of a loss with labels sampled from the model.

    Args:
        params: parameters or parameter groups: dense fp32, bf16 or fp16 tensors on any devices.
        lr: learning rate, a float or a tensor of one element.
        betas: decay of the momentum and of the Hessian estimate, each in [0, 1).
        rho: scale of the clipping threshold: the larger, the fewer coordinates are clipped; see `clip_fraction`.
        weight_decay: decoupled weight decay.
        bs: number of predictions (tokens, for a language model) in the batch behind ``update_hessian``.
        eps: added to the denominator.
        maximize: ascend instead of descend.
        capturable: not supported; only False is accepted.
        max_grad_norm: not supported; only None is accepted. Use ``torch.nn.utils.clip_grad_norm_``.
        param_rounding: how parameters below fp32 are stored: "nearest". "auto" takes the best one that there is.
        state_dtype: torch.float32 or torch.bfloat16 for both states. None: h in fp32, and m in bf16 for bf16 parameters,
            else in fp32.
        backend: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Raises:
        ValueError: naming the argument, what was expected, what came, and the remedy.
    """

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
    ):
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
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
        )
        self._clipped = {}  # group index -> (int64 [] of every device, clipped coordinates; all coordinates) of the last step
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        """Adds a group, as in ``torch.optim.Optimizer``; its options and parameters are checked."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1], len(self.param_groups) - 1)
        except ValueError:
            self.param_groups.pop()  # nothing is changed by a refused group
            raise

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.setdefault("_clipped", {})
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure=None, bs=None):
        """One optimization step.

        Args:
            closure: recomputes the loss and the gradients, and returns the loss.
            bs: overrides the groups' ``bs`` for this step.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if bs is not None:
            _check_bs(bs)
        for index, (group, params) in enumerate(self._groups_with_grad()):
            counts = []
            for local in _by_device(params):
                counts.append(torch.zeros((), dtype=torch.int64, device=local[0].device))
                sophia_step(
                    local,
                    [p.grad for p in local],
                    *([self.state[p][name] for p in local] for name in STATES),
                    lr=float(group["lr"]),
                    beta1=self._beta1(group),
                    beta2=self._beta2_in_step(group),
                    rho=group["rho"],
                    bs=group["bs"] if bs is None else bs,
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    maximize=group["maximize"],
                    param_rounding=_rounding(group),
                    clip_count=counts[-1],
                    backend=group["backend"],
                )
            if params:
                torch._foreach_add_([self.state[p]["step"] for p in params], 1)
            self._clipped[index] = counts, sum(p.numel() for p in params)
        return loss

    @torch.no_grad()
    def update_hessian(self):
        """Moves every h towards the square of the gradient that its parameter holds now."""
        for group, params in self._groups_with_grad():
            for local in _by_device(params):
                hessians = [self.state[p]["hessian"] for p in local]
                hessian_ema(hessians, [p.grad for p in local], beta2=group["betas"][1], backend=group["backend"])

    def clip_fraction(self):
        """Fraction of the coordinates that the last ``step()`` clipped, so that they moved by the full lr: the number to tune
        ``rho`` by. Sophia's authors advise 0.5 to 0.9. Waits for the device.

        Returns:
            One float a group; NaN where the last step moved nothing.
        """
        fractions = []
        for index in range(len(self.param_groups)):
            counts, numel = self._clipped.get(index, ([], 0))
            fractions.append(sum(int(count) for count in counts) / numel if numel else float("nan"))
        return fractions

    def load_state_dict(self, state_dict):
        """Loads ``state_dict()`` of this class or of the published one.

        Differs from ``torch.optim.Optimizer``: states keep the dtype that they were saved in, where torch casts them to that
        of their parameter (a published checkpoint is brought to this optimizer's ``state_dtype``); options that the checkpoint
        does not have stay as they are; ``backend``, which belongs to the machine, stays in any case.

        Raises:
            ValueError: the checkpoint does not fit the parameters; nothing was changed.
        """
        current = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        states = {}

        def take_over(optimizer, state_dict):  # runs after the user's own hooks, on what they made of the checkpoint
            saved_groups = state_dict["param_groups"]
            if len(saved_groups) != len(current):
                return state_dict  # torch says what is wrong
            options = [c | saved | {"backend": c["backend"]} for c, saved in zip(current, saved_groups)]
            for group, saved_group, merged in zip(self.param_groups, saved_groups, options):
                _check_options(merged)
                for param, key in zip(group["params"], saved_group["params"]):
                    if state_dict["state"].get(key):
                        cast = "state_dtype" not in saved_group
                        states[param] = _load_state(param, merged, state_dict["state"][key], cast)
            return state_dict | {"param_groups": options}

        def put_in_place(optimizer):  # runs before the user's own hooks
            self.state.update(states)
            self._clipped = {}

        handle = self.register_load_state_dict_pre_hook(take_over)
        place = self.register_load_state_dict_post_hook(put_in_place, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            place.remove()

    def _groups_with_grad(self):
        """Every group with those of its parameters that have a gradient, each once, with their states made.

        All options and gradients are checked before anything is changed.
        """
        groups = []
        for index, group in enumerate(self.param_groups):
            _check_options(group)
            for position, param in enumerate(group["params"]):
                if param.grad is not None:
                    name = f"parameter {position} in group {index}"
                    _check_dtype(f"the gradient of {name}", param.grad)
                    resolve_backend(group["backend"], param)
                    for key in STATES:
                        if key in self.state.get(param, ()) and not same_layout(self.state[param][key], param):
                            got, remedy = f"{param.stride()}", "do not change the memory format of a model in training"
                            raise argument_error(name, f"strides {self.state[param][key].stride()}, as its {key}", got, remedy)
            groups.append((group, [p for p in dict.fromkeys(group["params"]) if p.grad is not None]))
        for group, params in groups:
            for param in params:
                if not self.state[param]:
                    self.state[param] = _new_state(param, group)
        return groups

    def _beta1(self, group):
        return group["betas"][0]

    def _beta2_in_step(self, group):
        return None


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

    def __init__(self, params, lr=5e-6, betas=(0.9, 0.95), *, published_code=False, **options):
        super().__init__(params, lr, betas, **options)
        self.defaults["published_code"] = published_code  # a group option, so that copies and checkpoints carry it
        for group in self.param_groups:
            group.setdefault("published_code", published_code)

    def update_hessian(self):
        """Refuses: ``step()`` has done it already.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("SOUL refreshes h inside step(); for a curvature of your own choice use SophiaG")

    def _beta1(self, group):
        return group["betas"][0] ** 2 if group["published_code"] else group["betas"][0]

    def _beta2_in_step(self, group):
        return group["betas"][1]


def _rounding(group):
    return "nearest" if group["param_rounding"] == "auto" else group["param_rounding"]


def _new_state(param, group):
    m_dtype = h_dtype = group["state_dtype"]
    if m_dtype is None:
        m_dtype = torch.bfloat16 if param.dtype == torch.bfloat16 else torch.float32
        h_dtype = torch.float32
    return {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        "exp_avg": torch.zeros_like(param, dtype=m_dtype, memory_format=torch.preserve_format),
        "hessian": torch.zeros_like(param, dtype=h_dtype, memory_format=torch.preserve_format),
    }


def _load_state(param, group, saved, cast):
    """The states of one parameter from a checkpoint: in the dtype that they have there, or in that of the group's policy."""
    if not all(name in saved for name in STATES):
        got, remedy = f"{', '.join(sorted(saved))}", "is it the checkpoint of another optimizer?"
        raise argument_error("state_dict", f"states {', '.join(STATES)}", got, remedy)
    state = _new_state(param, group)
    state["step"] = torch.tensor(float(saved.get("step", 0)), dtype=torch.float32, device="cpu")
    for name in STATES:
        value = saved[name]
        if value.shape != param.shape:
            remedy = "load the checkpoint of this model"
            raise argument_error(f"state_dict {name}", f"shape {tuple(param.shape)}", tuple(value.shape), remedy)
        dtype = state[name].dtype if cast or value.dtype not in STATE_DTYPES else value.dtype
        state[name] = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format).copy_(value)
    return state


def _by_device(params):
    """Splits a list of parameters by device."""
    return [[p for p in params if p.device == device] for device in dict.fromkeys(p.device for p in params)]


def _check_dtype(name, tensor):
    check_gradient(name, tensor)
    if tensor.dtype not in PARAM_DTYPES:
        names = ", ".join(str(dtype) for dtype in PARAM_DTYPES)
        raise argument_error(name, f"dtype {names}", tensor.dtype, "convert it first")


def _check_bs(bs):
    if not bs > 0:
        raise argument_error("bs", "a positive number", bs, "pass the number of predictions in the Hessian batch")


def _check_options(group):
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise argument_error("lr", "one number", f"a tensor of {lr.numel()}", "use one parameter group for each lr")
    check_range("lr", float(lr))
    if len(group["betas"]) != 2:
        raise argument_error("betas", "two numbers, of momentum and Hessian", group["betas"], "for instance (0.9, 0.95)")
    for position, beta in enumerate(group["betas"]):
        check_range(f"betas[{position}]", beta, high=1.0)
    for name in ("rho", "weight_decay", "eps"):
        check_range(name, group[name])
    _check_bs(group["bs"])
    if group["capturable"]:
        raise argument_error("capturable", "False", True, "CUDA graph capture of the step is not supported")
    if group["max_grad_norm"] is not None:
        raise argument_error("max_grad_norm", "None", group["max_grad_norm"], "use torch.nn.utils.clip_grad_norm_")
    check_choice("param_rounding", group["param_rounding"], ("auto", *ROUNDINGS))
    check_choice("state_dtype", group["state_dtype"], (None, *STATE_DTYPES))
    check_choice("backend", group["backend"], BACKENDS)


def _check_group(group, index):
    _check_options(group)
    for position, param in enumerate(group["params"]):
        name = f"parameter {position} in group {index}"
        _check_dtype(name, param)
        if not is_dense(param):
            got = f"shape {tuple(param.shape)} with strides {param.stride()}"
            raise argument_error(name, "dense strides (no gaps, no overlap)", got, "make it contiguous first")
