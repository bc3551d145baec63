"""What is stepped together, and what that needs: found anew only where something has changed."""

import operator
import weakref

import torch

from soul.distributed.shards import device_and_sharding, first_number, is_sharded, local, splits
from soul.optim.options import ON_DEVICE, check_options, check_param_dtype, check_sees_all, rounding_of
from soul.optim.states import STATES, new_state
from soul_kernels import TensorTable
from soul_kernels.backends import resolve_backend
from soul_kernels.errors import argument_error
from soul_kernels.tensors import has_data, is_dense, same_layout

# Name of a state -> name of the list that the ops take.
LISTS = {
    "exp_avg": "exp_avgs",
    "hessian": "hessians",
    "low_bits": "low_bits",
    "exp_avg_scale": "exp_avg_scales",
    "hessian_scale": "hessian_scales",
}
COUNTERS = ("step", "hessian_step")


_AFTER_TO = (
    "after model.to(...) call optimizer.load_state_dict(optimizer.state_dict()), which fits the states to the parameters"
)


class Part:
    """Some parameters of one group in one place, each with a state.

    Attributes:
        params: the parameters.
        states: the state of each.
        device: where they are.
        tensor_ids: number of each parameter in the optimizer, for its noise.
        tensor_offsets: number of the first element that this process holds of each, for the same.
        table, hessian_table, norm_table: for the launches of `sophia_step`, `hessian_ema` and `grad_norm`.
        telemetry: fp64 [3] on the device, what `sophia_step` counts there.
        numel: coordinates of the parameters, over all shards.

    The ops walk dense tensors. A parameter with gaps, such as a slice of columns, is stepped in a dense buffer: `params_in`
    copies it there, and `copy_back` returns the result.
    """

    def __init__(self, params, states, tensor_ids):
        self.params, self.states, self.tensor_ids = params, states, tensor_ids
        self.tensor_offsets = [first_number(param) for param in params]
        self.device, self._mesh, self._placements = device_and_sharding(params[0])
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
        self._buffers = {i: None for i, p in enumerate(params) if not is_dense(local(p))}  # position -> its dense buffer

    def params_in(self):
        """The parameters as the ops take them: dense, those with gaps as copies in buffers that stay where they are."""
        tensors = self.locals(self.params)
        if self._buffers:
            tensors = list(tensors)
        for position, buffer in self._buffers.items():
            param = tensors[position]
            if buffer is None or (buffer.dtype, buffer.device, buffer.shape) != (param.dtype, param.device, param.shape):
                buffer = self._buffers[position] = torch.empty_like(param, requires_grad=False)
            tensors[position] = buffer.copy_(param)
        return tensors

    def copy_back(self):
        """Copies what the ops made of parameters with gaps into these."""
        for position, buffer in self._buffers.items():
            local(self.params[position]).copy_(buffer)

    def _flatten(self, name):
        """Makes the counters of all states views of one vector, so that one addition moves them all."""
        if len(self.states) == 1:  # nothing is moved: parts of one parameter come and go beside those of all
            return self.states[0][name].view(1), [self.states[0][name]]
        flat = torch.stack([state[name].reshape(()) for state in self.states])
        views = list(flat.unbind())
        for state, view in zip(self.states, views):
            state[name] = view
        return flat, views

    def fits(self, params):
        """Tells whether this is still the part for these parameters: the same objects, with counters nobody has replaced."""
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

    def sum_over_shards(self, value):
        """Adds up, in place, a number that every process has for its own shards."""
        for dim, placement in enumerate(self._placements):
            if splits(placement):
                torch.distributed.all_reduce(value, group=self._mesh.get_group(dim))
        return value


