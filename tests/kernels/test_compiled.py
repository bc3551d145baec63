"""backend="compile": the bits of the reference, one variant for all tensors, and what happens where nothing can be compiled.

The tests that compile take some seconds each the first time; torch keeps what it has compiled on the disk.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
import torch

from soul import SOUL
from soul_kernels import _compiled, hessian_ema, sophia_step
from soul_kernels.backends import resolve_backend
from soul_kernels.reference.rounding import GROUP
from tests.kernels.test_sophia_step import OPTIONS, clone_storage, make_storage
from tests.support.helpers import peak_bytes
from tests.support.optimizers import BRAIN, FLOAT, HALF, give_gradients, make

ROOT = pathlib.Path(__file__).parents[2]
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(shutil.which(_compiled.cpp_compiler()) is None, reason="no C++ compiler")
# Several blocks and a piece of a group; a group and a piece; no row; nothing; a middling tensor.
SHAPES = [(9 * GROUP + 1,), (300,), (), (0,), (3, 500, 7)]


@pytest.fixture
def fresh(monkeypatch):
    """Reset the caches to those of a process that has compiled nothing and seen no failure."""
    monkeypatch.setattr(_compiled, "_refusals", [])
    monkeypatch.setattr(_compiled, "_variants", {})


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(_compiled.Compiled, "size", 4 * GROUP)


def same(got, want):
    """Tell whether tensors are bitwise equal, up to the payload of NaN."""
    if got.is_floating_point():
        got, want = got.nan_to_num(123.0), want.nan_to_num(123.0)
        return torch.equal(got, want) and torch.equal(got.signbit(), want.signbit())
    return torch.equal(got, want)


MANY = pytest.mark.slow(reason="compiles for each; the dtypes are those of other cases, rounded in other ways")


@pytest.mark.parametrize("p_dtype, state_dtype, rounding", [
    (FLOAT, FLOAT, "nearest"),
    pytest.param(BRAIN, BRAIN, "nearest", marks=MANY),
    (BRAIN, FLOAT, "stochastic"),
    (BRAIN, "8bit", "compensated"),
    pytest.param(HALF, FLOAT, "compensated", marks=MANY),
], ids=str)  # fmt: skip
def test_compiled_step_equals_the_reference_bit_for_bit(p_dtype, state_dtype, rounding, small_blocks):
    """Every rounding and every storage of a state, each once. All 27 combinations were compared when this was written."""
    got = make_storage(SHAPES, CPU, p_dtype, state_dtype, rounding)
    for tensor in got[0][1]:  # gradients that are not finite, or far too small or large
        flat = tensor.view(-1)
        flat[: 7 * len(flat) // 300 : 7] = torch.tensor(float("nan"))
        flat[1 : 9 * len(flat) // 300 : 9] = 6e4
        flat[2 : 9 * len(flat) // 300 : 9] = -1e-7
    want = clone_storage(got)
    counted = torch.zeros(2, 3, dtype=torch.float64)
    for index, lr in enumerate((1e-2, torch.tensor(1e-4))):
        for (lists, more), backend, telemetry in ((got, "compile", counted[0]), (want, "reference", counted[1])):
            options = OPTIONS | dict(lr=lr, seed=index, param_rounding=rounding, telemetry=telemetry, backend=backend)
            sophia_step(*lists, **options, **more, beta2=0.95)
    assert not _compiled._refusals
    for mine, theirs in zip((*got[0], *got[1].values()), (*want[0], *want[1].values())):
        assert all(map(same, mine, theirs))
    assert torch.equal(counted[0, :2], counted[1, :2]) and counted[0, 0] > 0


@pytest.mark.parametrize("state_dtype", [FLOAT, pytest.param(BRAIN, marks=MANY), "8bit"], ids=str)
def test_compiled_ema_equals_the_reference_bit_for_bit(state_dtype, small_blocks):
    lists, more = make_storage(SHAPES, CPU, BRAIN, state_dtype, "nearest")
    scales = more.get("hessian_scales")
    want = [h.clone() for h in lists[3]]
    want_scales = scales and [s.clone() for s in scales]
    hessian_ema(lists[3], lists[1], beta2=0.9, scale=3.0, seed=5, hessian_scales=scales, backend="compile")
    hessian_ema(want, lists[1], beta2=0.9, scale=3.0, seed=5, hessian_scales=want_scales, backend="reference")
    assert not _compiled._refusals
    assert all(map(torch.equal, [*lists[3], *(scales or [])], [*want, *(want_scales or [])]))


def test_one_variant_serves_all_tensors(fresh):
    """Whatever their sizes, layouts and places in memory, and whatever the numbers."""
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    base = torch.randn(40, 20 * GROUP)
    params = make(shapes=((2 * GROUP,), (3 * GROUP, 2), (1 << 16,), (64, 3, 16, 2), (1000, 701)))
    params += [base[3:5].detach().requires_grad_(), base[6:9].t().detach().requires_grad_()]
    optimizer = SOUL(params, lr=1e-3, backend="compile", max_grad_norm=1.0)
    for lr, bs in ((1e-3, 5120), (1e-5, 100), (0.0, 7)):
        optimizer.param_groups[0]["lr"] = lr
        give_gradients(params)
        params[bs % 2].grad = None  # another list of tensors each time
        optimizer.step(bs=bs)
    capturable = SOUL(make(shapes=((5, 3 * GROUP),)), lr=1e-3, backend="compile", max_grad_norm=1.0, capturable=True)
    give_gradients(capturable.param_groups[0]["params"])
    capturable.step()
    lists = make_storage([(6 * GROUP,)], CPU, FLOAT, FLOAT, "nearest")[0]
    numbers = dict(lr=torch.tensor([1e-3]), telemetry=torch.zeros(3, dtype=torch.float64), grad_factor=torch.ones(1))
    sophia_step(*lists, **OPTIONS | numbers, maximize=True, beta2=0.9, corrections=torch.ones(1), backend="compile")
    assert not _compiled._refusals and len(_compiled._variants) == 1
    assert graphs["unique_graphs"] == before + 1


def test_a_compiled_step_holds_little_memory():
    """At most 64 MiB, however large a tensor is: 8-bit states need most."""
    lists, more = make_storage([(1 << 22,)], CPU, BRAIN, "8bit", "compensated")
    options = OPTIONS | dict(param_rounding="compensated", backend="compile", telemetry=torch.zeros(3, dtype=torch.float64))
    assert peak_bytes(lambda: sophia_step(*lists, **options, **more, beta2=0.95), CPU) <= 64 * 2**20
    assert not _compiled._refusals


def add(param, *, amount):
    """A block function for tests of what goes wrong: quickly compiled."""
    param.add_(amount)


def run(function, **options):
    """Return the result of a compiled block function on zeros, and the warnings."""
    param = torch.zeros(3, GROUP)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # one warning only
            _compiled.Compiled(function)(param, **options)
    assert param.unique().numel() == 1
    return param[0, 0].item(), [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


@pytest.mark.slow(reason="compiles without caches")
@pytest.mark.parametrize("threads", [2, 5])
def test_loops_are_divided_among_all_threads(threads, fresh):
    """Inductor judges by the examples on which a variant is proven; short ones would leave every step to one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            _, sources = torch._inductor.utils.run_and_get_code(lambda: run(add, amount=1.0))
    finally:
        torch.set_num_threads(before)
    assert "#pragma omp for" in "".join(sources)


