"""Influence unlearning: one second-order step towards the model that was never trained on the forget set, ``p + step H^-1 g``.

If theta minimises the mean loss over retain and forget data together, its retain gradient is ``-(n_f / n_r)`` times its
forget gradient, and one Newton step on the retain loss is::

    theta + (n_f / n_r) H^-1 g        g: gradient of the mean forget loss, H: Hessian of the mean retain loss

(Koh and Liang 2017, arXiv 1703.04730; Izzo et al. 2021; Jia et al. 2023, arXiv 2304.04934; equations 4 to 6 of SOUL, Jia et al.
2024, arXiv 2404.18239.) SOUL iterates this step, with a momentum, a clipped step and a diagonal H that follows the parameters:
with ``beta1 = 0, lr = clip, rho bs = clip / step, eps = clip damping / step`` one `soul_kernels.sophia_step` on ``-g`` is
`influence_update`. Here H is either a diagonal, or the empirical Fisher matrix of WoodFisher, the baseline of SOUL's paper.
"""

import collections.abc
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soul.data.batches import NO_SEQUENCE, Batch, collate
from soul.data.examples import Sequence
from soul.distributed.processes import Processes, gathered
from soul.distributed.shards import is_sharded, local, n_copies
from soul.models.causal_lm import autocast, evaluating, head, hidden_states, lm_head, trained
from soul.output.progress import track
from soul.run.streamed_fisher import most_held, solve_streamed
from soul_kernels import LinearOptions, hessian_ema, linear_cross_entropy, linear_gnb
from soul_kernels.backends import resolve_head_backend
from soul_kernels.errors import argument_error, check_choice, check_positive
from soul_kernels.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CURVATURES = ("gnb", "fisher", "woodfisher")
MEMORY_GB = 8.0
REMEDY = "it bounds the update"

Tensors = collections.abc.Sequence[Tensor]  # a list of parameters is one


def influence_update(
    params: Tensors,
    forget_grads: Tensors,
    hessians: Tensors,
    *,
    damping: float,
    step: float = 1.0,
    clip: float | None = None,
) -> list[Tensor]:
    """Return parameters after the update with a diagonal Hessian, computed per element in fp32 and rounded once::

        p + clamp(step g / (max(h, 0) + damping), -clip, clip)

    Args:
        params: list of tensors, fp32, bf16, fp16 or fp64; not changed.
        forget_grads: gradients of the mean forget loss, of the same shapes.
        hessians: diagonals of the Hessian of the mean retain loss, of the same shapes.
        damping: added to the diagonal, > 0, in units of the diagonal.
        step: n_f / n_r is the Newton step if the model was trained on both sets; a negative step learns instead.
        clip: largest change of an element, > 0; None: no limit.

    Returns:
        List of new tensors, of the parameters' dtypes (fp64 is computed in fp64).

    Raises:
        ArgumentError: lists or shapes do not fit, damping or clip is not positive, or an update is not finite.
    """
    check_positive("damping", damping, REMEDY)
    _check_lists("forget_grads", forget_grads, params)
    _check_lists("hessians", hessians, params)
    return _moved(params, _over_diagonal(forget_grads, hessians, damping), step, clip)