class Parts:
    """The parts of an optimizer.

    Args:
        optimizer: a `soul.SophiaG`; its groups and states are looked at again in every step.
    """

    def __init__(self, optimizer):
        self._optimizer = weakref.proxy(optimizer)  # no cycle, which would keep states on a GPU until Python cleans up
        self._parts = {}  # group index, or parameter -> parts
        self._known_states = []  # the states that the parts were made for
        self._places = {}  # parameter -> index of its group, and position there
        self._captured = set()  # parts of captured steps, whose memory replays use

    def collect(self, bs=None):
        """Every group with its parts and their gradients: [(group, [(part, gradients)])].

        All options are checked, and all gradients that are not those of the last call in every respect, before anything is
        changed; states are made for parameters that have none.
        """
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        self._check_states()
        groups, work, fresh = self._optimizer.param_groups, [], {}
        for index, group in enumerate(groups):
            check_options(group)
            check_sees_all(group)
            params = group["params"]
            grads = [p.grad for p in params]
            if capturing:
                self._check_capture(group, index, grads, bs)
            parts = self._parts.get(index, ())
            active = params
            if [grad for grad in grads if grad is None]:  # the cheapest way to ask; `in` would compare tensors
                active = [p for p in params if p.grad is not None]
                grads = [p.grad for p in active]
            if len(parts) == 1 and parts[0].fits(active):
                work.append((group, [(parts[0], parts[0].locals(grads))]))
                continue
            active = list(dict.fromkeys(active))
            if not _all_fit(parts, active):
                fresh[index] = active
            work.append((group, [(part, part.locals([p.grad for p in part.params])) for part in parts]))
        if fresh and capturing:  # it would count its steps in memory that a replay sets back
            remedy = "run one eager step before the capture"
            raise argument_error("CUDA graph", "the parameters and states of the last step", "others", remedy)
        if fresh:  # known parts are checked by the ops, before anything is changed, at a tenth of the cost
            self.check_gradients()
            self._check_shared_elements()
        for index, active in fresh.items():
            parts = self._parts[index] = self._make_parts(groups[index], index, active)
            work[index] = groups[index], [(part, part.locals([p.grad for p in part.params])) for part in parts]
        if capturing:
            self._captured.update(part for _, parts in work for part, _ in parts)
        return work

    def of(self, param):
        """The same for one parameter."""
        self._check_states()
        index, position = self.place(param)
        group = self._optimizer.param_groups[index]
        check_options(group)
        self._check_gradient(param, index, position)
        parts = self._parts.get(param, ())
        if not _all_fit(parts, [param]):
            parts = self._parts[param] = self._make_parts(group, index, [param])
        return [(group, [(parts[0], parts[0].locals([param.grad]))])]

    def _check_states(self):
        """Drops the parts where states are not those that they were made for."""
        states = self._optimizer.state.values()
        if len(states) != len(self._known_states) or not all(map(operator.is_, states, self._known_states)):
            self._parts.clear()
            self._known_states = list(states)

    def place(self, param):
        """Index of a parameter's group, and its position there."""
        index, position = self._places.get(param, (0, -1))
        params = self._optimizer.param_groups[index]["params"]
        if not 0 <= position < len(params) or params[position] is not param:  # not known yet, or the groups were changed
            self._places = {}
            for index, group in reversed(list(enumerate(self._optimizer.param_groups))):
                self._places |= {p: (index, i) for i, p in reversed(list(enumerate(group["params"])))}
        return self._places[param]

    def _make_parts(self, group, index, params):
        first = sum(len(g["params"]) for g in self._optimizer.param_groups[:index])
        if len(params) > 1:  # counters would move to other memory than the one that replays add to
            captured = {id(p) for part in self._captured for p in part.params}
            if any(id(p) in captured for p in params):
                remedy = "give all of them gradients, or load the optimizer's state into a new one"
                raise argument_error("gradients", "those of the parameters in the captured step", "of others", remedy)
        places, state = {}, self._optimizer.state
        for param in params:
            if not state[param]:
                state[param] = new_state(param, group, self._optimizer._counters(group))
            places.setdefault(device_and_sharding(param), []).append(param)
        self._known_states = list(state.values())
        numbers = {id(p): first + position for position, p in reversed(list(enumerate(group["params"])))}
        return [Part(here, [state[p] for p in here], [numbers[id(p)] for p in here]) for here in places.values()]

    def check_gradients(self):
        """Check the gradient of every parameter."""
        for index, group in enumerate(self._optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                self._check_gradient(param, index, position)

    def _check_gradient(self, param, index, position):
        """Checks one gradient, and that its parameter is still one that its states were made for."""
        if param.grad is None:
            return
        name, group = f"parameter {position} in group {index}", self._optimizer.param_groups[index]
        check_param_dtype(name, param)
        check_param_dtype(f"the gradient of {name}", param.grad)
        resolve_backend(group["backend"], local(param))
        state = self._optimizer.state.get(param, {})
        dense = torch.empty_like(local(param), device="meta")  # laid out as the states are, also where a parameter has gaps
        for key in STATES:
            if key not in state:
                continue
            if local(state[key]).device != local(param).device:
                raise argument_error(name, f"device {local(state[key]).device}, as its {key}", local(param).device, _AFTER_TO)
            if local(state[key]).shape != dense.shape:
                got, remedy = tuple(dense.shape), "do not change the shape of a parameter in training"
                raise argument_error(name, f"shape {tuple(local(state[key]).shape)}, as its {key}", got, remedy)
            if not same_layout(local(state[key]), dense):
                got, remedy = f"{param.stride()}", "do not change the memory format of a model in training"
                raise argument_error(name, f"strides {state[key].stride()}, as its {key}", got, remedy)
        if "low_bits" in state and param.dtype == torch.float32:
            raise argument_error(name, "torch.bfloat16 or torch.float16, beside its low_bits", param.dtype, _AFTER_TO)
        if state and "low_bits" not in state and param.dtype != torch.float32 and rounding_of(group) == "compensated":
            raise argument_error(name, "torch.float32, or low_bits in its state", f"{param.dtype} without", _AFTER_TO)

    def _check_shared_elements(self):
        """Raises where a parameter with gaps has elements of another one; of dense parameters the ops know.

        Their ranges of addresses may overlap without a shared element, as those of two slices of columns do: so every byte of
        their common storage is marked.
        """
        names = {}  # parameter -> its name
        for index, group in enumerate(self._optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                if has_data(local(param)):
                    names.setdefault(param, f"parameter {position} in group {index}")
        params = [(name, local(param)) for param, name in names.items()]
        strided = {param.untyped_storage().data_ptr() for _, param in params if not is_dense(param)}
        marks = {}  # address of a storage -> for each of its bytes, whether a parameter has it
        for name, param in params if strided else ():
            storage, size = param.untyped_storage(), param.element_size()
            if storage.data_ptr() not in strided:
                continue
            if storage.data_ptr() not in marks:
                marks[storage.data_ptr()] = torch.zeros(storage.nbytes(), dtype=torch.bool, device="cpu")
            strides = [stride * size for stride in param.stride()]
            view = marks[storage.data_ptr()].as_strided((*param.shape, size), (*strides, 1), param.storage_offset() * size)
            if view.any():
                got, remedy = "elements of another parameter", "pass a tied tensor once, and no views of one another"
                raise argument_error(name, "memory of its own", got, remedy)
            view.fill_(True)

    def _check_capture(self, group, index, grads, bs):
        """A replay repeats what is captured: options by value, and only the parameters that took part."""
        if not group["capturable"]:
            raise argument_error("capturable", "True in a CUDA graph", f"False in group {index}", "pass capturable=True")
        for name, value in ((name, group[name]) for name in ON_DEVICE if name != "bs" or bs is None):
            if not isinstance(value, torch.Tensor):
                remedy = f"replays would keep it: use group[{name!r}].fill_() where it was a tensor"
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


def _all_fit(parts, params):
    places = {}
    for param in params:
        places.setdefault(device_and_sharding(param), []).append(param)
    return len(places) == len(parts) and all(part.fits(here) for part, here in zip(parts, places.values()))
