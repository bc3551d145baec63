"""``python -m bench --model h100``: the time of the ops on a card that this machine need not have. Modelled, not measured.

The compiled kernels were executed without a card (``tests/kernels/compiled_kernels-3.9.json``), so it is known what they load,
store and compute for each element. The time of a kernel is that of its scarcest resource, as if all others were used at the
same time: the largest of its bytes at the card's copy bandwidth and, for each unit, its instructions at the unit's rate.
Losses from hidden states add their matrix products at the card's GEMM rate. Left out are the host and its launches, waits for
memory and at barriers, and the last programs of a launch. bench/README.md says how large the error is.

Every modelled row is one that the benchmarks of the ops time on a GPU, under the same names.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bench import bench_grad_norm, bench_hessian_ema, bench_linear_loss, bench_sophia_step
from bench._heads import LOSSES, SHAPES, SIZES
from soul import SOUL, SophiaG
from soul.plan.cards import CARDS, Card

EVIDENCE = pathlib.Path(__file__).parent.parent / "tests" / "kernels" / "compiled_kernels-3.9.json"
# Instructions of a thread that a multiprocessor of compute capability 9.0 issues in a clock: four schedulers of one warp each.
# Then by unit, from the table "Throughput of Native Arithmetic Instructions" of NVIDIA's CUDA C++ Programming Guide.
RATES = {"issued": 128, "float": 128, "integer": 64, "special": 16, "exchange": 32}
BYTES = "bytes"
NAMES: dict[Any, str] = {torch.float32: "fp32", torch.bfloat16: "bf16", "8bit": "8bit"}
ROWS, VOCABULARIES = 2048, (128256, 32003)  # of the benchmarks of row kernels
STATISTICS, GRADIENT = "token_logprob statistics", "token_logprob gradient bf16"
LIKELIEST, DRAW = "token_draw likeliest", "token_draw bf16"
DIVERGENCE, DIVERGENCE_GRADIENT = "kl_divergence statistics", "kl_divergence gradient bf16"
BOTH = (STATISTICS, STATISTICS)  # of the logits of the model and of the reference model


@dataclasses.dataclass(frozen=True)
class Work:
    """One variant of one case.

    Attributes:
        op: as the benchmarks name it, like the next two.
        case: what is computed, on what.
        variant: how.
        bytes: that one call must move, or None.
        elements: that each of its kernels works on.
        kernels: their names in the evidence.
        flops: of matrix products.
        program: what one program works on, as the evidence calls it: "tensor" (a chunk of one) or "V 128256" (a row).
    """

    op: str
    case: str
    variant: str
    bytes: float | None
    elements: int
    kernels: tuple[str, ...]
    flops: float = 0.0
    program: str = "tensor"


def cards() -> list[str]:
    """Return the names of the cards that can be modelled: those with known multiprocessors have compute capability 9.0."""
    return [name for name, card in CARDS.items() if card.multiprocessors]


def kernel_times(counts: Mapping[str, Any], elements: int, card: Card) -> dict[str, float]:
    """Return the seconds for which one kernel needs each resource.

    Args:
        counts: of one element, an entry of the evidence.
        elements: how many there are.
        card: that runs the kernel.
    """
    clocks = card.multiprocessors * card.clock
    times = {BYTES: (counts["loaded"] + counts["stored"]) * elements / card.bandwidth}
    return times | {unit: counts[unit] * elements / (rate * clocks) for unit, rate in RATES.items()}


def modelled(work: Work, card: Card, kernels: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Model the time of a `Work`.

    Args:
        work: what is done.
        card: that does it.
        kernels: name -> counts, of the evidence.

    Returns:
        ``ms``; ``counted``: whether there are counts; if not, ``ms`` is the time of the bytes alone, and there is nothing
        more. Of the kernel that takes longest: ``limit``, the resource that it waits for; ``then``, the next one; ``busy``,
        the percentage of the time in which the next one is used; ``barriers`` of a program, or None. Without matrix products:
        ``percent_of_copy``, of the bytes that must be moved, and ``percent_without_overlap``, the same if bytes and
        instructions waited for each other. With matrix products: ``products_ms``, their time alone.
    """
    if not all(name in kernels for name in work.kernels):
        assert work.bytes is not None
        return {"ms": 1e3 * work.bytes / card.bandwidth, "counted": False}
    times = [kernel_times(kernels[name], work.elements, card) for name in work.kernels]
    longest = max(range(len(times)), key=lambda i: max(times[i].values()))
    limit, then = sorted(times[longest], key=times[longest].__getitem__, reverse=True)[:2]
    products = work.flops / card.flops
    seconds = products + sum(max(needed.values()) for needed in times)
    result: dict[str, Any] = {"ms": 1e3 * seconds, "counted": True, "limit": limit, "then": then}
    result["busy"] = 100 * times[longest][then] / times[longest][limit]
    result["barriers"] = kernels[work.kernels[longest]]["barriers"].get(work.program)
    if products:
        return result | {"products_ms": 1e3 * products}
    assert work.bytes is not None  # only losses from hidden states, which have products, have no count of bytes
    apart = sum(needed[BYTES] + max(needed[unit] for unit in RATES) for needed in times)
    least = 100 * work.bytes / card.bandwidth
    return result | {"percent_of_copy": least / seconds, "percent_without_overlap": least / apart}


