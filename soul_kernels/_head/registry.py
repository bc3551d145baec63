"""Numbers of objectives. A custom op cannot take a Python function, so under torch.compile it takes such a number."""

import itertools
import secrets
import weakref

from soul_kernels.errors import argument_error
from soul_kernels.tokens import ObjectiveFunction

_objectives: weakref.WeakValueDictionary[int, ObjectiveFunction] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_process = (1 << 62) | (secrets.randbits(29) << 32)  # distinguishes the numbers in programs that this process has exported


def register_objective(objective: ObjectiveFunction) -> int:
    """Return a new number for an objective; it is valid for as long as the objective lives.

    An objective with this number as its attribute ``key`` is compiled without a graph break, as those of ``soul.losses`` are.
    """
    number = next(_numbers)
    _objectives[number] = objective
    return number


def objective_of(number: int) -> ObjectiveFunction:
    """Return the objective of a number from `register_objective` or `exported_number`.

    Raises:
        ArgumentError: the objective is gone, or the number comes from a program that another process has exported.
    """
    local_number = number ^ _process if number >> 62 else number
    if local_number not in _objectives:
        remedy = "keep a reference to it; a program that is to run in another process can return log-probabilities only"
        raise argument_error("objective", "one that is alive in this process", f"number {number}, which is not", remedy)
    return _objectives[local_number]


def exported_number(number: int) -> int:
    """Return the number of an objective for an exported program. In another process it belongs to no objective."""
    return number ^ _process
