import importlib.util
import os
import random

import pytest
import torch

# Must stand before anything imports a kernel. "0" from outside (make test-compile) is left alone.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TQDM_DISABLE", "1")


EXTRAS = ("transformers", "tokenizers", "safetensors", "peft", "datasets", "pyarrow", "yaml", "accelerate", "rouge_score",
          "scipy", "sklearn", "matplotlib", "pytest_benchmark")  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--all-extras", action="store_true", help="a missing extra is an error, and no reason to skip (make test)")


def pytest_configure(config):
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing and config.getoption("all_extras"):
        raise pytest.UsageError(f"not installed: {', '.join(missing)}; is it in the extras of setup.py?")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test of what needs an extra is skipped where that is missing, with the words that a user would read."""
    from soul._extras import MissingExtra

    try:
        return (yield)
    except MissingExtra as error:
        if item.config.getoption("all_extras"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def device():
    """Where the kernels run: a GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["triton", "torch"])
def backend(request, monkeypatch):
    """How an op sweeps over rows: with the kernels, and in plain PyTorch, there in blocks so small that a test has several."""
    if request.param == "torch":
        from soul_kernels import _head_rows
        from soul_kernels.reference import _rows

        monkeypatch.setattr(_rows, "BLOCK", 2000)
        monkeypatch.setattr(_rows, "DIVERGENCE_BLOCK", 1000)
        monkeypatch.setattr(_head_rows, "WEIGHT_BLOCK", 1000)
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    random.seed(0)
