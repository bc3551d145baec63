"""The benchmarks on a CPU: numbers of threads, memory, targets, and that ours and its peers do the same work."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
import time
import types

import pytest
import torch

from bench import __main__, _harness, _plots, bench_linear_loss, bench_sophia_step, results, start, targets, whole_step
from bench._llama import TINY

CPU = torch.device("cpu")
LIMITS = {"copy_bytes_per_s": 1e10, "gemm_flop_per_s": 1e11}
HEADER = {"device": "Some CPU", "kind": "cpu", "threads": "1, 2", "load": 0.1, "torch": "2.13", "commit": "abc", "date": "2026"}
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
# Milliseconds, and more, of every variant by the beginning of its name: all targets reached, each just about.
GOOD = {
    "ours, exact": dict(ms=100.0, extra_mib=60.0),
    "ours, nearest": dict(ms=240.0, extra_mib=60.0),
    "ours, compensated": dict(ms=490.0, extra_mib=60.0, gb_per_s=10.0),
    "ours, first step": dict(ms=9000.0, first_step_s=4.9, first_step_processor_s=4.8),
    "ours, import": dict(ms=2290.0),
    "ours, AdamW": dict(ms=95.0, peak_mib=2190.0),
    "bare GEMMs": dict(ms=88.0),
    "ours": dict(ms=100.0, extra_mib=120.0 + 76.0, gradients_mib=120.0, peak_mib=2190.0),
    "published SOUL, eager": dict(ms=510.0),
    "published recipe": dict(ms=810.0, peak_mib=2000.0),
    "torch AdamW, foreach": dict(ms=101.0),
    "torch AdamW, fused": dict(ms=67.0),
    "plain PyTorch": dict(ms=96.0, peak_mib=2000.0),
    "import torch": dict(ms=2000.0),
}
WORSE = {"ms": 3.0, "extra_mib": 3.0, "first_step_s": 2.0, "first_step_processor_s": 2.0, "peak_mib": 1.2}


def rows_of_a_cpu(monkeypatch, worse=()):
    """Rows of all cases of a CPU, under the names that they have there, without measuring.

    ``worse``: beginnings of the names of variants that do badly.
    """
    monkeypatch.setattr(bench_sophia_step, "gpt2", lambda: [(2,)])
    monkeypatch.setattr(bench_sophia_step, "check_room", lambda nbytes: None)
    monkeypatch.setattr(bench_sophia_step, "blocks", lambda millions: [(millions,)])
    modules = {"sophia_step": bench_sophia_step, "step": whole_step, "start": start}
    made = [(op, make()) for op, module in modules.items() for make in module.cases(CPU, quick=False)]
    made.append(("linear_loss", bench_linear_loss.make_labelled_case(4096, 1024, 576, 49152, CPU)))
    rows = []
    for op, case in made:
        for count in (1, 2):
            for variant in case.variants:
                fields = dict(next((values for name, values in GOOD.items() if variant.startswith(name)), {"ms": 1.0}))
                if variant.startswith(worse) and worse:
                    fields = {name: value * WORSE.get(name, 1.0) for name, value in fields.items()}
                    fields["gb_per_s"] = 10.0 if "124 M" in variant else 5.0
                fields |= {"threads": count, "processor_ms": fields["ms"] * count}
                rows.append({"op": op, "case": __main__.with_threads(case.name, count), "variant": variant} | fields)
    return rows


def untimed(calls, device, budget_s):
    return dict.fromkeys(calls, (1.0, 1.0, 1.0, 1.0))


def judged(rows):
    verdicts = targets.main([{"environment": HEADER, "ceilings": LIMITS, "rows": rows}])[len(targets.TARGETS) :]
    return {target.what: verdict for target, verdict in zip(targets.CPU_TARGETS, verdicts, strict=True)}


def test_every_target_of_a_cpu_has_rows_that_reach_it_and_rows_that_do_not(monkeypatch, capsys):
    good = judged(rows_of_a_cpu(monkeypatch))
    assert set(good.values()) == {"pass", "reached"}, good
    bad = judged(rows_of_a_cpu(monkeypatch, worse="ours"))
    assert set(bad.values()) == {"fail", "short of"}, bad
    aims = [what for what, verdict in bad.items() if verdict == "short of"]
    assert aims == ["the same over torch AdamW, fused"] and good[aims[0]] == "reached"
    out = capsys.readouterr().out
    assert "Some CPU" in out and "threads 1, 2, load 0.1" in out
    assert "got 290 ms   [start of a process" in out and "got 5.1x" not in out


def test_one_number_of_threads_that_fails_is_enough(monkeypatch, capsys):
    rows = rows_of_a_cpu(monkeypatch)
    for row in rows:
        if row["case"].endswith("2 threads") and row["variant"] == "ours" and row["op"] == "linear_loss":
            row["ms"] = 102.0
    assert judged(rows)["loss, 1,024 of 4,096 tokens, V 49152, over bare GEMMs"] == "fail"
    assert "got 1.159x   [CE, N 1024 of 4096, D 576, V 49152, float32, trained head, 2 threads" in capsys.readouterr().out


def test_what_has_no_row_or_no_peer_is_not_measured(monkeypatch):
    rows = rows_of_a_cpu(monkeypatch)
    assert set(judged([]).values()) == {"not measured"}
    alone = [row for row in rows if row["variant"].startswith("ours")]
    verdicts = judged(alone)
    assert verdicts["step, fp32, over torch AdamW, foreach"] == verdicts["import soul, beyond torch's own"] == "not measured"
    assert verdicts["first step, compiled before"] == "pass"
    # Where the system tells no memory, and where a peer did not run.
    for row in rows:
        row.update({name: None for name in ("extra_mib", "peak_mib") if name in row})
        if row["variant"].startswith("torch AdamW"):
            del row["ms"], row["processor_ms"]
    verdicts = judged(rows)
    for what in (
        "the same, peak memory",
        "step, memory beyond parameters, gradients and states",
        "step, fp32, over torch AdamW, foreach",
    ):
        assert verdicts[what] == "not measured"
    # What is wrong fails, also without a time.
    case = "SOUL.step, GPT-2 124M, float32, 1 thread"
    wrong = {"op": "sophia_step", "case": case, "variant": "ours", "reason": _harness.WRONG + "not the reference's bits"}
    assert judged([wrong])["step, fp32, over torch AdamW, foreach"] == "fail"


def test_one_thread_is_judged_by_what_it_worked_and_more_by_what_one_waits():
    row = {"ms": 5.0, "processor_ms": 3.0, "gb_per_s": 2.0}
    assert _harness.cost(row | {"threads": 1}) == 3.0 and _harness.cost(row | {"threads": 2}) == _harness.cost(row) == 5.0
    assert targets.cost_of_a_byte(row | {"threads": 1}) == 3.0 / 10.0 and targets.cost_of_a_byte({"ms": 5.0}) is None


def test_a_picture_shows_what_is_judged():
    """A bar is as long as the cost, and where the wall's time says nothing it has no whiskers."""
    matplotlib = pytest.importorskip("matplotlib.figure")
    row = {"variant": "ours", "ms": 50.0, "ms_p20": 40.0, "ms_p80": 90.0, "processor_ms": 30.0, "extra_mib": 5.0}
    for threads, length, text in ((1, 30.0, "30 ms of a processor, 5 MiB"), (2, 50.0, "50 ms")):
        axes = matplotlib.Figure().add_subplot()
        _plots._bars(axes, [row | {"threads": threads}])
        assert axes.patches[0].get_width() == length and axes.texts[0].get_text() == text


