"""The benchmarks must run; what they print is for people to judge."""

import dataclasses
import functools
import importlib
import json
import re
import sys
import weakref

import pytest
import torch

from bench import (
    __main__,
    _harness,
    _heads,
    bench_kl_divergence,
    bench_linear_gnb,
    bench_linear_loss,
    bench_token_logprob,
    host_part,
    model,
)
from bench import bench_sophia_step as step_bench
from bench.__main__ import OPS
from soul import SOUL, SophiaG
from soul.plan import card_of
from soul_kernels import SophiaStep
from tests.support.helpers import needs_kernels_on_cpu

LIMITS = {"copy_bytes_per_s": 1e10, "gemm_flop_per_s": 1e11}
CPU = torch.device("cpu")
# Need not be installed, or not run without a GPU.
PEERS = (
    "optimi", "FlashOptim", "torchao", "bitsandbytes", "pytorch_optimizer", "Liger", "cut-cross-entropy",
    "torch linear_cross_entropy", "quack", "Transformer Engine", "apex", "Dion",
)  # fmt: skip


@pytest.fixture
def untimed(monkeypatch):
    """Kernels on a CPU are slow, and nobody reads their times: that every variant was called once must do."""
    monkeypatch.setattr(_harness, "time_interleaved", lambda calls, device, budget_s: dict.fromkeys(calls, (1.0, 1.0, 1.0)))
    monkeypatch.setattr(_harness, "peak_extra_mib", lambda call, device: None)


def test_a_clock_that_stands_still_divides_nothing_by_zero(monkeypatch):
    """A call below the resolution of the clock takes at most as long as that."""
    monkeypatch.setattr(_harness.time, "perf_counter", lambda: 7.0)
    ms = _harness.time_once(lambda: None, CPU)
    rates = _harness.Case("case", {}, None, bytes=8, flops=8, tokens=8).rates("a", ms, LIMITS)
    assert 0 < ms < 1e-3 and all(0 < rate < float("inf") for rate in rates.values())


SLOW = pytest.mark.slow(reason="calls every variant of every case; three ops, of which one takes hidden states, always are")
ALWAYS = ("grad_norm", "token_logprob", "linear_cross_entropy")


@pytest.mark.parametrize("op", [pytest.param(op, marks=[] if op in ALWAYS else SLOW) for op in OPS])
def test_every_case_is_right_and_runs(op, untimed, request):
    if op.startswith("linear"):
        request.getfixturevalue("without_kernels")
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
    assert all(low <= median <= high and worked >= 0 for median, low, high, worked in times.values())


def test_a_wrong_result_is_not_timed():
    def check():
        raise AssertionError("wrong")

    case = _harness.Case("bad", {"ours": lambda: pytest.fail}, check)
    with pytest.raises(AssertionError, match="wrong"):
        _harness.run_case(case, CPU, LIMITS, budget_s=0.0)


def test_a_missing_peer_is_a_line_and_a_failing_one_too_but_ours_is_wrong_then(untimed, capsys):
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
    variants = {"ours, a": failing, "ours, b": lambda: lambda: None}  # a graph that cannot be captured costs the others nothing
    rows = _harness.run_case(_harness.Case("case", variants, dict), CPU, LIMITS, budget_s=0.0)
    assert rows[0]["ms"] == 1.0 and rows[1]["reason"] == "wrong, not timed: ValueError: not on this machine"
    assert "in failing" in capsys.readouterr().err  # the traceback


@pytest.mark.parametrize("errors, variant, message", [
    ({}, "ours", "wrong, not timed: ValueError: not on this machine"), ({"ours, b": "h is off"}, "ours, b", "h is off"),
])  # fmt: skip
def test_under_pytest_benchmark_what_is_wrong_fails(errors, variant, message):
    """And is not skipped, as a peer that does not run is."""
    pytest.importorskip("pytest_benchmark")
    from bench.test_benchmarks import test_variant

    def failing():
        raise ValueError("not on this machine")

    case = _harness.Case("case", {"ours": failing, "ours, b": lambda: dict}, dict)
    with pytest.raises(AssertionError, match=message):
        test_variant((case, errors), variant, LIMITS, None)


