"""``python -m bench.host_part``: the host time of a LoRA step, ours and that of torch's fused AdamW. It is not a step time.

The kernels of the steps are left out: of ours the launch, of AdamW's ``torch._fused_adamw_``. On a CPU its
``torch._foreach_add_`` is left out as well, since there it would be a kernel for every tensor. What remains is what Python and
C++ do to find, check and pass on the tensors, so any machine can measure it. The small kernels that clear and count remain.
"""

import contextlib
import importlib
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from bench._harness import cpu_model
from bench._optimizers import gradients
from bench.bench_sophia_step import lora, make_params
from soul import SOUL

GROUPS = (1, 16)
LR = 1e-4


class _Steps:
    """Steps of one optimizer, each with a learning rate of its own and with gradients where they were or elsewhere."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], n_groups: int, device: torch.device, **options: Any) -> None:
        params = make_params(lora(), device, torch.bfloat16)
        size = len(params) // n_groups
        groups = [{"params": params[begin : begin + size]} for begin in range(0, len(params), size)]
        self.optimizer = optimizer(groups, **options)
        self._params = params
        self._grads = [gradients(params), [grad.clone() for grad in gradients(params)]]
        self._at = 0
        self.optimizer.step()

    def time(self, *, moved: bool, lr: float) -> float:
        """Take a step and return its time in us."""
        self._at ^= moved
        for param, grad in zip(self._params, self._grads[self._at]):
            param.grad = grad
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        begun = time.perf_counter()
        self.optimizer.step()
        return (time.perf_counter() - begun) * 1e6


@contextlib.contextmanager
def _without_kernels(device: torch.device) -> Iterator[None]:
    """Leave out the kernels of both optimizers within the ``with`` block; let a CPU be taken for a GPU."""
    with contextlib.ExitStack() as stack:
        replace = stack.enter_context
        replace(mock.patch("soul_kernels._table.launch", new=lambda *args, **arguments: None))
        replace(mock.patch("torch._fused_adamw_", new=lambda *args, **options: None))
        if device.type == "cpu":
            replace(mock.patch("torch._foreach_add_", new=_count))
            for name in ("soul_kernels.sophia_step", "soul.optim.stepper"):
                module = importlib.import_module(name)  # by its name, Python 3.10 finds the function sophia_step
                replace(mock.patch.object(module, "resolve_backend", new=lambda *args, **options: "triton"))
            replace(mock.patch("soul.optim.options.has_data", new=lambda tensor: False))  # a tensor on a GPU is not read
        yield


def _count(tensors: list[torch.Tensor], number: int, add: Any = torch._foreach_add_) -> None:
    """Add a number to tensors, unless they are AdamW's counters: one a parameter, with no dimension."""
    if tensors[0].dim():
        add(tensors, number)


def measure(
    n_groups: int, *, capturable: bool, moved: bool, rounds: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Return times of steps in us, ours and AdamW's, which take turns.

    Args:
        n_groups: number of parameter groups among which the tensors are divided.
        capturable: as in both optimizers; the learning rate is then a tensor.
        moved: each step finds its gradients at other addresses than the step before.
        rounds: number of steps.
        device: where the tensors are.
    """
    lr = torch.tensor(LR, device=device) if capturable else LR
    with _without_kernels(device):
        ours = _Steps(SOUL, n_groups, device, lr=lr, capturable=capturable)
        adamw = _Steps(torch.optim.AdamW, n_groups, device, lr=lr, capturable=capturable, fused=True)
        samples: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds):
            for steps, times in zip((ours, adamw), samples):
                times.append(steps.time(moved=moved, lr=LR / (1 + number)))
    return samples


def main(rounds: int = 400) -> None:
    """Print a line for each case: medians of both, the range from their 20th to their 80th percentile, and their ratio."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = cpu_model() + (f", {torch.cuda.get_device_name()}" if device.type == "cuda" else "")
    print(f"host part of a step, launch left out, not a step time: {len(lora())} tensors, {machine}, torch {torch.__version__}")
    print(f"  {'':<52}{'ours, us':<24}{'fused AdamW, us':<24}ratio")
    for n_groups in GROUPS:
        for capturable in (False, True):
            for moved in (False, True):
                both = measure(n_groups, capturable=capturable, moved=moved, rounds=rounds, device=device)
                name = f"{n_groups} group{'s'[: n_groups > 1]}{', capturable' * capturable}, gradients {_WHERE[moved]}"
                ratio = statistics.median(both[0]) / statistics.median(both[1])
                print(f"  {name:<52}{_shown(both[0]):<24}{_shown(both[1]):<24}{ratio:.2f}")


_WHERE = {False: "where they were", True: "elsewhere"}


def _shown(times: list[float]) -> str:
    """Return the median of times and, in brackets, their 20th and 80th percentile."""
    low, _, _, high = statistics.quantiles(times, n=5)
    return f"{statistics.median(times):.0f} ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    main()
