"""The whole tensors of a model in shards, gathered one at a time for the first process.

How it works: gathering a tensor is collective, but the first process alone knows which tensor it wants next, and whether a disk
has been full meanwhile. So it tells the others a name before each tensor, and None when it is done or has failed; the others
help until then. No process holds more than one whole tensor by this, unless the first one keeps some.

Safe to change: the attributes of `WholeTensors`. Not safe: a collective call of the first process that the others do not make.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from soul.distributed.processes import Processes, full

T = TypeVar("T")


class WholeTensors:
    """The tensors of a model by name, whole and on the CPU; each is gathered when it is asked for.

    Attributes:
        entries: name in ``model.state_dict()`` -> the tensor as this process has it, a DTensor if it is in shards.
        first_names: name -> the first of the names of this tensor, itself unless the tensor is tied.
    """

    def __init__(self, model: torch.nn.Module, processes: Processes) -> None:
        self._processes = processes
        self.entries = dict(model.state_dict(keep_vars=True))
        names: dict[int, str] = {}
        self.first_names = {name: names.setdefault(id(tensor), name) for name, tensor in self.entries.items()}

    def whole(self, name: str) -> torch.Tensor:
        """Return one tensor, in the first process, within `on_first_with_tensors`."""
        self._processes.broadcast(name)
        return full(self.entries[name].detach()).cpu()

    def state(self, *, trained: bool = False) -> dict[str, torch.Tensor]:
        """Return all tensors at once, or with ``trained`` those that require a gradient; names of a tied one share it."""
        state: dict[str, torch.Tensor] = {}
        for name, first_name in self.first_names.items():
            if self.entries[name].requires_grad or not trained:
                state[name] = self.whole(name) if name == first_name else state[first_name]
        return state

    def help(self) -> None:
        """Take part, in a process other than the first, in the gathering of every tensor that the first one asks for."""
        while (name := self._processes.broadcast(None)) is not None:
            full(self.entries[name].detach())

    def end(self) -> None:
        """Let the other processes go, in the first one."""
        self._processes.broadcast(None)


def on_first_with_tensors(model: torch.nn.Module, call: Callable[[WholeTensors], T]) -> T | None:
    """Return ``call(tensors)`` in the first process, and None in the others, which help it to gather the model's tensors.

    Every process must call this. ``call`` may make no other collective call than those of ``tensors``.

    Args:
        model: a model, in shards or whole.
        call: takes the whole tensors of the model. If it raises, all processes do, as `Processes.together` says.
    """
    processes = Processes.of(model)
    tensors = WholeTensors(model, processes)

    def ask() -> T:
        try:
            return call(tensors)
        finally:
            tensors.end()

    def answer() -> None:
        tensors.help()

    return processes.together(ask if processes.first else answer)