@pytest.mark.parametrize("alone, alive", [(False, ["a", "b"]), (True, ["b"])])
def test_variants_that_are_alone_are_dropped_before_the_next_is_made(alone, alive, monkeypatch):
    """Else a peak would be that of several; and those that take turns are all there."""
    living, seen = weakref.WeakValueDictionary(), []

    class Call:
        def __call__(self):
            pass

    def make(name):
        living[name] = call = Call()
        return call

    def timed(calls, device, budget_s):
        seen.append(sorted(living))
        return dict.fromkeys(calls, (1.0, 1.0, 1.0))

    monkeypatch.setattr(_harness, "time_interleaved", timed)
    case = _harness.Case("case", {name: functools.partial(make, name) for name in "ab"}, dict, alone=alone)
    assert [row["variant"] for row in _harness.run_case(case, CPU, LIMITS, budget_s=0.0)] == ["a", "b"]
    assert seen[-1] == alive and len(seen) == (2 if alone else 1)


def test_bytes_are_those_of_the_table_and_of_the_states():
    """Against research: 14 B/param in bf16, 10.25 with 8-bit states, 2 more for low bits; and against what is allocated."""
    half, options = torch.bfloat16, dict(param_rounding="nearest")
    count = step_bench.bytes_per_param
    assert [count(half, soul, state_dtype=half, **options) for soul in (False, True)] == [12, 14]
    assert [count(torch.float32, soul) for soul in (False, True)] == [24, 28]
    assert round(count(half, True, state_dtype="8bit", **options), 2) == 10.25
    for dtype in (torch.float32, half):
        for state_dtype in step_bench.STATE_DTYPES:
            for rounding in step_bench.ROUNDINGS:
                options = dict(param_rounding=rounding, state_dtype=state_dtype)
                params = step_bench.make_params([(16, 32)], CPU, dtype)
                opt = SOUL(params, backend="reference", **options)
                opt.step()
                states = sum(value.nbytes for value in opt.state[params[0]].values() if value.numel() > 1)
                assert count(dtype, True, **options) * 512 == 3 * params[0].nbytes + 2 * states


def test_a_wrong_kernel_fails_the_check(monkeypatch):
    prepare = SophiaStep.prepare

    def prepare_wrongly(self, tensors, options, *, backend, **others):
        wrong = options if backend == "reference" else options._replace(beta1=options.beta1 * 0.999)
        return prepare(self, tensors, wrong, backend=backend, **others)

    monkeypatch.setattr(SophiaStep, "prepare", prepare_wrongly)
    for optimizer in (SophiaG, SOUL):
        with pytest.raises(AssertionError, match="not the reference's bits|differ from the reference by"):
            step_bench.check(optimizer, [dict(state_dtype="8bit")], CPU, torch.bfloat16, True)


@pytest.fixture
def cross_entropy():
    """The first case of the tables of the losses: CE with a trained head, and all peers."""
    torch.manual_seed(0)
    return next(iter(bench_linear_loss.cases(CPU, quick=True)))()


def test_every_variant_of_a_loss_has_its_own_errors(cross_entropy, untimed, without_kernels, monkeypatch, capsys):
    for name in ["liger_kernel", *(name for name in sys.modules if name.startswith("liger_kernel."))]:
        monkeypatch.setitem(sys.modules, name, None)
    rows = {row["variant"]: row for row in _harness.run_case(cross_entropy, CPU, LIMITS, budget_s=0.0)}
    out = capsys.readouterr().out
    for name, row in rows.items():
        if name.startswith("Liger"):
            assert re.fullmatch(r"liger_kernel\S*: not installed; run: pip install 'soul-kernels\[peers\]'", row["reason"])
            assert f"  {name}  " in out
        elif "reason" not in row:
            assert row["percent_of_floor"] == 100.0
            assert ("errors" in row) == (name != _heads.FLOOR)
    quantities = [f"{name} {kind}" for kind in ("flat", "peaked") for name in ("loss", "log p", "dX", "dW")]
    assert list(rows["ours"]["errors"]) == list(rows["eager"]["errors"]) == quantities
    # Where p is close to 1, eager PyTorch loses 1 - p, and ours does not.
    assert rows["eager"]["errors"]["dX peaked"] > 3 * rows["ours"]["errors"]["dX peaked"]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        assert 0 < rows["torch linear_cross_entropy, accurate"]["errors"]["dW flat"] < 1e-5
    json.dumps(list(rows.values()))


