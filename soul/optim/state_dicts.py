"""The dict of a parameter's state, which notes that it was changed.

An optimizer would have to look at every tensor of every state before each step, since users may put others into the dicts. For
many small tensors that takes longer than all else. A `State` notes each change of any state instead.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar


class State(dict[str, Any]):
    """State of a parameter, name -> tensor, as a dict that notes changes.

    Checkpoints hold plain dicts: see `soul.SophiaG.state_dict`.

    Attributes:
        last_change: an object that stands for the last change of any `State`; the next change replaces it.
    """

    last_change: ClassVar[object] = object()


def _noted(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of `dict` that also notes a change."""

    @functools.wraps(method)
    def change(self: State, *args: Any, **entries: Any) -> Any:
        State.last_change = object()
        return method(self, *args, **entries)

    return change


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(State, _name, _noted(getattr(dict, _name)))
