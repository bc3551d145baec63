"""Influence unlearning: one second-order step to where training without the forget set would have ended, ``p + step H^-1 g``.

Where theta minimises the mean loss over retain and forget data together, its retain gradient is ``-(n_f / n_r)`` times its
forget gradient, and one Newton step on the retain loss is::

    theta + (n_f / n_r) H^-1 g        g: gradient of the mean forget loss, H: Hessian of the mean retain loss

(Koh and Liang 2017, arXiv 1703.04730; Izzo et al. 2021; Jia et al. 2023, arXiv 2304.04934; equations 4 to 6 of SOUL, Jia et al.
2024, arXiv 2404.18239.) SOUL iterates it, with a momentum, a clipped step and a diagonal H that follows the parameters: with
``beta1 = 0, lr = clip, rho bs = clip / step, eps = clip damping / step`` one `soul_kernels.sophia_step` on ``-g`` is
`influence_update`. Here are the diagonal H and the empirical Fisher matrix of WoodFisher, the paper's baseline.
"""

import torch

from soul import losses
from soul.data.batches import collate
from soul.models.causal_lm import autocast, evaluating, head, hidden_states, trained, transform
from soul_kernels import hessian_ema, linear_gnb, linear_objective
from soul_kernels.backends import resolve_head_backend
from soul_kernels.errors import argument_error, check_choice, check_positive
from soul_kernels.tokens import IGNORE_INDEX

CURVATURES = ("gnb", "fisher", "woodfisher")


def influence_update(params, forget_grads, hessians, *, damping, step=1.0, clip=None):
    """The update with a diagonal Hessian, per element in fp32 and rounded once::

        p + clamp(step g / (max(h, 0) + damping), -clip, clip)

    Args:
        params: list of tensors, fp32, bf16, fp16 or fp64; not changed.
        forget_grads: gradients of the mean forget loss, of the same shapes.
        hessians: diagonals of the Hessian of the mean retain loss, of the same shapes.
        damping: added to the diagonal, > 0, in its units.
        step: n_f / n_r for the Newton step, where both sets were trained on; < 0 learns instead.
        clip: largest change of an element, > 0; None: any.

    Returns:
        List of new tensors, of the parameters' dtypes (fp64 is computed in fp64).

    Raises:
        ArgumentError: lists or shapes do not fit, damping or clip is not positive, or an update is not finite.
    """
    _check_positive("damping", damping)
    _check_lists("forget_grads", forget_grads, params)
    _check_lists("hessians", hessians, params)
    return _moved(params, _over_diagonal(forget_grads, hessians, damping), step, clip)


class WoodFisher:
    """The inverse of ``F = damping I + (1/n) sum_i g_i g_i^T``, times vectors, without a matrix of P x P elements.

    By the Sherman-Morrison formula, one gradient at a time (Singh and Alistarh 2020, arXiv 2004.14340, equation 4)::

        F_0^-1 = I / damping
        F_i^-1 = F_{i-1}^-1 - o_i o_i^T / (n + g_i . o_i)        o_i = F_{i-1}^-1 g_i

    The n products o_i are kept, n P fp32 numbers, and give ``F^-1 v`` in O(n P). (The code of Unlearn-Sparse,
    unlearn/Wfisher.py, keeps one vector, ``F_i^-1 g_1`` in the place of all o_i: exact for equal gradients only.)

    Sums over elements are fp32, those over tensors fp64. With damping far below ``|g|^2 / n`` what is left of ``v / damping``
    is a small difference of large numbers. And with far fewer gradients than parameters most of v lies outside of their span,
    and comes out as ``v / damping``: gradient ascent, of a length that the damping sets.

    Args:
        n: how many gradients will come.
        damping: > 0, in units of the Hessian.
        blockwise: each tensor is a block of its own: F without what connects them.

    Raises:
        ArgumentError: n or damping does not fit.
    """

    def __init__(self, n, *, damping, blockwise=False):
        if isinstance(n, bool) or not (isinstance(n, int) and n >= 1):
            raise argument_error("n", "an integer >= 1", repr(n), "it is the number of gradients")
        self.n, self.damping, self.blockwise = n, _check_positive("damping", damping), blockwise
        self.products = []  # (o_i, n + g_i . o_i for each tensor)

    def add(self, grads):
        """Takes the next gradient into F.

        Args:
            grads: list of tensors, of any dtype; of the same shapes each time.

        Raises:
            ArgumentError: all n have come, or the shapes are others than before; nothing was changed.
        """
        if len(self.products) == self.n:
            raise argument_error("grads", f"{self.n} gradients", "one more", "make a WoodFisher with a larger n")
        self._check("grads", grads)
        product = self._times(grads)
        self.products.append((product, [self.n + dot for dot in self._dots(product, grads)]))

    def solve(self, vectors):
        """``F^-1 v``.

        Args:
            vectors: v, a list of tensors of the gradients' shapes.

        Returns:
            List of fp32 tensors.

        Raises:
            ArgumentError: not all n gradients have come, or the shapes are others.
        """
        if len(self.products) < self.n:
            raise argument_error("grads", f"{self.n} gradients before solve", len(self.products), "add the rest first")
        self._check("vectors", vectors)
        return self._times(vectors)

    def _times(self, vectors):
        vectors = [v.detach().float() for v in vectors]
        found = [v / self.damping for v in vectors]
        for product, denominators in self.products:
            for to, o, dot, denominator in zip(found, product, self._dots(product, vectors), denominators):
                to.sub_(o, alpha=dot / denominator)
        return found

    def _dots(self, a, b):
        """A number for each tensor: of its block, or of all tensors together."""
        dots = [torch.dot(x.flatten(), y.detach().float().flatten()).item() for x, y in zip(a, b)]
        return dots if self.blockwise else [sum(dots)] * len(dots)

    def _check(self, name, tensors):
        if self.products:
            _check_lists(name, tensors, self.products[0][0])


