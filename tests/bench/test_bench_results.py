"""Results of the benchmarks as files, what is read out of them, and the command line around it."""

import copy
import importlib
import importlib.util
import json
import re
import sys
import types

import pytest
import torch

from bench import (
    __main__,
    _harness,
    _plots,
    bench_linear_gnb,
    bench_linear_loss,
    bench_sophia_step,
    compare,
    plan,
    results,
    targets,
)

LIMITS = {"copy_bytes_per_s": 1e12, "gemm_flop_per_s": 1e14}
HEADER = {
    "device": "Some Card 80GB",
    "kind": "cuda",
    "torch": "2.11",
    "triton": "3.6",
    "commit": "abc",
    "date": "2026-11-24 22:00 UTC",
}


def row(op, case, variant, ms, **more):
    return {
        "op": op,
        "case": case,
        "variant": variant,
        "ms": ms,
        "ms_p20": 0.9 * ms,
        "ms_p80": 1.1 * ms,
        "extra_mib": None,
    } | more


def results_of(*rows, **header):
    return {"environment": HEADER | header, "ceilings": LIMITS, "rows": list(rows)}


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr(_harness, "time_interleaved", lambda calls, device, budget_s: dict.fromkeys(calls, (1.0, 1.0, 1.0)))
    monkeypatch.setattr(__main__, "ceilings", lambda device: LIMITS)


def test_results_come_back_as_they_were_written_but_for_digits(tmp_path):
    rows = [row("step", "a", "ours", 1 / 3, phases={"forward": 2 / 3}), row("step", "a", "peer", 2.0)]
    path = results.folder_of(HEADER, tmp_path) / "step.json"
    results.write(path, HEADER, LIMITS, rows, {"fits": [1 / 7]})
    assert path == tmp_path / "some-card-80gb" / "step.json"
    read = results.read(path)
    assert read["environment"] == HEADER and read["ceilings"] == LIMITS and read["summary"] == {"fits": [0.14286]}
    assert [r["variant"] for r in read["rows"]] == ["ours", "peer"]
    assert read["rows"][0]["ms"] == 0.33333 and read["rows"][0]["phases"] == {"forward": 0.66667}
    results.write(path.with_name("grad_norm.json"), HEADER | {"date": "2027"}, LIMITS, [row("grad_norm", "b", "ours", 1.0)])
    together = results.read(path.parent)
    assert {r["op"] for r in together["rows"]} == {"step", "grad_norm"} and together["environment"]["date"] == "2027"
    assert together["environment"]["commit"] == "abc"
    # Rows of two runs are not passed off as rows of the newer one.
    results.write(path, HEADER | {"commit": "old", "date": "2025"}, LIMITS, rows)
    assert results.read(path.parent)["environment"] == HEADER | {"date": "2027", "commit": "abc, old"}
    results.write(tmp_path / "none.json", HEADER, LIMITS, [])
    assert results.read(tmp_path / "none.json")["rows"] == []


def test_what_holds_no_results_is_refused_by_name(tmp_path):
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for name in ("other.json", "broken.json", "missing.json", "empty"):
        with pytest.raises(ValueError, match=rf"^results: .*{name}"):
            results.read(tmp_path / name)
    for card in ("A", "B"):
        results.write(tmp_path / "cards" / f"{card}.json", HEADER | {"device": card}, LIMITS, [])
    with pytest.raises(ValueError, match="results of one device, got A, B"):
        results.read(tmp_path / "cards")


def test_the_command_writes_one_file_an_op(tmp_path, untimed, capsys):
    __main__.main(["grad_norm", "hessian_ema", "--device", "cpu", "--quick", "--results", str(tmp_path)])
    files = sorted(tmp_path.rglob("*.json"))
    assert [file.name for file in files] == ["grad_norm.json", "hessian_ema.json"]
    for file in files:
        read = results.read(file)
        assert {r["op"] for r in read["rows"]} == {file.stem} and read["environment"]["kind"] == "cpu"
        assert read["environment"]["date"].endswith("UTC") and file.stat().st_size < 20_000
        assert str(file) in capsys.readouterr().out or file != files[0]
    assert __main__.main(["--compare", str(files[0]), str(files[0])]) == 0


