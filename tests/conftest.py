import collections
import dataclasses
import importlib
import importlib.util
import multiprocessing
import os
import random
import re

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TQDM_DISABLE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core, and threads of one would only wait for those of another
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
# Processes of tests are forked from one that has imported this and computed nothing: importing takes seconds.
multiprocessing.set_forkserver_preload(["tests.support.runs", "tests.distributed.test_processes"])

WORKERS = pytest.StashKey[list]()  # what the workers of pytest-xdist have executed as PTX
EXTRAS = ("transformers", "tokenizers", "safetensors", "peft", "datasets", "pyarrow", "yaml", "accelerate", "rouge_score",
          "sacrebleu", "scipy", "sklearn", "matplotlib", "pytest_benchmark")  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--all-extras", action="store_true", help="a missing extra is an error, and no reason to skip (make test)")
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (make test-all)")
    parser.addoption("--parity", action="store_true", help="write what tests of several processes measure into "
                     "tests/distributed/parity.json (make parity)")  # fmt: skip

    group = parser.getgroup("ptx", "kernels compiled for a GPU and executed on the CPU (tests/ptx)")
    targets = ["sm_80", "sm_90", "sm_100"]
    group.addoption("--ptx", metavar="TARGET", choices=targets, help="the GPU that is compiled for (sm_90)")
    group.addoption("--ptx-strict", action="store_true", help="look for races in global memory and for reads of padding, "
                    "fill torch.empty with NaN")  # fmt: skip
    group.addoption("--ptx-backwards", action="store_true", help="run the programs of a launch in reverse order")
    group.addoption("--ptx-ulps", metavar="N", type=int, default=0, help="errors of approximate instructions")


def choose_kernels(config):
    """Choose where tests run kernels, before anything imports one.

    On a GPU; without one compiled for a GPU and executed on the CPU (`tests.ptx`); where Triton cannot compile, or with
    TRITON_INTERPRET=1, in Triton's interpreter. With TRITON_INTERPRET=0 (make test-compile) they do not run.
    """
    chosen, is_worker = os.environ.get("TRITON_INTERPRET"), "PYTEST_XDIST_WORKER" in os.environ
    asked = [name for name in ("ptx", "ptx_strict", "ptx_backwards", "ptx_ulps") if config.getoption(name)]
    if torch.cuda.is_available() or chosen == "1" or (chosen == "0" and not is_worker) or not can_compile():
        if asked:
            where = "no GPU (CUDA_VISIBLE_DEVICES= hides one), no TRITON_INTERPRET, and Triton"
            raise pytest.UsageError(f"--{asked[0].replace('_', '-')}: expected {where}; got another place where kernels run")
        if not torch.cuda.is_available():
            os.environ.setdefault("TRITON_INTERPRET", "1")
        return
    os.environ["TRITON_INTERPRET"] = "0"
    from tests.ptx.driver import Checks, activate

    strict = config.getoption("ptx_strict")
    checks = Checks(races=strict, strict=strict, backwards=config.getoption("ptx_backwards"))
    target = config.getoption("ptx") or "sm_90"
    config.ptx_context = activate(target, checks, ulps=config.getoption("ptx_ulps"))  # kept: it ends with the process
    config.ptx_driver = config.ptx_context.__enter__()
    if strict:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True


def can_compile():
    """Tells whether Triton is here, with its compiler for NVIDIA's GPUs."""
    try:
        return "nvidia" in importlib.import_module("triton.backends").backends
    except ImportError:
        return False


def ptx_numbers(config):
    """Return what this process has executed: launches, variants by name and hash of their PTX, findings."""
    record = config.ptx_driver.record
    return record.launches, [f"{name} {digest}" for name, digest in record.counts], record.findings