class Influence:
    """The method "influence" of a run: `unlearn_once` with these options, in the place of an objective.

    Args:
        damping: as in `unlearn_once`, as are all others.
        step: factor of the update.
        clip: largest change of a parameter.
        curvature: "gnb", "fisher" or "woodfisher".
        blockwise: for "woodfisher".

    Raises:
        ArgumentError: an option does not fit.
    """

    alpha = 1.0  # it needs retain data
    relabels = pairs = False

    def __init__(self, damping=None, step=None, clip=None, curvature="gnb", blockwise=False):
        _check_options(damping, clip, curvature)
        self.options = dict(damping=damping, step=step, clip=clip, curvature=curvature, blockwise=blockwise)

    def __repr__(self):
        return f"Influence({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


def unlearn_once(
    model, forget, retain, *, damping=None, step=None, clip=None, curvature="gnb", blockwise=False, batch_size=8,
    generator=None, backend="auto",
):  # fmt: skip
    """One influence update of a language model, in place.

    H is that of the mean negative log-likelihood of a retain token, from one pass over the retain batches, b of n_b tokens,
    with gradients g_b of their means: ``sum_b (n_b / n) n_b g_b g_b``.

    Memory: with a diagonal a few fp32 copies of the trained parameters, with "woodfisher" one more for every retain batch: give
    it few sequences or large batches.

    Args:
        model: a Hugging Face causal language model, which peft may have wrapped. Its trainable parameters are changed;
            their ``grad`` is not, nor is the mode. Dropout is off meanwhile.
        forget: list of `soul.data.Sequence`.
        retain: list of `soul.data.Sequence`: what H is taken from, a sample if that is enough.
        damping: added to the diagonal of H, > 0; None: 0.1 times the mean of the diagonal (as Grosse et al. 2023, arXiv
            2308.03296, do with eigenvalues), not for "woodfisher".
        step: factor of the update; None: forget tokens over retain tokens, the Newton step where ``retain`` is all that was
            trained on besides.
        clip: largest change of a parameter, > 0; None: any.
        curvature: "gnb", diagonal, labels drawn from the model: unbiased for the Gauss-Newton diagonal; "fisher", diagonal,
            true labels; or "woodfisher", true labels and the whole matrix: see `WoodFisher`.
        blockwise: as in `WoodFisher`, for that only.
        batch_size: sequences at a time.
        generator: ``torch.Generator`` on the model's device, for the labels of "gnb".
        backend: "auto", "triton", "compile", "torch" or "reference".

    Returns:
        A dict of floats: ``forget_nll`` and ``retain_nll``, means over tokens before the update; ``step``, ``damping``; and
        ``update_norm``.

    Raises:
        ArgumentError: an argument does not fit, there is nothing to forget or to retain, or the update is not finite; the model
            was not changed.
    """
    _check_options(damping, clip, curvature)
    for name, sequences in (("forget", forget), ("retain", retain)):
        if not _tokens(sequences):
            raise argument_error(name, "sequences with labels", f"{len(sequences)} without any", "check the data")
    if isinstance(batch_size, bool) or not (isinstance(batch_size, int) and batch_size >= 1):
        raise argument_error("batch_size", "an integer >= 1", repr(batch_size), "8, for instance")
    params = trained(model)
    backend = resolve_head_backend(backend, head(model)[0])
    step = _tokens(forget) / _tokens(retain) if step is None else step
    with evaluating(model), torch.enable_grad():
        grads, forget_nll = [torch.zeros_like(p, dtype=torch.float32) for p in params], 0.0
        for part, found, nll in _gradients(model, params, forget, batch_size, backend):
            torch._foreach_add_(grads, [g.float() for g in found], alpha=part)
            forget_nll = forget_nll + part * nll
        direction, retain_nll, damping = _over_retain(
            model, params, grads, retain, damping, curvature, blockwise, batch_size, generator, backend
        )
    moved = _moved(params, direction, step, clip)
    norm = torch.stack([(new.float() - p.detach().float()).norm().double() for new, p in zip(moved, params)]).norm()
    with torch.no_grad():
        for p, new in zip(params, moved):
            p.copy_(new)
    nlls = {"forget_nll": float(forget_nll), "retain_nll": float(retain_nll)}
    return {**nlls, "step": float(step), "damping": float(damping), "update_norm": float(norm)}


