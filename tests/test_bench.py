"""The benchmarks must run; what they print is for people to judge."""

import importlib
import json
import sys

import pytest
import torch

from bench import __main__, _harness, host_part
from bench import bench_sophia_step as step_bench
from bench.__main__ import OPS
from soul import SOUL, SophiaG

LIMITS = {"copy_bytes_per_s": 1e10, "gemm_flop_per_s": 1e11}
CPU = torch.device("cpu")
PEERS = ("optimi", "FlashOptim")  # need not be installed, or not run without a GPU


@pytest.fixture
def untimed(monkeypatch):
    """The interpreter is slow, and nobody reads its times: that every variant was called once must do."""
    monkeypatch.setattr(_harness, "time_interleaved", lambda calls, device, budget_s: dict.fromkeys(calls, (1.0, 1.0, 1.0)))


@pytest.mark.parametrize("op", OPS)
def test_every_case_is_right_and_runs(op, untimed):
    for make in importlib.import_module(f"bench.bench_{op}").cases(CPU, quick=True):
        case = make()
        rows = _harness.run_case(case, CPU, LIMITS, budget_s=0.0)
        assert len(rows) == len(case.variants) >= 2
        for row in rows:
            assert row.get("ms", 0) > 0 or row["variant"].startswith(PEERS) and row["reason"], row
            assert not isinstance(case.bytes, dict) or "reason" in row or row["gb_per_s"] > 0, row


def test_variants_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = _harness.time_interleaved(calls, CPU, budget_s=0.0)
    assert order[-4:] == ["a", "b", "a", "b"] and set(times) == {"a", "b"}
    assert all(low <= median <= high for median, low, high in times.values())


def test_a_wrong_result_is_not_timed():
    def check():
        raise AssertionError("wrong")

    case = _harness.Case("bad", {"ours": lambda: pytest.fail}, check)
    with pytest.raises(AssertionError, match="wrong"):
        _harness.run_case(case, CPU, LIMITS, budget_s=0.0)


def test_a_missing_peer_is_a_line_and_a_failing_one_too_but_ours_must_run(untimed, capsys):
    def missing():
        import no_such_package  # noqa: F401

    def failing():
        raise ValueError("not on this machine")

    variants = {"ours": lambda: lambda: None, "a peer": missing, "another": failing}
    rows = _harness.run_case(_harness.Case("case", variants, dict), CPU, LIMITS, budget_s=0.0)
    assert [row.get("reason") for row in rows] == [
        None,
        "no_such_package: not installed",
        "did not run: ValueError: not on this machine",
    ]
    assert "no_such_package: not installed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not on this machine"):
        _harness.run_case(_harness.Case("case", {"ours": failing}, dict), CPU, LIMITS, budget_s=0.0)


def test_bytes_are_those_of_the_table_and_of_the_states():
    """Against research: 14 B/param in bf16, 10.06 with 8-bit states, 2 more for low bits; and against what is allocated."""
    half, options = torch.bfloat16, dict(param_rounding="nearest")
    count = step_bench.bytes_per_param
    assert [count(half, soul, state_dtype=half, **options) for soul in (False, True)] == [12, 14]
    assert [count(torch.float32, soul) for soul in (False, True)] == [24, 28]
    assert round(count(half, True, state_dtype="8bit", **options), 2) == 10.06
    for dtype in (torch.float32, half):
        for state_dtype in step_bench.STATE_DTYPES:
            for rounding in step_bench.ROUNDINGS:
                options = dict(param_rounding=rounding, state_dtype=state_dtype)
                params = step_bench.make_params([(512,)], CPU, dtype)
                opt = SOUL(params, backend="reference", **options)
                opt.step()
                states = sum(value.nbytes for value in opt.state[params[0]].values() if value.numel() > 1)
                assert count(dtype, True, **options) * 512 == 3 * params[0].nbytes + 2 * states


def test_a_wrong_kernel_fails_the_check(monkeypatch):
    from soul_kernels import sophia_step as package_op  # noqa: F401

    module = importlib.import_module("soul.optimizer")
    right = module.sophia_step

    def wrong(*args, backend, beta1, **options):
        right(*args, backend=backend, beta1=beta1 if backend == "reference" else beta1 * 0.999, **options)

    monkeypatch.setattr(module, "sophia_step", wrong)
    for optimizer in (SophiaG, SOUL):
        with pytest.raises(AssertionError, match="not the reference's bits"):
            step_bench.check(optimizer, [dict(state_dtype="8bit")], CPU, torch.bfloat16, True)


def test_command_writes_rows_and_pictures(tmp_path, untimed, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(__main__, "ceilings", lambda device: LIMITS)
    rows, plots = tmp_path / "rows.json", tmp_path / "plots"
    __main__.main(["grad_norm", "--device", "cpu", "--quick", "--json", str(rows), "--plots", str(plots)])
    found = json.loads(rows.read_text())
    assert found["environment"]["torch"] == torch.__version__ and "triton" in found["environment"]
    assert {row["op"] for row in found["rows"]} == {"grad_norm"} and len(found["rows"]) == 3
    (picture,) = plots.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in capsys.readouterr().out
    __main__.main(["grad_norm", "--device", "cpu", "--quick", "--only", "no such case", "--json", str(rows)])
    assert json.loads(rows.read_text())["rows"] == []


def test_pictures_without_matplotlib_name_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        __main__.main(["--plots", "nowhere"])
    assert "pip install 'soul-kernels[bench]'" in capsys.readouterr().err


def test_host_part_launches_nothing_and_says_so(capsys):
    host_part.main(rounds=2)
    out = capsys.readouterr().out
    assert "launch left out" in out and "not a step time" in out