@pytest.mark.parametrize("error", [0.0, 1e-4, 1e-2])
def test_what_a_gradient_was_before_it_was_rounded(error):
    """Below, at and above the rounding of bf16, 1.7e-3; 2e6 elements tell 1e-4 to a tenth or so."""
    torch.manual_seed(0)
    want = torch.randn(2000, 1000, dtype=torch.float64)
    got = (want + error * torch.randn_like(want)).bfloat16()
    assert _heads.before_rounding(got, want, _heads.relative(got, want)) == pytest.approx(error, rel=0.3)


def test_a_wrong_peer_is_reported_and_a_wrong_loss_of_ours_is_not_timed(monkeypatch):
    monkeypatch.setattr(_harness, "time_interleaved", lambda *args: pytest.fail("timed"))
    right = _heads.linear_objective

    def wrong(hidden, *args, **options):
        loss, logps = right(hidden, *args, **options)
        return loss + 1e-3 * (hidden - hidden.detach()).square().sum() + 1e-3 * (hidden - hidden.detach()).sum(), logps

    monkeypatch.setattr(_heads, "linear_objective", wrong)
    functions = {"ours": lambda: _heads.ours("CE"), "eager": lambda: _heads.ours("CE")}
    case = _heads.make_case("CE", 16, 16, 50, True, functions, CPU)
    with pytest.raises(AssertionError, match=r"ours, flat inputs: .*dX"):
        _harness.run_case(case, CPU, LIMITS, budget_s=0.0)
    del functions["ours"]
    assert _heads.make_case("CE", 16, 16, 50, True, functions, CPU).check()["eager"]["dX flat"] > 1e-2


def test_a_label_that_was_not_drawn_by_its_number_is_noticed(without_kernels, monkeypatch):
    right = _heads.linear_gnb
    monkeypatch.setattr(_heads, "linear_gnb", lambda *args, uniforms, **options: right(*args, uniforms=1 - uniforms, **options))
    (case, *_) = (make() for make in bench_linear_gnb.cases(CPU, quick=True))
    with pytest.raises(AssertionError, match=r"ours, flat inputs: \{'draw'"):
        case.check()


def test_equal_work_is_asserted():
    inputs = _heads.make_inputs("CE", 16, 16, 50, CPU, torch.float32, frozen=False)["flat"]
    with pytest.raises(AssertionError):  # no gradient of the head
        _heads.train(lambda inputs: inputs.hidden.sum(), inputs)
    _heads.train(_heads.ours("CE"), inputs)  # nothing is left of that
    inputs.weight.grad = torch.zeros_like(inputs.weight)
    with pytest.raises(AssertionError):  # gradients of the call before
        _heads.train(_heads.ours("CE"), inputs)
    with pytest.raises(AssertionError, match="ignored token"):
        _heads.Inputs(inputs.hidden, inputs.weight, inputs.labels - 50, inputs.is_forget)


def test_tables_of_the_losses_are_complete_and_a_part_runs_by_default():
    made = [make() for make in bench_linear_loss.cases(torch.device("cuda"), quick=False)]  # inputs are made later
    assert len({case.name for case in made if "head" in case.name}) == len(made) == 91  # one of the sizes of chunks
    assert sum("CE over chunks" in case.name for case in made) == 1
    default = [case.name for case in made if case.default]
    assert len(default) == 18
    for loss in _heads.LOSSES:
        assert sum(name.startswith(f"{loss}, N 4096, D 2048, V 128256") for name in default) == 2  # trained, frozen


@pytest.mark.parametrize("module, kinds", [
    (bench_kl_divergence, ("divergences", "gradient")),
    (bench_token_logprob, ("statistics", "gradient")),
])  # fmt: skip
@needs_kernels_on_cpu
def test_row_kernels_are_checked_before_they_are_timed(module, kinds, untimed):
    for kind in kinds:
        torch.manual_seed(0)
        rows = _harness.run_case(module.make_case(kind, 5, 4500, CPU, True), CPU, LIMITS, budget_s=0.0)
        assert all(row["gb_per_s"] > 0 for row in rows) and rows[0]["errors"]["gradient"] < 4e-3
        names = [row["variant"] for row in rows]  # eager PyTorch starts from logits alone
        assert "ours, from logits alone" in names or kind == "statistics"


