import inspect

import pytest
import torch

from soul_kernels._launch import launch, tl, triton, triton_dtype
from soul_kernels.backends import interpreting
from soul_kernels.reference import rounding as reference
from soul_kernels.reference.rounding import GROUP, bits, from_bits, join, split
from soul_kernels.rounding import decode, encode, noise_key, noise_words, round_nearest, round_stochastic
from soul_kernels.rounding import join as kernel_join
from soul_kernels.rounding import split as kernel_split
from tests.support.helpers import mutant

BRAIN, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
INF, NAN = float("inf"), float("nan")


@triton.jit
def _store_kernel(x_ptr, noise_ptr, out_ptr, low_ptr, joined_ptr, MODE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Round one block; with "split" also write the low bits, and the value that both represent."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    noise = tl.load(noise_ptr + offsets).to(tl.uint32)
    if MODE == "nearest":
        tl.store(out_ptr + offsets, round_nearest(x, DTYPE))
    elif MODE == "stochastic":
        tl.store(out_ptr + offsets, round_stochastic(x, noise, DTYPE))
    else:
        high, low = kernel_split(x, noise, DTYPE)
        tl.store(out_ptr + offsets, high)
        tl.store(low_ptr + offsets, low)
        tl.store(joined_ptr + offsets, kernel_join(high, low, DTYPE))


@triton.jit
def _codec_kernel(
    x_ptr, noise_ptr, code_ptr, scale_ptr, out_ptr, HESSIAN: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr
):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if noise_ptr is None:
        code, scale = encode(tl.load(x_ptr + offsets), None, HESSIAN, BLOCK)
    else:
        code, scale = encode(tl.load(x_ptr + offsets), tl.load(noise_ptr + offsets).to(tl.uint32), HESSIAN, BLOCK)
    tl.store(code_ptr + offsets, code)
    tl.store(scale_ptr + tl.program_id(0) * GROUPS + tl.arange(0, GROUPS), scale)
    tl.store(out_ptr + offsets, decode(code, scale, HESSIAN, BLOCK))


@triton.jit
def _noise_kernel(out_ptr, salt, step, start, CROSSES: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    step = step + 0.0  # what the interpreter passes is no tensor yet
    start = tl.zeros([], tl.int64) + start
    salt = tl.zeros([], tl.int64) + salt
    tl.store(out_ptr + offsets, noise_words(noise_key(salt, step), start, offsets, CROSSES).to(tl.int64))


def bit_patterns(device):
    """All upper halves of fp32, with the lower halves where rounding turns: below, at and above a tie, and even/odd."""
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0080, 0x1000])
    return from_bits((upper + lower).flatten()).to(device)


def random_words(n, device="cpu"):
    return torch.randint(0, 2**32, (n,), generator=torch.Generator().manual_seed(1)).to(device)


