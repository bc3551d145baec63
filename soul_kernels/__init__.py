"""Fused Triton kernels for second-order unlearning: one op a module, and ``__all__`` lists the ops.

May import: torch and Triton, and nothing of ``soul``; it can be imported without Triton and without a GPU.
Start reading with ``reference/<op>.py``, which defines an op, then ``<op>.py``, which has its kernel.
"""

from soul_kernels import _versions  # noqa: F401  first: it raises where torch is too old
from soul_kernels._head.registry import register_objective
from soul_kernels._table import TensorTable
from soul_kernels.bundles import Guards, Noise, StepOptions, StepTensors
from soul_kernels.chunks import LinearOptions
from soul_kernels.grad_norm import grad_norm
from soul_kernels.hessian_ema import HessianEma, hessian_ema
from soul_kernels.linear_cross_entropy import Predictions, linear_cross_entropy
from soul_kernels.linear_gnb import linear_gnb
from soul_kernels.linear_kl import linear_kl
from soul_kernels.linear_loss import linear_logprob, linear_objective, linear_statistics
from soul_kernels.sophia_step import SophiaStep, sophia_step
from soul_kernels.tokens import Divergence, Head, Reference, TokenBatch, TokenStatistics

__version__ = "0.1.0"
__all__ = [
    "sophia_step",
    "hessian_ema",
    "grad_norm",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_objective",
    "linear_kl",
    "linear_gnb",
    "linear_statistics",
    "register_objective",
    "SophiaStep",
    "StepTensors",
    "StepOptions",
    "HessianEma",
    "Noise",
    "Guards",
    "Divergence",
    "Head",
    "LinearOptions",
    "Predictions",
    "Reference",
    "TensorTable",
    "TokenBatch",
    "TokenStatistics",
]