def test_without_being_asked_nothing_is_written(tmp_path, untimed, monkeypatch):
    monkeypatch.setattr(results, "write", lambda *args: pytest.fail("written"))
    __main__.main(["grad_norm", "--device", "cpu", "--quick"])


@pytest.mark.parametrize("factor, spread, status", [
    (1.5, 0.1, 1),  # clearly slower
    (1.15, 0.1, 0),  # within what both runs scatter: the median alone is above the first one's 80th percentile
    (1.15, 0.01, 1),  # the same, told apart by steadier runs
    (0.95, 0.1, 0),  # not faster either
    (0.5, 0.1, 0),  # faster
])  # fmt: skip
def test_a_regression_is_what_is_slower_beyond_the_spread(factor, spread, status, tmp_path, capsys):
    before = [
        row("step", "a", "ours", 1.0),
        row("step", "a", "peer", 5.0),
        {"op": "x", "case": "c", "variant": "v", "reason": "no"},
    ]
    after = copy.deepcopy(before)
    after[0] |= {"ms": factor, "ms_p20": factor * (1 - spread), "ms_p80": factor * (1 + spread)}
    before[0] |= {"ms_p20": 1 - spread, "ms_p80": 1 + spread}
    for name, rows in (("A", before), ("B", after)):
        results.write(tmp_path / f"{name}.json", HEADER, LIMITS, rows)
    assert __main__.main(["--compare", str(tmp_path / "A.json"), str(tmp_path / "B.json")]) == status
    out = capsys.readouterr().out
    assert f"{status} slower, {int(factor == 0.5)} faster" in out and ("step: a: ours" in out) == (status == 1 or factor == 0.5)


def test_rows_are_compared_with_their_like_and_missing_ones_are_told(tmp_path, capsys):
    results.write(tmp_path / "A", HEADER, LIMITS, [row("step", "a", "ours", 1.0), row("step", "b", "ours", 9.0)])
    results.write(
        tmp_path / "B", HEADER | {"device": "Another"}, LIMITS, [row("step", "b", "ours", 9.0), row("loss", "a", "ours", 3.0)]
    )
    assert compare.main(tmp_path / "A", tmp_path / "B") == 0
    out = capsys.readouterr().out
    assert "not the same device: Some Card 80GB, then Another" in out and "step: a: ours" in out and "1 missing" in out


ONE_B = "SOUL.step, Llama-3.2-1B, bfloat16"
EIGHT = "ours, compensated, 8-bit states, 12.25 B/param"


def verdicts(*rows, **header):
    judged = targets.main([results_of(*rows, **header)])
    return {target.what: verdict for target, verdict in zip(targets.TARGETS, judged)}


def test_without_results_nothing_is_measured(capsys):
    assert __main__.main(["--targets"]) == 0
    out = capsys.readouterr().out
    assert out.count("not measured  ") == len(targets.TARGETS + targets.CPU_TARGETS) and out.count("0 pass, 0 fail") == 2
    # Nor those of a GPU by a processor, nor any by rows that did not run.
    reason = {"op": "sophia_step", "case": ONE_B, "variant": EIGHT, "reason": "no"}
    for one in (verdicts(row("sophia_step", ONE_B, EIGHT, 1.0, percent_of_copy=99.0), kind="cpu"), verdicts(reason)):
        assert set(one.values()) == {"not measured"}


def test_what_is_wrong_fails_its_targets(capsys):
    """A case as a whole, under the name of "ours"; of ways to do the same one that is right may still pass."""
    case, reason = "step, llama-3.2-1b, x", "wrong, not timed: "
    steps = [row("step", case, name, ms) for name, ms in (("published recipe", 400.0), ("ours, eager", 20.0))]
    steps.append({"op": "step", "case": case, "variant": "ours, --cuda-graph", "reason": f"{reason}RuntimeError"})
    verdict_of = verdicts({"op": "sophia_step", "case": ONE_B, "variant": "ours", "reason": f"{reason}h is"}, *steps)
    assert (
        verdict_of["SOUL step, 1.24 B, 8-bit states, compensated weights"]
        == verdict_of["the same against SOUL's code"]
        == "fail"
    )
    assert verdict_of["whole SOUL step, 1B, against the published recipe"] == "pass"
    assert f"[{ONE_B}: ours: wrong, not timed: h is]" in capsys.readouterr().out


