"""The machine that executes PTX: every instruction that is more than arithmetic, and every fault that it must find."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.ptx.arithmetic import Unsupported
from tests.ptx.costs import UNITS, issued
from tests.ptx.machine import Checks, Counts, Finding, Kernel
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import parse

HEADER = """
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
  .param .u64 .ptr .global .align 1 in_ptr,
  .param .u64 .ptr .global .align 1 out_ptr,
  .param .u32 number
)
{
  .reg .pred %p<9>;
  .reg .b16 %rs<19>;
  .reg .b32 %r<29>;
  .reg .b64 %rd<29>;
  .loc 1 7 3
  ld.param.b64 %rd20, [in_ptr];
  ld.param.b64 %rd21, [out_ptr];
  mov.u32 %r20, %tid.x;
  mov.u32 %r21, %ctaid.x;
  mov.u32 %r22, %ntid.x;
  mad.lo.s32 %r23, %r21, %r22, %r20;
  mad.wide.u32 %rd22, %r23, 4, %rd20;
  mad.wide.u32 %rd23, %r23, 4, %rd21;
  mov.b32 %r25, global_smem;
  shl.b32 %r26, %r20, 2;
  add.s32 %r24, %r25, %r26;
"""
FOOTER = """
  ret;
  .file 1 "somewhere.py"
}
"""
# In these bodies: %rd22 and %rd23 are the thread's words of the input and of the output, %r24 its word of shared memory,
# %r20 the thread, %r21 the program.


def run(body, *, words=None, n_out=None, threads=32, programs=1, shared=1024, number=0, checks=None):
    """Run a body; return the output as uint32 [programs, threads] or [n_out], and the counts."""
    n = threads * programs
    inputs = torch.arange(n, dtype=torch.int32) if words is None else torch.as_tensor(words).to(torch.int64).to(torch.int32)
    out = torch.full((n_out or n,), -1, dtype=torch.int32)
    kernel = Kernel(HEADER + body + FOOTER, threads, shared)
    counts = Counts()
    space = GlobalMemory([("in_ptr", inputs), ("out_ptr", out)], list, strict=True)
    arguments = [np.array([[value & (2**64 - 1)]], np.uint64) for value in (inputs.data_ptr(), out.data_ptr(), number)]
    kernel.run((programs, 1, 1), arguments, space, checks or Checks(races=True), counts)
    result = out.numpy().view(np.uint32)
    return (result if n_out else result.reshape(programs, threads)), counts


LOAD, STORE = "ld.global.b32 %r1, [%rd22];\n", "st.global.b32 [%rd23], %r2;\n"
THREAD = np.arange(32)


def random_words(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint64)


def up(words, n):
    return words[np.where(THREAD < n, THREAD, THREAD - n)]


@pytest.mark.parametrize("special, want", [
    ("%tid.x", lambda p, t: t), ("%tid.y", lambda p, t: 0 * t), ("%tid.z", lambda p, t: 0 * t),
    ("%ntid.x", lambda p, t: 0 * t + 64),
    ("%ctaid.x", lambda p, t: 0 * t + p), ("%ctaid.y", lambda p, t: 0 * t), ("%ctaid.z", lambda p, t: 0 * t),
    ("%nctaid.x", lambda p, t: 0 * t + 3), ("%nctaid.y", lambda p, t: 0 * t + 1), ("%nctaid.z", lambda p, t: 0 * t + 1),
    ("%laneid", lambda p, t: t % 32),
])  # fmt: skip
def test_special_registers(special, want):
    result, _ = run(f"mov.u32 %r2, {special};\n" + STORE, threads=64, programs=3)
    assert (result == np.stack([want(p, np.arange(64)) for p in range(3)])).all()


def test_programs_are_numbered_along_x_first():
    kernel = Kernel(HEADER + """
        mov.u32 %r1, %ctaid.y; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ctaid.z;
        mul.lo.s32 %r6, %r5, 100; mad.lo.s32 %r6, %r1, 10, %r6; add.s32 %r6, %r6, %r4;
        mov.u32 %r7, %nctaid.y; mad.lo.s32 %r8, %r5, %r7, %r1; mad.lo.s32 %r8, %r8, %r3, %r4;
        mad.wide.u32 %rd1, %r8, 4, %rd21; st.global.b32 [%rd1], %r6;
    """ + FOOTER, 32, 0)  # fmt: skip
    out = torch.zeros(24, dtype=torch.int32)
    space = GlobalMemory([("out_ptr", out)], list)
    arguments = [np.array([[v]], np.uint64) for v in (0, out.data_ptr(), 0)]
    kernel.run((4, 3, 2), arguments, space, Checks(), Counts())
    assert out.tolist() == [100 * z + 10 * y + x for z in range(2) for y in range(3) for x in range(4)]


# Two ordinary halves, and the same with the lower one changed in odd threads and the upper one in every other pair of threads.
HALVES_DIFFER = """
    and.b32 %r1, %r1, 0x3FFF3FFF; and.b32 %r3, %r20, 1; and.b32 %r4, %r20, 2; shl.b32 %r4, %r4, 15;
    or.b32 %r3, %r3, %r4; xor.b32 %r3, %r1, %r3;
