"""One checkout of the library against another: who is measured, in which order, and what is said of it."""

import json
import pathlib
import shlex
import shutil
import subprocess

import pytest
import torch

from bench import __main__, _harness, against, bench_linear_loss, bench_sophia_step, results

HEADER = {"device": "Some Card 80GB", "kind": "cuda", "torch": "2.13", "triton": "3.9", "commit": "abc", "date": "2026-11-26"}
LIMITS = {"copy_bytes_per_s": 1e12, "gemm_flop_per_s": 1e14}


def row(variant, ms, case="loss", **more):
    spread = {"ms_p20": 0.99 * ms, "ms_p80": 1.01 * ms} if ms is not None else {}
    return {"op": "grad_norm", "case": case, "variant": variant, "extra_mib": 8.0} | spread | ({"ms": ms} if ms else {}) | more


@pytest.fixture
def other(tmp_path):
    """A folder with both packages, which are empty."""
    for name in against.PACKAGES:
        (tmp_path / "old" / name).mkdir(parents=True)
        (tmp_path / "old" / name / "__init__.py").touch()
    return tmp_path / "old"


@pytest.fixture
def measured(monkeypatch):
    """Processes that are not started: rows of each checkout by its number in the order, and what was run, in order."""
    rows = {"old": [[row("ours", 2.0)], [row("ours", 2.1)]], "this": [[row("ours", 1.0)], [row("ours", 1.2)]]}
    runs = []

    def run(folder, argv):
        name = "this" if folder == against.ROOT else folder.name
        number = sum(ran == name for ran, _ in runs)
        runs.append((name, argv))
        if rows[name][number]:
            results.write(pathlib.Path(argv[argv.index("--json") + 1]), HEADER, LIMITS, rows[name][number])
        return 0

    monkeypatch.setattr(against, "run", run)
    monkeypatch.setattr(__main__, "environment", lambda device: HEADER)
    return rows, runs


def command(other, tmp_path, *more):
    return __main__.main(
        ["grad_norm", *more, "--device", "cpu", "--against", str(other), "--results", str(tmp_path / "results")]
    )


def test_both_are_measured_in_turns_and_compared(other, measured, tmp_path, capsys):
    rows, runs = measured
    assert command(other, tmp_path, "--only", "loss", "--variants", "^ours", "--budget", "1", "--threads", "1") == 0
    assert [name for name, _ in runs] == ["old", "this", "this", "old"]
    options = ["--only", "loss", "--budget", "1.0", "--device", "cpu", "--variants", "^ours", "--threads", "1"]
    assert all(argv[0] == "grad_norm" and argv[3:] == options for _, argv in runs)
    folder = tmp_path / "results" / "some-card-80gb-against-old"
    assert sorted(file.name for file in folder.iterdir()) == [
        f"grad_norm-loss-{number}-{name}.json" for number, name in enumerate(against.ORDER, 1)
    ]
    out = capsys.readouterr().out
    assert "2.050      1.100      0.537x faster         8       8     loss: ours" in out and str(folder) in out


def test_results_of_a_card_do_not_hold_those_of_a_comparison(other, measured, tmp_path):
    """A folder is read with all below it, and targets would be judged by the other checkout."""
    command(other, tmp_path)
    of_card = tmp_path / "results" / "some-card-80gb"
    results.write(of_card / "grad_norm.json", HEADER, LIMITS, [row("ours", 1.0)])
    assert len(results.read(of_card)["rows"]) == 1


@pytest.mark.parametrize("factor, status", [(0.5, 0), (1.0, 0), (2.0, 1)])
def test_slower_is_what_lies_beyond_the_spread_of_all_runs(factor, status, other, measured, tmp_path):
    rows, _ = measured
    rows["this"] = [[row("ours", 2.05 * factor)], [row("ours", 2.05 * factor)]]
    assert command(other, tmp_path) == status


def test_one_slow_run_of_two_is_not_a_difference():
    """Here the machine was busy during one run of each checkout."""
    before = against.pooled({"rows": [row("ours", ms)]} for ms in (1.0, 3.0))
    after = against.pooled({"rows": [row("ours", ms)]} for ms in (2.0, 4.0))
    (one,) = before["rows"]
    assert (one["ms"], one["ms_p20"], one["ms_p80"]) == pytest.approx((2.0, 0.99, 3.03))
    assert not any(word in line for line in against.lines(before, after) for word in ("slower", "faster"))


def test_what_only_one_of_them_measures_is_told(other, measured, tmp_path, capsys):
    rows, _ = measured
    wrong = row("ours", None, "rows", reason="wrong, not timed: dX is 0.5")
    rows["old"] = [[row("ours", 2.0), row("ours", 1.0, "rows"), row("ours", 1.0, "gone")]] * 2
    rows["this"] = [[row("ours", 2.0), wrong, row("ours", 1.0, "new")]] * 2
    command(other, tmp_path)
    out = capsys.readouterr().out
    assert "missing in this checkout: grad_norm: gone: ours" in out
    assert "this checkout: rows: ours: wrong, not timed: dX is 0.5" in out


