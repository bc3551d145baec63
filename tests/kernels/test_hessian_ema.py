import pytest
import torch

from soul_kernels import hessian_ema
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, mutant


def make(device, h_dtype=torch.float32, g_dtype=torch.float32):
    # 0 and 1: the smallest; 16385: a second chunk of one element; (): 0-dim; a matrix for good measure
    shapes = [(0,), (1,), (129,), (16385,), (), (3, 50)]
    return [torch.rand(s, device=device).to(h_dtype) for s in shapes], [
        torch.randn(s, device=device).to(g_dtype) for s in shapes
    ]


@pytest.mark.parametrize("h_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("g_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_reference_bit_for_bit(h_dtype, g_dtype, device):
    hessians, grads = make(device, h_dtype, g_dtype)
    want = [h.clone() for h in hessians]
    hessian_ema(hessians, grads, beta2=0.99, scale=3.0, seed=5, backend="triton")
    hessian_ema(want, grads, beta2=0.99, scale=3.0, seed=5, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(hessians, want))


def check_against_fp64(ema, device, backend="triton"):
    hessians, grads = make(device)
    kept = [g.clone() for g in grads]
    want = [0.99 * h.double() + 0.01 * 3.0 * g.double() ** 2 for h, g in zip(hessians, grads)]
    ema(hessians, grads, beta2=0.99, scale=3.0, backend=backend)
    for got, expected in zip(hessians, want):
        assert_close(got, expected, tol.STEP_50_FP32, "h")
    assert all(torch.equal(g, k) for g, k in zip(grads, kept))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_against_fp64(backend, device):
    check_against_fp64(hessian_ema, device, backend)


@pytest.mark.parametrize("old, new", [
    ("products = g * g", "products = g"),
    ("beta2 * h + weight", "h + weight"),
    ("(1 - beta2) * scale", "1 - beta2"),
])  # fmt: skip
def test_mutants_do_not_pass(old, new, device, tmp_path):
    broken = mutant("soul_kernels.hessian_ema", old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_against_fp64(broken.hessian_ema, device)


def test_bad_input_is_named():
    h, g = [torch.zeros(4)], [torch.zeros(4)]
    with pytest.raises(ValueError, match=r"^beta2: expected a number in \[0.0, 1.0\), got 1.0"):
        hessian_ema(h, g, beta2=1.0)
    with pytest.raises(ValueError, match=r"^grads\[0\]: expected a dense tensor"):
        hessian_ema(h, [g[0].to_sparse()], beta2=0.9)
    with pytest.raises(ValueError, match=r"^hessians\[0\]: expected dense strides"):
        hessian_ema([torch.zeros(8)[::2]], g, beta2=0.9)
