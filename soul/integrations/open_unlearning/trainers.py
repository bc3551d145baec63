"""Trainers for open-unlearning, with its data, collators and evaluators, and SOUL's optimizers and fused losses.

At the end of its ``src/trainer/__init__.py``::

    from soul.integrations.open_unlearning import trainers as soul_trainers
    for soul_trainer in soul_trainers.ALL:
        _register_trainer(soul_trainer)

Source of the base class: locuslab/open-unlearning, src/trainer/unlearn/grad_diff.py, as of d3d7cf9.
"""

import inspect
from typing import Any

import torch
from trainer.unlearn.grad_diff import GradDiff  # open-unlearning's

from soul import losses
from soul.compat import COMPAT
from soul.integrations import zero
from soul.integrations.hf import SOULTrainerMixin
from soul_kernels.errors import argument_error, check_choice

RETAIN_LOSS_TYPES = {"NLL": "ce", "KL": "kl"}
RENAMED = {"ignore_first_n_answer_tokens": "ignore_first"}


class SOULUnlearn(SOULTrainerMixin, GradDiff):
    """Trainer with any objective of `soul.losses`, by its name; `ALL` has a subclass for each objective.

    The formulas are those of `soul.losses`; docs/objectives.md lists where open-unlearning's code computes something else.
    The reference model, if one is needed and the model has no adapters, is prepared by open-unlearning's own code.

    Args:
        *args: as for open-unlearning's trainers.
        method: a name in ``soul.losses.OBJECTIVES``.
        retain_loss_type: "NLL" or "KL"; an objective without a choice takes "NLL" only.
        soul_args: as in `soul.integrations.hf.SOULTrainerMixin`.
        compat: None, or "open-unlearning": a KL retain term and UNDIAL are means over the positions that its code counts,
            prompts and padding included. It is refused where the objective has neither.
        **kwargs: the objective's options under open-unlearning's names (gamma, alpha, beta, delta, ...), and the arguments of
            its trainers: model, args, data_collator, train_dataset, evaluators, template_args, ...

    Raises:
        ArgumentError: an option has a value that is not allowed, or does not fit the objective.
    """

    method: str = ""  # the objective of a subclass; empty: it must be passed

    def __init__(
        self,
        *args: Any,
        method: str | None = None,
        retain_loss_type: str = "NLL",
        soul_args: object = None,
        compat: str | None = None,
        **kwargs: Any,
    ) -> None:
        method = method or self.method
        check_choice("method", method, tuple(losses.OBJECTIVES))
        check_choice("retain_loss_type", retain_loss_type, tuple(RETAIN_LOSS_TYPES))
        known = inspect.signature(losses.OBJECTIVES[method]).parameters
        options = {RENAMED.get(name, name): value for name, value in kwargs.items() if RENAMED.get(name, name) in known}
        kwargs = {name: value for name, value in kwargs.items() if RENAMED.get(name, name) not in known}
        if "retain" in known:
            options.setdefault("retain", RETAIN_LOSS_TYPES[retain_loss_type])
        elif retain_loss_type != "NLL":
            remedy = "klmin has the KL term already, and ga has no retain term: leave it out"
            raise argument_error("retain_loss_type", f"NLL for {method}", retain_loss_type, remedy)
        objective = losses.get(method, **options)
        check_choice("compat", compat, COMPAT)
        if compat and objective.divergence is None:
            remedy = "only a KL retain term and UNDIAL count other positions in its code: leave it out (docs/objectives.md)"
            raise argument_error("compat", f"None for {method} with retain_loss_type {retain_loss_type}", compat, remedy)
        self.compat = compat
        super().__init__(*args, objective=objective, soul_args=soul_args, **kwargs)

    def prepare_reference_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return a frozen copy of ``model``, made by open-unlearning's code, which knows DeepSpeed."""
        whole = zero.whole_copy(model) if zero.in_pieces(model) else model
        return self._prepare_ref_model(whole).requires_grad_(False)


def _trainer_of(method: str) -> type[SOULUnlearn]:
    """Return the trainer of one objective, for instance ``SOULNPO``."""
    objective = losses.OBJECTIVES[method].__name__
    doc = f"`SOULUnlearn` with `soul.losses.{objective}`."
    return type(f"SOUL{objective}", (SOULUnlearn,), {"method": method, "__doc__": doc, "__module__": __name__})


ALL: tuple[type[SOULUnlearn], ...] = (SOULUnlearn, *(_trainer_of(method) for method in losses.OBJECTIVES))
globals().update({trainer.__name__: trainer for trainer in ALL})
