"""The tables of the losses: five of them from hidden states, against eager PyTorch, torch.compile, and fused cross-entropies.

On a GPU there is a case for every loss of CE, GradDiff, NPO, KL (to a reference, over all tokens) and GNB (labels drawn from
the model), every shape (D, V) of (2048, 128256), (4096, 32000), (4096, 128256), N of 512, 4096 and 16384 tokens, trained and
frozen head. By default one thing at a time differs from N 4096, D 2048, V 128256, trained head: all losses with a frozen head,
the other shapes for CE and KL, the other sizes for CE and NPO. Ask for the rest by name: ``--only head`` runs all 90,
``--only "NPO, N 16384"`` its six.

Peers are there where the work is equal, for CE, each as it comes and at its most accurate. Every variant has its errors beside
its time: see `bench._heads`. Eager PyTorch rounds its logits to the dtype of the inputs before it makes them fp32.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

from bench._heads import LOSSES, QUICK, SHAPES, SIZES, SMALL, functions_of, make_case


def liger(**options):
    """Liger's fused linear cross-entropy: bf16 logits; dW in the dtype of the weight unless ``accum_dtype`` says otherwise."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(inputs):
        x, labels = inputs.flat
        return liger_fused_linear_cross_entropy(x, inputs.weight, labels, **options)

    return loss


def cut(**options):
    """Cut cross-entropy. It leaves out blocks of small gradients unless ``filter_eps`` is None; ``impl="cce_exact"`` also adds
    up in fp32, but is not in every release.
    """
    from cut_cross_entropy import linear_cross_entropy

    def loss(inputs):
        x, labels = inputs.flat
        return linear_cross_entropy(x, inputs.weight, labels, **options)

    return loss


def of_torch(**options):
    """What torch itself has, from 2.13 on: without options a plain matrix product and cross-entropy, with them in chunks."""

    def loss(inputs):
        x, labels = inputs.flat
        chunking = torch.nn.LinearCrossEntropyOptions(**options) if options else None
        return F.linear_cross_entropy(x, inputs.weight, labels, options=chunking)

    return loss


PEERS = {
    "Liger": liger,
    "Liger, accum_dtype fp32": lambda: liger(accum_dtype=torch.float32),
    "cut-cross-entropy": cut,
    "cut-cross-entropy, no filter": lambda: cut(filter_eps=None),
    "cut-cross-entropy, cce_exact": lambda: cut(impl="cce_exact"),
    "torch linear_cross_entropy": of_torch,
    "torch linear_cross_entropy, chunks": lambda: of_torch(acc_policy="auto"),
    # The accumulator's dtype must be named: only the policy "auto" looks for one above that of the inputs.
    "torch linear_cross_entropy, accurate": lambda: of_torch(acc_policy="accurate", acc_dtype=torch.float32),
}


def runs_by_default(loss, n, d, n_vocab, frozen):
    """Tells whether a case runs without being asked for: where at most one thing differs from the first of each."""
    if frozen:
        return n == SIZES[0] and (d, n_vocab) == SHAPES[0]
    if n != SIZES[0]:
        return loss in ("CE", "NPO") and (d, n_vocab) == SHAPES[0]
    return (d, n_vocab) == SHAPES[0] or loss in ("CE", "KL")


def cases(device, quick):
    """Functions that make the cases; without a GPU one of each loss and head at a small size, by our references.

    Without a GPU and quick, only CE is there with a frozen head.
    """
    if device.type == "cpu":
        sizes = [(loss, *SMALL, frozen) for frozen in (False, True) for loss in LOSSES]
        if quick:
            sizes = [*((loss, *QUICK, False) for loss in LOSSES), ("CE", *QUICK, True)]
    else:
        grid = itertools.product((False, True), SHAPES, SIZES, LOSSES)
        sizes = [(loss, n, d, n_vocab, frozen) for frozen, (d, n_vocab), n, loss in grid]
    for size in sizes:
        functions = functions_of(size[0], device, quick) | (PEERS if size[0] == "CE" else {})
        default = device.type == "cpu" or runs_by_default(*size)
        yield functools.partial(make_case, *size, functions, device, default=default)
