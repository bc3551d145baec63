"""Run a compiled variant of a kernel once on inputs of real shapes, and report what it has executed for each element.

A kernel over a table of tensors gets one tensor of two and a half chunks and a tail; a row kernel `ROWS` rows of each length in
`VOCABULARIES`. Values matter only where control depends on them: a label that is drawn, statistics that belong to the logits.
Addresses are multiples of 16 bytes unless the variant is one of misaligned tensors.
"""

import dataclasses
from typing import Any

import torch

from soul_kernels.chunks import row_width
from soul_kernels.reference.rounding import GROUP
from soul_kernels.tokens import IGNORE_INDEX
from tests.ptx.costs import UNITS, issued
from tests.ptx.driver import launch
from tests.ptx.machine import Checks, Counts, Kernel

VOCABULARIES = (50257, 128256)
ROWS = 2
TAIL = 77  # elements of a tensor behind its last full block
# Rows of the tables, in the kernels' own order: for what is walked the prefix of the constant that is its dtype.
TABLES = {
    "sophia_step_kernel": ("P", "G", "M", "H", "LOW", "scales", "scales", "number", "number"),
    "hessian_ema_kernel": ("H", "G", "U", "scales", "number"),
    "squares_kernel": ("G",),
}
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "uint8": torch.uint8,
                "int8": torch.int8}  # fmt: skip
WIDE = 16  # bytes: the widest access of a thread


@dataclasses.dataclass(frozen=True)
class Run:
    """One execution.

    Attributes:
        counts: what was executed.
        elements: that the kernel has worked on.
        programs: that have done it: rows, or chunks.
    """

    counts: Counts
    elements: int
    programs: int

    def wide(self, kind: str) -> float:
        """Return the share of the bytes "loaded" or "stored" that 16-byte accesses moved; 1 where nothing was."""
        moved = getattr(self.counts, kind)
        return moved[WIDE] / moved.total() if moved else 1.0

    def figures(self) -> dict[str, float]:
        """Return what goes into the evidence, for each element, but for barriers, which are of a program."""
        counts = self.counts
        units = issued(counts.executed)
        by_element = {"executed": counts.instructions, "issued": sum(units.values())} | {name: units[name] for name in UNITS}
        by_element |= {"loaded": counts.loaded.total(), "stored": counts.stored.total()}
        figures = {name: round(count / self.elements, 3) for name, count in by_element.items()}
        figures |= {f"wide_{kind}": round(self.wide(kind), 3) for kind in ("loaded", "stored") if figures[kind] > 0}
        return figures | {"barriers": round(counts.barriers / self.programs, 1)}


def execute(variant: Any, ptx: str, shared: int, vocabularies: tuple[int, ...] = VOCABULARIES) -> dict[str, Run]:
    """Run a variant of ``tests.kernels.test_compile.KERNELS``.

    Args:
        variant: what was compiled.
        ptx: the result.
        shared: bytes of shared memory.
        vocabularies: lengths of the rows.

    Returns:
        Name -> `Run`: of a row kernel "V 50257", "V 128256" and "ignored", which is rows that are; of others one alone.
    """
    kernel = Kernel(ptx, 32 * variant.config["num_warps"], shared)
    if variant.kernel.__name__ in TABLES:
        return {"tensor": _run_tensor(variant, kernel)}
    if "logits_ptr" not in variant.signature:
        return {"partial sums": _run_partials(variant, kernel)}
    runs = {f"V {n_vocab}": _run_rows(variant, kernel, n_vocab, ignored=False) for n_vocab in vocabularies}
    return runs | {"ignored": _run_rows(variant, kernel, vocabularies[0], ignored=True)}


def _launch(variant: Any, kernel: Kernel, programs: int, values: dict[str, Any], others: list[torch.Tensor]) -> Counts:
    counts = Counts()
    parameters = [
        (name, variant.signature[name], values[name]) for name in variant.kernel.arg_names if name in variant.signature
    ]
    launch(kernel, (programs, 1, 1), parameters, lambda: others, Checks(), counts)
    return counts