def pytest_sessionfinish(session):
    """Hand the numbers of a worker of pytest-xdist to the process that started it."""
    if hasattr(session.config, "workeroutput") and hasattr(session.config, "ptx_driver"):
        session.config.workeroutput["ptx"] = ptx_numbers(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Keep the numbers of a worker; one that has crashed leaves none."""
    if numbers := getattr(node, "workeroutput", {}).get("ptx"):
        node.config.stash.setdefault(WORKERS, []).append(numbers)


def pytest_terminal_summary(terminalreporter, config):
    if driver := getattr(config, "ptx_driver", None):
        processes = [ptx_numbers(config), *config.stash.get(WORKERS, [])]
        launches, findings = (sum(numbers[i] for numbers in processes) for i in (0, 2))
        variants = {variant for numbers in processes for variant in numbers[1]}
        numbers = f"{launches} launches, {len(variants)} variants, {findings} findings"
        terminalreporter.write_line(f"PTX (sm_{driver.target.arch}): {numbers}")


# Tests of numbers with at least so many cases are sampled. Mutants are not, nor errors, which are quick to raise, nor what the
# compilers make of kernels, which make test-compile alone looks at.
MANY = 6
SAMPLED = re.compile(r"tests/(kernels|optim|bench|checkpoint|models|run)/|tests/test_(losses|functional|patching)")
WHOLE = re.compile("mutant|bad|refused|wrong|named|test_compile.py")


def sample(items):
    """Mark two of three cases slow where a test has many: which ones depends on the name of the test alone."""
    by_test = collections.defaultdict(list)
    for item in items:
        test = item.nodeid.partition("[")[0]
        if SAMPLED.match(test) and not WHOLE.search(test) and not item.get_closest_marker("slow"):
            by_test[test].append(item)
    for test, cases in by_test.items():
        if len(cases) >= MANY:
            for item in random.Random(test).sample(cases, 2 * len(cases) // 3):
                item.add_marker(pytest.mark.slow(reason="one of many cases, of which a third are always tested"))
                item.add_marker(pytest.mark.many)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(config, items):
    """Leave out the tests marked slow, each of which says why it is, unless they are asked for."""
    sample(items)
    slow = [item for item in items if item.get_closest_marker("slow")]
    for item in slow:
        if not item.get_closest_marker("slow").kwargs.get("reason"):
            raise pytest.UsageError(f"{item.nodeid}: expected @pytest.mark.slow(reason=...), got no reason")
    if slow and not config.getoption("--slow"):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_configure(config):
    choose_kernels(config)
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing and config.getoption("all_extras"):
        raise pytest.UsageError(f"not installed: {', '.join(missing)}; is it in the extras of setup.py?")
    if config.getoption("parity"):
        from tests.support.parity import Recorder  # after the kernels were chosen

        config.pluginmanager.register(Recorder())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test of what needs an extra, or Triton, is skipped where that is missing, with the words that a user would read."""
    from soul._extras import MissingExtra
    from soul_kernels.backends import has_triton

    try:
        return (yield)
    except (RuntimeError, ValueError) as error:
        if item.config.getoption("all_extras") or has_triton() or "Triton is not installed" not in str(error):
            raise
        pytest.skip(str(error))
    except MissingExtra as error:
        if item.config.getoption("all_extras"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def device():
    """Where the kernels run: a GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def without_kernels(monkeypatch):
    """On a CPU the ops compute as they do for a user without a GPU."""
    monkeypatch.setattr("soul_kernels.backends.runs_on_cpu", lambda: False)


@pytest.fixture(params=["triton", "torch"])
def backend(request, monkeypatch):
    """How an op sweeps over rows: with the kernels, and in plain PyTorch, there in blocks so small that a test has several."""
    if request.param == "torch":
        from soul_kernels._head import rows as head_rows
        from soul_kernels.reference import _rows

        monkeypatch.setattr(_rows, "BLOCK", 2000)
        monkeypatch.setattr(_rows, "DIVERGENCE_BLOCK", 1000)
        monkeypatch.setattr(head_rows, "WEIGHT_BLOCK", 1000)
    return request.param


@pytest.fixture(autouse=True)
def seed():
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)  # torch.manual_seed would keep a traceback for each device that might come
    random.seed(0)


@pytest.fixture(autouse=True)
def short_reports(monkeypatch):
    """Reports of runs have no pictures, and few tokens of the model's answers: both take two thirds of a run of a tiny model.

    Where reports are tested a fixture of this name does nothing.
    """
    monkeypatch.setattr("soul.report.charts.svg", lambda chart, name: f'<svg id="{name}"></svg>')
    monkeypatch.setattr("soul.run.notes.MAX_NEW_TOKENS", 4)


@pytest.fixture
def card(request):
    """The driver that executes PTX, with every check on; what is found while a test plants faults is not counted."""
    driver = getattr(request.config, "ptx_driver", None)
    if driver is None:
        pytest.skip("kernels do not run as PTX here")
    checks, findings = driver.checks, driver.record.findings
    driver.checks = dataclasses.replace(checks, races=True, strict=True)
    yield driver
    driver.checks, driver.edit, driver.record.findings = checks, None, findings
