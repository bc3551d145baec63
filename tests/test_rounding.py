import pytest
import torch

from soul_kernels._launch import launch, tl, triton, triton_dtype
from soul_kernels.reference.rounding import store_nearest
from soul_kernels.rounding import round_nearest


@triton.jit
def _store_kernel(x_ptr, out_ptr, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(out_ptr + offsets, round_nearest(x, DTYPE), mask=offsets < n)


def _bit_patterns():
    """All upper halves of fp32, with the lower halves where rounding turns: below, at and above a tie, and even/odd."""
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper + lower).flatten()
    return (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_bit_pattern_rounds_as_torch_does(dtype, device):
    x = _bit_patterns().to(device)
    got, want = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=dtype)
    grid = (-(-x.numel() // 65536),)
    launch(_store_kernel, grid, device, x_ptr=x, out_ptr=got, n=x.numel(), DTYPE=triton_dtype(dtype), BLOCK=65536)
    store_nearest(want, x)
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(integer)[~nan], want.view(integer)[~nan])  # bits: -0.0 is not 0.0
