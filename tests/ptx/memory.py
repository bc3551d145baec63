"""The global memory of an emulated card: this process's own, and what a launch may touch of it.

Addresses in PTX are addresses of this process: numpy views of the whole address space make a gather plain indexing. Every
access is therefore checked before it happens: that it lies in a live allocation, and that it is aligned.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

ORIGIN = 16  # address of the first element of every view: not null, and aligned for all widths
WORDS = {1: "|u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "|V16"}


class _AddressSpace:
    def __init__(self, width: int) -> None:
        shape = ((2**47 - ORIGIN) // width,)
        self.__array_interface__ = {"data": (ORIGIN, False), "shape": shape, "typestr": WORDS[width], "version": 3}


VIEWS = {width: np.asarray(_AddressSpace(width)) for width in WORDS}


class Range(NamedTuple):
    """Addresses from ``start`` to ``stop`` (exclusive); ``name`` tells a reader whose they are."""

    start: int
    stop: int
    name: str


class OutOfBounds(Exception):
    """An access outside every live range; the arguments are the position of the lane and what was found there."""


def storage_range(tensor: torch.Tensor, name: str) -> Range:
    """Return the whole storage of a tensor."""
    storage = tensor.untyped_storage()
    return Range(storage.data_ptr(), storage.data_ptr() + storage.nbytes(), _described(tensor, name))


def view_range(tensor: torch.Tensor, name: str) -> Range:
    """Return the elements of a tensor, from the first to the last, without what else its storage holds."""
    if not tensor.numel():
        return Range(tensor.data_ptr(), tensor.data_ptr(), _described(tensor, name))
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    start = tensor.data_ptr()
    return Range(start, start + (last + 1) * tensor.element_size(), _described(tensor, name))


def _described(tensor: torch.Tensor, name: str) -> str:
    return f"{name} ({str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)})"


class GlobalMemory:
    """What one launch may access.

    Args:
        arguments: names and tensors that were passed to the kernel.
        others: the tensors that a table of addresses may name; asked for at the first access outside the arguments.
        strict: only the elements of the tensors, without the rest of their storages.
    """

    def __init__(
        self,
        arguments: Iterable[tuple[str, torch.Tensor]],
        others: Callable[[], list[torch.Tensor]],
        *,
        strict: bool = False,
    ) -> None:
        self.others: Callable[[], list[torch.Tensor]] | None = others
        self.range_of = view_range if strict else storage_range
        self.arguments = [self.range_of(tensor, f"argument {name}") for name, tensor in arguments]
        self._set(self.arguments)

    def _set(self, ranges: Sequence[Range]) -> None:
        merged: list[Range] = []  # views of one storage overlap; an argument's name says the most
        for entry in sorted(set(ranges)):
            if merged and entry.start < merged[-1].stop:
                before = merged[-1]
                name = entry.name if entry in self.arguments and before not in self.arguments else before.name
                merged[-1] = Range(before.start, max(entry.stop, before.stop), name)
            elif entry.stop > entry.start:
                merged.append(entry)
        self.ranges = merged
        self.starts = np.array([entry.start for entry in merged], dtype=np.uint64)
        self.stops = np.array([entry.stop for entry in merged], dtype=np.uint64)

    def check(self, addresses: np.ndarray, width: int) -> None:
        """Check that ``width`` bytes from each address lie in one live range.

        Raises:
            OutOfBounds: with the index of the first address that does not.
        """
        outside = self._outside(addresses, width)
        if outside is None:
            return
        if self._has_learned():
            outside = self._outside(addresses, width)
            if outside is None:
                return
        raise OutOfBounds(outside, self.neighbour(int(addresses[outside])))

    def _has_learned(self) -> bool:
        """Add the other tensors, once; return whether they were added now."""
        if self.others is None:
            return False
        tensors = self.others()
        self.others = None
        self._set(self.arguments + [self.range_of(tensor, "a tensor") for tensor in tensors])
        return True

    def _outside(self, addresses: np.ndarray, width: int) -> int | None:
        if not self.ranges:
            return 0
        low = addresses.min()
        high = addresses.max()
        first = int(np.searchsorted(self.starts, low, side="right")) - 1
        if first >= 0 and int(high) + width <= int(self.stops[first]):
            return None
        index = np.searchsorted(self.starts, addresses, side="right") - 1
        bad = (index < 0) | (addresses + np.uint64(width) > self.stops[index])
        return int(bad.argmax()) if bad.any() else None

    def owner(self, address: int) -> str:
        """Return the name of the range in which an address lies."""
        self._has_learned()
        index = int(np.searchsorted(self.starts, np.uint64(address), side="right")) - 1
        return self.ranges[index].name if index >= 0 and address < self.ranges[index].stop else "no tensor"

    def neighbour(self, address: int) -> str:
        """Say where an address lies that is in no range: how far before or behind the nearest."""
        if not self.ranges:
            return f"address {address:#x}; the kernel has no tensor"
        distances = [(entry.start - address if address < entry.start else address - entry.stop, entry) for entry in self.ranges]
        distance, entry = min(distances, key=lambda pair: abs(pair[0]))
        side = "before the start" if address < entry.start else "after the end"
        return f"{abs(distance)} bytes {side} of {entry.name}"


class AddressBook:
    """The tensors whose addresses Python code has asked for: what a table of addresses on the device may name.

    `install` wraps ``torch.Tensor.data_ptr``. Tensors are held weakly: one that was freed is no longer a live range.
    """

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[torch.Tensor]] = {}
        self._data_ptr = torch.Tensor.data_ptr

    def install(self) -> None:
        """Note every tensor whose ``data_ptr()`` is called from now on."""
        data_ptr = self._data_ptr
        known = self._known

        @functools.wraps(data_ptr)
        def noted(tensor: torch.Tensor) -> int:
            address = data_ptr(tensor)
            key = id(tensor)
            if key not in known:
                known[key] = weakref.ref(tensor, lambda _: known.pop(key, None))
            return address

        torch.Tensor.data_ptr = noted  # type: ignore[method-assign]

    def uninstall(self) -> None:
        """Take the wrapper away."""
        torch.Tensor.data_ptr = self._data_ptr  # type: ignore[method-assign]

    def tensors(self) -> list[torch.Tensor]:
        """Return the noted tensors that are alive and lie on the CPU."""
        alive = (reference() for reference in list(self._known.values()))
        return [tensor for tensor in alive if tensor is not None and tensor.device.type == "cpu"]
