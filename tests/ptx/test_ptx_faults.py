"""Faults planted in the library's own kernels, each of which the machine for PTX must find (``pytest --ptx``)."""

import re

import pytest
import torch

from soul_kernels import _table, grad_norm, sophia_step
from soul_kernels.kl_divergence import divergence_gradient, divergence_statistics
from soul_kernels.token_draw import draw_labels, likeliest_statistics
from soul_kernels.token_logprob import statistics_and_gradient, token_gradient, token_statistics
from tests.support.helpers import mutant

Finding = pytest.importorskip("tests.ptx.machine", reason="Triton is not installed").Finding

V = 2 * 4096 + 108  # two whole blocks of the largest row kernel, and a tail


def one_step(sophia_step=sophia_step, n=20_000, misaligned=False):
    """A step of two tensors in bf16, from which views begin off a 16-byte border where that is asked for; the parameters."""
    torch.manual_seed(0)
    skip = int(misaligned)
    params = [torch.randn(size + skip).bfloat16()[skip:] for size in (n, 333)]
    grads = [torch.randn(size + skip).bfloat16()[skip:] for size in (n, 333)]
    states = [[torch.zeros(size) for size in (n, 333)] for _ in range(2)]
    options = dict(lr=1e-2, beta1=0.9, beta2=0.95, rho=0.04, weight_decay=0.1, eps=1e-8, bs=16, backend="triton")
    sophia_step(params, grads, *states, **options)
    return torch.cat(params)


def test_a_mask_that_is_one_element_too_long(card, tmp_path):
    """The last program of the longer tensor loads a gradient beyond its end."""
    one_step(sophia_step)
    broken = mutant("soul_kernels.sophia_step", "offsets < chunk.count", "offsets <= chunk.count", tmp_path)
    with pytest.raises(Finding, match=r"outside of memory: 2 bytes, 0 bytes after the end of a tensor \(bfloat16 \[\d+\]"):
        one_step(broken.sophia_step)


def test_an_alignment_that_is_promised_and_does_not_hold(card, monkeypatch):
    one_step(sophia_step, misaligned=True)

    class Promised(_table._Bucket):
        def __init__(self, **options):
            super().__init__(**options | {"aligned": True})

    monkeypatch.setattr(_table, "_Bucket", Promised)
    with pytest.raises(Finding, match=r"misaligned access: 16 bytes .* in a tensor \(bfloat16"):
        one_step(sophia_step, misaligned=True)


def test_a_chunk_that_is_done_twice(card, monkeypatch):
    chunk_map = _table._chunk_map

    def twice(*arguments):
        return tuple(torch.cat([column, column[:1]]) for column in chunk_map(*arguments))

    monkeypatch.setattr(_table, "_chunk_map", twice)
    with pytest.raises(Finding, match=r"race in global memory with a \w+ of program \(?\d+.* in a tensor"):
        one_step(sophia_step)


@pytest.mark.slow(reason="compiles and compares a kernel; a mask that is too long is always planted")
def test_a_flipped_sign(card):
    want = one_step(sophia_step)
    card.edit = lambda ptx: re.sub(r"\bsub(\.rn)?\.f32", r"add\1.f32", ptx, count=1)
    assert not torch.equal(one_step(sophia_step), want)


def draw(draw_labels=draw_labels, dtype=torch.float32):
    """Draws from a whole block, from the tail, and from the end of a row: the sum there falls short of the target, so that the
    last label is chosen, and its gradient stored once more. In place; a narrower dtype in the first half of a row's bytes.
    """
    torch.manual_seed(0)
    results = []
    for n_vocab in (V, 2 * 4096, 6 * 2048 + 108):  # of the last one the tail is a block in which threads wait for each other
        logits = torch.randn(6, n_vocab)
        labels = torch.zeros(6, dtype=torch.int64)
        statistics = torch.zeros(4, 6)
        likeliest_statistics(logits, labels, statistics)
        statistics[2, 4:] *= 1 + 1e-4
        uniforms = torch.tensor([0.1, 0.6, 0.9, 0.99, 1 - 2**-24, 1 - 2**-24])
        out = logits.view(dtype)[:, :n_vocab]
        draw_labels(logits, labels, uniforms, statistics, torch.ones(6), out)
        results += [labels, statistics, out]
    return results


