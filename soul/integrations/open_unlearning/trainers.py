"""Trainers for open-unlearning: its data, collators, evaluators and configurations, SOUL's optimizers and fused losses.

At the end of its ``src/trainer/__init__.py``::

    from soul.integrations.open_unlearning import trainers as soul_trainers
    for soul_trainer in soul_trainers.ALL:
        _register_trainer(soul_trainer)

Source of what is subclassed: locuslab/open-unlearning, src/trainer/unlearn/grad_diff.py, as of d3d7cf9.
"""

import inspect

from trainer.unlearn.grad_diff import GradDiff  # open-unlearning's

from soul import losses
from soul.compat import COMPAT
from soul.integrations.hf import SOULTrainerMixin
from soul_kernels.errors import argument_error, check_choice

RETAIN_LOSS_TYPES = {"NLL": "ce", "KL": "kl"}
RENAMED = {"ignore_first_n_answer_tokens": "ignore_first"}


class SOULUnlearn(SOULTrainerMixin, GradDiff):
    """Any objective of `soul.losses`, by its name; the classes below have one each.

    The formulas are those of `soul.losses`; docs/objectives.md lists where open-unlearning's code means something else.
    The reference model, where one is needed and the model has no adapters, is prepared by open-unlearning's own code.

    Args:
        *args: as for open-unlearning's trainers.
        method: a name in ``soul.losses.OBJECTIVES``.
        retain_loss_type: "NLL" or "KL"; an objective without a choice takes "NLL" only.
        soul_args: as in `soul.integrations.hf.SOULTrainerMixin`.
        compat: None, or "open-unlearning": a KL retain term, and UNDIAL, are means over the positions that its code counts,
            prompts and padding included. Refused where there is neither.
        **kwargs: the objective's options under open-unlearning's names (gamma, alpha, beta, delta, ...), and what its trainers
            take: model, args, data_collator, train_dataset, evaluators, template_args, ...

    Raises:
        ArgumentError: an option does not fit.
    """

    method = None

    def __init__(self, *args, method=None, retain_loss_type="NLL", soul_args=None, compat=None, **kwargs):
        method = method or self.method
        check_choice("method", method, tuple(losses.OBJECTIVES))
        check_choice("retain_loss_type", retain_loss_type, tuple(RETAIN_LOSS_TYPES))
        known = inspect.signature(losses.OBJECTIVES[method]).parameters
        options = {RENAMED.get(name, name): value for name, value in kwargs.items() if RENAMED.get(name, name) in known}
        kwargs = {name: value for name, value in kwargs.items() if RENAMED.get(name, name) not in known}
        if "retain" in known:
            options.setdefault("retain", RETAIN_LOSS_TYPES[retain_loss_type])
        elif retain_loss_type != "NLL":
            remedy = "klmin has the KL term already, and ga has no retain term"
            raise argument_error("retain_loss_type", f"NLL for {method}", retain_loss_type, remedy)
        objective = losses.get(method, **options)
        check_choice("compat", compat, COMPAT)
        if compat and objective.divergence is None:
            remedy = "only a KL retain term and UNDIAL count other positions in its code: see docs/objectives.md"
            raise argument_error("compat", f"None for {method} with retain_loss_type {retain_loss_type}", compat, remedy)
        self.compat = compat
        super().__init__(*args, objective=objective, soul_args=soul_args, **kwargs)

    def prepare_reference_model(self, model):
        """A frozen copy of ``model``: open-unlearning's, which knows DeepSpeed."""
        return self._prepare_ref_model(model).requires_grad_(False)


def _of(method):
    objective = losses.OBJECTIVES[method].__name__
    doc = f"`SOULUnlearn` with `soul.losses.{objective}`."
    return type(f"SOUL{objective}", (SOULUnlearn,), {"method": method, "__doc__": doc, "__module__": __name__})


ALL = (SOULUnlearn, *(_of(method) for method in losses.OBJECTIVES))
globals().update({trainer.__name__: trainer for trainer in ALL})
