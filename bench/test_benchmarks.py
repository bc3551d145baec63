"""All cases of ``python -m bench`` for pytest-benchmark: ``python -m pytest bench --benchmark-only``; not in ``make test``."""

import importlib

import pytest
import torch

from bench.__main__ import MODULES
from bench._harness import WRONG, ceilings, forget_compiled, free, start, synchronize
from soul._extras import MissingExtra

pytest.importorskip("pytest_benchmark", reason="the extra bench is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICK = DEVICE.type == "cpu"


def variants():
    """Every variant of every case. A case is made here to learn its name and variants, and dropped again."""
    for name in MODULES.values():
        for make in importlib.import_module(name).cases(DEVICE, QUICK):
            case = make()
            if not case.default:
                continue
            yield from (pytest.param(make, name, id=f"{case.name}: {name}") for name in case.variants)
            del case


@pytest.fixture(scope="module")
def limits():
    return ceilings(DEVICE)


@pytest.fixture(scope="module")
def case(request):
    """The case, made and checked once for all of its variants, and what the check says of them."""
    torch.manual_seed(0)
    forget_compiled()
    made = request.param()
    try:
        return made, made.check()
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def freed():
    """What a variant held is given back before the next one is made."""
    yield
    free(DEVICE)


@pytest.mark.parametrize("case, variant", variants(), indirect=["case"])
def test_variant(case, variant, limits, benchmark):
    case, errors = case
    assert not isinstance(errors.get(variant), str), errors[variant]
    call, reason = start(variant, case.variants[variant])
    assert not (reason or "").startswith(WRONG), reason
    if reason:
        pytest.skip(reason)

    def timed():
        call()
        synchronize(DEVICE)

    benchmark.group = case.name
    benchmark.pedantic(timed, rounds=5 if QUICK else 30, warmup_rounds=1 if QUICK else 3)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info |= case.rates(variant, benchmark.stats.stats.median * 1e3, limits)
