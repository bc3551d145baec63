"""Bytes of the tensors that are alive, counted operation by operation: on any device, and in a process group of one process."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from soul.distributed.shards import local


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations take and return, and how FSDP2 empties and fills them.

    Scratch memory within an operation is not seen. So the bytes are those of tensors, on the CPU as on a GPU.

    Attributes:
        now: bytes that are alive.
        peak: the most since the start, or since it was set.
    """

    def __init__(self, tensors):
        """Count some tensors that are alive already."""
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {}  # key of a storage -> its bytes, and a reference that tells its end
        for tensor in tensors:
            self._see(local(tensor))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                self._see(local(tensor))
        self.peak = max(self.peak, self.now)
        return result

    def __enter__(self):
        self._resize = torch.UntypedStorage.resize_

        def resize(storage, size):
            result = self._resize(storage, size)
            self._count(storage)
            return result

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*error)

    def _see(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = [0, weakref.ref(storage, lambda _: self._end(key))]
        self._count(storage)

    def _count(self, storage):
        entry = self._sizes.get(storage._cdata)
        if entry is not None:
            self.now += storage.nbytes() - entry[0]
            entry[0] = storage.nbytes()

    def _end(self, key):
        self.now -= self._sizes.pop(key)[0]