def test_other_bits_are_refused(fresh):
    def broken(param):
        param.add_(2.0 if torch.compiler.is_compiling() else 1.0)

    value, messages = run(broken)
    assert value == 2.0
    assert len(messages) == 1 and messages[0].startswith(
        "backend 'compile': compiled, broken gives other bits in param; steps run in plain"
    )
    assert run(add, amount=3.0) == (6.0, [])  # neither another compilation nor another warning
    assert resolve_backend("compile", torch.zeros(1), compiled=1) == "reference"


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    lists, more = make_storage([(3000,)], CPU, FLOAT, FLOAT, "nearest")
    want = clone_storage((lists, more))[0]
    with pytest.warns(RuntimeWarning) as messages:
        sophia_step(*lists, **OPTIONS, backend="compile")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sophia_step(*lists, **OPTIONS, backend="compile")
    assert [str(warning.message) for warning in messages] == [
        "backend 'compile': there is no C++ compiler 'no-such-compiler'; steps run in plain PyTorch, with the same results, "
        "in 2 to 4 times the time of compiled ones: install one, or name one in CXX"
    ]
    for _ in range(2):
        sophia_step(*want, **OPTIONS, backend="reference")
    assert all(map(torch.equal, lists[0], want[0]))


def test_a_compiler_that_fails(fresh, tmp_path):
    compiler = tmp_path / "broken"
    fails = 'echo "x.cpp:1: fatal error: Python.h: No such file" >&2; exit 1'
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *.cpp*) {fails};; *) exec g++ "$@";; esac\n')
    compiler.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (str(compiler),)}):
        value, messages = run(add, amount=0.1234)
    assert value == pytest.approx(2 * 0.1234)
    reason = "CppCompileError: x.cpp:1: fatal error: Python.h: No such file"
    assert len(messages) == 1 and f"{reason}; steps run in plain" in messages[0]