@pytest.mark.parametrize("percent, ms, expected", [(95.0, 5.0, ("pass", "pass")), (89.0, 5.5, ("fail", "fail"))])
def test_targets_pass_and_fail_by_the_numbers_of_the_files(percent, ms, expected, capsys):
    rows = [
        row("sophia_step", ONE_B, EIGHT, ms, percent_of_copy=percent),
        row("sophia_step", ONE_B, "published SOUL, eager, 14 B/param", 32.1),
        row("sophia_step", "SophiaG.step, Llama-3.2-1B, bfloat16", EIGHT, 99.0, percent_of_copy=1.0),  # another op
    ]
    verdict_of = verdicts(*rows)
    names = ("SOUL step, 1.24 B, 8-bit states, compensated weights", "the same against SOUL's code")
    assert tuple(verdict_of[name] for name in names) == expected
    assert sum(verdict != "not measured" for verdict in verdict_of.values()) == 2
    assert f"got {32.1 / ms:.4g}x" in capsys.readouterr().out


def test_the_worst_row_decides_unless_they_are_ways_to_do_the_same(capsys):
    half = [row("sophia_step", ONE_B, f"ours, {rounding}, fp32 states, 1 B/param", 1.0, percent_of_copy=percent)
            for rounding, percent in (("nearest", 99.0), ("compensated", 95.0), ("stochastic", 98.0))]  # fmt: skip
    steps = [row("step", "step, llama-3.2-1b, x", name, ms) for name, ms in (
        ("published recipe", 400.0), ("ours, eager", 50.0), ("ours, --cuda-graph", 20.0))]  # fmt: skip
    verdict_of = verdicts(*half, *steps)
    assert verdict_of["step, 1.24 B bf16 parameters, states of 16 bits or more, any rounding"] == "fail"
    assert verdict_of["whole SOUL step, 1B, against the published recipe"] == "pass"
    out = capsys.readouterr().out
    assert f"got 95% of copy   [{ONE_B}: ours, compensated" in out
    assert "got 20x   [step, llama-3.2-1b, x: ours, --cuda-graph]" in out


def test_every_target_has_rows_that_reach_it_and_rows_that_do_not():
    """With the names that cases and variants have on a GPU; a pattern that matches nothing would never be measured."""
    examples = rows_of_a_gpu(bad=False)
    for target in targets.TARGETS:
        good, bad = ("reached", "short of") if target.aim else ("pass", "fail")
        assert targets.judge(target, examples)[0] == good, target.what
        assert targets.judge(target, rows_of_a_gpu(bad=True))[0] == bad, target.what


