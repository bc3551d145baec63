"""Flat inputs of the ops on hidden states: [N, D] with one label each is a batch of one sequence."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from soul_kernels.errors import argument_error
from soul_kernels.tokens import Reference

P = ParamSpec("P")
T = TypeVar("T")
PER_TOKEN = ("labels", "keep", "uniforms")  # arguments with a number for each token


def takes_flat(op: Callable[P, T]) -> Callable[P, T]:
    """Return an op on hidden states [B, T, D] that also takes [N, D], with labels and other values of tokens as [N].

    Its results that have a value for each token are then [N] as well.
    """
    parameters = inspect.signature(op).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind == parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        arguments: dict[str, Any] = dict(zip(names, args)) | kwargs
        hidden = arguments.get("hidden")
        if not isinstance(hidden, Tensor) or hidden.dim() != 2 or len(args) > len(names):
            return op(*args, **kwargs)
        for name in PER_TOKEN:
            value = arguments.get(name)
            if isinstance(value, Tensor):
                if value.dim() != 1:
                    got = tuple(value.shape)
                    raise argument_error(name, f"[N] ({len(hidden)},), beside hidden [N, D]", got, "flatten both, or neither")
                arguments[name] = value[None]
        reference = arguments.get("reference")
        if isinstance(reference, Reference) and isinstance(reference.hidden, Tensor) and reference.hidden.dim() == 2:
            arguments["reference"] = reference._replace(hidden=reference.hidden[None])
        return _flat(op(**arguments | {"hidden": hidden[None]}))  # type: ignore[call-arg]  # by name

    return call


def _flat(result: Any) -> Any:
    """Return a result with [N] in place of [1, N], in tuples as well."""
    if isinstance(result, Tensor):
        return result.squeeze(0) if result.dim() == 2 else result
    values = map(_flat, result)
    return type(result)(*values) if hasattr(result, "_fields") else tuple(values)
