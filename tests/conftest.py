import os
import random

import pytest
import torch

# Must stand before anything imports a kernel. "0" from outside (make test-compile) is left alone.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TQDM_DISABLE", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test of what needs an extra is skipped where that is missing, with the words that a user would read."""
    from soul._extras import MissingExtra

    try:
        return (yield)
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.fixture
def device():
    """Where the kernels run: a GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    random.seed(0)