def works() -> Iterator[Work]:
    """Yield every `Work`, op by op."""
    yield from _steps()
    yield from _norms()
    yield from _averages()
    yield from _rows()
    yield from _heads()


def _numel(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def step_kernel(
    dtype: torch.dtype, soul: bool, *, param_rounding: str = "compensated", state_dtype: torch.dtype | str | None = None
) -> str:
    """Return the name in the evidence of the step that an optimizer with these options launches."""
    m = dtype if state_dtype is None else state_dtype
    h = torch.float32 if state_dtype is None else state_dtype
    rounding = "nearest" if dtype == torch.float32 else param_rounding
    return f"step p {NAMES[dtype]} m {NAMES[m]} h {NAMES[h]} {rounding}{' +hessian' if soul else ''}"


def _steps() -> Iterator[Work]:
    for (name, shapes, dtype), optimizer in itertools.product(bench_sophia_step.models(), (SophiaG, SOUL)):
        soul = optimizer is SOUL
        numel = _numel(shapes)
        roundings = bench_sophia_step.ROUNDINGS if dtype != torch.float32 else ("nearest",)
        states = [state for state in bench_sophia_step.STATE_DTYPES if state != dtype or dtype != torch.float32]
        for rounding, state in itertools.product(roundings, states):
            options: dict[str, Any] = dict(param_rounding=rounding, state_dtype=state)
            per_param = bench_sophia_step.bytes_per_param(dtype, soul, **options)
            yield Work(
                "sophia_step", f"{optimizer.__name__}.step, {name}, {str(dtype)[6:]}",
                f"{bench_sophia_step.label_of(dtype, **options)}, {per_param:.4g} B/param", per_param * numel, numel,
                (step_kernel(dtype, soul, **options),),
            )  # fmt: skip


def _norms() -> Iterator[Work]:
    for name, shapes, dtype in bench_sophia_step.models():
        numel = _numel(shapes)
        kernels = (f"grad_norm squares {NAMES[dtype]}",)  # the sum of a number for each 65,536 of them is one program
        yield Work("grad_norm", bench_grad_norm.name_of(name, dtype), "ours", dtype.itemsize * numel, numel, kernels)


def _averages() -> Iterator[Work]:
    for (name, shapes, dtype), (state, (h, width)) in itertools.product(
        bench_hessian_ema.models(), bench_hessian_ema.STATES.items()
    ):
        numel = _numel(shapes)
        per_param = 2 * width + dtype.itemsize
        kernel = f"hessian_ema h {NAMES.get(h, '8bit')} g {NAMES[dtype]}"
        yield Work("hessian_ema", f"update_hessian, {name}, g {str(dtype)[6:]}", f"ours, {state} h, {per_param:.4g} B/param",
                   per_param * numel, numel, (kernel,))  # fmt: skip


def _rows() -> Iterator[Work]:
    groups: dict[tuple[str, str, int], dict[str, tuple[str, ...]]] = {  # op, kind, bytes an element -> variant -> kernels
        ("token_logprob", "statistics", 4): {"ours": (STATISTICS,), "ours, all statistics": ("token_logprob statistics all",)},
        ("token_logprob", "gradient", 6): {"ours": (GRADIENT,), "ours, from logits alone": (STATISTICS, GRADIENT)},
        ("token_draw", "statistics", 4): {"ours, for drawing": (LIKELIEST,), "ours, of given labels": (STATISTICS,)},
        ("token_draw", "gradient", 6): {"ours, drawing": (DRAW,), "ours, of given labels": (GRADIENT,)},
        ("kl_divergence", "divergences", 8): {"ours": (DIVERGENCE,), "ours, from logits alone": (*BOTH, DIVERGENCE)},
        ("kl_divergence", "gradient", 10): {
            "ours": (DIVERGENCE_GRADIENT,),
            "ours, from logits alone": (*BOTH, DIVERGENCE, DIVERGENCE_GRADIENT),
        },
    }
    for ((op, kind, width), variants), n_vocab in itertools.product(groups.items(), VOCABULARIES):
        numel = ROWS * n_vocab
        for variant, kernels in variants.items():
            case = f"{kind}, {ROWS} x {n_vocab}, fp32 logits"
            yield Work(op, case, variant, width * numel, numel, kernels, program=f"V {n_vocab}")


def _heads() -> Iterator[Work]:
    kernels: dict[str, tuple[str, ...]] = dict.fromkeys(LOSSES, (STATISTICS, GRADIENT))
    kernels |= {
        "predictions": (LIKELIEST, *kernels["CE"]),
        "GNB": (LIKELIEST, DRAW),
        "KL": (*BOTH, DIVERGENCE, DIVERGENCE_GRADIENT),
    }

    def head(op: str, title: str, variant: str, loss: str, n: int, d: int, n_vocab: int, frozen: bool, products: int) -> Work:
        case = f"{title}, N {n}, D {d}, V {n_vocab}, bfloat16, {'frozen' if frozen else 'trained'} head"
        return Work(op, case, variant, None, n * n_vocab, kernels[loss], 2.0 * products * n * n_vocab * d, f"V {n_vocab}")

    for frozen, (d, n_vocab), n, loss in itertools.product((False, True), SHAPES, SIZES, LOSSES):
        if bench_linear_loss.runs_by_default(loss, n, d, n_vocab, frozen):
            products = (2 if frozen else 3) + (loss == "KL")
            yield head("linear_loss", loss, "ours", loss, n, d, n_vocab, frozen, products)
    for (n, d, n_vocab), frozen in itertools.product(((512, *SHAPES[0]), (4096, *SHAPES[1])), (False, True)):
        yield head("linear_gnb", "linear_gnb", "ours", "GNB", n, d, n_vocab, frozen, 2 if frozen else 3)
    for n, frozen in itertools.product((4096, 512), (False, True)):
        size = (n, *SHAPES[0], frozen)
        yield head("linear_kl", "linear_kl, mean", "ours", "KL", *size, 5 if frozen else 6)
        yield head("linear_kl", "linear_kl, mean", "ours, as an objective", "KL", *size, 3 if frozen else 4)
        products = 2 if frozen else 3
        for variant, more in (("ours", 0), ("ours, as an objective", 0), ("ours, with the logsumexp", 1)):
            yield head("linear_cross_entropy", "linear_cross_entropy", variant, "CE", *size, products + more)
        yield head("linear_cross_entropy", "linear_cross_entropy", "ours, with predictions", "predictions", *size, products)


def main(name: str, ops: Sequence[str], only: str = "") -> int:
    """Print the modelled times of the ops and return the exit status.

    Args:
        name: of the card, one of `cards`.
        ops: names of ops; empty: all.
        only: text that the name of a case must contain.

    Raises:
        ValueError: a card for which there are no counts, or no case is left.
    """
    if name not in cards():
        raise ValueError(f"--model: expected {' or '.join(cards())}, got {name!r}; the kernels were counted for sm_90 alone")
    chosen = [work for work in works() if (not ops or work.op in ops) and only in work.case]
    if not chosen:
        request = f"{', '.join(ops) or 'all ops'} and --only {only!r}"
        raise ValueError(f"--model: expected ops that have kernels of their own, got {request}; try python -m bench plan")
    card = CARDS[name]
    evidence = json.loads(EVIDENCE.read_text())
    print(f"MODELLED, NOT MEASURED: {name}, copy {card.bandwidth / 1e9:.0f} GB/s, GEMM {card.flops / 1e12:.0f} TFLOP/s "
          f"({card.source}), {card.multiprocessors} multiprocessors at {card.clock / 1e9:.2f} GHz (datasheet)")  # fmt: skip
    left_out = "host, launches, waiting for memory and at barriers are left out"
    print(f"counts of {evidence['target']}, Triton {evidence['triton']}; {left_out}")
    for op in ops:
        if op not in {work.op for work in chosen}:
            print(f"{op}: not modelled: --only leaves no case of it, or it has no kernels of its own; try python -m bench plan")
    for op, of_op in itertools.groupby(chosen, key=lambda work: work.op):
        print(f"\n== {op}, modelled")
        for case, of_case in itertools.groupby(of_op, key=lambda work: work.case):
            print(f"\n{case}")
            for work in of_case:
                print(f"  {work.variant:<48}{_line(modelled(work, card, evidence['kernels']))}")
    return 0


def _line(times: Mapping[str, Any]) -> str:
    line = f"{times['ms']:10.3f} ms"
    if not times["counted"]:
        return f"{line}  or more: the bytes alone, instructions are not counted"
    if "products_ms" in times:
        line += f"  {100 * times['ms'] / times['products_ms']:6.1f}% of its products"
    else:
        line += f"  {times['percent_of_copy']:6.1f}% of copy ({times['percent_without_overlap']:.0f} without overlap)"
    line += f"  limit: {times['limit']}, then {times['then']} {times['busy']:.0f}%"
    return line + (f"  barriers a program: {times['barriers']:g}" if times["barriers"] else "")
