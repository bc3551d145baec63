"""Every kernel, compiled for four targets without a GPU: no spills, 16-byte accesses in the full-block path.

Runs in a process of its own (``make test-compile``): the compiler cannot be used where the interpreter is on.
"""

import pathlib
import re
import subprocess

import pytest

from soul_kernels._launch import has_triton, interpreting, tl, triton
from soul_kernels.hessian_ema import CONFIG as EMA_CONFIG
from soul_kernels.hessian_ema import _hessian_ema_kernel
from soul_kernels.sophia_step import CONFIG as STEP_CONFIG
from soul_kernels.sophia_step import _sophia_step_kernel
from soul_kernels.token_logprob import GRADIENT_CONFIG, STATISTICS_CONFIG, _gradient_kernel, _statistics_kernel

if interpreting() or not has_triton():
    pytest.skip("needs Triton's compiler: run make test-compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TABLE = {"table_ptr": "*i64", "chunk_tensor_ptr": "*i32", "chunk_piece_ptr": "*i32", "n_tensors": "i32"}
STEP = TABLE | {"clip_count_ptr": "*i64"} | dict.fromkeys(
    ["lr", "beta1", "beta1_rest", "beta2", "beta2_rest", "h_weight", "eps", "weight_decay"], "fp32"
)  # fmt: skip
ROW = {"labels_ptr": "*i64", "statistics_ptr": "*fp32", "statistics_stride": "i32", "n_vocab": "i32", "row_stride": "i32"}
ALIGNED_ROW = ("logits_ptr", "out_ptr", "row_stride", "out_stride")  # what the scratch of linear_loss promises


def step(p, g, m, h, *, hessian, aligned=True):
    constants = dict(P_DTYPE=p, G_DTYPE=g, M_DTYPE=m, H_DTYPE=h, HESSIAN_IN_STEP=hessian, ROUNDING="nearest",
                     ALIGNED=aligned, CHUNK=STEP_CONFIG["chunk"], BLOCK=STEP_CONFIG["BLOCK"])  # fmt: skip
    return _sophia_step_kernel, STEP, constants, (), STEP_CONFIG["num_warps"]


def ema(h, g):
    constants = dict(H_DTYPE=h, G_DTYPE=g, ALIGNED=True, CHUNK=EMA_CONFIG["chunk"], BLOCK=EMA_CONFIG["BLOCK"])
    return _hessian_ema_kernel, TABLE | {"beta2": "fp32", "g2_weight": "fp32"}, constants, (), EMA_CONFIG["num_warps"]


def statistics():
    signature = {"logits_ptr": "*fp32"} | ROW
    return (
        _statistics_kernel,
        signature,
        {"BLOCK": STATISTICS_CONFIG["BLOCK"]},
        ALIGNED_ROW,
        STATISTICS_CONFIG["num_warps"],
    )


def gradient(out_dtype, pointer):
    signature = {"logits_ptr": "*fp32", "coefficients_ptr": "*fp32", "out_ptr": pointer, "out_stride": "i32"} | ROW
    constants = {"OUT_DTYPE": out_dtype, "BLOCK": GRADIENT_CONFIG["BLOCK"]}
    return _gradient_kernel, signature, constants, ALIGNED_ROW, GRADIENT_CONFIG["num_warps"]


F32, BF16, F16 = (None, None, None) if interpreting() else (tl.float32, tl.bfloat16, tl.float16)
KERNELS = {
    "step fp32": step(F32, F32, F32, F32, hessian=False),
    "step bf16": step(BF16, BF16, BF16, F32, hessian=False),
    "step+hessian fp32": step(F32, F32, F32, F32, hessian=True),
    "step+hessian bf16": step(BF16, BF16, BF16, F32, hessian=True),
    "step+hessian all bf16": step(BF16, BF16, BF16, BF16, hessian=True),
    "step+hessian fp16": step(F16, F16, F32, F32, hessian=True),
    "step misaligned": step(BF16, BF16, BF16, F32, hessian=True, aligned=False),
    "hessian_ema fp32": ema(F32, F32),
    "hessian_ema bf16": ema(F32, BF16),
    "statistics": statistics(),
    "gradient fp32": gradient(F32, "*fp32"),
    "gradient bf16": gradient(BF16, "*bf16"),
}


def compile_kernel(name, target):
    kernel, signature, constants, aligned, num_warps = KERNELS[name]
    # Specialization as at run time: arguments that are multiples of 16.
    names = kernel.arg_names
    attributes = {(names.index(a),): [["tt.divisibility", 16]] for a in aligned if a in names}
    source = ASTSource(
        kernel, signature={n: signature.get(n, "constexpr") for n in names}, constexprs=constants, attrs=attributes
    )
    return triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps, "enable_fp_fusion": False})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills_and_with_wide_accesses(name, target, tmp_path):
    compiled = compile_kernel(name, target)
    wide_expected = "misaligned" not in name
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        spills = [int(n) for n in re.findall(r"[sv]gpr_spill_count:\s*(\d+)", assembly)]
        wide = re.findall(r"(?:global|buffer)_(?:load|store)_dwordx[24]", assembly)
    else:
        usage = cubin_resources(compiled.asm["cubin"], tmp_path)
        print(f"{name} {target}: {usage}")
        spills = [usage["LOCAL"], usage["STACK"]]
        wide = re.findall(r"(?:ld|st)\.global\S*\.v4\.b32|(?:ld|st)\.global\S*\.v2\.b64", compiled.asm["ptx"])
        loads, stores = (any(w.startswith(kind) for w in wide) for kind in ("ld", "st"))
        if wide_expected:
            assert loads and (stores or name == "statistics")  # that one stores four numbers a row
    assert spills and not any(spills)
    assert bool(wide) == wide_expected


def cubin_resources(cubin, tmp_path):
    """Registers, stack and local memory of a kernel, as ``cuobjdump`` (shipped with Triton) reports them."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    out = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", out)}
