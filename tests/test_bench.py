"""The benchmarks must run; what they print is for people to judge."""

import importlib

import pytest
import torch

from bench import _harness
from bench.__main__ import OPS


@pytest.mark.parametrize("op", OPS)
def test_every_case_is_right_and_runs(op, monkeypatch):
    def once(calls, device, budget_s):  # the interpreter is slow, and nobody reads these times
        return {name: (_harness.time_once(call, device),) * 3 for name, call in calls.items()}

    monkeypatch.setattr(_harness, "time_interleaved", once)
    limits = {"copy_bytes_per_s": 1e10, "gemm_flop_per_s": 1e11}
    for make in importlib.import_module(f"bench.bench_{op}").cases(torch.device("cpu"), quick=True):
        case = make()
        rows = _harness.run_case(case, torch.device("cpu"), limits, budget_s=0.0)
        assert len(rows) == len(case.variants) >= 2  # nobody fell out
        assert all(row["ms"] > 0 for row in rows)


def test_variants_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = _harness.time_interleaved(calls, torch.device("cpu"), budget_s=0.0)
    assert order[-4:] == ["a", "b", "a", "b"] and set(times) == {"a", "b"}
    assert all(low <= median <= high for median, low, high in times.values())


def test_a_wrong_result_is_not_timed():
    def check():
        raise AssertionError("wrong")

    case = _harness.Case("bad", {"ours": lambda: pytest.fail}, check)
    with pytest.raises(AssertionError, match="wrong"):
        _harness.run_case(case, torch.device("cpu"), {}, budget_s=0.0)