def test_rows_lie_as_in_the_ops_and_those_of_peers_as_they_want_them(monkeypatch):
    """An odd vocabulary without padding has no 16-byte accesses, and no op ever reads one."""
    seen = []
    monkeypatch.setattr(bench_token_logprob, "token_statistics", lambda logits, *others: seen.append(logits.stride()))
    variants = bench_token_logprob.make_case("statistics", 5, 4501, CPU, True).variants
    variants["ours"]()()
    assert seen == [(4544, 1)] and variants["eager logsumexp"]().args[0].is_contiguous()


def test_a_softmax_in_fp32_writes_twice_as_much_as_a_gradient_in_bf16():
    case = bench_token_logprob.make_case("gradient", 5, 4500, CPU, True)
    moved = {name: case.rates(name, 1.0, LIMITS)["gb_per_s"] for name in case.variants}
    assert moved["eager softmax"] / moved["ours"] == pytest.approx(8 / 6)


@needs_kernels_on_cpu
def test_one_minus_p_as_a_difference_is_noticed(monkeypatch):
    right = bench_token_logprob.token_statistics

    def difference(logits, labels, statistics):
        right(logits, labels, statistics)
        statistics[bench_token_logprob.ONE_MINUS_P] = 1 - statistics[bench_token_logprob.LOGP].exp()

    monkeypatch.setattr(bench_token_logprob, "token_statistics", difference)
    with pytest.raises(AssertionError, match="'1 - p': "):
        bench_token_logprob.make_case("statistics", 5, 4500, CPU, True).check()