def _run_tensor(variant: Any, kernel: Kernel) -> Run:
    constants = variant.constants
    chunk = constants["CHUNK"]
    numel = 2 * chunk + chunk // 2 + TAIL
    generator = torch.Generator().manual_seed(0)

    def walked(dtype: torch.dtype) -> torch.Tensor:
        values = torch.randn(numel + 8, generator=generator).mul_(0.02).abs_()
        values = values.to(dtype) if dtype.is_floating_point else (values * 2000).to(dtype)
        return values[0 if constants["ALIGNED"] else 1 :][:numel]

    def column(role: str) -> torch.Tensor | None:
        if role == "scales":
            return torch.full((-(-numel // GROUP),), 0x7700, dtype=torch.int16)  # the pattern of 2^-8
        if role == "number":
            return torch.ones(1)
        dtype = constants.get(f"{role}_DTYPE")
        return None if dtype is None else walked(TORCH_DTYPES[str(dtype)])

    columns = [column(role) for role in TABLES[variant.kernel.__name__]]
    programs = -(-numel // chunk)
    numbers = {"lr": 1e-4, "weight_decay": 0.1, "rho": 0.04, "bs": 64.0, "beta1": 0.96, "beta1_rest": 0.04, "beta2": 0.99,
               "beta2_rest": 0.01, "eps": 1e-12, "weight": 0.01, "factor": 1.0, "skip": 0.0}  # fmt: skip
    on_device = [name for name, kind in variant.signature.items() if name in numbers and kind == "*fp32"]
    values = numbers | {name: torch.tensor(numbers[name]) for name in on_device}
    values |= {f"{name}_ptr": torch.tensor(numbers[name]) for name in ("factor", "skip")}
    values |= {
        "table_ptr": torch.tensor([*(0 if c is None else c.data_ptr() for c in columns), numel, 12345, 0]),
        "chunk_tensor_ptr": torch.zeros(programs, dtype=torch.int32),
        "chunk_piece_ptr": torch.arange(programs, dtype=torch.int32),
        "telemetry_ptr": torch.zeros(3, dtype=torch.float64),
        "partial_ptr": torch.zeros(programs, dtype=torch.float64),
        "n_tensors": 1,
    }
    counts = _launch(variant, kernel, programs, values, [c for c in columns if c is not None])
    return Run(counts, numel, programs)


def _run_partials(variant: Any, kernel: Kernel) -> Run:
    partial = torch.ones(2 * variant.constants["BLOCK"] + TAIL, dtype=torch.float64)
    values = {"partial_ptr": partial, "norm_ptr": torch.zeros(1), "n_partials": len(partial)}
    return Run(_launch(variant, kernel, 1, values, []), len(partial), 1)


def _run_rows(variant: Any, kernel: Kernel, n_vocab: int, *, ignored: bool) -> Run:
    generator = torch.Generator().manual_seed(0)

    def scratch(name: str) -> torch.Tensor:
        dtype = TORCH_DTYPES[variant.signature.get(name, "*fp32").removeprefix("*")]
        values = torch.randn(ROWS, row_width(n_vocab), generator=generator).mul_(3)
        return values.to(dtype)[:, :n_vocab]

    def statistics_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Log p(label), maximum, sum, 1 - p(label or likeliest), and room for three more."""
        logits = logits.float()
        highest = logits.amax(1)
        total = (logits - logits.amax(1, keepdim=True)).exp().sum(1)
        logp = logits.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        rest = 1 - 1 / total if "uniforms_ptr" in variant.signature else -torch.expm1(logp)
        return torch.cat([torch.stack([logp, highest, total, rest]), torch.zeros(3, ROWS)])

    logits, ref_logits = scratch("logits_ptr"), scratch("ref_logits_ptr")
    labels = torch.full((ROWS,), IGNORE_INDEX) if ignored else torch.arange(ROWS) * (n_vocab // ROWS) + 11
    out = scratch("out_ptr")
    statistics, ref_statistics = statistics_of(logits, labels), statistics_of(ref_logits, labels)
    divergences = torch.ones(3, ROWS)
    values = {
        "logits_ptr": logits, "ref_logits_ptr": ref_logits, "out_ptr": out, "labels_ptr": labels,
        "statistics_ptr": statistics, "ref_statistics_ptr": ref_statistics, "divergences_ptr": divergences,
        "strengths_ptr": torch.zeros(ROWS), "coefficients_ptr": torch.ones(ROWS), "weights_ptr": torch.ones(ROWS),
        "mean_scores_ptr": torch.ones(ROWS), "beta": 0.5,
        "means_ptr": torch.zeros(ROWS), "class_weights_ptr": torch.ones(n_vocab), "lse_coefficients_ptr": torch.ones(ROWS),
        "mean_coefficients_ptr": torch.ones(ROWS),
        "uniforms_ptr": torch.tensor([0.4, 0.7]), "statistics_stride": ROWS, "ref_statistics_stride": ROWS,
        "divergences_stride": ROWS, "n_vocab": n_vocab, "row_stride": logits.stride(0),
        "ref_row_stride": ref_logits.stride(0), "out_stride": out.stride(0), "logit_scale": 0.5, "softcap": 30.0,
    }  # fmt: skip
    return Run(_launch(variant, kernel, ROWS, values, []), ROWS * n_vocab, ROWS)
