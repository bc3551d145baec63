"""All cases of ``python -m bench`` for pytest-benchmark: ``python -m pytest bench --benchmark-only``; not in ``make test``."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.__main__ import MODULES
from bench._harness import WRONG, Case, Errors, Limits, ceilings, forget_compiled, free, start, synchronize
from soul._extras import MissingExtra

pytest.importorskip("pytest_benchmark", reason="the extra bench is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICK = DEVICE.type == "cpu"


def variants() -> Iterator[Any]:
    """Yield every variant of every case. A case is made here to learn its name and variants, and dropped again."""
    for name in MODULES.values():
        for make in importlib.import_module(name).cases(DEVICE, QUICK):
            case = make()
            if not case.default:
                continue
            yield from (pytest.param(make, name, id=f"{case.name}: {name}") for name in case.variants)
            del case


@pytest.fixture(scope="module")
def limits() -> Limits:
    return ceilings(DEVICE)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Case, Errors]:
    """Make a case and check it once for all of its variants; return it with its errors."""
    torch.manual_seed(0)
    forget_compiled()
    made = request.param()
    try:
        return made, made.check()
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """Give back the memory of a variant before the next one is made."""
    yield
    free(DEVICE)


@pytest.mark.parametrize("case, variant", variants(), indirect=["case"])
def test_variant(case: tuple[Case, Errors], variant: str, limits: Limits, benchmark: Any) -> None:
    made, errors = case
    assert not isinstance(errors.get(variant), str), errors[variant]
    call, reason = start(variant, made.variants[variant])
    assert not (reason or "").startswith(WRONG), reason
    if reason:
        pytest.skip(reason)

    def timed() -> None:
        call()
        synchronize(DEVICE)

    benchmark.group = made.name
    benchmark.pedantic(timed, rounds=5 if QUICK else 30, warmup_rounds=1 if QUICK else 3)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info |= made.rates(variant, benchmark.stats.stats.median * 1e3, limits)