def test_a_wrong_result_of_this_checkout_is_its_exit_status(other, measured, tmp_path, monkeypatch):
    run = against.run
    for wrong, status in (("this", 1), ("old", 0)):
        measured[1].clear()

        def run_wrongly(folder, argv, wrong=wrong):
            run(folder, argv)
            return int(("this" if folder == against.ROOT else "old") == wrong)

        monkeypatch.setattr(against, "run", run_wrongly)
        assert command(other, tmp_path) == status


def test_where_nothing_can_be_compared_an_old_file_is_not_taken_for_new(other, measured, tmp_path, capsys):
    rows, runs = measured
    command(other, tmp_path)
    runs.clear()
    rows["old"] = [[], []]
    assert command(other, tmp_path) == 2
    assert "nothing was compared" in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--against", "nowhere"], "--against: expected ops before it"),
    (["grad_norm", "--against", "nowhere"], "--against: expected a folder with the packages soul and soul_kernels, got"),
    (["grad_norm", "--against", str(against.ROOT)], "which is this one; make it with: git worktree add DIR COMMIT"),
    (["grad_norm", "--against", "nowhere", "--json", "a.json"], "--against: expected neither --json nor --plots"),
    (["grad_norm", "--variants", "("], "--variants: expected a regular expression, got '('"),
    (["grad_norm", "--against", "nowhere", "--model", "h100"], "--model: expected no --against beside it"),
])  # fmt: skip
def test_bad_input_is_a_usage_error(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main([*argv, "--device", "cpu"])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_commit_is_that_of_the_checkout_and_not_of_one_around_it(tmp_path):
    assert _harness.library() == against.ROOT / "soul"
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    settings = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run(["git", *settings, "-C", str(tmp_path), "commit", "--quiet", "--allow-empty", "-m", "a"], check=True)
    (tmp_path / "inside").mkdir()
    assert _harness.commit_of(tmp_path.resolve()) and _harness.commit_of((tmp_path / "inside").resolve()) is None


@pytest.mark.slow(reason="two processes that import torch; guards that each measures the library it is to measure")
def test_the_other_library_is_measured_by_the_benchmarks_of_this_checkout(tmp_path, monkeypatch, capfd):
    for name in against.PACKAGES:
        shutil.copytree(against.ROOT / name, tmp_path / "old" / name)
    with (tmp_path / "old" / "soul" / "__init__.py").open("a") as file:
        file.write("print('the other library')\n")
    monkeypatch.setattr(against, "ORDER", ("other", "this"))
    argv = ["grad_norm", "--quick", "--variants", "^ours", "--device", "cpu", "--threads", "1", "--budget", "0", "--against"]
    assert __main__.main([*argv, str(tmp_path / "old"), "--results", str(tmp_path / "results")]) in (0, 1)
    (before, after) = capfd.readouterr().out.split("2 of 2: this checkout")
    assert before.count("the other library") == 1 and "the other library" not in after
    (folder,) = (tmp_path / "results").iterdir()
    written = [json.loads((folder / f"grad_norm-{name}.json").read_text()) for name in ("1-other", "2-this")]
    assert all({one["variant"] for one in run["rows"]} == {"ours"} for run in written)
    assert written[0]["environment"]["commit"] is None and written[1]["environment"]["torch"] == str(torch.__version__)


def commands_of_a_gpu():
    """The words after ``python -m bench`` of every line of the README's run on a card that picks cases."""
    text = (against.ROOT / "bench" / "README.md").read_text().partition("## On a GPU machine")[2].partition("\n## ")[0]
    lines = [line.partition("python -m bench ")[2].split("  #")[0] for line in text.splitlines() if " --only " in line]
    return [
        shlex.split(line.replace("$A", "--against ../before --variants ^ours --results")) for line in lines if "`" not in line
    ]


def test_the_commands_of_the_readme_pick_cases_that_there_are(monkeypatch):
    """A name that has changed would measure nothing, on a machine that is lent for half an hour."""

    def make_params(shapes, device, dtype):
        return [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]

    monkeypatch.setattr(bench_sophia_step, "make_params", make_params)
    monkeypatch.setattr(__main__, "run", lambda args: args)
    monkeypatch.setattr(against, "main", lambda args, ops, header: args)
    devices = {"linear_loss": torch.device("cuda"), "sophia_step": torch.device("meta")}  # neither has inputs when it is made
    modules = {"linear_loss": bench_linear_loss, "sophia_step": bench_sophia_step}
    cases = {op: [make() for make in module.cases(devices[op], False)] for op, module in modules.items()}
    picked = [args for words in commands_of_a_gpu() if (args := __main__.main(["--device", "cpu", *words])).ops[0] in cases]
    assert len(picked) == 8
    for args in picked:
        chosen = [case for case in cases[args.ops[0]] if args.only in case.name]
        assert 1 <= len(chosen) <= 5, (args.only, [case.name for case in chosen])
        assert not args.variants or all(any(map(args.variants.search, case.variants)) for case in chosen)
