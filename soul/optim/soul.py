"""The optimizer `SOUL`: a `SophiaG` that refreshes its h in the step, and the differences of SOUL's published code."""

from collections.abc import Mapping
from typing import Literal, NoReturn

import torch
from torch.optim.optimizer import ParamsT

from soul.optim.optimizer import SophiaG
from soul.optim.options import Backend, EpsMode, Number, ParamGroup, ParamRounding, StateDtype
from soul_kernels.errors import argument_error


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

    All other options are those of `SophiaG`, with its defaults; ``bs`` is the number of predictions in the batch of a step.

    Raises:
        ValueError: an option or a parameter does not fit. The message names it, what was expected, what came, and the remedy.
    """

    hessian_in_step = True

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 5e-6,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: Number | Literal["auto"] = 0.04,
        weight_decay: Number = 0.1,
        *,
        published_code: bool = False,
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
        if not isinstance(published_code, bool):
            raise argument_error("published_code", "True or False", repr(published_code), "True does as SOUL's code does")
        super().__init__(
            params,
            lr,
            betas,
            rho,
            weight_decay,
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
        )
        self.defaults["published_code"] = published_code  # a group option, so that copies and checkpoints carry it
        for group in self.param_groups:
            group.setdefault("published_code", published_code)

    @classmethod
    def as_published(
        cls,
        params: ParamsT,
        lr: Number = 5e-6,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: Number | Literal["auto"] = 0.04,
        weight_decay: Number = 0.1,
        *,
        bs: Number = 5120,
        eps: float = 1e-15,
        maximize: bool = False,
        capturable: bool = False,
        max_grad_norm: float | None = None,
        backend: Backend = "auto",
        skip_nonfinite: bool = False,
        clip_target: float | None = None,
        bias_correction: bool = False,
        eps_mode: EpsMode = "add",
        seed: int = 0,
        state_offload: bool = False,
    ) -> "SOUL":
        """Return a `SOUL` that does what SOUL's published code does.

        It averages the momentum as that code does (the square of beta1 acts), rounds parameters to nearest, and stores both
        states of bf16 parameters in bf16. Other states are fp32, also those of fp16 parameters, for which the published code
        yields NaN. h in bf16 is rounded stochastically all the same.

        The arguments are those of `SOUL`, without the three that this sets: ``published_code``, ``param_rounding`` and
        ``state_dtype``. The parameters of a group must have one dtype.

        Raises:
            ValueError: an option or a parameter does not fit, or a group has parameters of several dtypes.
        """
        optimizer = cls(
            params,
            lr,
            betas,
            rho,
            weight_decay,
            published_code=True,
            bs=bs,
            eps=eps,
            maximize=maximize,
            capturable=capturable,
            max_grad_norm=max_grad_norm,
            param_rounding="nearest",
            state_dtype=torch.float32,
            backend=backend,
            skip_nonfinite=skip_nonfinite,
            clip_target=clip_target,
            bias_correction=bias_correction,
            eps_mode=eps_mode,
            seed=seed,
            state_offload=state_offload,
        )
        for index, group in enumerate(optimizer.param_groups):
            dtypes = {param.dtype for param in group["params"]}
            if len(dtypes) > 1:
                got = " and ".join(sorted(map(str, dtypes)))
                raise argument_error("params", f"one dtype in group {index}", got, "make a group for each dtype")
            if dtypes == {torch.bfloat16}:
                group["state_dtype"] = "bfloat16"
        return optimizer

    def update_hessian(
        self, *, probes: Mapping[torch.Tensor, torch.Tensor] | None = None, grad_scale: Number | None = None
    ) -> NoReturn:
        """Refuse: ``step()`` has refreshed h already.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("SOUL refreshes h inside step(); for a curvature of your own choice use SophiaG")

    def momentum_decay(self, group: ParamGroup) -> float:
        """Return the decay of the momentum that acts in a group: its beta1; with ``published_code``, the square of beta1."""
        beta1, _ = group["betas"]
        return beta1**2 if group["published_code"] else beta1

    def _published_betas(self, group: ParamGroup) -> tuple[float, float]:
        beta1, beta2 = group["betas"]
        return (beta1 if group["published_code"] else beta1**0.5, beta2)