def rows_of_a_gpu(bad):
    """Rows of all that targets speak of, all well or all badly done."""
    rows = []
    for name, _, dtype in bench_sophia_step.models():
        rounding = ("exact", "exact") if dtype == torch.float32 else ("compensated", "nearest")
        variants = [
            f"ours, {rounding[0]}, default states",
            f"ours, {rounding[1]}, bf16 states",
            f"ours, {rounding[0]}, 8-bit states",
        ]
        ms = 50.0 if bad else 0.05 if "LoRA" in name else 0.5
        for optimizer in ("SophiaG", "SOUL"):
            case = "sophia_step", f"{optimizer}.step, {name}, {str(dtype)[6:]}"
            rows += [row(*case, f"{v}, 1 B/param", ms, percent_of_copy=50.0 if bad else 99.0) for v in variants]
            rows.append(row(*case, f"published {optimizer}, eager, 1 B/param", 30.0))
            rows.append(row(*case, "torch AdamW, fused, 1 B/param", 1.0))
    for op, module in (("linear_loss", bench_linear_loss), ("linear_gnb", bench_linear_gnb)):
        for case in (make() for make in module.cases(torch.device("cuda"), quick=False)):
            for name in case.variants:
                mine = bad and name in ("ours", "ours, chunks of 4 GiB", "ours, bf16 logits")
                fields = dict(
                    percent_of_floor=200.0 if bad else 105.0,
                    errors=dict.fromkeys(("log p flat", "dW before rounding flat"), 1e-3 if bad else 1e-6),
                )
                fields["extra_mib"] = 50.0 if name == "ours" and not bad else 90.0
                rows.append(row(op, case.name, name, 2.0 if mine else 1.0, **fields))
    rows.append(row("token_logprob", "statistics", "ours", 1.0, errors={"1 - p": 1.0 if bad else 1e-4}))
    for name in ("llama-3.2-1b", "llama-2-7b"):
        case = ("step", f"step, {name}, 1 M parameters, bfloat16, 4 + 4 sequences")
        fields = dict(peak_mib=60e3 if bad else 30e3)
        rows.append(row(*case, "published recipe", 400.0))
        rows.append(row(*case, "ours, eager", 300.0, times_model=9.0, **fields))
        graph = (300.0, 9.0) if bad else (15.0, 1.2)
        rows.append(row(*case, "ours, --cuda-graph", graph[0], times_model=graph[1], **fields))
    return rows


def test_pictures_are_drawn_from_files(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    results.write(tmp_path / "r" / "all.json", HEADER, LIMITS, [
        row("sophia_step", ONE_B, EIGHT, 5.0, gb_per_s=900.0),
        row("sophia_step", ONE_B, "published SOUL, eager, 14 B/param", 30.0, gb_per_s=200.0),
        row("step", "step, x", "ours, eager", 50.0, model_flops=1e12, model_bytes=1e10),
        *(row("linear_loss", f"CE, N {n}, D 8, V 9, bfloat16, trained head", variant, 1.0, extra_mib=n / 2,
              at={"N": n, "D": 8, "V": 9}) for n in (512, 4096) for variant in ("ours", "eager")),
    ])  # fmt: skip
    monkeypatch.setattr(__main__, "run", lambda args: pytest.fail("measured"))
    assert __main__.main(["--from", str(tmp_path / "r"), "--plots", str(tmp_path / "p")]) == 0
    for name in ("roofline", "peers", "memory"):
        picture = tmp_path / "p" / f"{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000
        assert str(picture) in capsys.readouterr().out or name != "roofline"
    # Without rows to draw there are none, and nothing is made up.
    assert _plots.plot_results(results_of(row("x", "c", "ours", 1.0)), tmp_path / "none") == []


def test_points_of_the_roofline_are_what_rows_tell():
    x, y = _plots.intensity(row("sophia_step", ONE_B, EIGHT, 5.0, gb_per_s=900.0))
    assert (
        x == pytest.approx(_plots.STEP_FLOPS / 12.25) and y == pytest.approx(x * 900e9) and y < x * LIMITS["copy_bytes_per_s"]
    )
    assert _plots.intensity(row("step", "s", "ours", 50.0, model_flops=1e12, model_bytes=1e10)) == (100.0, pytest.approx(2e13))
    assert _plots.intensity(row("step", "s", "ours", 50.0)) is None


@pytest.mark.parametrize("argv, message", [
    (["nothing"], "no benchmark named nothing"),
    (["--from", "x"], "--from needs --plots"),
    (["--compare", "missing.json", "missing.json"], "results: .*missing.json"),
    (["--targets", "missing.json"], "results: .*missing.json"),
    (["plan", "--model", "70b", "--gpus", "0"], "gpus: "),
    (["plan", "--model", "70b", "--card", "toaster"], "card: "),
])  # fmt: skip
def test_what_is_wrong_on_the_command_line_is_told(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(argv)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_plan_is_an_estimate_and_says_whose_rates_it_takes(monkeypatch, capsys):
    argv = ["plan", "--model", "70b", "--gpus", "64", "--network", "25", "--gradient-checkpointing"]
    assert __main__.main(argv) == 0
    out = capsys.readouterr().out
    assert "estimate on paper" in out and "64 x h100, FSDP2" in out and "25 GB/s a GPU as given" in out and "70,5" in out
    # With a GPU its own ceilings, measured now.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(name="Some Card", total_memory=90e9)
    )
    monkeypatch.setattr(plan, "ceilings", lambda device: LIMITS)
    plan.main(argv[1:])
    out = capsys.readouterr().out
    assert "Some Card" in out and "measured in this run" in out and "at 1,000 GB/s and 100 TFLOP/s" in out
    plan.main([*argv[1:], "--card", "h200"])
    assert "h200" in capsys.readouterr().out


def test_what_does_not_fit_is_left_out_and_the_rest_goes_on(untimed, monkeypatch, tmp_path, capsys):
    def too_much():
        raise torch.OutOfMemoryError

    made = [_harness.Case(name, {"ours": make}, dict) for name, make in (("big", too_much), ("small", lambda: dict))]
    made.append(_harness.Case("apart", {"ours": too_much, "a peer": lambda: dict}, dict, alone=True))
    module = types.SimpleNamespace(cases=lambda device, quick: [too_much, *(lambda case=case: case for case in made)])
    monkeypatch.setattr(__main__.importlib, "import_module", lambda name: module)
    assert __main__.main(["grad_norm", "--device", "cpu", "--threads", "1", "--json", str(tmp_path / "rows.json")]) == 0
    out = capsys.readouterr().out
    assert (
        "big, 1 thread: left out" in out and "a case of grad_norm, 1 thread: left out" in out
    )  # the inputs alone are too much for the second
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(r["case"], r["variant"], "ms" in r) for r in rows] == [
        ("small, 1 thread", "ours", True), ("apart, 1 thread", "ours", False), ("apart, 1 thread", "a peer", True)]  # fmt: skip


