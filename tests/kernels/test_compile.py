"""Every kernel, compiled for four targets without a GPU: no spills in the main loop, and what it does for each element.

For NVIDIA's targets the PTX is executed once (`tests.ptx.workloads`): it must load and store no more bytes than an element has,
16 at a time, and pass no barrier more than before. For AMD's only the machine code is read.

Runs in a process of its own (``make test-compile``): the compiler cannot be used where the interpreter is on. The evidence for
sm_90 is kept in one file for each version of Triton, ``compiled_kernels-3.6.json`` and ``compiled_kernels-3.9.json``; the
installed version is held against its own. ``make evidence`` writes them anew.
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import pathlib
import re
import subprocess
import tempfile

import pytest

import soul_kernels.token_logprob
from soul_kernels._launch import tl, triton
from soul_kernels.backends import has_triton, runs_on_cpu
from soul_kernels.grad_norm import CONFIG as NORM_CONFIG
from soul_kernels.grad_norm import SUM_CONFIG, norm_kernel, squares_kernel
from soul_kernels.hessian_ema import CONFIG as EMA_CONFIG
from soul_kernels.hessian_ema import CONFIG_8BIT as EMA_CONFIG_8BIT
from soul_kernels.hessian_ema import hessian_ema_kernel
from soul_kernels.kl_divergence import DIVERGENCE_CONFIG, divergence_gradient_kernel, divergence_kernel
from soul_kernels.kl_divergence import GRADIENT_CONFIG as DIVERGENCE_GRADIENT_CONFIG
from soul_kernels.sophia_step import CONFIG as STEP_CONFIG
from soul_kernels.sophia_step import CONFIG_8BIT as STEP_CONFIG_8BIT
from soul_kernels.sophia_step import sophia_step_kernel
from soul_kernels.token_draw import DRAW_CONFIG, draw_kernel, likeliest_kernel
from soul_kernels.token_logprob import (
    GRADIENT_CONFIG,
    STATISTICS_CONFIG,
    gradient_kernel,
    statistics_gradient_kernel,
    statistics_kernel,
)

if runs_on_cpu() or not has_triton():
    pytest.skip("a run of its own, with Triton's compiler alone: make test-compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from tests.ptx.costs import issued  # noqa: E402
from tests.ptx.workloads import VOCABULARIES, execute  # noqa: E402
from tests.support.helpers import mutant  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VERSION = ".".join(triton.__version__.split(".")[:2])
EVIDENCE_FILES = {path.stem.partition("-")[2]: path for path in pathlib.Path(__file__).parent.glob("compiled_kernels-*.json")}
EVIDENCE = {version: json.loads(path.read_text())["kernels"] for version, path in EVIDENCE_FILES.items()}
DRIFT = 0.15  # of registers and instructions, from the evidence
EXCESS = 0.01  # of bytes that are moved, over those that must be: numbers of a row or of a program that threads load each
NARROW = 0.025  # of the bytes that could be moved 16 at a time: the last block of a row of 50257, which is masked, has 2.2%
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "8bit": tl.uint8}
TABLE = {"table_ptr": "*i64", "chunk_tensor_ptr": "*i32", "chunk_piece_ptr": "*i32", "n_tensors": "i32"}
FACTORS = {"factor_ptr": "*fp32", "skip_ptr": "*fp32"}
OPTIONS = ("lr", "weight_decay", "rho", "bs")
ROW = {"labels_ptr": "*i64", "statistics_ptr": "*fp32", "statistics_stride": "i32", "n_vocab": "i32", "row_stride": "i32"}
TRANSFORM = {"logit_scale": "fp32", "softcap": "fp32"}  # None elsewhere
REFERENCE_ROW = {"ref_statistics_ptr": "*fp32", "ref_statistics_stride": "i32", "ref_row_stride": "i32"}
REFERENCE_ROW |= {"divergences_ptr": "*fp32", "mean_scores_ptr": "*fp32"}
STRENGTHS = {"strengths_ptr": "*fp32"}  # None elsewhere
# Arguments that are multiples of 16: the scratch of the ops promises it.
ALIGNED_ROW = ("logits_ptr", "ref_logits_ptr", "out_ptr", "class_weights_ptr", "row_stride", "ref_row_stride", "out_stride")


@dataclasses.dataclass
class Variant:
    """A kernel with all that the compiler must know, and the bytes that it must move.

    Attributes:
        loaded: bytes an element of each operand that is read.
        stored: the same of those that are written.
        wide: whether accesses are to have 16 bytes, where a thread's share of an operand has as many.
        aligned: the arguments that are multiples of 16.
    """

    kernel: object
    signature: dict
    constants: dict
    config: dict
    loaded: tuple = ()
    stored: tuple = ()
    wide: bool = True
    aligned: tuple = ()


def walk(kernel, signature, config, *, stored, aligned=True, **constants):
    """A kernel over a table of tensors; ``stored``: which of the operands are written."""
    operands = {name: value for name, value in constants.items() if name.endswith("_DTYPE") and value}
    written = {name: operands[name] for name in stored if name in operands}
    block = config["BLOCK"] // (1 if aligned else 2)  # as TensorTable launches it
    constants |= {"ALIGNED": aligned, "CHUNK": config["chunk"], "BLOCK": block}
    return Variant(kernel, TABLE | signature, constants, config, sizes(operands), sizes(written), wide=aligned)


def sizes(operands):
    """Return bytes an element of each operand; 8-bit states have a scale of 2 bytes for 32 values."""
    widths = [dtype.primitive_bitwidth // 8 for dtype in operands.values()]
    return (*widths, *(2 / 32 for dtype in operands.values() if dtype == tl.uint8))


def step(p, m, h, rounding, hessian, *, all_options=False, aligned=True):
    signature = {"telemetry_ptr": "*fp64"} | dict.fromkeys(["beta1", "beta1_rest", "beta2", "beta2_rest", "eps"], "fp32")
    signature |= dict.fromkeys(OPTIONS, "*fp32" if all_options else "fp32") | (FACTORS if all_options else {})
    return walk(
        sophia_step_kernel, signature, STEP_CONFIG_8BIT if "8bit" in (m, h) else STEP_CONFIG, aligned=aligned,
        stored=("P_DTYPE", "M_DTYPE", "LOW_DTYPE", "H_DTYPE" if hessian else ""),
        P_DTYPE=DTYPES[p], G_DTYPE=DTYPES[p], M_DTYPE=DTYPES[m], H_DTYPE=DTYPES[h],
        LOW_DTYPE=tl.int8 if rounding == "compensated" else None, ON_DEVICE=15 if all_options else 0, HESSIAN_IN_STEP=hessian,
        ADD_EPS=not all_options, ROUNDING=rounding, STEPS=True, CORRECTIONS=all_options, CROSSES=False,
        STOCHASTIC_CODES=False,
    )  # fmt: skip


def ema(h, g, probe=None):
    config = EMA_CONFIG_8BIT if h == "8bit" else EMA_CONFIG
    dtypes = {"H_DTYPE": DTYPES[h], "G_DTYPE": DTYPES[g], "U_DTYPE": probe and DTYPES[probe]}
    signature = dict.fromkeys(["beta2", "weight"], "fp32")
    return walk(hessian_ema_kernel, signature, config, stored=("H_DTYPE",), STEPS=True, CROSSES=False,
                STOCHASTIC_CODES=False, **dtypes)  # fmt: skip


def squares(g):
    return walk(squares_kernel, {"partial_ptr": "*fp64"}, NORM_CONFIG, stored=(), G_DTYPE=DTYPES[g])


def norm():
    signature = {"partial_ptr": "*fp64", "norm_ptr": "*fp32", "n_partials": "i32"}
    return Variant(
        norm_kernel, signature, {"BLOCK": SUM_CONFIG["BLOCK"]}, SUM_CONFIG, (8,), wide=False, aligned=("partial_ptr",)
    )


def rows(kernel, config, *, logits="fp32", out=None, transform=False, reads=1, references=0, strengths=True, mean=False,
         class_weights=False, beta=False, **constants):  # fmt: skip
    """A kernel over rows of logits; ``reads``: of the logits; ``references``: how many chunks beside the logits are read."""
    signature = ROW | {"logits_ptr": f"*{logits}"} | (TRANSFORM if transform else {})
    if references:
        signature |= REFERENCE_ROW | {"ref_logits_ptr": f"*{logits}"} | (STRENGTHS if strengths else {})
    if out is not None:
        signature |= {"coefficients_ptr": "*fp32", "weights_ptr": "*fp32", "out_ptr": f"*{out}", "out_stride": "i32"}
    if mean:
        signature |= {"means_ptr": "*fp32", "lse_coefficients_ptr": "*fp32", "mean_coefficients_ptr": "*fp32"}
    if class_weights:
        signature["class_weights_ptr"] = "*fp32"
    if beta:
        signature["beta"] = "fp32"
    signature |= {"uniforms_ptr": "*fp32", "divergences_stride": "i32"}
    signature = {name: kind for name, kind in signature.items() if name in kernel.arg_names}
    constants["BLOCK"] = config["BLOCK"]
    loaded = (DTYPES[logits].primitive_bitwidth // 8,) * (reads + references) + (4,) * class_weights
    stored = () if out is None else (DTYPES[out].primitive_bitwidth // 8,)
    return Variant(kernel, signature, constants, config, loaded, stored, aligned=ALIGNED_ROW)


def divergence(kernel, config, *, KIND="kl", **options):
    return rows(kernel, config, references=1, strengths=KIND == "kl", beta=KIND == "jsd", KIND=KIND, **options)


STEPS = [  # p and g, m, h, rounding, Hessian in the step
    ("fp32", "fp32", "fp32", "nearest", False),
    ("fp32", "fp32", "fp32", "nearest", True),
    ("fp32", "8bit", "8bit", "nearest", True),
    ("bf16", "bf16", "fp32", "nearest", False),
    ("bf16", "bf16", "fp32", "nearest", True),
    ("bf16", "bf16", "fp32", "stochastic", True),
    ("bf16", "bf16", "fp32", "compensated", False),
    ("bf16", "bf16", "fp32", "compensated", True),
    ("bf16", "bf16", "bf16", "nearest", False),
    ("bf16", "bf16", "bf16", "stochastic", True),
    ("bf16", "bf16", "bf16", "compensated", True),
    ("bf16", "8bit", "8bit", "nearest", False),
    ("bf16", "8bit", "8bit", "stochastic", True),
    ("bf16", "8bit", "8bit", "compensated", False),
    ("bf16", "8bit", "8bit", "compensated", True),
    ("fp16", "fp32", "fp32", "nearest", True),
    ("fp16", "fp32", "fp32", "compensated", True),
    ("fp16", "8bit", "8bit", "compensated", True),
]
KERNELS = {f"step p {p} m {m} h {h} {r}{' +hessian' if hs else ''}": step(p, m, h, r, hs) for p, m, h, r, hs in STEPS} | {
    "step all options": step("bf16", "bf16", "fp32", "compensated", True, all_options=True),
    "step misaligned": step("bf16", "bf16", "fp32", "nearest", True, aligned=False),
    "step misaligned 8bit": step("bf16", "8bit", "8bit", "compensated", True, aligned=False),
    "hessian_ema h fp32 g fp32": ema("fp32", "fp32"),
    "hessian_ema h fp32 g bf16": ema("fp32", "bf16"),
    "hessian_ema h bf16 g bf16": ema("bf16", "bf16"),
    "hessian_ema h 8bit g bf16": ema("8bit", "bf16"),
    "hessian_ema h fp32 g bf16 probe": ema("fp32", "bf16", "bf16"),
    "grad_norm squares fp32": squares("fp32"),
    "grad_norm squares bf16": squares("bf16"),
    "grad_norm sum": norm(),
    "token_logprob statistics": rows(statistics_kernel, STATISTICS_CONFIG, ALL=False),
    "token_logprob statistics bf16 logits": rows(statistics_kernel, STATISTICS_CONFIG, logits="bf16", ALL=False),
    "token_logprob statistics capped": rows(statistics_kernel, STATISTICS_CONFIG, transform=True, ALL=False),
    "token_logprob statistics all": rows(statistics_kernel, STATISTICS_CONFIG, ALL=True),
    "token_logprob gradient fp32": rows(gradient_kernel, GRADIENT_CONFIG, out="fp32"),
    "token_logprob gradient bf16": rows(gradient_kernel, GRADIENT_CONFIG, out="bf16", OVERLAID=True),
    "token_logprob gradient bf16 capped": rows(gradient_kernel, GRADIENT_CONFIG, out="bf16", transform=True, OVERLAID=True),
    "token_logprob statistics mean": rows(
        statistics_kernel, STATISTICS_CONFIG, reads=2, mean=True, class_weights=True, ALL=False
    ),
    "token_logprob gradient bf16 mean": rows(gradient_kernel, GRADIENT_CONFIG, out="bf16", mean=True, OVERLAID=True),
    "token_logprob gradient bf16 class weights": rows(
        gradient_kernel, GRADIENT_CONFIG, out="bf16", mean=True, class_weights=True, OVERLAID=True
    ),
    "token_logprob both fp32": rows(statistics_gradient_kernel, STATISTICS_CONFIG, out="fp32", reads=2),
    "token_logprob both bf16": rows(statistics_gradient_kernel, STATISTICS_CONFIG, out="bf16", reads=2, OVERLAID=True),
    "token_logprob both bf16 logits": rows(statistics_gradient_kernel, STATISTICS_CONFIG, logits="bf16", out="bf16", reads=2),
    "token_logprob both bf16 capped": rows(
        statistics_gradient_kernel, STATISTICS_CONFIG, out="bf16", transform=True, reads=2, OVERLAID=True
    ),
    "token_draw likeliest": rows(likeliest_kernel, STATISTICS_CONFIG),
    "token_draw bf16": rows(draw_kernel, DRAW_CONFIG, out="bf16", OVERLAID=True),
    "kl_divergence statistics": divergence(divergence_kernel, DIVERGENCE_CONFIG),
    "kl_divergence statistics soul": divergence(divergence_kernel, DIVERGENCE_CONFIG, KIND="soul_kl"),
    "kl_divergence statistics jsd": divergence(divergence_kernel, DIVERGENCE_CONFIG, KIND="jsd"),
    "kl_divergence gradient bf16": divergence(
        divergence_gradient_kernel, DIVERGENCE_GRADIENT_CONFIG, out="bf16", OVERLAID=True
    ),
    "kl_divergence gradient bf16 soul": divergence(
        divergence_gradient_kernel, DIVERGENCE_GRADIENT_CONFIG, out="bf16", KIND="soul_kl", OVERLAID=True
    ),
    "kl_divergence gradient bf16 reverse": divergence(
        divergence_gradient_kernel, DIVERGENCE_GRADIENT_CONFIG, out="bf16", KIND="reverse_kl", OVERLAID=True
    ),
    "kl_divergence gradient bf16 jsd": divergence(
        divergence_gradient_kernel, DIVERGENCE_GRADIENT_CONFIG, out="bf16", KIND="jsd", OVERLAID=True
    ),
    "kl_divergence gradient bf16 capped": divergence(
        divergence_gradient_kernel, DIVERGENCE_GRADIENT_CONFIG, out="bf16", transform=True, OVERLAID=True
    ),
}


def compile_variant(variant, target):
    names = variant.kernel.arg_names
    aligned = [names.index(name) for name in variant.aligned if name in variant.signature]
    source = ASTSource(
        variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs=dict.fromkeys(set(names) - set(variant.signature)) | variant.constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},  # as at run time
    )
    options = {"num_warps": variant.config["num_warps"], "enable_fp_fusion": False}
    if TARGETS[target].backend == "cuda" and "maxnreg" in variant.config:
        options["maxnreg"] = variant.config["maxnreg"]
    return triton.compile(source, target=TARGETS[target], options=options)


def measure(variant, target):
    """Compile a variant and return what it is like: bytes spilled, whether in the main loop, ``fences``, and by target

    * for AMD the widest accesses in bits,
    * for NVIDIA registers, shared memory, ``loop`` (instructions an element in the largest loop of the machine code) and
      ``runs``, the counts of `execute`.

    Fences are instructions that order accesses to global memory, or waits for them, for other programs.
    """
    compiled = compile_variant(variant, target)
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"[sv]gpr_spill_count:\s*(\d+)", assembly))
        words = {kind: re.findall(rf"(?:global|buffer)_{kind}_dword(?:x(\d))?\b", assembly) for kind in ("load", "store")}
        fences = len(re.findall(r"\bbuffer_(?:wbl2|wbinvl1|inv)", assembly))
        return {"spills": spills, "spills_in_the_loop": spills > 0, "fences": fences} | {
            f"{kind}_bits": max((32 * int(n or 1) for n in widths), default=0) for kind, widths in words.items()
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", cuobjdump("--dump-resource-usage", cubin.name)))
        spills = int(usage["STACK"]) + int(usage["LOCAL"])
        instructions, loaded = main_loop(cuobjdump("-sass", cubin.name)) if spills or target == "sm_90" else ([], 0)
    vocabularies = VOCABULARIES if target == "sm_90" else VOCABULARIES[:1]
    elements = variant.constants["BLOCK"] // (32 * variant.config["num_warps"])
    unrolled = max(1, round(loaded / (8 * sum(variant.loaded) * elements)))
    return {
        "registers": int(usage["REG"]),
        "spills": spills,
        "spills_in_the_loop": any(re.search(r"\b(LDL|STL)\b", text) for text in instructions),
        "fences": len(re.findall(r"\b(?:membar|fence|acq_rel|acquire|release)\b", compiled.asm["ptx"])),
        "shared": compiled.metadata.shared,
        "loop": len(instructions) / (elements * unrolled),
        "runs": execute(variant, compiled.asm["ptx"], compiled.metadata.shared, vocabularies),
    }


def cuobjdump(*arguments):
    """Output of NVIDIA's tool, which is shipped with Triton."""
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def main_loop(sass):
    """The largest region that a branch jumps back over: its instructions, taken or not, and how many bits it loads."""
    lines = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    jumps = [(address, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for address, text in lines]
    regions = [[text for a, text in lines if int(to[1], 16) <= a <= address] for address, to in jumps if to]
    largest = max(regions, key=len)
    loads = [re.search(r"\bLDG\S*?(?:\.(U?8|U?16|64|128))?(?:\.\w*)?\s", text) for text in largest]
    return largest, sum(int((load[1] or "32").strip("U")) for load in loads if load)


@functools.cache
def measured(targets=tuple(TARGETS)):
    """Measure all kernels, two at a time: (name, target) -> the result of `measure`, or the error as text."""
    pairs = [(name, target) for target in targets for name in KERNELS]
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return dict(zip(pairs, pool.map(_measure_or_error, pairs)))


def _measure_or_error(pair):
    try:
        return measure(KERNELS[pair[0]], pair[1])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fills_accesses(operands):
    """Return bytes an element of the operands of which a thread has 16 bytes or more; it has 8 adjacent elements of each."""
    return sum(size for size in operands if size >= 2)


def faults(variant, runs, barriers=None):
    """Return what is wrong with the executed runs, as sentences.

    Args:
        variant: what was executed.
        runs: what `execute` has returned.
        barriers: run -> the most that a program may pass; None: not checked.
    """
    sentences = []
    for name, run in runs.items():
        counts = run.counts
        if name == "ignored":
            if moved := counts.loaded.total():
                sentences.append(f"an ignored row loads {moved} bytes")
            continue
        for kind in ("loaded", "stored"):
            operands = getattr(variant, kind)
            moved = getattr(counts, kind).total() / run.elements
            ideal = sum(operands)
            if abs(moved - ideal) > EXCESS * (ideal or 1):
                sentences.append(f"{name}: {kind} {moved:.3f} bytes an element, expected {ideal:.3f}")
            share = fills_accesses(operands) / ideal if ideal and variant.wide else 0
            if run.wide(kind) < share * (1 - NARROW):
                sentences.append(f"{name}: {kind} {run.wide(kind):.3f} of its bytes 16 at a time, expected {share:.3f}")
        if barriers is not None and (passed := run.figures()["barriers"]) > barriers[name]:
            sentences.append(f"{name}: passes {passed} barriers a program, expected {barriers[name]}")
    return sentences


def evidence_of(measurement):
    """Return what is kept as evidence of a measurement for sm_90, per element of the larger vocabulary."""
    runs = {name: run.figures() for name, run in measurement["runs"].items() if name != "ignored"}
    evidence = {name: measurement[name] for name in ("registers", "spills", "shared")} | runs[list(runs)[-1]]
    return evidence | {"barriers": {name: figures["barriers"] for name, figures in runs.items()}}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills_in_the_loop_and_moves_what_it_must(name, target):
    variant = KERNELS[name]
    measurement = measured()[name, target]
    assert isinstance(measurement, dict), measurement
    # Some bytes that a program spills once, around its loop, cost nothing; the evidence for sm_90 has none of them either.
    assert not (measurement["spills"] and measurement["spills_in_the_loop"]), measurement
    assert not measurement["fences"], "a memory barrier: is an atomic operation not relaxed?"
    if target != "gfx942":
        assert not faults(variant, measurement["runs"])
    elif variant.wide:  # with 64 lanes a warp, a thread has 8 bytes of bf16
        assert measurement["load_bits"] >= 64 or not fills_accesses(variant.loaded), measurement
        assert measurement["store_bits"] >= 64 or not fills_accesses(variant.stored), measurement


@pytest.mark.parametrize("name", KERNELS)
def test_agrees_with_the_evidence(name):
    if VERSION not in EVIDENCE:
        pytest.skip(f"no evidence for Triton {VERSION}")
    want = EVIDENCE[VERSION][name]
    measurement = measured()[name, "sm_90"]
    got = evidence_of(measurement)
    assert got.keys() == want.keys()
    assert not faults(KERNELS[name], measurement["runs"], want["barriers"])
    compared = ("registers", "executed", "issued")
    drifted = {key: (got[key], want[key]) for key in compared if abs(got[key] / want[key] - 1) > DRIFT}
    assert not drifted, f"{drifted}: if it is meant, write the evidence anew (make evidence)"


@pytest.mark.parametrize("version", EVIDENCE)
def test_the_evidence_has_all_kernels_and_no_others(version):
    assert sorted(EVIDENCE[version]) == sorted(KERNELS)


STEPS_OF_16_BITS = [name for name in KERNELS if name.startswith("step") and "8bit" not in name]


@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("sm_")])
@pytest.mark.parametrize("name", STEPS_OF_16_BITS)
def test_sixteen_warps_of_a_step_fit(name, target):
    """A multiprocessor has 65,536 registers; its memory keeps busy with 16 warps, whose threads then have 128 each."""
    assert measured()[name, target]["registers"] <= 128