"""
BITS = "selp.b32 %r3, 1, 0, %p1; selp.b32 %r4, 2, 0, %p2; or.b32 %r2, %r3, %r4;"
PAIR_EQUAL = 3 - (THREAD & 3)


@pytest.mark.parametrize("body, want", [
    ("mov.b32 %r2, %r1;", lambda w: w),
    ("mov.u32 %r2, 0x7632U;", lambda w: 0 * w + 0x7632),
    ("mov.b32 %r2, -1;", lambda w: 0 * w + 0xFFFFFFFF),
    ("mov.b32 %r2, 0f3FC00000;", lambda w: 0 * w + 0x3FC00000),
    ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1};", lambda w: (w >> 16) | (w << 16) & 0xFFFF0000),
    ("mov.b32 {_, %rs2}, %r1; cvt.u32.u16 %r2, %rs2;", lambda w: w >> 16),
    ("mov.b32 {%rs1, _}, %r1; cvt.u32.u16 %r2, %rs1;", lambda w: w & 0xFFFF),
    ("mov.b64 %rd1, {%r1, %r20}; mov.b64 {%r3, %r4}, %rd1; xor.b32 %r2, %r3, %r4;", lambda w: w ^ THREAD),
    ("mov.b64 %rd1, {%r20, %r1}; mov.b64 %rd2, %rd1; shr.u64 %rd3, %rd2, 32; cvt.u32.u64 %r2, %rd3;", lambda w: w),
    ("mov.b64 %rd1, {%r20, %r1}; mov.b64 {_, %r2}, %rd1;", lambda w: w),
    ("mov.u64 %rd1, 0x0; cvt.u32.u64 %r2, %rd1;", lambda w: 0 * w),
    ("mov.b16 %rs1, 0x7FC0; cvt.u32.u16 %r2, %rs1;", lambda w: 0 * w + 0x7FC0),
    ("mov.u16 %rs1, -1; cvt.u32.u16 %r2, %rs1;", lambda w: 0 * w + 0xFFFF),
    ("setp.lt.u32 %p1, %r20, 7; mov.pred %p2, %p1; selp.b32 %r2, %r1, 5, %p2;", lambda w: np.where(THREAD < 7, w, 5)),
    ("cvta.to.global.u64 %rd1, %rd22; ld.global.b32 %r2, [%rd1];", lambda w: w),
    ("cvt.s32.s8 %r2, %r1;", lambda w: ((w & 255) ^ 128) - 128 & 0xFFFFFFFF),  # PTX reads the low bits of a wider register
    ("cvt.u32.u16 %r2, %r1;", lambda w: w & 0xFFFF),
    ("mov.pred %p1, -1; mov.pred %p2, 0; selp.b32 %r3, %r1, 5, %p1; selp.b32 %r2, 7, %r3, %p2;", lambda w: w),
    (HALVES_DIFFER + "setp.eq.bf16x2 %p1|%p2, %r1, %r3;" + BITS, lambda w: PAIR_EQUAL),
    (HALVES_DIFFER + "setp.neu.f16x2 %p1|%p2, %r1, %r3;" + BITS, lambda w: 3 - PAIR_EQUAL),
    # guards: threads where they are false keep what was there
    ("mov.b32 %r2, 9; setp.lt.u32 %p1, %r20, 7; @%p1 mov.b32 %r2, %r1;", lambda w: np.where(THREAD < 7, w, 9)),
    ("mov.b32 %r2, 9; setp.lt.u32 %p1, %r20, 7; @!%p1 xor.b32 %r2, %r1, 1;", lambda w: np.where(THREAD < 7, 9, w ^ 1)),
    ("mov.b32 %r2, 9; setp.lt.u32 %p1, %r20, 7; @%p1 ld.global.b32 %r2, [%rd22];", lambda w: np.where(THREAD < 7, w, 9)),
    ("mov.b32 %r2, 9; setp.ge.u32 %p1, %r20, 7; @!%p1 ld.global.b32 {%r2}, [ %rd22 + 0 ];",
     lambda w: np.where(THREAD < 7, w, 9)),
    # shuffles
    *((f"shfl.sync.bfly.b32 %r2, %r1, {n}, 31, -1;", lambda w, n=n: w[THREAD ^ n]) for n in (1, 2, 4, 8, 16)),
    *((f"shfl.sync.up.b32 %r2, %r1, {n}, 0, -1;", lambda w, n=n: up(w, n)) for n in (1, 16)),
    *((f"shfl.sync.down.b32 %r2, %r1, {n}, 31, -1;", lambda w, n=n: up(w[::-1], n)[::-1]) for n in (1, 16)),
    ("shfl.sync.idx.b32 %r2, %r1, 5, 31, 0xFFFFFFFF;", lambda w: 0 * w + w[5]),
    ("shfl.sync.bfly.b32 %r2, 77, 1, 31, -1;", lambda w: 0 * w + 77),
])  # fmt: skip
def test_moves_guards_and_shuffles(body, want):
    words = random_words(32)
    result, _ = run(LOAD + body + STORE, words=words)
    assert result[0].tolist() == want(words.astype(np.int64)).tolist()


def signed(words):
    return [int(word) - 2**32 * (int(word) >= 2**31) for word in words]


def floats(words):
    return words.astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("operation, want", [
    ("add.s32", lambda w: sum(map(int, w)) % 2**32),
    ("add.u32", lambda w: sum(map(int, w)) % 2**32),
    ("max.s32", lambda w: max(signed(w)) % 2**32),
    ("min.s32", lambda w: min(signed(w)) % 2**32),
    ("max.u32", lambda w: int(max(w))),
    ("min.u32", lambda w: int(min(w))),
    ("and.b32", lambda w: int(np.bitwise_and.reduce(w))),
    ("or.b32", lambda w: int(np.bitwise_or.reduce(w))),
    ("xor.b32", lambda w: int(np.bitwise_xor.reduce(w))),
    ("max.f32", lambda w: int(np.nanmax(floats(w)).view(np.uint32))),
    ("min.f32", lambda w: int(np.nanmin(floats(w)).view(np.uint32))),
    ("max.NaN.f32", lambda w: 0x7FFFFFFF if np.isnan(floats(w)).any() else int(floats(w).max().view(np.uint32))),
    ("min.NaN.f32", lambda w: 0x7FFFFFFF if np.isnan(floats(w)).any() else int(floats(w).min().view(np.uint32))),
])  # fmt: skip
@pytest.mark.parametrize("special", [None, 0x7FC00000, 0xFFFFFFFE, 0x80000000])
def test_redux(operation, want, special):
    words = random_words(64)
    words[words % 2**31 > 0x7F800000] &= 0xBFFFFFFF  # no NaN but the chosen
    if special is not None:
        words[11] = special
    result, _ = run(LOAD + f"redux.sync.{operation} %r2, %r1, -1;" + STORE, words=words, threads=64)
    assert result[0].tolist() == [want(words[:32])] * 32 + [want(words[32:])] * 32


def test_redux_of_a_part_of_a_warp_is_refused():
    with pytest.raises(Unsupported, match="PTX line .*part of a warp"):
        run(LOAD + "mov.b32 %r3, 15; redux.sync.add.s32 %r2, %r1, %r3;" + STORE)


@pytest.mark.parametrize("body, want", [
    ("ld.global.b8 %rs1, [%rd1]; cvt.u32.u16 %r2, %rs1;", lambda b: b[0]),
    ("ld.global.u8 %r2, [%rd1+1];", lambda b: b[1]),
    ("ld.global.s8 %r2, [%rd1+ 1];", lambda b: b[1] - 256 * (b[1] > 127) & 0xFFFFFFFF),
    ("ld.global.b16 %rs1, [%rd1 + 2]; cvt.u32.u16 %r2, %rs1;", lambda b: b[2] + 256 * b[3]),
    ("ld.global.L1::evict_last.b32 %r2, [%rd1 + 4];", lambda b: int.from_bytes(b[4:8], "little")),
    ("ld.global.b64 %rd2, [%rd1 + 8]; mov.b64 {_, %r2}, %rd2;", lambda b: int.from_bytes(b[12:16], "little")),
    ("ld.global.v2.b32 {%r3, %r2}, [%rd1 + 8];", lambda b: int.from_bytes(b[12:16], "little")),
    ("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1]; add.s32 %r2, %r2, %r5;",
     lambda b: (int.from_bytes(b[:4], "little") + int.from_bytes(b[12:16], "little")) % 2**32),
    ("ld.global.v2.b64 {%rd2, %rd3}, [%rd1]; mov.b64 {%r2, _}, %rd3;", lambda b: int.from_bytes(b[8:12], "little")),
    ("ld.global.v4.b16 {%rs1, %rs2, %rs3, %rs4}, [%rd1]; cvt.u32.u16 %r2, %rs4;", lambda b: b[6] + 256 * b[7]),
])  # fmt: skip
def test_loads_from_global_memory(body, want):
    words = random_words(128)
    result, _ = run("mad.wide.u32 %rd1, %r20, 16, %rd20;" + body + STORE, words=words)
    stored = words.astype(np.uint32).tobytes()
    assert result[0].tolist() == [want(stored[16 * t : 16 * t + 16]) for t in range(32)]


@pytest.mark.parametrize("body, want", [
    ("cvt.u16.u32 %rs1, %r1; st.global.b8 [%rd1+3], %rs1;", lambda w: [2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1], ),
    ("st.global.b32 [%rd1 + 4], %r1;", lambda w: [-1, w, -1, -1]),
    ("st.global.v2.b32 [%rd1 + 8], {%r1, %r20};", lambda w: [-1, -1, w, "t"]),
    ("st.global.v4.b32 [%rd1], {%r20, %r1, %r20, %r1};", lambda w: ["t", w, "t", w]),
    ("mov.b64 %rd2, {%r1, %r20}; st.global.b64 [%rd1], %rd2;", lambda w: [w, "t", -1, -1]),
    ("mov.b64 %rd2, {%r1, %r20}; st.global.v2.b64 [%rd1], {%rd2, %rd2};", lambda w: [w, "t", w, "t"]),
    ("mov.b32 {%rs1, %rs2}, %r1; st.global.b16 [%rd1], %rs1; st.global.b16 [%rd1 + 2], %rs2;", lambda w: [w, -1, -1, -1]),
    ("mov.b32 {%rs1, %rs2}, %r1; st.global.v2.b16 [%rd1], {%rs1, %rs2};", lambda w: [w, -1, -1, -1]),
    ("st.global.b8 [%rd1], 7; st.global.b16 [%rd1 + 2], 9;", lambda w: [0x0009FF07, -1, -1, -1]),
])  # fmt: skip
def test_stores_to_global_memory(body, want):
    words = random_words(32)
    result, _ = run(LOAD + "mad.wide.u32 %rd1, %r20, 16, %rd21;" + body, words=words, n_out=128)
    if "st.global.b8 [%rd1+3]" in body:
        expected = [[(int(w) & 0xFF) << 24 | 0xFFFFFF, -1, -1, -1] for w in words]
    else:
        expected = [[t if item == "t" else item for item in want(int(w))] for t, w in enumerate(words)]
    assert result.reshape(32, 4).tolist() == [[item % 2**32 for item in row] for row in expected]


@pytest.mark.parametrize(
    "kind, n", [("b8", 1), ("b16", 1), ("b32", 1), ("b64", 1), ("v2.b32", 2), ("v4.b32", 4), ("v2.b64", 2)]
)
@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_shared_memory_carries_values_between_threads(kind, n, space):
    """Thread t stores; thread t ^ 33 of the other warp loads after the barrier."""
    element = kind.rpartition(".")[2]
    register = {"b8": "%rs", "b16": "%rs", "b32": "%r", "b64": "%rd"}[element]
    size = n * int(element[1:]) // 8
    first = {"%rs": "cvt.u16.u32 %rs1, %r1;", "%r": "", "%rd": "mov.b64 %rd1, {%r1, %r1};"}[register]
    stored = ", ".join([f"{register}1"] * n)
    loaded = ", ".join(f"{register}{2 + i}" for i in range(n))
    if n > 1:
        stored, loaded = f"{{{stored}}}", f"{{{loaded}}}"
    last = f"{register}{1 + n}"
    back = {"%rs": f"cvt.u32.u16 %r2, {last};", "%r": f"mov.b32 %r2, {last};", "%rd": f"mov.b64 {{_, %r2}}, {last};"}[register]
    body = f"""
        mad.lo.s32 %r10, %r20, {size}, %r25; xor.b32 %r11, %r20, 33; mad.lo.s32 %r12, %r11, {size}, %r25; {first}
        st.{space}.{kind} [%r10], {stored}; bar.sync 0; ld.{space}.{kind} {loaded}, [%r12]; {back}
    """
    words = random_words(64)
    result, counts = run(LOAD + body + STORE, words=words, threads=64)
    mask = {"b8": 0xFF, "b16": 0xFFFF}.get(kind, 0xFFFFFFFF)
    assert result[0].tolist() == [int(words[t ^ 33]) & mask for t in range(64)]
    assert counts.barriers == 1
    with pytest.raises(Finding, match="race in shared memory.*no barrier"):
        run(LOAD + body.replace("bar.sync 0;", "") + STORE, words=words, threads=64)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count, transposed):
    """Matrices of 8 by 8 halves; thread t holds row t // 4, columns 2 (t % 4) and the next."""
    words = random_words(32 * count)
    registers = ", ".join(f"%r{1 + i}" for i in range(count))
    fill = "".join(
        f"ld.global.b32 %r9, [%rd22 + {128 * i}]; st.shared.b32 [%r24 + {128 * i}], %r9;" for i in range(count)
    )  # fmt: skip
    form = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    out = "".join(f"st.global.b32 [%rd23 + {128 * i}], %r{1 + i};" for i in range(count))
    body = fill + f"bar.sync 0; mad.lo.s32 %r10, %r20, 16, %r25; {form} {{{registers}}}, [%r10];" + out
    result, _ = run(body, words=words, n_out=32 * count)
    matrices = words.astype(np.uint32).view(np.uint16).reshape(count, 8, 8)
    for i, matrix in enumerate(matrices):
        matrix = matrix.T if transposed else matrix
        want = [int(matrix[t // 4, 2 * (t % 4)]) | int(matrix[t // 4, 2 * (t % 4) + 1]) << 16 for t in range(32)]
        assert result[32 * i : 32 * i + 32].tolist() == want


@pytest.mark.parametrize("order", ["acq_rel", "relaxed"])
@pytest.mark.parametrize("name, target", [("atom", "%rd2, "), ("red", "")])
def test_atomic_add(name, target, order):
    body = f"""
        cvt.rn.f64.s32 %rd1, %r20; setp.lt.u32 %p1, %r20, 5; mov.u64 %rd2, 0x0;
        @%p1 {name}.global.gpu.{order}.add.f64 {target}[ %rd21 + 0 ], %rd1;
    """
    out = torch.zeros(2, dtype=torch.float64)
    kernel = Kernel(HEADER + body + FOOTER, 32, 0)
    space = GlobalMemory([("out_ptr", out)], list)
    arguments = [np.array([[v]], np.uint64) for v in (0, out.data_ptr(), 0)]
    kernel.run((3, 1, 1), arguments, space, Checks(races=True), Counts())
    assert out.tolist() == [30.0, 0.0]


def test_loops_and_branches_of_single_programs():
    """Program p adds its thread p times, and program 1 leaves early."""
    body = """
        setp.eq.b32 %p3, %r21, 1; mov.b32 %r2, 0; mov.b32 %r3, 0;
        @%p3 bra $L_end;
        setp.ge.s32 %p1, %r3, %r21;
        @%p1 bra $L_end;
        $L_again:
        add.s32 %r2, %r2, %r20; add.s32 %r3, %r3, 1;
        setp.lt.s32 %p1, %r3, %r21;
        @%p1 bra $L_again;
        bra.uni $L_end;
        $L_end:
    """
    result, counts = run(body.replace("$L_again:", "\n$L_again:\n").replace("$L_end:\n", "\n$L_end:\n") + STORE, programs=6)
    assert result.tolist() == [[t * (0 if p == 1 else p) for t in range(32)] for p in range(6)]
    assert counts.programs == 6 and counts.launches == 1 and counts.stored == {4: 4 * 32 * 6}


@pytest.mark.parametrize("races", [False, True])
def test_bytes_are_counted_by_width_and_once_for_neighbours(races):
    """Program 0 of two takes the branch, in which 8 threads share an address, and a warp begins anew."""
    body = """
        ld.global.b32 %r1, [%rd20];
        setp.ne.b32 %p1, %r21, 0;
        @%p1 bra $L_end;
        shr.u32 %r3, %r20, 5; mad.wide.u32 %rd2, %r3, 4, %rd20; ld.global.b32 %r4, [%rd2];
        shr.u32 %r5, %r20, 3; mad.wide.u32 %rd3, %r5, 16, %rd20; ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd3];
        setp.lt.u32 %p2, %r20, 5;
        @%p2 ld.global.b8 %rs1, [%rd22];
        bar.sync 0;
        $L_end:
    """
    body = body.replace("$L_end:", "\n$L_end:\n")
    _, counts = run(body + STORE, threads=64, programs=2, checks=Checks(races=races))
    assert counts.loaded == {4: 2 * 4, 16: 8 * 16, 1: 5}
    assert counts.stored == {4: 4 * 64 * 2}
    assert counts.executed["ld.global.b32"] == 64 * (2 + 1) and counts.executed["ld.global.b8"] == 64
    assert counts.barriers == 1 and counts.instructions == sum(counts.executed.values())


def test_instruction_costs():
    """A division by its parts, and one of each unit; 64-bit integers are two instructions; moves, parameters, signs none."""
    executed = {"div.full.f32": 3, "mov.b32": 9, "ld.param.b64": 9, "neg.f32": 9, "add.s64": 1, "max.f32": 1, "cvt.s64.s32": 1,
                "fma.rn.f32": 1, "ld.shared.b32": 1, "shfl.sync.bfly.b32": 1, "st.global.v4.b32": 1, "bra": 1}  # fmt: skip
    assert issued(executed) == {"special": 3, "float": 16, "integer": 10, "exchange": 2, "memory": 1, "control": 1}
    assert set(issued(executed)) == set(UNITS)


def test_programs_that_return_early():
    result, _ = run("mov.b32 %r2, 3; setp.gt.s32 %p1, %r21, 1;\n @%p1 ret;\n" + STORE, programs=4)
    assert (result[:2] == 3).all() and (result[2:] == 2**32 - 1).all()


def test_parameters_are_read_in_the_type_of_the_instruction():
    body = "ld.param.s32 %rd1, [number]; ld.param.b32 %r3, [number]; mov.b64 {%r4, %r5}, %rd1; xor.b32 %r2, %r5, %r3;"
    result, _ = run(body + STORE, number=-7)
    assert (result == (0xFFFFFFFF ^ (2**32 - 7))).all()


@pytest.mark.parametrize("body", ["mov.b32 %r2, %r19;", "ld.shared.b32 %r2, [%r24];", "mov.b64 {_, %r2}, %rd19;",
                                  "mov.b64 {%r2, _}, %rd19;", "mov.b32 %r2, {%rs9, %rs9};"])  # fmt: skip
def test_registers_and_shared_memory_hold_nan_at_first(body):
    """In every format that the bits may be read in."""
    words = run(body + STORE)[0]
    halves = torch.from_numpy(words.view(np.int16))
    assert np.isnan(words.view(np.float32)).all() and np.isnan(np.repeat(words, 2).view(np.float64)).all()
    assert halves.view(torch.float16).isnan().all() and halves.view(torch.bfloat16).isnan().all()


FINDINGS = {
    "one element too far": ("ld.global.b32 %r2, [%rd22 + 4];", "4 bytes, 0 bytes after the end of argument in_ptr", 31),
    "before the start": ("st.global.b32 [%rd23 + -4], %r20;", "4 bytes before the start of argument out_ptr", 0),
    "a null pointer": ("mov.u64 %rd1, 0x0; ld.global.b32 %r2, [%rd1];", "before the start", 0),
    "a tail that is not masked": ("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd22];", "misaligned access: 16 bytes", 1),
    "misaligned": ("ld.global.b64 %rd1, [%rd22];", "misaligned access: 8 bytes .* in argument in_ptr", 1),
    "misaligned in shared memory": ("ld.shared.b64 %rd1, [%r24];", "misaligned access: 8 bytes .* in shared memory", 1),
    "out of shared memory": ("ld.shared.b32 %r2, [%r24 + 904];", "outside of shared memory: 4 bytes at offset 1024", 30),
    "a branch that threads disagree on": ("setp.lt.u32 %p1, %r20, 7;\n@%p1 bra $L_end;\n$L_end:\n", "disagree on a branch", 7),
    "store and load": ("st.shared.b32 [%r24], %r20; ld.shared.b32 %r2, [%r25];", "race in shared memory: a load", 1),
    "load and store": ("ld.shared.b32 %r2, [%r25]; st.shared.b32 [%r24], %r20;", "race in shared memory: a store", 0),
    "stores at once": ("st.shared.b32 [%r25], %r20;", "two threads store different values", 0),
    "stores one after another": (
        "setp.eq.b32 %p1, %r20, 2; setp.eq.b32 %p2, %r20, 3; @%p1 st.shared.b32 [%r25], 1; @%p2 st.shared.b32 [%r25], 1;",
        "race in shared memory: a store", 3),
    "threads on one global address": ("ld.global.b32 %r2, [%rd21]; st.global.b32 [%rd23], %r20;", "race in global memory", 0),
    "programs on one global address": (
        "mad.wide.u32 %rd1, %r20, 4, %rd21; st.global.b32 [%rd1], %r20;", "race in global memory", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FINDINGS)
def test_findings_say_where(name):
    body, what, thread = FINDINGS[name]
    with pytest.raises(Finding) as error:
        run(body, programs=2)
    message = str(error.value)
    assert re.search(what, message)
    assert re.search(rf"kernel kernel, program \(\d, 0, 0\), thread {thread}\n", message)
    assert re.search(r"PTX line \d+: .*\n  Python: somewhere.py:7", message)


@pytest.mark.parametrize("body", [
    "st.shared.b32 [%r24], %r20; bar.sync 0; ld.shared.b32 %r2, [%r25];",
    "ld.shared.b32 %r2, [%r25]; bar.sync 0; st.shared.b32 [%r24], %r20;",
    "ld.shared.b32 %r2, [%r25]; ld.shared.b32 %r2, [%r24]; bar.sync 0; st.shared.b32 [%r24], %r20;",
    "st.shared.b32 [%r24], %r20; bar.warp.sync -1; ld.shared.b32 %r2, [%r25];",  # within a warp
    "ld.shared.b32 %r2, [%r25]; shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; st.shared.b32 [%r24], %r3;",
    "st.shared.b32 [%r24], %r20; ld.shared.b32 %r2, [%r24]; st.shared.b32 [%r24], %r2;",  # each its own
    "ld.global.b32 %r2, [%rd23]; st.global.b32 [%rd23], %r20;",
    "ld.global.b32 %r2, [%rd20]; ld.global.b32 %r3, [%rd22];",  # nothing is written
    "st.shared.b32 [%r25], 3;",  # the same value
])  # fmt: skip
def test_what_is_ordered_is_no_finding(body):
    run(body, programs=2)


def test_other_warps_are_not_ordered_by_a_shuffle():
    body = "ld.shared.b32 %r2, [%r25]; shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; st.shared.b32 [%r24], %r3;"
    with pytest.raises(Finding, match="race in shared memory: a store"):
        run(body, threads=64)


def test_padding_of_a_view_is_out_of_bounds_only_where_that_is_strict():
    storage = torch.zeros(64, dtype=torch.int32)
    kernel = Kernel(HEADER + "ld.global.b32 %r2, [%rd22 + 4];" + FOOTER, 32, 0)
    arguments = [np.array([[v]], np.uint64) for v in (storage.data_ptr(), 0, 0)]
    for strict in (False, True):
        space = GlobalMemory([("in_ptr", storage[:32])], list, strict=strict)
        if strict:
            with pytest.raises(Finding, match="after the end of argument in_ptr"):
                kernel.run((1, 1, 1), arguments, space, Checks(), Counts())
        else:
            kernel.run((1, 1, 1), arguments, space, Checks(), Counts())


@pytest.mark.parametrize("line, what", [
    ("frob.b32 %r1, %r2;", "frob.b32"),
    ("add.rz.f32 %r1, %r2, %r3;", "add.rz.f32"),
    ("ld.volatile.global.b32 %r1, [%rd1];", "volatile"),
    ("ld.local.b32 %r1, [%rd1];", "modifiers"),
    ("ld.b32 %r1, [%rd1];", "modifiers"),
    ("ld.global.b128 %rd1, [%rd1];", "modifiers"),
    ("ld.global.v2.b32 {%r1}, [%rd1];", "destination"),
    ("shfl.sync.bfly.b32 %r1, %r2, 1, 15, -1;", "part of a warp"),
    ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, 15;", "part of a warp"),
    ("shfl.sync.idx.b32 %r1, %r2, %r3, 31, -1;", "constant"),
    ("@%p1 shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;", "guard"),
    ("@%p1 bar.sync 0;", "guard"),
    ("bar.sync 1, 64;", "form"),
    ("bar.red.popc.u32 %r1, 0, %p1;", "form"),
    ("redux.sync.mul.s32 %r1, %r2, -1;", "form"),
    ("setp.eq.f32 %p1|%p2, %r1, %r2;", "result"),
    ("setp.eq.f16x2 %p1, %r1, %r2;", "operands"),
    ("red.global.gpu.relaxed.add.f64 %rd1, [%rd1], %rd2;", "form"),
    ("atom.global.gpu.relaxed.add.f64 [%rd1], %rd2;", "form"),
    ("atom.global.gpu.acq_rel.cas.b32 %r1, [%rd1], %r2, %r3;", "form"),
    ("atom.shared.gpu.acq_rel.add.f64 %rd1, [%rd1], %rd2;", "form"),
    ("ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r1, %r2, %r3}, [%r4];", "form"),
    ("cvta.shared.u64 %rd1, %rd2;", "cvta"),
    ("mov.u32 %r1, %clock;", "operand"),
    ("mov.b32 %r1, %rd1;", "register %rd1 where b32"),
    ("add.s32 %rd1, %r1, %r2;", "result"),
    ("add.s32 %r1, %r1;", "operands"),
    ("call.uni f, (%r1);", ""),
    (".local .align 4 .b8 stack[16];", "directive"),
])  # fmt: skip
def test_what_is_unknown_is_refused_with_its_line(line, what):
    with pytest.raises(Unsupported) as error:
        Kernel(HEADER + line + FOOTER, 32, 0)
    assert re.search(r"PTX line \d+", str(error.value)) and what in str(error.value)


def test_ptx_without_a_kernel_is_refused():
    with pytest.raises(Unsupported, match="no .visible .entry"):
        parse(".version 8.4\n")