def test_a_wrong_case_is_told_and_does_not_cost_the_others(untimed, monkeypatch, tmp_path, capsys):
    def check():
        raise AssertionError("dX is 0.5")

    def broken():
        raise RuntimeError("CUDA error")

    made = [_harness.Case("bad", {"ours": lambda: pytest.fail}, check), _harness.Case("good", {"ours": lambda: dict}, dict)]
    module = types.SimpleNamespace(cases=lambda device, quick: [broken, *(lambda case=case: case for case in made)])
    plots = importlib.util.find_spec("matplotlib") is not None
    if plots:
        importlib.import_module("matplotlib.backends.backend_agg")  # which imports by the function that is replaced
    monkeypatch.setattr(__main__.importlib, "import_module", lambda name: module)
    where = [
        "--json",
        str(tmp_path / "rows.json"),
        *(["--plots", str(tmp_path)] if plots else []),
    ]
    assert __main__.main(["grad_norm", "--device", "cpu", "--threads", "1", *where]) == 1
    assert "bad, 1 thread: wrong, not timed: dX is 0.5" in capsys.readouterr().out
    rows = results.read(tmp_path / "rows.json")["rows"]
    assert [(r["case"], "ms" in r, r.get("reason")) for r in rows] == [
        ("a case of grad_norm, 1 thread", False, "wrong, not timed: RuntimeError: CUDA error"),
        ("bad, 1 thread", False, "wrong, not timed: dX is 0.5"), ("good, 1 thread", True, None)]  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the extra hf")
def test_a_step_without_its_extra_is_a_line(untimed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert __main__.main(["step", "--device", "cpu", "--quick"]) == 0
    assert "left out: transformers is not installed; run: pip install 'soul-kernels[hf]'" in capsys.readouterr().out


def test_a_datasheet_stands_beside_the_ceilings_of_cards_that_are_known():
    assert _harness.datasheet("NVIDIA H100 80GB HBM3") == {"copy": " (datasheet 3350)", "gemm": " (datasheet 989)"}
    assert _harness.datasheet("NVIDIA H200")["copy"] == " (datasheet 4800)"
    for unknown in ("AMD EPYC", "NVIDIA H100 PCIe"):  # the second is slower than the card that is known
        assert _harness.datasheet(unknown) == {"copy": "", "gemm": ""}