def _over_retain(model, params, grads, retain, damping, curvature, blockwise, batch_size, generator, backend):
    """``H^-1`` times the gradients, with H from the retain data; their mean NLL, on true labels; damping."""
    n_batches, n_tokens = -(-len(retain) // batch_size), _tokens(retain)
    fisher = WoodFisher(n_batches, damping=damping, blockwise=blockwise) if curvature == "woodfisher" else None
    hessians = [torch.zeros_like(p, dtype=torch.float32) for p in params] if fisher is None else None
    seen, retain_nll = 0, 0.0
    draw = dict(drawn=True, generator=generator) if curvature == "gnb" else {}
    for part, found, nll in _gradients(model, params, retain, batch_size, backend, **draw):
        count = round(part * n_tokens)
        if fisher is not None:  # (1/n) sum_b over batches is to be sum_b (n_b / n) n_b
            fisher.add([g.float() * (count * (n_batches / n_tokens) ** 0.5) for g in found])
        elif count:
            found = [g.float().contiguous() for g in found]
            hessian_ema(hessians, found, beta2=seen / (seen + count), scale=float(count), backend=backend)
        seen, retain_nll = seen + count, retain_nll + part * nll
    if fisher is not None:
        return fisher.solve(grads), retain_nll, damping
    if damping is None:
        n_params = sum(h.numel() for h in hessians)
        damping = _check_positive("damping", float(0.1 * sum(h.sum(dtype=torch.float64) for h in hessians) / n_params))
    return _over_diagonal(grads, hessians, damping), retain_nll, damping


def _gradients(model, params, sequences, batch_size, backend, *, drawn=False, generator=None):
    """For each batch: its part of all tokens, the gradients of its mean negative log-likelihood, and that on true labels."""
    total, objective = _tokens(sequences), losses.PO(alpha=0.0)
    (weight, bias), options = head(model), dict(transform(model), backend=backend)
    for start in range(0, len(sequences), batch_size):
        batch = collate(sequences[start : start + batch_size], [], device=weight.device)
        with autocast(model):
            hidden = hidden_states(model, batch)
            if drawn:
                keep = batch.labels != IGNORE_INDEX
                loss, _ = linear_gnb(hidden, weight, keep, bias=bias, rows=batch.token_indices, generator=generator, **options)
                with torch.no_grad():
                    nll = linear_objective(
                        hidden, weight, batch.labels, objective, bias=bias, rows=batch.token_indices, **options
                    )
            else:
                loss = linear_objective(hidden, weight, batch.labels, objective, bias=bias, rows=batch.token_indices, **options)
                nll = loss.detach()
        found = torch.autograd.grad(loss, params, allow_unused=True)
        yield (
            len(batch.token_indices) / total,
            [torch.zeros_like(p) if g is None else g for p, g in zip(params, found)],
            nll.detach(),
        )


def _over_diagonal(grads, hessians, damping):
    """``g / (max(h, 0) + damping)``, in fp32 or fp64."""
    wide = [torch.promote_types(g.dtype, torch.float32) for g in grads]
    return [g.detach().to(w) / (h.detach().to(w).clamp(min=0) + damping) for g, h, w in zip(grads, hessians, wide)]


def _moved(params, direction, step, clip):
    """``p + clamp(step d, -clip, clip)``, rounded once to the dtype of p."""
    if clip is not None:
        _check_positive("clip", clip)
    moved = []
    for index, (p, d) in enumerate(zip(params, direction)):
        change = step * d
        if not change.isfinite().all():
            raise argument_error("damping", "one that leaves the update finite", f"inf or NaN in parameter {index}", "raise it")
        change = change if clip is None else change.clamp(-clip, clip)
        moved.append((p.detach().to(torch.promote_types(p.dtype, change.dtype)) + change).to(p.dtype))
    return moved


def _tokens(sequences):
    return sum(sequence.n_labels for sequence in sequences)


def _check_options(damping, clip, curvature):
    check_choice("curvature", curvature, CURVATURES)
    if damping is None and curvature == "woodfisher":
        raise argument_error("damping", "a positive number with woodfisher", None, "it is added to the Fisher matrix")
    for name, value in (("damping", damping), ("clip", clip)):
        if value is not None:
            _check_positive(name, value)


def _check_positive(name, value):
    check_positive(name, value, "it bounds the update")
    return value


def _check_lists(name, tensors, like):
    shapes, expected = [tuple(t.shape) for t in tensors], [tuple(t.shape) for t in like]
    if shapes != expected:
        raise argument_error(name, f"tensors of shapes {expected}", shapes, "pass one for every parameter, in their order")