def same_bits(a, b):
    nan = b.isnan()
    integer = torch.int32 if b.dtype == FLOAT else torch.int16
    return torch.equal(a.isnan(), nan) and torch.equal(a.view(integer)[~nan], b.view(integer)[~nan])  # -0.0 is not 0.0


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FLOAT])
@pytest.mark.parametrize("mode", ["nearest", "stochastic", "split"])
def test_kernel_rounds_every_bit_pattern_as_the_reference_does(mode, dtype, device):
    if (mode, dtype) == ("split", FLOAT):
        return  # fp32 parameters have no low bits
    x = bit_patterns(device)
    noise = random_words(x.numel(), device)
    got, want = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=dtype)
    low = torch.empty_like(x, dtype=torch.int8)
    joined = torch.empty_like(x)
    block = 65536 if interpreting() else 1024  # a compiler would unroll the large one; the interpreter has few programs then
    launch(_store_kernel, (x.numel() // block,), device, x_ptr=x, noise_ptr=noise, out_ptr=got, low_ptr=low, joined_ptr=joined,
           MODE=mode, DTYPE=triton_dtype(dtype), BLOCK=block)  # fmt: skip
    if mode == "nearest":
        want.copy_(x)
    elif mode == "stochastic":
        want = reference.round_stochastic(x, noise, dtype)
    else:
        want, want_low = split(x, noise, dtype)
        assert torch.equal(low, want_low) and same_bits(joined, join(want, want_low))
    assert same_bits(got, want)


@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_stochastic_mean_is_exact(dtype):
    """Every noise word once: the mean over all of them is x itself, not only nearly; subnormal fp16 included."""
    dropped = reference.DROPPED[dtype]
    words = torch.arange(2**dropped) << (32 - dropped)
    for value in (1.0 + 2**-9, -0.020012, 3e-6 if dtype == HALF else 3e-38):
        x = torch.full((len(words),), value)
        x = from_bits(bits(x) & ~0xFF)  # so that the words resolve it
        out = reference.round_stochastic(x, words, dtype)
        assert out.double().mean().item() == pytest.approx(x[0].item(), rel=1e-12 if dtype == BRAIN else 1e-7)
        assert out.unique().numel() <= 2


@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_what_needs_no_rounding_is_not_changed(dtype):
    """Representable values, infinities and NaN; the fast way to round stochastically turns CUDA's NaN 0x7fffffff into -0."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for word in (0, 2**32 - 1):
        noise = torch.full((2**16,), word)
        out = reference.round_stochastic(patterns.float(), noise, dtype)
        assert same_bits(out, patterns)
        high, low = split(patterns.float(), noise, dtype)
        assert same_bits(high, patterns) and not low.any()
        assert same_bits(join(high, low), patterns.float())
    nan = from_bits(torch.tensor([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001]))
    out = reference.round_stochastic(nan, torch.full((3,), 2**32 - 1), dtype)
    assert out.isnan().all() and split(nan, torch.full((3,), 2**32 - 1), dtype)[0].isnan().all()


@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_24_bit_weights(dtype):
    """high is x to nearest; both together are 256 times as fine, unbiased, and survive a second split exactly."""
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 2, 20000)
    if dtype == BRAIN:
        x = torch.cat([x, x * 1e-36, torch.tensor([1e-40, -1e-39])])  # subnormal bf16
    noise = random_words(x.numel())
    high, low = split(x, noise, dtype)
    both = join(high, low)
    smallest = torch.tensor(1, dtype=torch.int16).view(dtype).double()
    representable = x.abs() > 0.51 * smallest  # below, it is 0 or the smallest number, without low bits
    assert representable.double().mean() > 0.8
    x = x[representable]
    noise = noise[representable]
    high = high[representable]
    low = low[representable]
    both = both[representable]
    ulp = (torch.nextafter(high.abs(), torch.tensor(INF, dtype=dtype)) - high.abs()).double()
    assert ((high.double() - x.double()).abs() <= ulp * 0.51).all()
    assert ((both.double() - x.double()).abs() <= ulp / 255).all()
    again_high, again_low = split(both, random_words(x.numel()).flip(0), dtype)
    assert torch.equal(again_high, high) and torch.equal(again_low, low)
    below = reference.DROPPED[dtype] - 8
    words = torch.arange(2**below) << (32 - below)
    value = from_bits(bits(torch.tensor([0.0199])) & ~0x7)  # a multiple of what the words resolve
    high, low = split(value.expand(len(words)).contiguous(), words, dtype)
    assert join(high, low).double().mean().item() == pytest.approx(value.item(), rel=1e-9 if dtype == BRAIN else 1e-6)


@pytest.mark.parametrize("dtype, largest", [(BRAIN, 0x7F7F7F00), (HALF, 0x477FEFE0)])
def test_24_bit_weights_become_inf_where_nearest_does(dtype, largest, device):
    """The noise of a weight's last bit must not carry a number to inf that is to stay finite; nor may inf, NaN or what is too
    large become finite."""
    patterns = torch.tensor([largest - 0x100, largest - 1, largest, largest + 1, 0x7F800000, 0x7FC00000, 0x7F7FFFFF])
    half_a_unit = 0x7F7F8000 if dtype == BRAIN else 0x477FF000  # from here on, nearest is inf
    x = from_bits(torch.cat([patterns, torch.tensor([half_a_unit - 1, half_a_unit, half_a_unit + 1])]))
    x = torch.cat([x, -x]).to(device)
    assert join(torch.tensor([torch.finfo(dtype).max], dtype=dtype), torch.tensor([127], dtype=torch.int8)) == x[2].cpu()
    for word in (0, 2**31, 2**32 - 1):
        noise = torch.full(x.shape, word, device=device)
        high, low = split(x, noise, dtype)
        assert same_bits(high, x.to(dtype)), word
        both = join(high, low)
        finite = both.isfinite()
        assert (both[finite].abs() <= x[2]).all() and torch.equal(finite, x.to(dtype).isfinite())
        got, got_low, joined = (pad(torch.zeros_like(tensor)) for tensor in (high, low, x))
        launch(_store_kernel, (1,), device, x_ptr=pad(x), noise_ptr=pad(noise), out_ptr=got, low_ptr=got_low, joined_ptr=joined,
               MODE="split", DTYPE=triton_dtype(dtype), BLOCK=32)  # fmt: skip
        assert same_bits(got[: len(x)], high) and torch.equal(got_low[: len(x)], low) and same_bits(joined[: len(x)], both)


def pad(tensor, size=32):
    """The vector with zeros up to the size of a block."""
    return torch.cat([tensor, tensor.new_zeros(size - len(tensor))])


def test_fp16_weights_leave_zero():
    """Half the smallest number is 3e-8: steps below it would never leave 0 if they were rounded to nearest."""
    words = torch.arange(2**16) << 8  # both fields that count, in all combinations of their upper bits
    for value in (2.0**-27, -(2.0**-26), 2.0**-32):
        high, low = split(torch.full((2**16,), value), words, HALF)
        assert join(high, low).double().mean().item() == pytest.approx(value, rel=1e-6)
        assert set(high.abs().unique().tolist()) == {0.0, 2.0**-24}


@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_low_bits_left_from_another_value_do_no_harm(dtype):
    """Users zero a parameter or load another model without telling the optimizer."""
    high = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1.0], dtype=dtype)
    for stale in (-128, -1, 1, 127):
        value = join(high, torch.full((6,), stale, dtype=torch.int8))
        assert same_bits(value[:5], high[:5].float())
        assert abs(value[5] - 1) <= 0.51 * torch.finfo(dtype).eps
    largest = torch.finfo(FLOAT).max
    assert join(*split(torch.tensor([largest, -largest]), torch.tensor([0, 2**32 - 1]), dtype)).tolist() == [INF, -INF]


def eight_bit_values():
    """Groups as states have them: normal, of one size that is half between two scales, spread over 12 decades, zero, tiny,
    huge."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(GROUP, generator=g)
    spread = normal * torch.logspace(-12, 0, GROUP)
    return torch.cat([normal, 2 * normal, normal.sign() * (1 + 2.0**-9), spread, torch.zeros(GROUP), normal * 1e-30,
                      normal * 1e37, torch.full((GROUP,), 1e-45), torch.full((GROUP,), -torch.finfo(FLOAT).max)])  # fmt: skip


def run_codec(kernel, x, noise, kind, device):
    """Encode and decode by a kernel: codes, scales, values."""
    x = x.to(device)
    noise = None if noise is None else noise.to(device)
    code = torch.empty_like(x, dtype=torch.uint8)
    out = torch.empty_like(x)
    scale = torch.empty(x.numel() // GROUP, dtype=torch.int16, device=device)
    block = 512
    launch(kernel, (x.numel() // block,), device, x_ptr=x, noise_ptr=noise, code_ptr=code, scale_ptr=scale, out_ptr=out,
           HESSIAN=kind == "hessian", BLOCK=block, GROUPS=block // GROUP)  # fmt: skip
    return code, scale, out


def check_codec(kernel, kind, stochastic, nan, device):
    """Raise AssertionError unless a kernel gives the bits of the reference, with a NaN in one group and an inf in another."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1 << 14, generator=generator) * torch.logspace(-9, 9, 1 << 14)
    x = eight_bit_values()
    x = torch.cat([x, normal[len(x) :]])
    if kind == "hessian":
        x = torch.where(torch.arange(x.numel()) % 5 == 0, x, x.abs())  # a negative one counts as 0
    x[3] = from_bits(torch.tensor(nan))
    x[GROUP + 5] = INF
    noise = random_words(x.numel()) if stochastic else None
    code, scale, out = (tensor.cpu() for tensor in run_codec(kernel, x, noise, kind, device))
    want_code, want_scale = reference.encode(x, noise, kind)
    assert torch.equal(scale, want_scale)
    finite = (want_scale != reference.NAN_SCALE).repeat_interleave(GROUP)  # beside a NaN, codes mean nothing
    assert torch.equal(code[finite], want_code[finite]) and not finite[: 2 * GROUP].any() and finite[2 * GROUP :].all()
    assert same_bits(out, reference.decode(want_code, want_scale, kind))
    assert out[: 2 * GROUP].isnan().all() and out[2 * GROUP :].isfinite().all()  # not hidden, and no further than the group


CODECS = [("exp_avg", False), ("hessian", False), ("hessian", True)]


@pytest.mark.parametrize("nan", [0x7FC00000, 0x7FFFFFFF])  # of a CPU; of a GPU, which makes it of any NaN in a maximum
@pytest.mark.parametrize("kind, stochastic", CODECS)
def test_8_bit_kernel_equals_reference(kind, stochastic, nan, device):
    check_codec(_codec_kernel, kind, stochastic, nan, device)


@pytest.mark.parametrize("old, new, kind, stochastic", [
    ("+ 0x4000) >> 15", "+ 0x3FFF) >> 15", "exp_avg", False),  # the scale cut off, not to nearest, at a tie
    ("+ 0x4000) >> 15", ") >> 15", "hessian", False),
    ("tl.maximum(largest, SMALLEST)", "largest", "exp_avg", False),  # 1 / scale overflows
    (", 0xFEFF)", ", 0xFFFF)", "exp_avg", False),  # the largest finite numbers become inf
    ("largest < 0x7F800000, rounded, 0xFF80", "largest <= 0x7F800000, rounded, 0xFF80", "exp_avg", False),  # inf is hidden
    ("tl.abs(t) + 1.0", "t + 1.0", "exp_avg", False),
    ("M_POLE - tl.abs(level)", "M_POLE - level", "exp_avg", False),
    ("tl.sqrt_rn(x *", "(x *", "hessian", False),
    ("level * level * _spread(scale * H_STEP", "level * _spread(scale * H_STEP", "hessian", False),
    ("x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)", "x = x", "hessian", False),
    ("x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)", "x = tl.abs(x)", "hessian", False),
    ("12582912.0", "12582911.0", "exp_avg", False),
    ("code.to(tl.int8, bitcast=True)", "code", "exp_avg", False),
    ("noise << 7", "noise << 8", "hessian", True),
    ("- 1.5\n", "- 1.0\n", "hessian", True),
    ("level = tl.minimum(level, 255.0)", "level = level", "hessian", True),  # 256 is stored as 0
])  # fmt: skip
def test_mutants_of_the_8_bit_formats_do_not_pass(old, new, kind, stochastic, device, tmp_path):
    kernel = "\n\n@triton.jit\n" + inspect.getsource(_codec_kernel.fn).removeprefix("@triton.jit\n")
    broken = mutant("soul_kernels.rounding", old, new, tmp_path, kernel)._codec_kernel
    with pytest.raises(AssertionError):
        check_codec(broken, kind, stochastic, 0x7FC00000, device)


@pytest.mark.parametrize("kind", ["exp_avg", "hessian"])
def test_8_bit_codes_are_as_fine_as_they_say(kind):
    """Half a level, which is 1 / 127 of the largest value or less; the largest value of a group to 2^-9; zero exactly."""
    x = eight_bit_values()
    x = x.abs() if kind == "hessian" else x
    x = x[x.abs().view(-1, GROUP).amax(1).repeat_interleave(GROUP) > 2.0**-100]
    largest = x.view(-1, GROUP).abs().amax(1, keepdim=True)
    value = reference.decode(*reference.encode(x, None, kind), kind)
    t = (x.view(-1, GROUP).abs() / largest).double().flatten()
    if kind == "exp_avg":
        bend = reference.M_BEND
        step = (1 + bend * t) ** 2 / (1 + bend) / 127  # the slope of the inverse, where the value is
        step = torch.maximum(step, (1 + bend * (t + step / 2)) ** 2 / (1 + bend) / 127)
    else:
        step = 2 * t.sqrt() / 255 + 0.51 / 255**2
    error = ((value - x).view(-1, GROUP).abs() / largest).double().flatten()
    assert (error <= step * 0.5 + 1e-6).all() and (error > step * 0.2).any()
    top = value.view(-1, GROUP).abs().amax(1, keepdim=True) / largest
    assert ((top - 1).abs() <= 2.0**-9).all()
    zero = reference.decode(*reference.encode(torch.zeros(300), None, kind), kind)
    assert torch.equal(zero, torch.zeros(300))
    fresh = torch.zeros(300, dtype=torch.uint8), torch.zeros(-(-300 // GROUP), dtype=torch.int16)
    assert torch.equal(reference.decode(*fresh, kind), torch.zeros(300))  # as states begin


@pytest.mark.parametrize("kind", ["exp_avg", "hessian"])
def test_rows_have_groups_of_their_own(kind):
    """Shards of rows hold whole groups: encoded alone, a row gets the codes and the scales that it has in the whole tensor."""
    rows, columns = 6, 3 * GROUP
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, rows)[:, None]
    code, scale = reference.encode(x.flatten(), None, kind)
    for row, codes, scales in zip(x, code.view(rows, columns), scale.view(rows, columns // GROUP)):
        alone, its_scales = reference.encode(row, None, kind)
        assert torch.equal(alone, codes) and torch.equal(its_scales, scales)


@pytest.mark.parametrize("kind", ["exp_avg", "hessian"])
def test_what_8_bit_codes_hold_is_stored_as_it_is(kind):
    """A step that changes nothing changes no state: every code of every scale that may occur survives."""
    low, high = (-127, 128) if kind == "exp_avg" else (0, 256)
    levels = torch.arange(low, high)
    for pattern in (0x7F00, 0x7F01, 0x7FFF, 0x5000, 0x2400, 0xFEFF, 0xA123):
        scale = torch.tensor([pattern - (pattern >> 15 << 16)], dtype=torch.int16)
        for part in levels.split(GROUP - 1):
            code = torch.cat([part, levels[-1:]]).to(torch.int32) & 0xFF  # the largest value stands for its scale
            value = reference.decode(code.to(torch.uint8), scale, kind)
            again, same = reference.encode(value, None, kind)
            assert torch.equal(again.int(), code) and torch.equal(same, scale)


def test_stochastic_8_bit_codes_are_unbiased():
    """The mean over 1024 noise words. It exceeds h, whose root is rounded, by a quarter of 1 / 255^2 at most, and the words
    resolve a level to 1 / 2048."""
    x = eight_bit_values()[: 3 * GROUP].abs()
    total = torch.zeros_like(x, dtype=torch.float64)
    fields = torch.arange(0, 65536, 64) + 32
    for field in fields.tolist():
        total += reference.decode(*reference.encode(x, torch.full(x.shape, field), "hessian"), "hessian").double()
    largest = x.view(-1, GROUP).amax(1).repeat_interleave(GROUP)
    inside = x < 0.99 * largest
    bias = (total / len(fields) - x) / largest
    resolved = 2 * 255 / 2048 / 255**2
    assert (bias[inside] <= 0.26 / 255**2 + resolved).all() and (bias[inside] >= -resolved).all()


def averages(beta2, steps, sparse=1.0):
    """The mean of h over its exact mean, after squared gradients of unit noise, of which a share is not 0."""
    generator = torch.Generator().manual_seed(0)
    n = 256 * GROUP
    exact = torch.zeros(n, dtype=torch.float64)
    code, scale = torch.zeros(n, dtype=torch.uint8), torch.zeros(n // GROUP, dtype=torch.int16)
    for _ in range(steps):
        g = torch.randn(n, generator=generator) * (torch.rand(n, generator=generator) < sparse)
        noise = torch.randint(0, 2**32, (n,), generator=generator) if reference.draws_codes(beta2) else None
        h = beta2 * reference.decode(code, scale, "hessian") + (1 - beta2) * g * g
        code, scale = reference.encode(h, noise, "hessian")
        exact = beta2 * exact + (1 - beta2) * g.double() ** 2
    return (reference.decode(code, scale, "hessian").double().mean() / exact.mean()).item()


SHORT = pytest.mark.slow(reason="averages that forget more slowly, which are harder, are always tested")


@pytest.mark.parametrize("beta2, steps, sparse", [
    pytest.param(0.95, 60, 1.0, marks=SHORT), pytest.param(0.95, 60, 0.1, marks=SHORT),
    pytest.param(0.99, 300, 1.0, marks=SHORT), pytest.param(0.99, 300, 0.1, marks=SHORT),
    (0.999, 1000, 1.0), (0.999, 1000, 0.1),
])  # fmt: skip
def test_8_bit_averages_have_the_right_mean(beta2, steps, sparse, monkeypatch):
    assert averages(beta2, steps, sparse) == pytest.approx(1, abs=0.01)
    if beta2 == 0.999 and sparse < 1:  # this is what the noise is for
        monkeypatch.setattr(reference, "NEAREST_UP_TO", 1.0)
        assert abs(averages(beta2, steps, sparse) - 1) > 0.1


def int8_of_flashoptim(x, kind):
    """Values as flashoptim 0.1.4 stores them (`optimizers.py`, `_adam_kernel`): int8 in groups of 32 with an fp16 scale, m
    through 2 x / (1 + |x|), the second moment through its root; to nearest.
    """
    groups = x.view(-1, 32)
    groups = groups if kind == "exp_avg" else groups.sqrt()
    largest = groups.abs().amax(1, keepdim=True).clamp(min=1e-12)
    scaled, scale = groups / largest, largest.half().float()
    if kind == "hessian":
        return ((scaled * 255 + 0.5).floor() / 255 * scale).square().flatten()
    level = (2 * scaled / (1 + scaled.abs()) * 127 + 0.5).floor() / 127
    return (level / (2 - level.abs()) * scale).flatten()


def ours(x, kind):
    return reference.decode(*reference.encode(x, None, kind), kind)


@pytest.mark.parametrize("signal", [0.0, 0.5, 1.0])
def test_8_bit_states_are_as_exact_as_int8_in_groups_of_32(signal):
    """100 steps of SOUL's update on noisy gradients; the mean error of a parameter, in units of lr, where nearly all, many
    and few coordinates are clipped. The table in docs/optimizer.md comes from more elements.
    """
    n = 1 << 16
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(n, generator=generator) * signal * 0.01
    exact = torch.zeros(2, n, dtype=torch.float64)
    states = {codec: torch.zeros(2, n) for codec in (ours, int8_of_flashoptim)}
    moved = {codec: torch.zeros(3, n, dtype=torch.float64) for codec in states}
    rhos = torch.tensor([0.04, 40.0, 400.0], dtype=torch.float64)[:, None]
    for _ in range(100):
        g = drift + torch.randn(n, generator=generator) * 0.01
        average = torch.tensor([[0.9], [0.95]])
        now = torch.stack([g, g * g])
        exact = average.double() * exact + (1 - average.double()) * now.double()
        want = (exact[0] / (rhos * exact[1])).clamp(-1, 1)
        for codec, state in states.items():
            m, h = average * state + (1 - average) * now
            moved[codec] += (m.double() / (rhos * h.double())).clamp(-1, 1) - want
            states[codec] = torch.stack([codec(m, "exp_avg"), codec(h, "hessian")])
    errors, theirs = (moved[codec].abs().mean(1) for codec in (ours, int8_of_flashoptim))
    assert (errors <= 1.02 * theirs).all(), (errors, theirs)  # the means are known to 1%


def words_of(salt, step, numel):
    """The first words of a tensor as int64 in [0, 2^32)."""
    words = reference.noise_words(reference.noise_key(salt, step, 0, "cpu"), torch.tensor(0), (numel,))
    assert words.dtype == torch.int32
    return words.long() & reference.WORD


def test_noise_kernel_equals_reference(device):
    out = torch.empty(1024, dtype=torch.int64, device=device)
    salt = reference.salt(7, 3)
    for start in (0, 2**32 + 3 * 16384, 3 * 2**32 - 500):  # the upper half of the number counts as well
        crosses = start % 2**32 > 2**31
        launch(_noise_kernel, (1,), device, out_ptr=out, salt=salt, step=5.0, start=start, CROSSES=crosses, BLOCK=1024)
        key = reference.mix(salt + 5 * reference.PRIME & reference.WORD)
        numbers = range(start, start + 1024)
        assert out.tolist() == [reference.mix(reference.mix(key ^ (n >> 32)) ^ (n & reference.WORD)) for n in numbers]
        for low, high in ((0, 1024),) if not crosses else ((0, 500), (500, 1024)):  # no block goes beyond a multiple of 2^32
            first = start + low
            key = reference.noise_key(salt, 5, first, "cpu")
            words = reference.noise_words(key, torch.tensor(first), (high - low,))
            assert torch.equal(out[low:high].cpu(), words.long() & reference.WORD)


def test_noise_is_uniform_and_differs_by_seed_tensor_step_and_element():
    n = 65536
    words = words_of(reference.salt(0, 0), 1, n)
    assert words.unique().numel() == n  # a bijection of the index
    for shift, size in ((24, 256), (16, 256), (12, 4096), (0, 4096)):  # the fields that are used
        counts = torch.bincount(words >> shift & (size - 1), minlength=size).double()
        expected = n / size
        chi2 = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi2 - size) < 6 * (2 * size) ** 0.5
    centred = words.double() / 2**32 - 0.5
    for salt, step in (
        (reference.salt(1, 0), 1),
        (reference.salt(0, 1), 1),
        (reference.salt(0, 0), 2),
        (reference.salt(2**40, 0), 1),
    ):
        other = words_of(salt, step, n).double() / 2**32 - 0.5
        assert abs((centred * other).mean().item() * 12) < 5 / n**0.5
    neighbours = (centred[1:] * centred[:-1]).mean().item() * 12
    assert abs(neighbours) < 5 / n**0.5


def signs(words):
    """Bits as -1 and 1: [32, n]."""
    return torch.stack([(words >> bit & 1).float() * 2 - 1 for bit in range(32)])


def test_every_bit_of_the_noise_is_fair_and_goes_with_no_bit_of_related_noise():
    """Related is what follows: elements, steps, tensors, seeds; and, an avalanche, an element whose number differs in one bit.

    With one multiplication less, or without the last shift, some of these correlations are 84 to 254 standard deviations.
    """
    n = 65536
    start = reference.salt(0, 0)
    words = words_of(start, 1, n + 4096)
    first = signs(words[:n])
    related = {f"element +{d}": words[d : n + d] for d in (1, 2, 3, 4, 8, 64, 256, 4096)}
    related |= {f"step {step}": words_of(start, step, n) for step in (2, 3, 4, 5, 1000)}
    related |= {f"tensor {number}": words_of(reference.salt(0, number), 1, n) for number in (1, 2, 3)}
    related |= {f"seed {seed}": words_of(reference.salt(seed, 0), 1, n) for seed in (1, 2, 3, 2**33)}
    for name, other in related.items():
        correlations = first @ signs(other).T / n**0.5  # 1024 of them, in standard deviations
        assert correlations.abs().max() < 6, name
    assert (first.sum(1).abs() < 6 * n**0.5).all()
    for bit in range(16):
        changed = first * signs(words[torch.arange(n) ^ (1 << bit)])
        assert (changed.sum(1).abs() < 8 * n**0.5).all(), bit  # elements come in pairs: wider by sqrt(2)


def test_the_noise_of_one_element_is_uniform_over_steps_and_so_are_pairs():
    """What makes the mean of many steps right: top bytes of 64 elements in 4096 steps, alone, with the step before, and with
    the element before.
    """
    steps = torch.arange(4096, dtype=torch.float32)
    keys = reference.noise_key(reference.salt(0, 0), steps, 0, "cpu")
    top = (reference.mix(keys[:, None] ^ torch.arange(64, dtype=torch.int32)) >> 24 & 0xFF).long()
    for values, size in ((top, 256), (top[1:] * 256 + top[:-1], 65536), (top[:, ::2] * 256 + top[:, 1::2], 65536)):
        expected = values.numel() / size
        chi2 = ((torch.bincount(values.flatten(), minlength=size) - expected).double() ** 2 / expected).sum().item()
        assert abs(chi2 - size) < 6 * (2 * size) ** 0.5
    # A value that lies a third of a bf16 step above 1, rounded at every step and element: the mean is right to its error.
    words = reference.mix(keys[:, None] ^ torch.arange(64, dtype=torch.int32))
    x = torch.full(words.shape, 1 + 2.0**-7 / 3)
    up = (reference.round_stochastic(x, words, BRAIN) > 1).double()
    assert abs(up.mean().item() - 1 / 3) < 5 * (2 / 9 / words.numel()) ** 0.5
    assert (up.mean(0) - 1 / 3).abs().max() < 5 * (2 / 9 / len(steps)) ** 0.5  # of each element