@pytest.mark.slow(reason="compiles three kernels; races with and without a barrier are always tested in test_ptx.py")
def test_a_barrier_that_was_removed_from_the_source(card, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        draw(dtype=dtype)
    lines = "tl.debug_barrier()  # other threads have stored the block that holds it, and no value orders two stores"
    broken = mutant("soul_kernels.token_draw", lines, "pass", tmp_path)
    with pytest.raises(Finding, match=r"race in global memory with a store .* in argument \w+_ptr \(float32 \[6, 8300\]"):
        draw(broken.draw_labels)


def rows(n_vocab=V):
    torch.manual_seed(0)
    labels = torch.tensor([0, 17, n_vocab - 1, -100])
    return torch.randn(4, n_vocab), torch.randn(4, n_vocab), labels, torch.randn(4)


def statistics(n):
    logits, _, labels, _ = rows()
    logits[1, [4, 17]] = 9.0  # the label's logit and one before it: such a row is read again
    out = torch.zeros(n, 4)
    token_statistics(logits, labels, out)
    return out


def gradient(dtype=torch.float32):
    """In the place of the logits; of a narrower dtype, in the first half of the bytes of each row."""
    logits, _, labels, coefficients = rows()
    token_gradient(logits, labels, statistics(4), coefficients, logits.view(dtype)[:, :V])
    return logits


def both(dtype=torch.float32):
    logits, _, labels, coefficients = rows()
    out = torch.zeros(4, 4)
    statistics_and_gradient(logits, labels, out, coefficients, logits.view(dtype)[:, :V])
    return out, logits


def likeliest():
    logits, _, labels, _ = rows()
    out = torch.zeros(4, 4)
    likeliest_statistics(logits, labels, out)
    return out


def divergence(kind, dtype=torch.float32):
    n_vocab = 6 * 2048 + 108  # six whole blocks: threads wait for each other in blocks 0 and 2, and in the tail
    logits, reference, labels, coefficients = rows(n_vocab)
    stats, ref_stats, divergences = torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(2, 4)
    token_statistics(logits, labels, stats)
    token_statistics(reference, labels, ref_stats)
    arguments = (logits, reference, labels, stats, ref_stats)
    divergence_statistics(*arguments, divergences, kind=kind)
    divergence_gradient(*arguments, divergences, coefficients, torch.ones(4), logits.view(dtype)[:, :n_vocab], kind=kind)
    return divergences, logits


CALLS = {
    "statistics": lambda: statistics(4), "all statistics": lambda: statistics(7), "gradient": gradient, "likeliest": likeliest,
    "draw": draw, "kl": lambda: divergence("kl"), "soul_kl": lambda: divergence("soul_kl"),
    "narrow draw": lambda: draw(dtype=torch.bfloat16), "both": both, "narrow both": lambda: both(torch.bfloat16),
    "narrow gradient": lambda: gradient(torch.bfloat16), "narrow kl": lambda: divergence("kl", torch.bfloat16),
    "grad_norm": lambda: grad_norm([torch.ones(100_000)], backend="triton"),
    "step": lambda: one_step(sophia_step),
}  # fmt: skip


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [tensor for item in result for tensor in tensors(item)]


def without_barrier(name, number):
    """An edit that removes the barrier of this number from the kernel of this name, and says whether there was one."""
    removed = []

    def edit(ptx):
        if f".entry {name}(" not in ptx:
            return ptx
        barriers = list(re.finditer(r"\tbar\.sync \t0;\n", ptx))
        if number >= len(barriers):
            return ptx
        removed.append(number)
        return ptx[: barriers[number].start()] + ptx[barriers[number].end() :]

    return edit, removed


def kernels_of(call, card):
    names = []

    def note(ptx):
        names.append(re.search(r"\.entry (\w+)\(", ptx)[1])
        return ptx

    card.edit = note
    call()
    card.edit = None
    return list(dict.fromkeys(names))


SLOW = pytest.mark.slow(reason="draws once for each of a hundred barriers; one of them is removed from the source always")


@pytest.mark.slow(reason="executes kernels for every barrier that they have")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[SLOW] * ("draw" in name)) for name in CALLS])
def test_a_barrier_that_was_removed_from_a_compiled_kernel(name, card):
    """Remove each barrier singly: a race is found, or a result changes."""
    call = CALLS[name]
    want = tensors(call())
    for kernel in kernels_of(call, card):
        number = 0
        removed = [True]
        while removed:
            card.edit, removed = without_barrier(kernel, number)
            try:
                same = all(torch.equal(a, b) for a, b in zip(tensors(call()), want, strict=True))
            except Finding:
                same = False
            assert not (removed and same), f"barrier {number} of {kernel}: nothing was found without it"
            number += 1
        assert number > 1 or kernel in ("gradient_kernel", "divergence_gradient_kernel")  # which reduce nothing