PLAIN = ("step p", "token_logprob gradient bf16", "kl_divergence gradient")  # one long loop, all of which is executed


@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith(PLAIN)])
def test_the_estimate_of_issued_instructions_is_the_length_of_the_loop(name):
    """The estimate leaves out the slow path of an IEEE division, which is in the loop but not executed."""
    measurement = measured()[name, "sm_90"]
    assert 0.86 < evidence_of(measurement)["issued"] / measurement["loop"] < 1.12


STATISTICS = "token_logprob statistics"


def faults_of(variant):
    """Return what is wrong with another variant of the statistics, which must pass no more barriers than they do."""
    return faults(variant, measure(variant, "sm_90")["runs"], evidence_of(measured()[STATISTICS, "sm_90"])["barriers"])


@pytest.mark.parametrize("old, new, fault", [
    # A load with another cache modifier: the compiler would merge two equal loads.
    ("raw = tl.load(row_ptr + block.columns).to(",
     'raw = tl.maximum(tl.load(row_ptr + block.columns), tl.load(row_ptr + block.columns, cache_modifier=".cg")).to(',
     "loaded 7.9.. bytes an element, expected 4.000"),
    # One reduction more. A barrier alone may take the place of one that the compiler puts there.
    ("rest=tl.sum(lanes.rest, 0)", "rest=tl.sum(lanes.rest, 0) + 0.0 * tl.max(lanes.rest, 0)",
     "V 50257: passes .* barriers a program"),
])  # fmt: skip
def test_planted_faults_are_found(old, new, fault, tmp_path):
    kernel = mutant(soul_kernels.token_logprob.__name__, old, new, tmp_path).statistics_kernel
    sentences = faults_of(dataclasses.replace(KERNELS[STATISTICS], kernel=kernel))
    assert any(re.search(fault, text) for text in sentences), sentences


