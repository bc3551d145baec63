"""What the chunks of a head's rows add up to: the gradients of hidden states, weight and bias."""

import torch

from soul_kernels._head.rows import mm_fp32, product_with_weight, products_in


class HeadGradients:
    """Sums what the chunks contribute to the gradients that are wanted; the others are None. All are fp32 (in fp64 they are
    fp64), to be rounded once.

    Attributes:
        x: [R, D] gradient of the rows.
        weight: [V, D].
        bias: [V].
    """

    def __init__(self, rows, *, hidden, weight, bias):
        self.rows = rows
        options = dict(dtype=rows.options.result_dtype, device=rows.x.device)
        # The first chunk overwrites dW; but in fp16 every chunk is added, and without rows there is none.
        self.fp16 = rows.x.dtype == torch.float16
        new = torch.zeros if self.fp16 or not len(rows) else torch.empty
        self.x = torch.empty(rows.x.shape, **options) if hidden else None
        self.weight = new(rows.head.weight.shape, **options) if weight else None
        self.bias = torch.zeros(rows.n_vocab, **options) if bias else None

    def add(self, chunk, coefficients, weights=None):
        """Takes in a loaded and measured chunk; chunks come in order. Arguments as those of `HeadRows.gradient`."""
        part, scale = chunk.part, None
        if self.fp16:
            # coefficient (about 1 / R) times p (about 1 / V) underflows in fp16; a power of two brings the largest possible
            # element to between 32 and 64 and is divided out of the fp32 sums. Of each row, where no sum over rows is wanted:
            # the gradient of a memorised row may be 1e-9 of another's, and what it will be multiplied with is not known.
            bounds = self.rows.bounds(chunk, coefficients, weights)
            if self.weight is not None or self.bias is not None:
                bounds = bounds.max()
            scale = torch.exp2((6 - torch.frexp(bounds).exponent).clamp(max=100))
            coefficients, weights = coefficients * scale, None if weights is None else weights * scale
        dlogits = self.rows.gradient(chunk, coefficients, weights)
        if self.x is not None:
            product_with_weight(dlogits, self.rows.head.weight, self.x[part])
        if self.weight is not None and not self.fp16:
            with products_in(self.rows.options.compute_dtype, dlogits):
                _accumulate_fp32(self.weight, dlogits.T, self.rows.x[part], first=chunk.start == 0)
        bias = None if self.bias is None else dlogits.sum(0, dtype=self.bias.dtype)
        if self.fp16:
            if self.x is not None:
                self.x[part] /= scale.view(-1, 1)
            if self.weight is not None:
                weight = torch.empty_like(self.weight)
                mm_fp32(dlogits.T, self.rows.x[part], weight)
                self.weight += weight.div_(scale)
            bias = None if bias is None else bias / scale
        if bias is not None:
            self.bias += bias


def _accumulate_fp32(total, a, b, first):
    """``total = a @ b`` for the first chunk, ``total += a @ b`` after it; in the dtype of the total all the way."""
    if first:
        mm_fp32(a, b, total)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
