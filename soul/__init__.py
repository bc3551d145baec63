"""Second-order unlearning of large language models: optimizers, objectives, and the runs that put them together.

May import: functional, losses, model_loss, models, optim, patching, plan, run. Models and data need the extra ``hf``.
Start reading with `soul.run.unlearner` for a whole run, or with `soul.optim.optimizer` for the optimizers.
"""

import soul_kernels  # noqa: F401  first: it raises if torch is too old
from soul import functional, losses, plan
from soul.model_loss import unlearning_loss
from soul.models.ref_model import reference_hidden, reference_logps
from soul.optim import curvature
from soul.optim.optimizer import SophiaG
from soul.optim.release import release_gradients
from soul.optim.soul import SOUL
from soul.patching import fused, patch, unpatch
from soul.run.config import UnlearnConfig
from soul.run.unlearner import Unlearner
from soul_kernels import __version__

__all__ = [
    "SOUL",
    "SophiaG",
    "UnlearnConfig",
    "Unlearner",
    "curvature",
    "functional",
    "fused",
    "losses",
    "patch",
    "plan",
    "reference_hidden",
    "reference_logps",
    "release_gradients",
    "unlearning_loss",
    "unpatch",
    "__version__",
]