def test_a_cache_that_cannot_be_written(fresh, tmp_path, monkeypatch):
    """A file in the place of the directory: permissions do not stop root."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    value, messages = run(add, amount=0.2345)
    assert value == pytest.approx(2 * 0.2345)
    assert len(messages) == 1 and "Errno" in messages[0] and "steps run in plain PyTorch" in messages[0]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of a process")
def test_a_full_disk(fresh, tmp_path, monkeypatch):
    import resource

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # no file can grow
    try:
        value, messages = run(add, amount=0.3456)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert value == pytest.approx(2 * 0.3456)
    assert len(messages) == 1 and "Errno" in messages[0] and "steps run in plain PyTorch" in messages[0]


def test_torch_compile_switched_off(fresh):
    with torch._dynamo.config.patch(disable=True):
        value, messages = run(add, amount=1.0)
    assert value == 2.0 and len(messages) == 1 and "torch.compile is switched off" in messages[0]


def test_a_variant_that_can_be_compiled_no_more(fresh, monkeypatch):
    """torch compiles anew where something global has changed; a block is then updated once all the same."""

    def failing(*arguments, **options):
        raise torch._dynamo.exc.BackendCompilerFailed(None, OSError(28, "No space left on device"), None)

    monkeypatch.setattr(_compiled, "_proven", lambda *_: failing)
    value, messages = run(add, amount=1.0)
    assert value == 2.0 and len(messages) == 1 and "No space left on device" in messages[0]


def test_auto_compiles_large_models_on_a_cpu(fresh, monkeypatch, without_kernels):
    """By all parameters of an optimizer, also where they are in groups or stepped one at a time."""
    compiled = []
    monkeypatch.setattr(_compiled, "_proven", lambda function, *_: compiled.append(function.__name__) or function)
    monkeypatch.setattr(_compiled, "PAYS", 4 * GROUP)
    for count, names in ((3, []), (4, ["step_block"])):
        params = make(shapes=((2 * GROUP,), ((count - 2) * GROUP,)))
        give_gradients(params)
        SOUL([{"params": params[:1]}, {"params": params[1:]}]).step()
        assert compiled == names
    assert resolve_backend("auto", torch.zeros(1, device="meta"), compiled=1 << 40) == "reference"
    assert resolve_backend("compile", torch.zeros(1)) == "reference"  # an op that is not compiled


# The rest runs in processes of its own: some 25 s on one core.
SCRIPT = """
    import sys, torch
    from soul_kernels import hessian_ema
    torch.manual_seed(0)
    hessians, grads = [torch.rand(4096)], [torch.randn(4096)]
    hessian_ema(hessians, grads, beta2=0.9, backend="compile")
    print(hessians[0].view(torch.int32).sum().item())
"""


def expected():
    torch.manual_seed(0)
    hessians = [torch.rand(4096)]
    grads = [torch.randn(4096)]
    hessian_ema(hessians, grads, beta2=0.9, backend="reference")
    return f"{hessians[0].view(torch.int32).sum().item()}\n"


def start(cache, **environment):
    # Without trying out the processor's vector instructions, each of which is a compilation.
    quick = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)} | quick | environment
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.mark.slow(reason="three processes compile with an empty cache")
def test_several_processes_at_once(tmp_path):
    """Slow: into one empty cache."""
    processes = [start(tmp_path) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out) == (0, expected()) and "backend 'compile'" not in err, err


@pytest.mark.slow(reason="compiles twice with an empty cache")
@pytest.mark.skipif(sys.platform == "win32", reason="a compiler that is a shell script")
def test_a_process_killed_while_it_compiles(tmp_path):
    """Slow: half a library is left in the cache, which torch takes for a whole one."""
    compiler = tmp_path / "slow"
    begun = tmp_path / "begun"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *main.cpp*) ;; *) exec g++ "$@";; esac\n'
        f'[ -e {begun} ] && exec g++ "$@"\n'
        'while [ "$1" != -o ]; do shift; done; echo half > "$2"\n'
        f"touch {begun}; exec sleep 600\n"
    )
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    process = start(cache, CXX=str(compiler))
    deadline = time.monotonic() + 200
    while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert begun.exists() and process.returncode == -signal.SIGKILL
    process = start(cache, CXX=str(compiler))
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, expected()), err
    assert err.count("backend 'compile': ") == 1 and str(cache) in err, err