class WoodFisher:
    """The inverse of ``F = damping I + (1/n) sum_i g_i g_i^T``, times vectors, without a matrix of P x P elements.

    By the Sherman-Morrison formula, one gradient at a time (Singh and Alistarh 2020, arXiv 2004.14340, equation 4)::

        F_0^-1 = I / damping
        F_i^-1 = F_{i-1}^-1 - o_i o_i^T / (n + g_i . o_i)        o_i = F_{i-1}^-1 g_i

    The n products o_i are stored, n P fp32 numbers, and give ``F^-1 v`` in O(n P). (The code of Unlearn-Sparse,
    unlearn/Wfisher.py, stores one vector, ``F_i^-1 g_1`` in place of all o_i: exact for equal gradients only.)

    Sums over elements are fp32, sums over tensors fp64. If damping is far below ``|g|^2 / n``, the result is a small difference
    of large numbers. With far fewer gradients than parameters most of v lies outside of their span, and becomes
    ``v / damping``: gradient ascent with a step size that the damping sets.

    Args:
        n: number of gradients to be added.
        damping: > 0, in units of the Hessian.
        blockwise: treat each tensor as a block of its own, leaving out the elements of F that connect two tensors.
        add_up: adds a tensor of dot products up over the processes that hold shards of the gradients; None: this process has
            all of them.

    Raises:
        ArgumentError: n or damping does not fit.
    """

    def __init__(
        self,
        n: int,
        *,
        damping: float,
        blockwise: bool = False,
        add_up: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if isinstance(n, bool) or not (isinstance(n, int) and n >= 1):
            raise argument_error("n", "an integer >= 1", repr(n), "it is the number of gradients")
        check_positive("damping", damping, REMEDY)
        self.n = n
        self.damping = damping
        self.blockwise = blockwise
        self._add_up = add_up
        self.products: list[tuple[list[Tensor], list[float]]] = []  # (o_i, n + g_i . o_i for each tensor)

    def add(self, grads: Tensors) -> None:
        """Add the next gradient to F.

        Args:
            grads: a tensor for each parameter, of any dtype; of the same shapes each time.

        Raises:
            ArgumentError: all n gradients have been added, or the shapes differ from those before; nothing was changed.
        """
        if len(self.products) == self.n:
            raise argument_error("grads", f"{self.n} gradients", "one more", "make a WoodFisher with a larger n")
        self._check("grads", grads)
        product = self._times(grads)
        self.products.append((product, [self.n + dot for dot in self._dots(product, grads)]))

    def solve(self, vectors: Tensors) -> list[Tensor]:
        """Return ``F^-1 v``, a list of fp32 tensors.

        Args:
            vectors: v, a list of tensors of the gradients' shapes.

        Raises:
            ArgumentError: fewer than n gradients have been added, or the shapes differ from theirs.
        """
        if len(self.products) < self.n:
            raise argument_error("grads", f"{self.n} gradients before solve", len(self.products), "add the rest first")
        self._check("vectors", vectors)
        return self._times(vectors)

    def _times(self, vectors: Tensors) -> list[Tensor]:
        """Return the inverse of F, as it is so far, times a vector."""
        vectors = [v.detach().float() for v in vectors]
        results = [v / self.damping for v in vectors]
        for product, denominators in self.products:
            for result, o, dot, denominator in zip(results, product, self._dots(product, vectors), denominators):
                result.sub_(o, alpha=dot / denominator)
        return results

    def _dots(self, a: Tensors, b: Tensors) -> list[float]:
        """Return a dot product for each tensor: that of its block, or that of all tensors together."""
        dots = [torch.dot(x.flatten(), y.detach().float().flatten()).item() for x, y in zip(a, b)]
        if self._add_up is not None:
            dots = self._add_up(torch.tensor(dots, dtype=torch.float64, device="cpu")).tolist()
        return dots if self.blockwise else [sum(dots)] * len(dots)

    def _check(self, name: str, tensors: Tensors) -> None:
        if self.products:
            _check_lists(name, tensors, self.products[0][0])


class Influence:
    """The method "influence" of a run: `unlearn_once` with these options, in place of an objective.

    Args:
        damping: as in `unlearn_once`, like all other arguments.
        step: factor of the update.
        clip: largest change of a parameter.
        curvature: "gnb", "fisher" or "woodfisher".
        blockwise: for "woodfisher" only.
        memory_gb: for "woodfisher" only.

    Raises:
        ArgumentError: an option does not fit.
    """

    alpha = 1.0  # retain data are needed
    additive: str | None = None  # one step over all data, without micro-batches
    shares_batches = True
    relabels = False
    pairs = False

    def __init__(
        self,
        damping: float | None = None,
        step: float | None = None,
        clip: float | None = None,
        curvature: str = "gnb",
        blockwise: bool = False,
        memory_gb: float = MEMORY_GB,
    ) -> None:
        _check_options(damping, clip, curvature, memory_gb)
        self.options: dict[str, Any] = dict(
            damping=damping, step=step, clip=clip, curvature=curvature, blockwise=blockwise, memory_gb=memory_gb
        )

    def __repr__(self) -> str:
        return f"Influence({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


def unlearn_once(
    model: "PreTrainedModel",
    forget: list[Sequence],
    retain: list[Sequence],
    *,
    damping: float | None = None,
    step: float | None = None,
    clip: float | None = None,
    curvature: str = "gnb",
    blockwise: bool = False,
    memory_gb: float = MEMORY_GB,
    batch_size: int = 8,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> dict[str, float]:
    """Take one influence step with a language model, in place.

    H is the Hessian of the mean negative log-likelihood of a retain token, estimated in one pass over the retain batches: with
    n_b tokens in batch b, n in all, and the gradient g_b of the batch's mean, H is ``sum_b (n_b / n) n_b g_b g_b``.

    If the model is in shards (`soul.distributed.shard`), every process calls this function with the same sequences. Each takes
    its share of every batch and holds its shards of all tensors; numbers, such as dot products, are added up.

    Memory: with a diagonal a few fp32 copies of the trained parameters; with "woodfisher" one more for every retain batch, as
    far as ``memory_gb`` has room for them. Beyond that gradients are computed again (`soul.run.streamed_fisher`), n^2 / 2 of
    them if only one fits.

    Args:
        model: a Hugging Face causal language model, which peft may have wrapped. Its trainable parameters are changed; their
            ``grad`` and the model's mode are not. Dropout is off during the call.
        forget: sequences to forget.
        retain: sequences that H is taken from; a sample of the retain set may be enough.
        damping: added to the diagonal of H, > 0; None: 0.1 times the mean of the diagonal (as Grosse et al. 2023, arXiv
            2308.03296, do with eigenvalues), not for "woodfisher".
        step: factor of the update; None: forget tokens over retain tokens, the Newton step if ``forget`` and ``retain`` are all
            that the model was trained on.
        clip: largest change of a parameter, > 0; None: no limit.
        curvature: "gnb", diagonal, labels drawn from the model: unbiased for the Gauss-Newton diagonal; "fisher", diagonal,
            true labels; or "woodfisher", true labels and the whole matrix: see `WoodFisher`.
        blockwise: as in `WoodFisher`, and for it only.
        memory_gb: for "woodfisher": bound on its tensors of the parameters' size, in 1e9 bytes, in each process; it needs six
            at least.
        batch_size: sequences at a time.
        generator: ``torch.Generator`` on the model's device, for the labels of "gnb"; in several processes one of another
            seed in each.
        backend: "auto", "triton", "compile", "torch" or "reference".

    Returns:
        ``forget_nll`` and ``retain_nll``, means over tokens before the update, in nats; ``step``; ``damping``; and
        ``update_norm``, the L2 norm of the change.

    Raises:
        ArgumentError: an argument does not fit, there is nothing to forget or to retain, or the update is not finite; the model
            was not changed.
    """
    _check_options(damping, clip, curvature, memory_gb)
    for name, sequences in (("forget", forget), ("retain", retain)):
        if not _tokens(sequences):
            raise argument_error(name, "sequences with labels", f"{len(sequences)} without any", "check the data")
    if isinstance(batch_size, bool) or not (isinstance(batch_size, int) and batch_size >= 1):
        raise argument_error("batch_size", "an integer >= 1", repr(batch_size), "8, for instance")
    params = trained(model)
    processes = Processes.of(model)
    copies = n_copies(params[0])  # of each shard, all of which are in a sum over the processes
    shards = [local(p.detach()) for p in params]
    backend = resolve_head_backend(backend, head(model)[0])
    if step is None:
        step = _tokens(forget) / _tokens(retain)
    with evaluating(model), torch.enable_grad():
        forget_grads = [torch.zeros_like(shard, dtype=torch.float32) for shard in shards]
        forget_nll: Tensor | float = 0.0
        for share, grads, nll in _gradients(model, params, forget, batch_size, backend):
            torch._foreach_add_(forget_grads, [grad.float() for grad in grads], alpha=share)
            forget_nll = forget_nll + share * nll
        if curvature == "woodfisher":
            assert damping is not None  # checked above
            direction, retain_nll = _over_woodfisher(
                forget_grads,
                _ScaledGradients(model, params, retain, batch_size, backend),
                damping=damping,
                blockwise=blockwise,
                memory_gb=memory_gb,
                processes=processes,
                copies=copies,
            )
        else:
            hessians, retain_nll = _diagonal(
                model, params, retain, batch_size, backend, drawn=curvature == "gnb", generator=generator
            )
            if damping is None:
                damping = _default_damping(hessians, processes)
            direction = _over_diagonal(forget_grads, hessians, damping)
    moved = processes.together(lambda: _moved(shards, direction, step, clip))
    norm = torch.stack([(new.float() - shard.float()).norm().double() for new, shard in zip(moved, shards)]).norm()
    for shard, new in zip(shards, moved):
        shard.copy_(new)
    sums = {"forget_nll": forget_nll, "retain_nll": retain_nll, "update_norm": norm.square() / copies}
    totals = processes.totals({name: torch.as_tensor(value, device=norm.device) for name, value in sums.items()})
    update_norm = totals.pop("update_norm").sqrt()
    nlls = {name: float(value) for name, value in totals.items()}
    return {**nlls, "step": float(step), "damping": float(damping), "update_norm": float(update_norm)}


class _ScaledGradients:
    """The gradients of the retain batches, times what makes (1/n) sum_b over n batches H.

    Args:
        model: as in `unlearn_once`.
        params: its trainable parameters.
        retain: as in `unlearn_once`.
        batch_size: as in `unlearn_once`.
        backend: as in `unlearn_once`.

    Attributes:
        n: number of batches.
        nll: mean negative log-likelihood of a token, after a pass from the first batch on; this process's share of it.
    """

    def __init__(
        self, model: "PreTrainedModel", params: Tensors, retain: list[Sequence], batch_size: int, backend: str
    ) -> None:
        self._arguments = model, params, retain, batch_size, backend
        self._n_tokens = _tokens(retain)
        self.n = -(-len(retain) // batch_size)
        self.nll: Tensor | float = 0.0

    def __call__(self, first: int) -> Iterator[list[Tensor]]:
        """Yield the gradients from one batch on, fp32."""
        nll: Tensor | float = 0.0
        for share, grads, batch_nll in _gradients(*self._arguments, first=first):
            count = round(share * self._n_tokens)
            nll = nll + share * batch_nll
            # H is sum_b (n_b / n_tokens) n_b g_b g_b^T.
            yield [grad.float() * (count * (self.n / self._n_tokens) ** 0.5) for grad in grads]
        self.nll = nll if first == 0 else self.nll


def _over_woodfisher(
    vectors: Tensors,
    gradients: _ScaledGradients,
    *,
    damping: float,
    blockwise: bool,
    memory_gb: float,
    processes: Processes,
    copies: int,
) -> tuple[list[Tensor], Tensor | float]:
    """Return ``F^-1 v`` and the mean negative log-likelihood of a retain token; with products of all gradients if they fit."""
    largest = max(processes.gather(sum(v.numel() for v in vectors)))  # all processes must hold equally many gradients
    held = most_held(memory_gb, largest)

    def add_up(products: Tensor) -> Tensor:
        return processes.add_up(products) / copies

    options: dict[str, Any] = dict(damping=damping, blockwise=blockwise, add_up=add_up)
    if held < gradients.n:
        return solve_streamed(gradients, gradients.n, vectors, held=held, **options), gradients.nll
    fisher = WoodFisher(gradients.n, **options)
    for grads in gradients(0):
        fisher.add(grads)
    return fisher.solve(vectors), gradients.nll


def _diagonal(
    model: "PreTrainedModel",
    params: Tensors,
    retain: list[Sequence],
    batch_size: int,
    backend: str,
    *,
    drawn: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[list[Tensor], Tensor | float]:
    """Return the diagonal of H, fp32, and this process's share of the mean negative log-likelihood of a retain token.

    With ``drawn`` H is taken with labels drawn from the model; the likelihood is always that of the true labels.
    """
    n_tokens = _tokens(retain)
    hessians = [torch.zeros_like(local(p.detach()), dtype=torch.float32) for p in params]
    seen = 0
    retain_nll: Tensor | float = 0.0
    for share, grads, nll in _gradients(model, params, retain, batch_size, backend, drawn=drawn, generator=generator):
        count = round(share * n_tokens)
        if count:
            grads = [grad.float().contiguous() for grad in grads]
            hessian_ema(hessians, grads, beta2=seen / (seen + count), scale=float(count), backend=backend)
        seen += count
        retain_nll = retain_nll + share * nll
    return hessians, retain_nll


def _default_damping(hessians: Tensors, processes: Processes) -> float:
    """Return 0.1 times the mean of the diagonal."""
    n_params = processes.total(sum(h.numel() for h in hessians))
    total = torch.stack([h.sum(dtype=torch.float64) for h in hessians]).sum()
    damping = float(0.1 * processes.add_up(total) / n_params)
    check_positive("damping", damping, REMEDY)
    return damping


def _gradients(
    model: "PreTrainedModel",
    params: Tensors,
    sequences: list[Sequence],
    batch_size: int,
    backend: str,
    *,
    drawn: bool = False,
    generator: torch.Generator | None = None,
    first: int = 0,
) -> Iterator[tuple[float, list[Tensor], Tensor]]:
    """Yield for each batch its share of all tokens, the gradients of its mean negative log-likelihood, and that likelihood.

    It begins with the batch number ``first``. With ``drawn`` the gradients are taken with labels drawn from the model; the
    likelihood is always that of the true labels. In several processes the gradients are shards of those of the whole batch, and
    the likelihood is the share of it that this process's sequences have.
    """
    total = _tokens(sequences)
    processes = Processes.of(model)
    for start in track(range(first * batch_size, len(sequences), batch_size), "one pass over the rows", stays=True):
        count = _tokens(sequences[start : start + batch_size])
        own, _ = processes.share(sequences[start : start + batch_size], [])
        batch = collate(own or [NO_SEQUENCE], [], device=head(model)[0].device)
        loss, nll = gathered(model, functools.partial(_losses, model, batch, max(1, count), backend, drawn, generator))
        yield count / total, _derivatives(loss, params), nll.detach()


def _losses(
    model: "PreTrainedModel", batch: Batch, n_tokens: int, backend: str, drawn: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return the sums over this batch of the negative log-likelihoods, divided by ``n_tokens``.

    The first one is that of the labels to differentiate, which may be drawn, the second one that of the true labels.
    """
    options = LinearOptions(token_indices=batch.token_indices, backend=backend)
    model_head = lm_head(model)
    with autocast(model):
        hidden = hidden_states(model, batch)
        if not drawn:
            loss = linear_cross_entropy(hidden, model_head, batch.labels, reduction="sum", options=options) / n_tokens
            return loss, loss.detach()
        keep = batch.labels != IGNORE_INDEX
        loss, _ = linear_gnb(hidden, model_head, keep, generator=generator, n_tokens=n_tokens, options=options)
        with torch.no_grad():
            nll = linear_cross_entropy(hidden, model_head, batch.labels, reduction="sum", options=options)
            return loss, nll / n_tokens


def _derivatives(loss: Tensor, params: Tensors) -> list[Tensor]:
    """Return the gradients of a loss; of parameters in shards, the shards of gradients that FSDP2 adds up over the processes.

    FSDP2 reduces gradients in ``backward()`` alone, so these go through ``grad``, which is left as it was.
    """
    if not any(map(is_sharded, params)):
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(params, grads)]
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        loss.backward()
        return [torch.zeros_like(local(p.detach())) if p.grad is None else local(p.grad) for p in params]
    finally:
        for p, grad in zip(params, before):
            p.grad = grad


def _over_diagonal(grads: Tensors, hessians: Tensors, damping: float) -> list[Tensor]:
    """Return ``g / (max(h, 0) + damping)``, in fp32 or fp64."""
    wide = [torch.promote_types(g.dtype, torch.float32) for g in grads]
    return [g.detach().to(w) / (h.detach().to(w).clamp(min=0) + damping) for g, h, w in zip(grads, hessians, wide)]


def _moved(params: Tensors, direction: Tensors, step: float, clip: float | None) -> list[Tensor]:
    """Return ``p + clamp(step d, -clip, clip)``, rounded once to the dtype of p."""
    if clip is not None:
        check_positive("clip", clip, REMEDY)
    moved = []
    for index, (p, d) in enumerate(zip(params, direction)):
        change = step * d
        if not change.isfinite().all():
            raise argument_error("damping", "one that leaves the update finite", f"inf or NaN in parameter {index}", "raise it")
        change = change if clip is None else change.clamp(-clip, clip)
        moved.append((p.detach().to(torch.promote_types(p.dtype, change.dtype)) + change).to(p.dtype))
    return moved


def _tokens(sequences: list[Sequence]) -> int:
    """Return the number of labelled tokens."""
    return sum(sequence.n_labels for sequence in sequences)


def _check_options(damping: float | None, clip: float | None, curvature: str, memory_gb: float) -> None:
    check_choice("curvature", curvature, CURVATURES)
    if damping is None and curvature == "woodfisher":
        raise argument_error("damping", "a positive number with woodfisher", None, "it is added to the Fisher matrix")
    for name, value in (("damping", damping), ("clip", clip), ("memory_gb", memory_gb)):
        if value is not None:
            check_positive(name, value, REMEDY)


def _check_lists(name: str, tensors: Tensors, like: Tensors) -> None:
    """Raise unless ``tensors`` have the shapes of ``like``."""
    shapes = [tuple(t.shape) for t in tensors]
    expected = [tuple(t.shape) for t in like]
    if shapes != expected:
        raise argument_error(name, f"tensors of shapes {expected}", shapes, "pass one for every parameter, in their order")
