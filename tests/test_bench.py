"""The benchmarks must run; what they print is for people to judge."""

import importlib

import pytest
import torch

from bench import _harness
from bench.__main__ import OPS


@pytest.mark.parametrize("op", OPS)
def test_every_case_is_right_and_runs(op):
    limits = {"copy_bytes_per_s": 1e10, "gemm_flop_per_s": 1e11}
    for make in importlib.import_module(f"bench.bench_{op}").cases(torch.device("cpu"), quick=True):
        case = make()
        rows = _harness.run_case(case, torch.device("cpu"), limits, budget_s=0.0)
        assert len(rows) == len(case.variants) >= 2  # nobody fell out
        assert all(row["ms"] > 0 for row in rows)


def test_a_wrong_result_is_not_timed():
    def check():
        raise AssertionError("wrong")

    case = _harness.Case("bad", {"ours": lambda: pytest.fail}, check)
    with pytest.raises(AssertionError, match="wrong"):
        _harness.run_case(case, torch.device("cpu"), {}, budget_s=0.0)
