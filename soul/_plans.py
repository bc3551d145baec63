"""Which parameters are stepped together, with which gradients: found anew only where something has changed."""

import operator
import weakref

import torch

from soul._options import ON_DEVICE, check_options, check_param_dtype
from soul._plan import Plan, local, place
from soul._states import STATES, new_state
from soul_kernels._checks import argument_error, same_layout
from soul_kernels._launch import resolve_backend


class Plans:
    """The plans of an optimizer.

    Args:
        optimizer: a `soul.SophiaG`; its groups and states are looked at again in every step.
    """

    def __init__(self, optimizer):
        self._optimizer = weakref.proxy(optimizer)  # no cycle, which would keep states on a GPU until Python cleans up
        self._plans = {}  # group index, or parameter -> plans
        self._known_states = []  # the states that the plans were made for
        self._places = {}  # parameter -> index of its group, and position there
        self._captured = set()  # plans of captured steps, whose memory replays use

    def collect(self, bs=None):
        """Every group with its plans and their gradients: [(group, [(plan, gradients)])].

        All options are checked, and all gradients that are not those of the last call in every respect, before anything is
        changed; states are made for parameters that have none.
        """
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        self._check_states()
        groups, work, fresh = self._optimizer.param_groups, [], {}
        for index, group in enumerate(groups):
            check_options(group)
            params = group["params"]
            grads = [p.grad for p in params]
            if capturing:
                self._check_capture(group, index, grads, bs)
            plans = self._plans.get(index, ())
            active = params
            if [grad for grad in grads if grad is None]:  # the cheapest way to ask; `in` would compare tensors
                active = [p for p in params if p.grad is not None]
                grads = [p.grad for p in active]
            if len(plans) == 1 and plans[0].fits(active):
                work.append((group, [(plans[0], plans[0].locals(grads))]))
                continue
            active = list(dict.fromkeys(active))
            if not _all_fit(plans, active):
                fresh[index] = active
            work.append((group, [(plan, plan.locals([p.grad for p in plan.params])) for plan in plans]))
        if fresh and capturing:  # it would count its steps in memory that a replay sets back
            remedy = "run one eager step before the capture"
            raise argument_error("CUDA graph", "the parameters and states of the last step", "others", remedy)
        if fresh:  # known plans are checked by the ops, before anything is changed, at a tenth of the cost
            self.check_gradients()
        for index, active in fresh.items():
            plans = self._plans[index] = self._make_plans(groups[index], index, active)
            work[index] = groups[index], [(plan, plan.locals([p.grad for p in plan.params])) for plan in plans]
        if capturing:
            self._captured.update(plan for _, plans in work for plan, _ in plans)
        return work

    def of(self, param):
        """The same for one parameter."""
        self._check_states()
        index, position = self.place(param)
        group = self._optimizer.param_groups[index]
        check_options(group)
        self._check_gradient(param, index, position)
        plans = self._plans.get(param, ())
        if not _all_fit(plans, [param]):
            plans = self._plans[param] = self._make_plans(group, index, [param])
        return [(group, [(plans[0], plans[0].locals([param.grad]))])]

    def _check_states(self):
        """Drops the plans where states are not those that they were made for."""
        states = self._optimizer.state.values()
        if len(states) != len(self._known_states) or not all(map(operator.is_, states, self._known_states)):
            self._plans.clear()
            self._known_states = list(states)

    def place(self, param):
        """Index of a parameter's group, and its position there."""
        index, position = self._places.get(param, (0, 0))
        params = self._optimizer.param_groups[index]["params"]
        if position >= len(params) or params[position] is not param:  # not known yet, or the groups were changed
            self._places = {}
            for index, group in reversed(list(enumerate(self._optimizer.param_groups))):
                self._places |= {p: (index, i) for i, p in reversed(list(enumerate(group["params"])))}
        return self._places[param]

    def _make_plans(self, group, index, params):
        first = sum(len(g["params"]) for g in self._optimizer.param_groups[:index])
        if len(params) > 1:  # counters would move to other memory than the one that replays add to
            captured = {id(p) for plan in self._captured for p in plan.params}
            if any(id(p) in captured for p in params):
                remedy = "give all of them gradients, or load the optimizer's state into a new one"
                raise argument_error("gradients", "those of the parameters in the captured step", "of others", remedy)
        places, state = {}, self._optimizer.state
        for param in params:
            if not state[param]:
                state[param] = new_state(param, group, self._optimizer._counters(group))
            places.setdefault(place(param), []).append(param)
        self._known_states = list(state.values())
        numbers = {id(p): first + position for position, p in reversed(list(enumerate(group["params"])))}
        return [Plan(here, [state[p] for p in here], [numbers[id(p)] for p in here]) for here in places.values()]

    def check_gradients(self):
        for index, group in enumerate(self._optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                self._check_gradient(param, index, position)

    def _check_gradient(self, param, index, position):
        """Checks one gradient, and that parameter and states still lie in memory alike."""
        if param.grad is None:
            return
        name = f"parameter {position} in group {index}"
        check_param_dtype(f"the gradient of {name}", param.grad)
        resolve_backend(self._optimizer.param_groups[index]["backend"], local(param))
        state = self._optimizer.state.get(param, {})
        for key in STATES:
            if key in state and not same_layout(local(state[key]), local(param)):
                got, remedy = f"{param.stride()}", "do not change the memory format of a model in training"
                raise argument_error(name, f"strides {state[key].stride()}, as its {key}", got, remedy)

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


def _all_fit(plans, params):
    places = {}
    for param in params:
        places.setdefault(place(param), []).append(param)
    return len(places) == len(plans) and all(plan.fits(here) for plan, here in zip(plans, places.values()))
