"""Step groups: the parameters that one call of an op steps together, with all that such a call needs besides options.

Collecting parameters, gradients and states anew in every step would cost more than the step of a small model. So a `StepGroup`
is made once: the parameters of one parameter group that lie on one device and are sharded alike, their states, and the tables
of the launches. `StepGroups` keeps the step groups of an optimizer, and checks before every step whether they still fit: users
may change groups, gradients and states between any two steps. Known parameters, dicts of states and options are recognised by
identity (``is``), which is cheap; what is in the dicts, by `soul.optim.state_dicts.State`, which notes changes. New ones are
checked in full, so that an error names a parameter before anything changes.

The checks of a gradient may be changed safely. Two things may not: the memory of counters and corrections, because a replay of
a CUDA graph adds to the very tensors that were captured; and the ``operator`` calls over whole lists, because a small step
spends its time there.
"""

import itertools
import operator
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from soul.distributed.shards import (
    NUMBER_SPACING,
    device_and_sharding,
    first_number,
    hidden_sharding,
    is_sharded,
    local,
    splits,
)
from soul.optim.offload import OffloadedStates
from soul.optim.options import (
    FIXED,
    ON_DEVICE,
    Number,
    ParamGroup,
    check_not_in_pieces,
    check_numbers,
    check_options,
    check_param_dtype,
    lasts,
    rounding_of,
)
from soul.optim.scales import own_scales
from soul.optim.state_dicts import State
from soul.optim.states import STATES, device_of_states, new_state
from soul_kernels import HessianEma, Noise, SophiaStep, TensorTable
from soul_kernels.backends import resolve_backend
from soul_kernels.errors import argument_error
from soul_kernels.tensors import has_data, is_dense, same_layout

# Name of a state -> name of the argument of the ops that takes a list of them.
OP_ARGUMENTS = {
    "exp_avg": "exp_avgs",
    "hessian": "hessians",
    "low_bits": "low_bits",
    "exp_avg_scale": "exp_avg_scales",
    "hessian_scale": "hessian_scales",
}
_FIXED_OF = operator.itemgetter(*FIXED)
_NUMBERS_OF = operator.itemgetter(*ON_DEVICE)
COUNTERS = ("step", "hessian_step")

_REFIT = "after model.to(...) call optimizer.load_state_dict(optimizer.state_dict()), which fits the states to the parameters"


def counters_of(hessian_in_step: bool) -> tuple[str, ...]:
    """Return the names of the counters of a state: an h that the step refreshes is counted by the step's own counter."""
    return COUNTERS[:1] if hessian_in_step else COUNTERS


class GroupedOptimizer(Protocol):
    """What `StepGroups` needs of an optimizer, a `soul.SophiaG`."""

    param_groups: list[ParamGroup]
    state: Any  # parameter -> its state
    hessian_in_step: bool


