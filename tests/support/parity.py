"""What tests measure: how far the results of several processes are from those of one, and bytes before and after.

A test hands each comparison to one of the functions below, which asserts it, and keeps the number. With ``--parity``
(`make parity`) pytest writes the largest number of each test that is marked ``covers(feature, layout)`` for several processes,
or ``counts``, into tests/distributed/parity.json. Tests that did not run keep their numbers. tests/support/layouts.py prints
all of them on the page.
"""

import datetime
import math
import os
from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch

from tests.support import layouts
from tests.support.helpers import relative_error

ONE = "one process"  # what results are compared with, unless a test says otherwise
PROPERTY = "parity"  # in the report of a test


class Measured(NamedTuple):
    """A comparison: the difference in a unit of `layouts.UNITS`, the largest that the test admits, and which case it was."""

    unit: str
    versus: str
    limit: float
    error: float
    case: str


class Counted(NamedTuple):
    """Bytes without a feature and with it, and how they were found: "counted", "measured" or "computed"."""

    what: str
    before: int
    after: int
    how: str


_of_test: list[Measured | Counted] = []  # of the test that runs


def within(unit, error, limit, case, versus=ONE):
    """Assert that a difference is within its limit, and keep it."""
    error = float(error.detach() if isinstance(error, torch.Tensor) else error)
    assert 0 <= error <= limit, f"{case}: {error:.1e} > {limit:.0e} {layouts.UNITS[unit]}"
    _of_test.append(Measured(unit, versus, limit, error, str(case)))


def count(what, before, after, how="counted"):
    """Keep bytes that a test has compared with what they ought to be, for the table of the page."""
    _of_test.append(Counted(what, int(before), int(after), how))


def bit_for_bit(got, want, case="", versus=ONE):
    """Assert that two tensors, or those of two mappings or sequences, have the same dtype and the same values."""
    for name, value, wanted in _pairs(got, want):
        assert value.dtype == wanted.dtype and torch.equal(value, wanted), f"{case}: {name}"
    within("bits", 0.0, 0.0, case, versus)


def moved_alike(got, want, start, limit=1e-4, case="", versus=ONE):
    """Compare parameters relative to how far they have moved: ||got - want|| <= limit ||want - start||, over all of them."""
    pairs = list(_pairs(got, want))
    start = _named(start)
    off = sum((value.double() - wanted.double()).square().sum() for _, value, wanted in pairs).sqrt()
    moved = sum((wanted.double() - start[name].double()).square().sum() for name, _, wanted in pairs).sqrt()
    assert moved > 0, case
    within("movement", off / moved, limit, case, versus)


def elements_alike(got, want, rtol=0.0, atol=0.0, case="", versus=ONE):
    """Compare element by element, as torch.allclose does, and dtypes too; without tolerances bit for bit."""
    if not rtol:
        return bit_for_bit(got, want, case, versus)
    errors = [torch.zeros(1)]
    for name, value, wanted in _pairs(got, want):
        assert value.dtype == wanted.dtype, f"{case}: {name}"
        errors.append(((value.double() - wanted.double()).abs() / (wanted.double().abs() + atol / rtol)).flatten())
    within("element", torch.cat(errors).max(), rtol, case, versus)


def logs_alike(got, want, rel=1e-4, floor=0.1, case="", versus=ONE):
    """Compare the records of two logs: |got - want| <= rel max(|want|, floor) for each number, the rest is the same."""
    assert [list(record) for record in got] == [list(record) for record in want]
    errors = [0.0]
    for value, wanted in ((one[name], other[name]) for one, other in zip(got, want) for name in other):
        if isinstance(wanted, float):
            errors.append(abs(value - wanted) / max(abs(wanted), floor))
        else:
            assert value == wanted, case
    assert not any(map(math.isnan, errors)), case
    within("log", max(errors), rel, case, versus)


def norms_alike(got, want, limit, case, versus):
    """Compare the norm of a difference with that of what is wanted, as `tests.support.helpers.assert_close` does."""
    within("norm", relative_error(got, want), limit, case, versus)


def _named(tensors):
    if isinstance(tensors, torch.Tensor):
        return {"tensor": tensors}
    return tensors if isinstance(tensors, Mapping) else dict(enumerate(tensors))


def _pairs(got, want):
    got, want = _named(got), _named(want)
    assert got.keys() == want.keys() and got
    for name, wanted in want.items():
        assert got[name].shape == wanted.shape, name
        yield name, got[name], wanted


class Recorder:
    """The plugin of ``--parity``: takes the numbers of each test, from workers of pytest-xdist too, and writes them."""

    def __init__(self):
        self.by_test = {}

    def pytest_runtest_setup(self):
        _of_test.clear()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call":
            report.user_properties.append((PROPERTY, [list(one) for one in _of_test]))
        return report

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            test, _, case = report.nodeid.partition("[")
            for values in dict(report.user_properties).get(PROPERTY, []):
                one = Counted(*values) if len(values) == len(Counted._fields) else Measured(*values)
                if isinstance(one, Measured) and not one.case:
                    one = one._replace(case=case.removesuffix("]"))
                self.by_test.setdefault(test, []).append(one)

    def pytest_sessionfinish(self, session):
        if not hasattr(session.config, "workerinput"):
            layouts.write_measured({test: entry(measured) for test, measured in self.by_test.items()})


def entry(numbers):
    """Return the largest difference of each kind, all bytes, and where they were measured."""
    kinds = {}
    for one in numbers:
        if isinstance(one, Measured):
            kinds.setdefault((one.unit, one.versus, one.limit), []).append(one)
    largest = [(max(ones, key=lambda one: one.error), len({one.case for one in ones})) for ones in kinds.values()]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "torch": torch.__version__.partition("+")[0],
        "measured": [{**one._asdict(), "error": float(f"{one.error:.1e}"), "cases": cases} for one, cases in largest],
        "bytes": [one._asdict() for one in dict.fromkeys(numbers) if isinstance(one, Counted)],
    }


def machine():
    from soul.run.notes import device_name

    return f"{os.cpu_count()} cores, {device_name(torch.device('cpu'))}"
