"""What an optimizer step over one part of a group needs, kept from step to step: lists of tensors, tables, counters."""

import operator

import torch

from soul_kernels import TensorTable

# Name of a state -> name of the list that the ops take.
LISTS = {
    "exp_avg": "exp_avgs",
    "hessian": "hessians",
    "low_bits": "low_bits",
    "exp_avg_scale": "exp_avg_scales",
    "hessian_scale": "hessian_scales",
}
COUNTERS = ("step", "hessian_step")


def is_sharded(tensor):
    """Tells whether this is a DTensor, without importing it."""
    return hasattr(tensor, "device_mesh")


def local(tensor):
    """The tensor, or the shard of a DTensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _splits(placement):
    """Tells whether processes hold different parts (Shard, and the _StridedShard of FSDP over tensor parallelism)."""
    return not placement.is_replicate() and not placement.is_partial()


def place(param):
    """Where a parameter lies: its device, and how it is sharded. Parameters of one place are stepped together."""
    return (local(param).device, param.device_mesh, param.placements) if is_sharded(param) else (param.device, None, ())


class Plan:
    """Some parameters of one group in one place, each with a state.

    Attributes:
        params: the parameters.
        states: the state of each.
        device: where they are.
        tensor_ids: number of each parameter in the optimizer, for its noise.
        table, hessian_table, norm_table: for the launches of `sophia_step`, `hessian_ema` and `grad_norm`.
        telemetry: fp64 [3] on the device, what `sophia_step` counts there.
        numel: coordinates of the parameters, over all shards.
    """

    def __init__(self, params, states, tensor_ids):
        self.params, self.states, self.tensor_ids = params, states, tensor_ids
        self.device, self._mesh, self._placements = place(params[0])
        self.table, self.hessian_table, self.norm_table = TensorTable(), TensorTable(), TensorTable()
        self.telemetry = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.numel = sum(p.numel() for p in params)
        # Reading a column of the states takes as long as all else in a small step: hence itemgetter where it can be.
        self._columns = {}
        for name, plural in LISTS.items():
            having = sum(name in state for state in states)
            if having:
                read = operator.itemgetter(name) if having == len(states) else operator.methodcaller("get", name)
                self._columns[name] = plural, read
        self._counters = {name: self._flatten(name) for name in COUNTERS if name in states[0]}
        self._corrections = None

    def _flatten(self, name):
        """Makes the counters of all states views of one vector, so that one addition moves them all."""
        if len(self.states) == 1:  # nothing is moved: plans of one parameter come and go beside those of all
            return self.states[0][name].view(1), [self.states[0][name]]
        flat = torch.stack([state[name].reshape(()) for state in self.states])
        views = list(flat.unbind())
        for state, view in zip(self.states, views):
            state[name] = view
        return flat, views

    def fits(self, params):
        """Tells whether this is still the plan for these parameters: the same objects, with counters nobody has replaced."""
        if len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        for name, (_, views) in self._counters.items():
            if not all(map(operator.is_, map(operator.itemgetter(name), self.states), views)):
                return False
        return True

    def locals(self, tensors):
        """The tensors, or what this process holds of them."""
        return tensors if self._mesh is None else [self._local(tensor) for tensor in tensors]

    def _local(self, tensor):
        if is_sharded(tensor) and tensor.placements != self._placements:  # a gradient that is still to be summed
            tensor = tensor.redistribute(self._mesh, self._placements)
        return local(tensor)

    def lists(self, *names):
        """The states as lists, by the names of the ops' arguments."""
        return {
            plural: self.locals(list(map(read, self.states)))
            for name, (plural, read) in self._columns.items()
            if not names or name in names
        }

    def count(self, name):
        """The counters ``name`` of all states as one vector [n]."""
        return self._counters[name][0]

    def corrections(self, decay, updates):
        """``1 - decay^updates``, and 1 where there was no update, [n]; always in the same place."""
        values = 1 - torch.pow(decay, updates)
        values.masked_fill_(values == 0, 1.0)
        if self._corrections is None:
            self._corrections = values
        return self._corrections.copy_(values)

    def shard(self):
        """A number for the part of the parameters that this process holds; replicas of one part have the same."""
        number = 0
        for dim, placement in enumerate(self._placements):
            if _splits(placement):
                number = number * self._mesh.size(dim) + self._mesh.get_local_rank(dim)
        return number

    def sum_over_shards(self, value):
        """Adds up, in place, a number that every process has for its own shards."""
        for dim, placement in enumerate(self._placements):
            if _splits(placement):
                torch.distributed.all_reduce(value, group=self._mesh.get_group(dim))
        return value