class StepGroup:
    """Parameters of one parameter group on one device, sharded alike, each with its state: what one call of an op steps.

    Attributes:
        params: the parameters.
        states: the state of each.
        device: the device that they are on.
        tensor_ids: number of each parameter in the optimizer, for its noise.
        tensor_offsets: number of the first element that this process holds of each parameter, for its noise.
        step: takes their steps.
        hessian_ema: updates their Hessians.
        offloaded: takes steps and updates if the states are in main memory.
        norm_table: for the launches of `grad_norm`.
        telemetry: fp64 [3] on the device, the counts of the last step.
        is_piece: whether the only parameter is this process's piece of a group under DeepSpeed's ZeRO.
        is_divided: whether other processes hold other shards or pieces.
        numel: coordinates of the parameters, over all shards, and over all pieces with what ZeRO fills them up with.
        prepared_for: what the last step that was prepared in full depends on, apart from tensors and ``ON_DEVICE``.

    The ops walk dense tensors. A parameter with gaps, such as a slice of columns, is stepped in a dense buffer: `dense_params`
    copies it there, and `copy_back` returns the result.
    """

    def __init__(self, params: list[torch.Tensor], states: list[dict[str, Any]], tensor_ids: list[int]) -> None:
        self.params = params
        self.states = states
        self.tensor_ids = tensor_ids
        self.tensor_offsets = [first_number(param) for param in params]
        self.device, self._mesh, self._placements = device_and_sharding(params[0])
        self.step = SophiaStep()
        self.hessian_ema = HessianEma()
        self.offloaded = OffloadedStates()
        self.norm_table = TensorTable()
        self.telemetry = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.is_piece = hidden_sharding(params) == "DeepSpeed" and torch.distributed.is_initialized()
        if self.is_piece:  # which does not tell its position in the parameters: the noise of each process is its own
            self.tensor_offsets = [(1 + torch.distributed.get_rank()) * NUMBER_SPACING]
        self.is_divided = self.is_piece or self._mesh is not None
        pieces = torch.distributed.get_world_size() if self.is_piece else 1  # all of one size: ZeRO fills the last one up
        self.numel = sum(p.numel() for p in params) * pieces
        self.prepared_for: object = None
        # Reading one entry of all states takes as long as all else in a small step: hence itemgetter if all states have it.
        self._columns: dict[str, tuple[str, Any]] = {}  # name of a state -> argument of the ops, and how to read the state
        for name, argument in OP_ARGUMENTS.items():
            n_states = sum(name in state for state in states)
            if n_states:
                in_all = n_states == len(states)
                read: Any = operator.itemgetter(name) if in_all else operator.methodcaller("get", name)
                self._columns[name] = argument, read
        self._has_data = has_data(local(params[0]))
        self._notes_changes = all(isinstance(state, State) for state in states)  # a dict of the user's does not
        self._seen: list[object] = []  # the last change of a state, and the memory of the first one, in the last step
        self._counters = {name: self._flatten(name) for name in COUNTERS if name in states[0]}
        self._corrections: torch.Tensor | None = None
        gaps = [position for position, param in enumerate(params) if not is_dense(local(param))]
        self._buffers: dict[int, torch.Tensor | None] = dict.fromkeys(gaps)  # position of a parameter -> its dense buffer

    @property
    def version(self) -> int:
        """Number that changes if a step of other tensors was prepared than before."""
        return self.step.version + self.offloaded.version

    def dense_params(self) -> list[torch.Tensor]:
        """Return the parameters as the ops take them: dense, those with gaps as copies in buffers that stay where they are."""
        tensors = self.locals(self.params)
        if self._buffers:
            tensors = list(tensors)
        for position, buffer in self._buffers.items():
            param = tensors[position]
            if buffer is None or (buffer.dtype, buffer.device, buffer.shape) != (param.dtype, param.device, param.shape):
                buffer = self._buffers[position] = torch.empty_like(param, requires_grad=False)
            tensors[position] = buffer.copy_(param)
        return tensors

    def noise(self, seed: int, counter: str) -> Noise:
        """Return where the noise of the parameters comes from, in the step that a counter tells."""
        return Noise(seed, self.tensor_ids, self.tensor_offsets, self.count(counter))

    def copy_back(self) -> None:
        """Copy the buffers, which an op has changed, into the parameters with gaps."""
        for position, buffer in self._buffers.items():
            if buffer is not None:
                local(self.params[position]).copy_(buffer)

    def _flatten(self, name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Make the counters of all states views of one vector, to which one addition is enough; return it and the views."""
        if len(self.states) == 1:  # in its own memory: step groups of one parameter come and go beside those of all
            return self.states[0][name].view(1), [self.states[0][name]]
        flat = torch.stack([state[name].reshape(()) for state in self.states])
        views = list(flat.unbind())
        for state, view in zip(self.states, views):
            state[name] = view
        return flat, views

    def fits(self, params: Sequence[torch.Tensor]) -> bool:
        """Tell whether this is still the step group of ``params``: the same objects, with counters that nobody has replaced."""
        if len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        if self._seen and self._seen[0] is State.last_change:
            return True
        for name, (_, views) in self._counters.items():
            if not all(map(operator.is_, map(operator.methodcaller("get", name), self.states), views)):
                return False
        return True

    def locals(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors; for DTensors, the shards that this process holds."""
        return tensors if self._mesh is None else [self._local(tensor) for tensor in tensors]

    def _local(self, tensor: Any) -> torch.Tensor:
        """Return the local shard of a tensor that is first sharded as the parameters are."""
        if is_sharded(tensor) and tensor.placements != self._placements:  # a gradient that is still to be summed
            tensor = tensor.redistribute(self._mesh, self._placements)
        return local(tensor)

    def lists(self, *names: str) -> dict[str, list[torch.Tensor]]:
        """Return lists of states by the names of the ops' arguments: of the states in ``names``, or of all."""
        return {
            argument: self._own(name, list(map(read, self.states)))
            for name, (argument, read) in self._columns.items()
            if not names or name in names
        }

    def _own(self, name: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the shards of states that this process holds; of scales, without what fills them up."""
        codes = name.removesuffix("_scale")
        if self._mesh is None or codes == name:
            return self.locals(tensors)
        return [scale if scale is None else own_scales(scale, state[codes]) for scale, state in zip(tensors, self.states)]

    def has_same_states(self) -> bool:
        """Tell whether all states hold the tensors of the last call.

        No state may have changed since. Of the first one the memory is compared as well: code that moves states behind the
        same objects (``state["exp_avg"].data = ...``) moves all of them.
        """
        if not self._has_data or not self._notes_changes:
            return False
        first = self.states[0]
        tensors = [read(first) for _, read in self._columns.values()]
        seen = [State.last_change, *[_memory_of(local(tensor)) for tensor in tensors if tensor is not None]]
        same = seen == self._seen
        self._seen = seen
        return same

    def count(self, name: str) -> torch.Tensor:
        """Return the counters ``name`` of all states as one fp32 vector [n], to be changed in place."""
        return self._counters[name][0]

    def corrections(self, decay: float, updates: torch.Tensor) -> torch.Tensor:
        """Return ``1 - decay^updates``, or 1 for no updates, [n]; always in the same memory."""
        values = 1 - torch.pow(decay, updates)
        values.masked_fill_(values == 0, 1.0)
        if self._corrections is None:
            self._corrections = values
        return self._corrections.copy_(values)

    def sum_over_shards(self, value: torch.Tensor) -> torch.Tensor:
        """Add up, in place, numbers that every process has for its own shards, or its piece under ZeRO; return them."""
        if self.is_piece:
            torch.distributed.all_reduce(value)
        if self._mesh is None:
            return value
        for dim, placement in enumerate(self._placements):
            if splits(placement):
                torch.distributed.all_reduce(value, group=self._mesh.get_group(dim))
        return value


class GroupWork(NamedTuple):
    """The work of one step on one parameter group.

    Attributes:
        group: the parameter group.
        options_version: number that stays the same as long as the options in ``FIXED`` do.
        step_groups: its step groups.
        grads: the gradients of each step group as the ops take them.
    """

    group: ParamGroup
    options_version: int
    step_groups: list[StepGroup]
    grads: list[list[torch.Tensor]]

    @classmethod
    def of(cls, group: ParamGroup, options_version: int, step_groups: list[StepGroup]) -> "GroupWork":
        """Return the step groups with the gradients that their parameters hold now."""
        all_grads = []
        for step_group in step_groups:
            grads: list[Any] = [p.grad for p in step_group.params]  # None only in a step group that `collect` then replaces
            all_grads.append(step_group.locals(grads))
        return cls(group, options_version, step_groups, all_grads)


class StepGroups:
    """The step groups of an optimizer, kept from step to step.

    Args:
        optimizer: a `soul.SophiaG`; its groups and states are looked at again in every step.
    """

    def __init__(self, optimizer: GroupedOptimizer) -> None:
        self._optimizer = weakref.proxy(optimizer)  # a cycle would keep states on a GPU until Python collects garbage
        self._step_groups: dict[Hashable, list[StepGroup]] = {}  # by index of the parameter group, or by parameter
        self._first_params: dict[int, torch.Tensor] = {}  # id of a group -> its first parameter in the first step
        self.n_groups = len(getattr(optimizer, "param_groups", ()))  # ZeRO shows one group at a time
        self._known_states: list[dict[str, Any]] = []  # the states that the step groups were made for
        # Index of a group -> version, and the options in FIXED and in ON_DEVICE that have been checked; None if not lasting.
        self._options: dict[int, tuple[int, tuple[Any, ...] | None, tuple[Any, ...] | None]] = {}
        self._versions = itertools.count()
        self._positions: dict[torch.Tensor, tuple[int, int]] = {}  # parameter -> index of its group, and position there
        self._captured: set[StepGroup] = set()  # step groups of captured steps: replays use their memory

    def collect(self, bs: Number | None = None) -> list[GroupWork]:
        """Return every parameter group with its step groups and their gradients.

        All options are checked before anything is changed. Gradients are checked here if the step groups no longer fit;
        otherwise the ops check them. Parameters that have no state get one.

        Args:
            bs: the ``bs`` of this step in place of the groups', or None.

        Raises:
            ArgumentError: an option or a gradient does not fit, or a CUDA graph that is being captured could not repeat the
                step.
        """
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        self._check_states()
        groups = self._optimizer.param_groups
        work: list[GroupWork] = []
        fresh: dict[int, list[torch.Tensor]] = {}  # index of a group whose step groups do not fit -> its parameters
        for index, group in enumerate(groups):
            options_version = self._check_options(group, index)
            params = group["params"]
            first = self._first_params.setdefault(id(group), params[0]) if params else None
            check_not_in_pieces(group, first, self.n_groups)
            grads = [p.grad for p in params]
            if capturing:
                self._check_capture(group, index, grads, bs)
            step_groups = self._step_groups.get(index, [])
            active = params
            if [grad for grad in grads if grad is None]:  # the cheapest way to ask; `in` would compare tensors
                active = [p for p in params if p.grad is not None]
                grads = [p.grad for p in active]
            if len(step_groups) == 1 and step_groups[0].fits(active):
                work.append(GroupWork(group, options_version, step_groups, [step_groups[0].locals(grads)]))
                continue
            active = list(dict.fromkeys(active))
            if not _all_fit(step_groups, active):
                fresh[index] = active
            work.append(GroupWork.of(group, options_version, step_groups))
        if fresh and capturing:  # their steps would be counted in memory that a replay sets back
            remedy = "run one eager step before the capture"
            raise argument_error("CUDA graph", "the parameters and states of the last step", "others", remedy)
        if fresh:  # otherwise the ops check the gradients, before anything is changed, at a tenth of the cost
            self.check_gradients()
            self._check_shared_elements()
        for index, active in fresh.items():
            self._step_groups[index] = self._make(groups[index], index, active)
            work[index] = GroupWork.of(groups[index], work[index].options_version, self._step_groups[index])
        if capturing:
            self._captured.update(each for group_work in work for each in group_work.step_groups)
        return work

    def collect_one(self, param: torch.Tensor) -> GroupWork:
        """Return the `GroupWork` of one parameter: its group, with one step group of this parameter alone."""
        self._check_states()
        index, position = self.position_of(param)
        group = self._optimizer.param_groups[index]
        options_version = self._check_options(group, index)
        self._check_gradient(param, index, position)
        if not _all_fit(self._step_groups.get(param, []), [param]):
            self._step_groups[param] = self._make(group, index, [param])
        return GroupWork.of(group, options_version, self._step_groups[param])

    def _check_options(self, group: ParamGroup, index: int) -> int:
        """Check the options of a group that are not those of the last step.

        Returns:
            A number that stays the same as long as the options in ``FIXED`` do.
        """
        fixed = _FIXED_OF(group)
        numbers = _NUMBERS_OF(group)
        version, known_fixed, known_numbers = self._options.get(index, (0, None, None))
        if known_fixed is None or not all(map(operator.is_, fixed, known_fixed)):
            check_options(group)
            version = next(self._versions)
            self._options[index] = version, fixed if lasts(fixed) else None, numbers if lasts(numbers) else None
        elif known_numbers is None or not all(map(operator.is_, numbers, known_numbers)):
            check_numbers(group)
            self._options[index] = version, fixed, numbers if lasts(numbers) else None
        return version

    def _check_states(self) -> None:
        """Drop all step groups if the states are not those that they were made for."""
        states = self._optimizer.state.values()
        if len(states) != len(self._known_states) or not all(map(operator.is_, states, self._known_states)):
            self._step_groups.clear()
            self._known_states = list(states)

    def position_of(self, param: torch.Tensor) -> tuple[int, int]:
        """Return the index of a parameter's group, and its position there."""
        index, position = self._positions.get(param, (0, -1))
        params = self._optimizer.param_groups[index]["params"]
        if not 0 <= position < len(params) or params[position] is not param:  # not known yet, or the groups were changed
            self._positions = {}
            for index, group in reversed(list(enumerate(self._optimizer.param_groups))):
                self._positions |= {p: (index, i) for i, p in reversed(list(enumerate(group["params"])))}
        return self._positions[param]

    def _make(self, group: ParamGroup, index: int, params: list[torch.Tensor]) -> list[StepGroup]:
        """Return new step groups for parameters of a group; make the states that are missing."""
        if len(params) > 1:  # counters would leave the memory that replays add to
            captured = {id(p) for each in self._captured for p in each.params}
            if any(id(p) in captured for p in params):
                remedy = "give all of them gradients, or load the optimizer's state into a new one"
                raise argument_error("gradients", "those of the parameters in the captured step", "those of others", remedy)
        state = self._optimizer.state
        for param in params:
            if not state[param]:
                state[param] = State(new_state(param, group, counters_of(self._optimizer.hessian_in_step)))
        self._known_states = list(state.values())
        first = sum(len(each["params"]) for each in self._optimizer.param_groups[:index])
        tensor_ids = {id(p): first + position for position, p in reversed(list(enumerate(group["params"])))}
        if hidden_sharding(group["params"]) == "DeepSpeed":  # shows one piece at a time, so each would be the first
            tensor_ids = {id(p): number for number, p in enumerate(state)}
        return [
            StepGroup(together, [state[p] for p in together], [tensor_ids[id(p)] for p in together])
            for together in _stepped_together(params)
        ]

    def check_gradients(self) -> None:
        """Check the gradient of every parameter.

        Raises:
            ArgumentError: one does not fit, or its parameter no longer fits its state.
        """
        for index, group in enumerate(self._optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                self._check_gradient(param, index, position)

    def _check_gradient(self, param: torch.Tensor, index: int, position: int) -> None:
        """Check one gradient, and that its parameter still fits its state."""
        if param.grad is None:
            return
        name = f"parameter {position} in group {index}"
        group = self._optimizer.param_groups[index]
        check_param_dtype(name, param)
        check_param_dtype(f"the gradient of {name}", param.grad)
        resolve_backend(group["backend"], local(param))
        state = self._optimizer.state.get(param, {})
        dense = torch.empty_like(local(param), device="meta")  # laid out as the states are, also if a parameter has gaps
        for key in STATES:
            if key not in state:
                continue
            if local(state[key]).device != device_of_states(local(param), group):
                raise argument_error(name, f"device {local(state[key]).device}, as its {key}", local(param).device, _REFIT)
            if local(state[key]).shape != dense.shape:
                expected = f"shape {tuple(local(state[key]).shape)}, as its {key}"
                remedy = "do not change the shape of a parameter in training"
                raise argument_error(name, expected, tuple(dense.shape), remedy)
            if not same_layout(local(state[key]), dense):
                remedy = "do not change the memory format of a model in training"
                raise argument_error(name, f"strides {state[key].stride()}, as its {key}", param.stride(), remedy)
        if "low_bits" in state and param.dtype == torch.float32:
            raise argument_error(name, "torch.bfloat16 or torch.float16, beside its low_bits", param.dtype, _REFIT)
        if state and "low_bits" not in state and param.dtype != torch.float32 and rounding_of(group) == "compensated":
            raise argument_error(name, "torch.float32, or low_bits in its state", f"{param.dtype} without", _REFIT)

    def _check_shared_elements(self) -> None:
        """Raise if a parameter with gaps shares elements with another parameter; the ops check dense ones.

        Ranges of addresses may overlap without a shared element, as those of two slices of columns do. So every byte of a
        common storage is marked.
        """
        names: dict[torch.Tensor, str] = {}
        for index, group in enumerate(self._optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                if has_data(local(param)):
                    names.setdefault(param, f"parameter {position} in group {index}")
        params = [(name, local(param)) for param, name in names.items()]
        with_gaps = {param.untyped_storage().data_ptr() for _, param in params if not is_dense(param)}
        if not with_gaps:
            return
        taken: dict[int, torch.Tensor] = {}  # address of a storage -> for each of its bytes, whether a parameter has it
        for name, param in params:
            storage = param.untyped_storage()
            address = storage.data_ptr()
            if address not in with_gaps:
                continue
            if address not in taken:
                taken[address] = torch.zeros(storage.nbytes(), dtype=torch.bool, device="cpu")
            size = param.element_size()
            strides = [stride * size for stride in param.stride()]
            view = taken[address].as_strided((*param.shape, size), (*strides, 1), param.storage_offset() * size)
            if view.any():
                remedy = "pass a tied tensor once, and no views of one another"
                raise argument_error(name, "memory of its own", "elements of another parameter", remedy)
            view.fill_(True)

    def _check_capture(self, group: ParamGroup, index: int, grads: list[torch.Tensor | None], bs: Number | None) -> None:
        """Raise if a replay could not do what a step does: it repeats numbers, and steps only what was captured."""
        if not group["capturable"]:
            raise argument_error("capturable", "True in a CUDA graph", f"False in group {index}", "pass capturable=True")
        for name, value in ((name, group[name]) for name in ON_DEVICE if name != "bs" or bs is None):
            if not isinstance(value, torch.Tensor):
                remedy = f"replays would keep it: use group[{name!r}].fill_(), which keeps the tensor"
                raise argument_error(name, "a tensor in a CUDA graph", f"{value!r} in group {index}", remedy)
        if bs is not None and not isinstance(bs, torch.Tensor):
            raise argument_error("bs", "a tensor or None in a CUDA graph", repr(bs), "replays would keep it: fill the group's")
        missing = sum(grad is None for grad in grads)
        if missing:
            remedy = "replays would never move them: leave them out of the optimizer, or use them in the captured pass"
            raise argument_error(
                "CUDA graph", "a gradient for every parameter", f"{missing} without one in group {index}", remedy
            )
        if not all(self._optimizer.state.get(p) for p in group["params"]):
            remedy = "run one eager step before the capture"
            raise argument_error("CUDA graph", "states that exist", f"none for some of group {index}", remedy)


def _memory_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return where and how a tensor lies in memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _all_fit(step_groups: list[StepGroup], params: list[torch.Tensor]) -> bool:
    """Tell whether the step groups are still those of these parameters."""
    together = _stepped_together(params)
    return len(together) == len(step_groups) and all(each.fits(same) for each, same in zip(step_groups, together))


def _stepped_together(params: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Divide parameters into lists that one call of an op can step: on one device, and sharded alike."""
    lists: dict[Hashable, list[torch.Tensor]] = {}  # by device and sharding
    for param in params:
        lists.setdefault(device_and_sharding(param), []).append(param)
    return list(lists.values())