def test_only_also_finds_what_does_not_run_by_default(tmp_path, untimed, monkeypatch):
    monkeypatch.setattr(__main__, "ceilings", lambda device: LIMITS)
    made = [_harness.Case(name, {"ours": lambda: dict}, dict, default=name == "one") for name in ("one", "two")]
    module = type("module", (), {"cases": lambda device, quick: [lambda case=case: case for case in made]})
    monkeypatch.setattr(__main__.importlib, "import_module", lambda name: module)
    for only, expected in (([], ["one"]), (["--only", "tw"], ["two"]), (["--only", "o"], ["one", "two"])):
        argv = ["grad_norm", "--device", "cpu", "--threads=1", "--json", str(tmp_path / "rows.json"), *only]
        assert __main__.main(argv) == 0
        cases = [row["case"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
        assert cases == [f"{name}, 1 thread" for name in expected]
        for case in made:
            case.name = case.name.partition(",")[0]
    assert __main__.main(["grad_norm", "--device", "cpu", "--only", "three"]) == 2


def test_command_writes_rows_and_pictures(tmp_path, untimed, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(__main__, "ceilings", lambda device: LIMITS)
    rows, plots = tmp_path / "rows.json", tmp_path / "plots"
    __main__.main(["grad_norm", "--device", "cpu", "--quick", "--threads=1", "--json", str(rows), "--plots", str(plots)])
    written = json.loads(rows.read_text())
    assert written["environment"]["torch"] == torch.__version__ and "triton" in written["environment"]
    assert {row["op"] for row in written["rows"]} == {"grad_norm"} and len(written["rows"]) == 3
    out = capsys.readouterr().out
    assert {picture.name for picture in plots.iterdir()} == {
        "tiny-float32-4-b-gradient-to-clip-3-times-that-1-thread.png",
        "peers.png",
    }
    for picture in plots.iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in out
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


def test_what_takes_long_to_compile_comes_last(monkeypatch):
    monkeypatch.setattr(step_bench, "make_params", lambda *args: [])  # names do not depend on them
    for quick, count in ((False, 8), (True, 0)):
        names = [make().name for make in step_bench.cases(torch.device("meta"), quick)]  # as on a GPU, but without memory
        late = ["torch.compile" in name for name in names]
        assert sum(late) == count and late == sorted(late)


def test_a_compiled_peer_is_compiled_for_the_shapes_of_its_case(untimed, monkeypatch):
    """Of many cases in one process none is compiled for any shape, nor given up because there have been too many before."""
    seen = []

    def backend(graph, inputs):
        seen.append([type(size) for tensor in inputs for size in getattr(tensor, "shape", ())])
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: original(function, backend=backend, **options))
    sizes = range(2, 4 + torch._dynamo.config.recompile_limit)
    for size in sizes:
        params = step_bench.make_params([(size, 2 * size)], CPU, torch.float32)
        peers = step_bench.compiled_peers(True, params, torch.float32, quick=False)
        variants = {name: make for name, (make, _) in peers.items() if name == "foreach SOUL, torch.compile"}
        _harness.run_case(_harness.Case("case", variants, dict), CPU, LIMITS, budget_s=0.0)
    assert len(seen) == len(sizes) and {kind for kinds in seen for kind in kinds} == {int}


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_a_usage_error(device, capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main(["grad_norm", "--device", device])
    assert end.value.code == 2 and f"--device: expected cpu or cuda, got {device}" in capsys.readouterr().err


H100 = card_of("h100")
COUNTS = json.loads(model.EVIDENCE.read_text())["kernels"]
WORKS = {(work.op, work.case, work.variant): work for work in model.works()}


def test_modelled_time_is_that_of_the_scarcest_resource():
    """By hand: a card of 2 multiprocessors at 1 GHz that moves 10 bytes a nanosecond, 1e9 elements."""
    card = H100._replace(multiprocessors=2, clock=1e9, bandwidth=1e10, flops=1e12)
    counts = {"loaded": 4, "stored": 2, "issued": 64, "float": 20, "integer": 10, "special": 1, "exchange": 4}
    counts["barriers"] = {"V 50257": 3, "V 128256": 7}
    work = model.Work("op", "case", "ours", 5e9, 10**9, ("a",), program="V 128256")
    bound_by_bytes = model.modelled(work, card, {"a": counts})
    assert bound_by_bytes == {
        "ms": 600.0, "counted": True, "limit": "bytes", "then": "issued", "busy": pytest.approx(25 / 0.6), "barriers": 7,
        "percent_of_copy": pytest.approx(500 / 6), "percent_without_overlap": pytest.approx(50 / 0.85),
    }  # fmt: skip
    bound_by_integers = model.modelled(work, card, {"a": counts | {"integer": 128}})
    assert (bound_by_integers["ms"], bound_by_integers["limit"], bound_by_integers["then"]) == (1000.0, "integer", "bytes")
    products = model.modelled(dataclasses.replace(work, flops=2e12), card, {"a": counts})
    assert (products["ms"], products["products_ms"]) == (2600.0, 2000.0) and "percent_of_copy" not in products
    assert model.modelled(work, card, {}) == {"ms": 500.0, "counted": False}
    twice = model.modelled(dataclasses.replace(work, kernels=("a", "b")), card, {"a": counts, "b": counts | {"integer": 128}})
    assert (twice["ms"], twice["limit"]) == (1600.0, "integer")


def test_bytes_that_benchmarks_state_are_those_that_kernels_move():
    """The model beside each call is by hand, and the kernels were executed."""
    single = [work for work in WORKS.values() if work.bytes and len(work.kernels) == 1 and work.kernels[0] in COUNTS]
    assert {kernel for work in single for kernel in work.kernels} >= {model.STATISTICS, model.DRAW, model.DIVERGENCE_GRADIENT}
    for work in single:
        counts = COUNTS[work.kernels[0]]
        assert (counts["loaded"] + counts["stored"]) * work.elements == pytest.approx(work.bytes, rel=5e-3), work


@pytest.mark.parametrize("op", OPS)
def test_what_is_modelled_is_what_the_benchmarks_would_time_on_a_gpu(op, monkeypatch):
    """Names and bytes. A step's variants are spread over several cases there, as memory allows; chunks do not matter here."""

    def make_params(shapes, device, dtype):
        return [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]

    monkeypatch.setattr(step_bench, "make_params", make_params)  # random numbers take time on "meta" too
    timed = {}
    for make in importlib.import_module(f"bench.bench_{op}").cases(torch.device("meta"), False):
        case = make()
        if not case.default:
            continue
        name = re.sub(r", (other libraries|multi-tensor libraries|torch\.compile|\S+ states)(?=, )", "", case.name)
        name = name.replace("float32", "bfloat16") if op.startswith("linear") else name  # what a GPU is given
        for variant in case.variants:
            if variant.startswith("ours") and "plain" not in variant:
                bytes_of = case.bytes.get(variant) if isinstance(case.bytes, dict) else case.bytes
                timed[name, variant] = bytes_of, case.flops
    known = {(work.case, work.variant): work for work in WORKS.values() if work.op == op}
    assert known.keys() == timed.keys()
    for key, work in known.items():
        assert work.bytes == pytest.approx(timed[key][0]) if work.bytes else work.flops >= timed[key][1]


# Milliseconds on an H100 of kernels like ours, from before they were written (bench/README.md).
PROTOTYPES = [
    ("SophiaG.step, Llama-3.2-1B, bfloat16", "ours, nearest, bf16 states, 12 B/param", 5.00),
    ("SOUL.step, Llama-3.2-1B, bfloat16", "ours, compensated, bf16 states, 16 B/param", 6.76),
    ("SophiaG.step, Llama-3.2-1B, bfloat16", "ours, compensated, default states, 16 B/param", 6.63),
    ("SOUL.step, Llama-3.2-1B, bfloat16", "ours, compensated, default states, 20 B/param", 8.46),
    ("SophiaG.step, GPT-2 124M, float32", "ours, exact, default states, 24 B/param", 1.03),
    ("SOUL.step, GPT-2 124M, float32", "ours, exact, default states, 28 B/param", 1.24),
    ("SophiaG.step, GPT-2 124M, bfloat16", "ours, nearest, bf16 states, 12 B/param", 0.52),
]


@pytest.mark.parametrize("case, variant, measured", PROTOTYPES)
def test_modelled_steps_are_close_to_what_prototypes_took(case, variant, measured):
    assert 0.93 < model.modelled(WORKS["sophia_step", case, variant], H100, COUNTS)["ms"] / measured < 1.0


def test_the_modelled_norm_is_close_to_what_a_prototype_took():
    (work,) = [work for work in WORKS.values() if work.op == "grad_norm" and work.case.startswith("Llama")]
    assert 0.95 < model.modelled(work, H100, COUNTS)["ms"] / 0.84 < 1.0


@pytest.mark.parametrize("n, d, n_vocab, measured", [(8192, 2048, 128256, 22.1), (8192, 4096, 32000, 10.1)])
def test_modelled_losses_are_close_to_what_prototypes_took(n, d, n_vocab, measured):
    kernels = (model.STATISTICS, model.GRADIENT)
    work = model.Work("linear_loss", "", "ours", None, n * n_vocab, kernels, 6.0 * n * d * n_vocab)
    assert 0.95 < model.modelled(work, H100, COUNTS)["ms"] / measured < 1.0


@pytest.mark.parametrize("kernel, width, measured", [(f"{model.STATISTICS} bf16 logits", 2, 2410), (model.GRADIENT, 6, 2780)])
def test_what_rows_of_prototypes_reached_lies_between_all_overlap_and_none(kernel, width, measured):
    numel = 2048 * 128256
    times = model.modelled(model.Work("", "", "ours", width * numel, numel, (kernel,)), H100, COUNTS)
    assert times["percent_without_overlap"] < measured / 30 < times["percent_of_copy"]


def test_the_model_of_a_card_is_printed_and_says_what_it_is(capsys):
    assert __main__.main(["--model", "h100", "sophia_step", "step", "--only", "LoRA"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("MODELLED, NOT MEASURED: h100, copy 3000 GB/s")
    assert lines[2].startswith("step: not modelled")
    assert "== sophia_step, modelled" in lines and not any("GPT-2" in line for line in lines)
    assert any("100.0% of copy" in line for line in lines) and any("not counted" in line for line in lines)


@pytest.mark.parametrize("words, message", [
    (["--model", "h1000"], "--model: expected h100 or h200, got 'h1000'"),
    (["--model", "a100-80gb"], "--model: expected h100 or h200, got 'a100-80gb'; the kernels were counted for sm_90 alone"),
    (["--model", "h100", "step"], "--model: expected ops that have kernels of their own, got step"),
    (["--model", "h100", "--only", "70B"], "--only '70B'"),
    (["--model", "h100", "--json", "out.json"], "--model: expected no --json beside it"),
    (["--model", "h100", "--targets"], "--model: expected no --targets beside it"),
])  # fmt: skip
def test_bad_input_of_the_model_is_a_usage_error(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err
