"""Models that DeepSpeed's ZeRO-3 has cut into pieces while they were loaded (``zero.Init``).

Such a model cannot compute before DeepSpeed has made an engine of it: each parameter is empty, with this process's piece beside
it. What an objective needs of the model before training gathers them here, a few at a time. All functions are collective.
"""

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any

import torch

from soul.models import causal_lm


def in_pieces(model: torch.nn.Module) -> bool:
    """Tell whether ZeRO-3 has cut a model."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _gather(parameters: list[torch.nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which parameters are whole; those that no one has cut are so anyway."""
    context: contextlib.AbstractContextManager[Any] = importlib.import_module("deepspeed").zero.GatheredParameters(parameters)
    return context


def whole_copy(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy with whole parameters, which are gathered and copied one at a time and require no gradient."""
    if not in_pieces(model):
        return copy.deepcopy(model)
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        with _gather([parameter]):
            copies[id(parameter)] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
    return copy.deepcopy(model, copies)  # which takes what is in `copies` for copied already


@contextlib.contextmanager
def computing(model: torch.nn.Module) -> Iterator[None]:
    """Let a model compute in the block: every module gathers its own parameters while it runs, and the head stays whole.

    Args:
        model: a Hugging Face model, in pieces or whole, which peft may have wrapped. All processes must compute the same.
    """
    if not in_pieces(model):
        yield
        return
    head = list(causal_lm.base_of(causal_lm.bare(model)).get_output_embeddings().parameters())
    kept = {id(parameter) for parameter in head}  # ZeRO refuses to gather a parameter twice
    with _gather(head), contextlib.ExitStack() as stack:
        running: list[contextlib.ExitStack] = []  # of the modules that are running, from the outermost on

        def gather(module: torch.nn.Module, _: Any) -> None:
            running.append(stack.enter_context(contextlib.ExitStack()))
            running[-1].enter_context(_gather([p for p in module.parameters(recurse=False) if id(p) not in kept]))

        def free(module: torch.nn.Module, *_: Any) -> None:
            running.pop().close()

        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                stack.enter_context(module.register_forward_pre_hook(gather))  # a handle is a context that removes its hook
                stack.enter_context(module.register_forward_hook(free))
        yield
