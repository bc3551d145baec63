"""The functions by which tests of several processes compare, and keep what they have measured: tests/support/parity.py."""

import math

import pytest
import torch

from tests.support import layouts, parity
from tests.support.parity import Counted, Measured

ONES = {"a": torch.ones(4), "b": torch.ones(3)}


def near(error):
    return {"a": torch.ones(4) + error, "b": torch.ones(3)}


@pytest.fixture
def kept(monkeypatch):
    """The numbers of this test."""
    numbers = []
    monkeypatch.setattr(parity, "_of_test", numbers)
    return numbers


@pytest.mark.parametrize("compare", [
    lambda error: parity.within("absolute", error, 1e-4, ""),
    lambda error: parity.moved_alike(near(error), ONES, {"a": torch.zeros(4), "b": torch.zeros(3)}),
    lambda error: parity.elements_alike(near(error), ONES, rtol=1e-4, atol=1e-8),
    lambda error: parity.norms_alike(near(error)["a"], ONES["a"], 1e-4, "", "a reference"),
    lambda error: parity.logs_alike([{"step": 1, "loss": 1.0 + error}], [{"step": 1, "loss": 1.0}]),
])  # fmt: skip
def test_a_difference_above_its_limit_fails_and_one_below_is_kept(compare, kept):
    compare(5e-5)
    (measured,) = kept
    assert 2e-5 < measured.error < 6e-5 and measured.limit == 1e-4
    for error in (2e-3, -2e-3, math.nan, math.inf):
        with pytest.raises(AssertionError):
            compare(error)
    assert kept == [measured]


@pytest.mark.parametrize("got, want", [
    (near(1e-7), ONES), (near(math.nan), near(math.nan)), ({"a": ONES["a"]}, ONES), ({}, {}), (ONES["a"], torch.ones(5)),
    (ONES["a"].double(), ONES["a"]),
])  # fmt: skip
def test_bits_are_the_same_or_not(got, want, kept):
    parity.bit_for_bit(ONES, near(0.0))
    with pytest.raises(AssertionError):
        parity.bit_for_bit(got, want)
    assert len(kept) == 1


def test_logs_of_other_steps_or_names_differ():
    for got in ([], [{"step": 2, "loss": 1.0}], [{"step": 1}], [{"loss": 1.0, "step": 1}]):
        with pytest.raises(AssertionError):
            parity.logs_alike(got, [{"step": 1, "loss": 1.0}])


def test_of_each_kind_the_largest_is_written_and_the_numbers_of_other_tests_stay(tmp_path, monkeypatch):
    one, other, *_ = sorted(layouts.of_several_processes(layouts.marks()))
    monkeypatch.setattr(layouts, "MEASURED", tmp_path / "parity.json")
    layouts.MEASURED.write_text("{}")
    numbers = [Measured("movement", parity.ONE, 1e-4, error, case) for error, case in ((1e-6, "a"), (3.14159e-6, "b"))]
    numbers += [Measured("bits", "a run", 0.0, 0.0, "a"), *[Counted("x", 8, 4_200_000_000, "counted")] * 2]
    entry = parity.entry(numbers)
    assert entry["measured"] == [
        {"unit": "movement", "versus": parity.ONE, "limit": 1e-4, "error": 3.1e-6, "case": "b", "cases": 2},
        {"unit": "bits", "versus": "a run", "limit": 0.0, "error": 0.0, "case": "a", "cases": 1},
    ]
    assert entry["bytes"] == [{"what": "x", "before": 8, "after": 4_200_000_000, "how": "counted"}]
    layouts.write_measured({one: entry, "tests/test_gone.py::test_gone": entry})
    layouts.write_measured({other: parity.entry(numbers[:1])})
    assert list(layouts.measured()) == [one, other] and layouts.measured()[one] == entry
    notes = "\n".join(layouts.notes_of([one, "tests/test_x.py::test_x"]))
    words = "differs from one process by at most 3.1e-6 of the movement (limit 1e-4; largest of 2 cases: b)"
    assert f"1. `{one}`: equal bit for bit to a run; {words}\n2. `tests/test_x.py::test_x`\n" in notes
    assert f"| x | 8 | 4.2 GB | counted: `{one}` |" in layouts.table_of_bytes()