def test_what_a_process_works_that_was_started_counts():
    begun = _harness.worked_s()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert _harness.worked_s() - begun > 0.03


@needs_linux
def test_a_case_that_the_machine_has_no_room_for_is_not_made(monkeypatch):
    _harness.check_room(1)
    with pytest.raises(torch.OutOfMemoryError):
        _harness.check_room(2**60)
    asked = []
    monkeypatch.setattr(bench_sophia_step, "blocks", lambda millions: [(millions,)])
    monkeypatch.setattr(bench_sophia_step, "check_room", asked.append)
    bench_sophia_step.make_sizes_case(CPU)
    assert asked == [11 * 620e6]


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "100000", ""])
def test_numbers_of_threads_that_cannot_be_are_refused(value, capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(["grad_norm", "--device", "cpu", f"--threads={value}"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(rf"--threads: expected whole numbers from 1 to {_harness.cores()}, .*, got '{value}'", error)


@pytest.mark.parametrize("argv, message", [
    (["step", "--threads"], "--threads: expected at least one argument"),
    (["--threads", "1", "step"], "got 'step'; names of ops come before --threads"),
    (["--model", "h100", "--threads", "1"], "--model: expected no --threads"),
])  # fmt: skip
def test_threads_where_they_have_no_meaning_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        __main__.main([*argv, "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_a_gpu_has_no_threads_to_set(monkeypatch, capsys):
    monkeypatch.setattr(torch, "empty", lambda *args, **options: None)
    with pytest.raises(SystemExit):
        __main__.main(["--device", "cuda", "--threads", "1"])
    assert "--threads: expected --device cpu" in capsys.readouterr().err


def test_every_case_is_measured_with_every_number_of_threads(monkeypatch, tmp_path, capsys):
    """But for those that are measured once, with the most."""
    seen = []

    def case(name, **more):
        seen.append((name, torch.get_num_threads()))
        return _harness.Case(name, {"ours": lambda: lambda: None}, dict, **more)

    module = types.SimpleNamespace(cases=lambda device, quick: [lambda: case("a"), lambda: case("b", once=True)])
    monkeypatch.setattr(__main__.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(__main__, "ceilings", lambda device: LIMITS)
    monkeypatch.setattr(_harness, "time_interleaved", untimed)
    monkeypatch.setattr(__main__, "cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    assert (
        __main__.main(["grad_norm", "--device", "cpu", "--budget", "0", "--results", str(tmp_path), "--threads", "2", "1", "2"])
        == 0
    )
    assert seen == [("a", 1), ("b", 1), ("a", 2), ("b", 2)] and torch.get_num_threads() == before
    written = results.read(tmp_path)
    assert [(row["case"], row["threads"]) for row in written["rows"]] == [
        ("a, 1 thread", 1),
        ("a, 2 threads", 2),
        ("b, 2 threads", 2),
    ]
    assert written["environment"]["threads"] == "1, 2" and written["environment"]["cores"] >= 1
    assert {"vector", "load", "highest load"} <= written["environment"].keys()
    assert "ceilings, 1 thread: " in capsys.readouterr().out


@pytest.mark.parametrize("name, folder", [
    ("Intel(R) Xeon(R) Processor", "intel-xeon-processor"),
    ("AMD EPYC 7B13 64-Core Processor", "amd-epyc-7b13-64-core-processor"),
    ("Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", "intel-core-i7-8650u-cpu-1-90ghz"),
    ("../../etc", "etc"),
    ("龙芯", "unknown"),
])  # fmt: skip
def test_a_folder_is_named_after_the_processor(name, folder, tmp_path):
    assert results.folder_of({"device": name}, tmp_path) == tmp_path / folder


@needs_linux
def test_memory_of_a_call_is_what_its_pages_take():
    def call():
        torch.ones(2**24)  # 64 MiB, given back at once

    assert 60 < _harness.peak_extra_mib(call, CPU) < 80
    held = []
    variants = {"ours": lambda: lambda: held.append(torch.ones(2**22)), "peer": lambda: call}
    measured = _harness.measure(variants, CPU, budget_s=0.0)
    assert measured["ours"]["extra_mib"] >= 15 and measured["ours"]["peak_mib"] >= 30  # two calls, each of which stays
    assert 60 < measured["peer"]["peak_mib"] < 80  # not what came before it


def test_where_the_system_tells_no_memory_there_is_none(monkeypatch):
    called = []
    monkeypatch.setattr(_harness.Resident, "_read", lambda name: None)
    assert _harness.peak_extra_mib(lambda: called.append(1), CPU) is None and called == [1]
    measured = _harness.measure({"ours": lambda: lambda: None}, CPU, budget_s=0.0)
    assert measured["ours"]["extra_mib"] is measured["ours"]["peak_mib"] is None


def test_slow_calls_are_warmed_up_by_those_before_and_take_fewer_rounds(monkeypatch):
    counts = {"slow": 0, "fast": 0}

    def slow():
        counts["slow"] += 1
        time.sleep(0.003)

    monkeypatch.setattr(_harness, "SLOW_MS", 2.0)
    monkeypatch.setattr(_harness, "ROUNDS", ((0.0, 5), (0.002, 3), (60.0, 1)))
    calls = {"slow": slow, "fast": lambda: counts.__setitem__("fast", counts["fast"] + 1)}
    _harness.time_interleaved(calls, CPU, budget_s=0.0)
    assert counts == {"slow": 1 + 3, "fast": 4 + 3}
    counts["slow"] = 0
    _harness.time_interleaved({"slow": slow}, CPU, budget_s=0.0)
    assert counts["slow"] == 3  # the first one counts
    monkeypatch.setattr(_harness, "ROUNDS", ((0.0, 1),))
    median, low, high, worked = _harness.time_interleaved({"slow": slow}, CPU, budget_s=0.0)["slow"]
    assert median == low == high >= 3.0 > worked  # sleep is no work of a processor


@pytest.fixture
def labelled_case(monkeypatch):
    monkeypatch.setattr(bench_linear_loss, "compiled", lambda function: function)
    monkeypatch.setattr(bench_linear_loss, "inductor_chunks", lambda: bench_linear_loss.of_labelled_tokens)
    monkeypatch.setattr(_harness, "time_interleaved", untimed)
    torch.manual_seed(0)
    return bench_linear_loss.make_labelled_case(64, 16, 32, 200, CPU)


def test_losses_of_some_tokens_are_the_same_loss(labelled_case, without_kernels):
    rows = {row["variant"]: row for row in _harness.run_case(labelled_case, CPU, LIMITS, budget_s=0.0)}
    assert {"bare GEMMs", "ours", "plain Hugging Face loss", "eager, of tokens with a label"} <= rows.keys()
    assert max(rows["ours"]["errors"].values()) < 1e-5
    assert (
        rows["ours"]["gradients_mib"] == pytest.approx((64 * 32 + 200 * 32) * 4 / 2**20)
        and rows["ours"]["percent_of_floor"] > 0
    )


def test_a_loss_of_other_tokens_is_not_timed(labelled_case, without_kernels, monkeypatch):
    right = bench_linear_loss.of_all_tokens
    monkeypatch.setattr(
        bench_linear_loss, "of_all_tokens", lambda inputs: right(dataclasses.replace(inputs, labels=inputs.labels.clamp(min=0)))
    )
    with pytest.raises(AssertionError, match="ours: "):
        labelled_case.check()


def test_compiled_steps_are_checked_by_name(monkeypatch):
    """ "auto" takes the reference for what is small, which is no check of what is timed."""
    asked = []

    def optimizer(params, *, backend, **options):
        asked.append(backend)
        return bench_sophia_step.SOUL(params, backend="reference", **options)

    bench_sophia_step.check(optimizer, [{}], CPU, torch.float32, False)
    assert asked == ["compile", "reference"]


@pytest.mark.parametrize(
    "program, row_fields", [("print(4.0, 3.0)", {"first_step_s": 4.0, "first_step_processor_s": 3.0}), ("pass", {})]
)
def test_a_process_tells_seconds_but_for_its_first(program, row_fields, tmp_path):
    call = start.Process(program, str(tmp_path))
    call()
    assert call.row_fields == {}  # it has compiled
    call()
    assert call.row_fields == row_fields


def test_a_process_that_fails_says_why(tmp_path):
    call = start.Process("import warnings; warnings.warn('no compiler', RuntimeWarning)", str(tmp_path))
    with pytest.raises(RuntimeError, match="no compiler"):
        call()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the extra hf")
def test_adamw_here_is_compared_with_adamw_there(without_kernels):
    def other(setup, model, device, **options):
        step = whole_step.ours(setup, model, device, optimizer="adamw", **options)
        step.optimizer.param_groups[0]["maximize"] = True
        return step

    adamw = next(iter(whole_step.cpu_cases(CPU))).args[1]["ours, AdamW"]
    variants = {"ours, AdamW": adamw, "ours, SOUL": whole_step.ours, "ours, AdamW, up the hill": other}
    errors = whole_step.check(variants, 1.0, TINY, CPU, torch.float32)
    assert errors["ours, AdamW"]["1 - cosine of updates"] < 1e-3 and errors["ours, SOUL"]["error of the likelihoods"] < 1e-4
    assert isinstance(errors["ours, AdamW, up the hill"], str)