@pytest.mark.parametrize("target", TARGETS)
def test_memory_barriers_are_found(target, tmp_path):
    kernel = mutant("soul_kernels.sophia_step", ', sem="relaxed"', "", tmp_path).sophia_step_kernel
    name = "step p bf16 m bf16 h fp32 nearest"
    assert measure(dataclasses.replace(KERNELS[name], kernel=kernel), target)["fences"] >= 3  # one an addition, or more


def test_narrow_accesses_are_found():
    sentences = faults_of(dataclasses.replace(KERNELS[STATISTICS], aligned=()))
    assert sentences[0] == "V 50257: loaded 0.000 of its bytes 16 at a time, expected 1.000"


@pytest.mark.parametrize("name", [name for name in KERNELS if "statistics" in name or "likeliest" in name])
def test_threads_exchange_nothing_before_the_end_of_a_row(name):
    """Statistics of a longer row pass no more barriers and shuffles than those of a shorter one."""
    runs = measured()[name, "sm_90"]["runs"]
    short, long = (runs[f"V {n_vocab}"].counts for n_vocab in VOCABULARIES)
    assert 0 < long.barriers == short.barriers
    assert 0 < issued(long.executed)["exchange"] == issued(short.executed)["exchange"]


def write_evidence():
    measurements = measured(("sm_90",))
    if failed := {pair: error for pair, error in measurements.items() if isinstance(error, str)}:
        raise SystemExit(f"Triton {triton.__version__}: nothing is written, because of {failed}")
    lines = [f'  "{name}": {json.dumps(evidence_of(measurements[name, "sm_90"]))}' for name in sorted(KERNELS)]
    head = f'{{\n "target": "sm_90",\n "triton": "{triton.__version__}",\n "kernels": {{\n'
    path = pathlib.Path(__file__).parent / f"compiled_kernels-{VERSION}.json"
    path.write_text(head + ",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    write_evidence()
