"""Trackers get the numbers of the log; none of them changes a run or ends it.

The libraries themselves are tested where they are installed, without a network. Everywhere else stand-ins take their place,
whose signatures are those of wandb 0.31, trackio 0.43, mlflow 3.17 and torch 2.13.
"""

import importlib
import json
import pathlib
import random
import re
import sys
import time
import types

import pytest

from soul._extras import MissingExtra
from soul.cli import main
from soul.output.directory import check_output
from soul.run import trackers as trackers_module
from soul.run.config import UnlearnConfig
from soul.run.trackers import CLIENTS, Trackers, check_trackers
from soul.run.unlearner import Unlearner
from soul_kernels.errors import ArgumentError
from tests.support.models import examples, tiny_model, tiny_tokenizer
from tests.support.runs import words, write_model_and_data

RECORDS = [
    {"step": 1, "epoch": 1, "loss": 2.5, "tokens_per_s": float("nan")},
    {"step": 2, "epoch": 1, "loss": 2.0, "forget_prob": 0.5, "stopped": "forget probability has reached 0.5"},
]
NUMBERS = {1: {"epoch": 1.0, "loss": 2.5}, 2: {"epoch": 1.0, "loss": 2.0, "forget_prob": 0.5}}


class FakeTracker:
    """A tracker in memory: run -> {step: numbers}, and how the run ended. Like some libraries it draws random numbers."""

    def __init__(self):
        self.runs = {}
        self.ends = []
        self.sent = []
        self.starts = []
        self.fails_at = None

    def __call__(self, directory, options, run, after):
        random.seed(1)
        self.starts.append((options.get("optimizer"), after))
        client = types.SimpleNamespace(run=run or f"run-{len(self.runs)}", log=self.log, close=self.close)
        self.numbers = self.runs.setdefault(client.run, {})
        return client

    def close(self, failed):
        self.ends.append(failed)

    def log(self, numbers, step):
        random.random()
        if step == self.fails_at:
            raise ConnectionError("no\nroute")
        self.sent.append(step)
        self.numbers[step] = numbers


@pytest.fixture
def fake(monkeypatch):
    fake = FakeTracker()
    monkeypatch.setitem(CLIENTS, "wandb", fake)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    return fake


def test_finite_numbers_are_sent_by_their_names_in_the_log(fake, tmp_path):
    state = random.getstate()
    with Trackers(["wandb", "wandb"], tmp_path) as trackers:
        trackers.start([])
        for record in RECORDS:
            trackers.write(record)
    assert fake.runs == {"run-0": NUMBERS} and fake.ends == [False]
    assert random.getstate() == state


def test_an_event_is_no_record_of_a_step(fake, tmp_path):
    with Trackers(["wandb"], tmp_path) as trackers:
        trackers.start([{"event": "pilot", "step": 0, "lr": 1e-5}])
        assert fake.runs == {"run-0": {0: {"pilot/lr": 1e-5}}}
        trackers.write({"event": "verdict", "step": 9, "forget_prob": 0.1, "met": True, "control_prob": None})
    assert fake.runs["run-0"][9] == {"verdict/forget_prob": 0.1}


def test_a_resumed_run_is_continued_and_a_new_tracker_gets_the_log_so_far(fake, tmp_path):
    for before, record in ((RECORDS[:1], RECORDS[1]), (RECORDS, {"step": 3, "loss": 1.0})):
        with Trackers(["wandb"], tmp_path) as trackers:
            trackers.start(before)
            trackers.write(record)
    assert list(fake.runs) == ["run-0"] and fake.sent == [1, 2, 3]
    (tmp_path / trackers_module.TRACKERS_FILE).write_text("[broken")
    with Trackers(["wandb"], tmp_path) as trackers:
        trackers.start(RECORDS)
    assert fake.runs["run-1"] == NUMBERS


def test_a_tracker_that_fails_is_turned_off_with_one_line(fake, tmp_path, capsys):
    fake.fails_at = 1
    with Trackers(["wandb"], tmp_path) as trackers:
        trackers.start([])
        for record in RECORDS:
            trackers.write(record)
    assert fake.sent == [] and capsys.readouterr().err == "wandb: ConnectionError: no route; nothing more is reported there\n"


def test_a_tracker_that_cannot_start_costs_the_others_nothing(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CLIENTS, "mlflow", lambda *_: 1 / 0)
    with Trackers(["mlflow", "wandb"], tmp_path) as trackers:
        trackers.start(RECORDS)
    assert fake.runs == {"run-0": NUMBERS}
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(RuntimeError), Trackers(["wandb"], tmp_path) as trackers:
        trackers.start(RECORDS)
        raise RuntimeError("diverged")
    assert fake.ends == [False, True]


def test_bad_input(monkeypatch, tmp_path):
    with pytest.raises(ArgumentError, match="report_to.*'tensorboard'.*wandb"):
        check_trackers(["tensorbord"])
    for name in CLIENTS:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingExtra, match=rf"pip install 'soul-kernels\[{name}\]'"):
            check_trackers([name])
    with pytest.raises(ArgumentError, match="output"):
        check_trackers(["wandb"], None)
    assert main(["unlearn", "--model=x", "--forget=y", "--method=ga", f"--output={tmp_path / 'out'}", "--report-to=wandb"]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["trackers.json", "tensorboard", "wandb"])
def test_what_trackers_write_in_the_output_is_no_link(name, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "soul_config.json").write_text("{}")
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArgumentError, match=f"{name}, a symbolic link"):
        check_output(tmp_path / "out", resume=True)


def unlearner():
    config = UnlearnConfig(epochs=2, batch_size=2, lr=1e-3, backend="reference", eval_every=2)
    return Unlearner(tiny_model(), examples(5), examples(9)[5:], config, tokenizer=tiny_tokenizer())


def test_a_run_is_reported_as_it_is_logged(fake, tmp_path):
    plain = unlearner().run(tmp_path / "plain", progress=False)
    records = unlearner().run(tmp_path / "out", progress=False, report_to=["wandb"])
    logged = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    (sent,) = fake.runs.values()
    assert [{"step": step, **numbers} for step, numbers in sent.items()] == [
        {name: value for name, value in record.items() if value is not None} for record in logged
    ]
    assert {"loss", "lr", "clip_fraction", "grad_norm"} <= sent[1].keys() and "forget_prob" in sent[2]
    assert [record["loss"] for record in records] == [record["loss"] for record in plain]
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "out")]
    assert saved[0] == saved[1]


def test_the_one_step_of_influence_is_reported(fake, tmp_path):
    config = UnlearnConfig(method="influence", batch_size=2, backend="reference", method_options={"clip": 1e-3})
    unlearner = Unlearner(tiny_model(), examples(5), examples(9)[5:], config, tokenizer=tiny_tokenizer())
    (record,) = unlearner.run(tmp_path / "out", progress=False, report_to=["wandb"])
    assert fake.runs["run-0"][1]["factor"] == record["factor"] and fake.sent == [1]


def test_the_command_reports_and_a_resumed_run_goes_on_there(fake, tmp_path, capsys):
    folder = write_model_and_data(tmp_path, tiny_tokenizer())
    flags = ("--report-to=wandb", "--save-every=1", "--epochs=2", "--optimizer=adamw")
    log = fake.log

    def interrupted(numbers, step):
        log(numbers, step)
        if step == 3:
            raise KeyboardInterrupt

    fake.log = interrupted
    assert main(words(folder, tmp_path / "out", *flags)) == 130
    fake.log = log
    assert main(words(folder, tmp_path / "out", *flags, "--resume")) == 0
    assert list(fake.runs) == ["run-0"] and fake.ends == [True, False]
    assert fake.starts == [("adamw", 0), ("adamw", 2)]
    assert fake.sent == [1, 2, 3, 3, 4, 5, 6]  # step 3 was not in a checkpoint
    assert main(words(folder, tmp_path / "out", "--save-every=1", "--epochs=2", "--optimizer=adamw", "--resume")) == 0
    assert "nothing to resume" in capsys.readouterr().out


def names_in_the_guide():
    """The scalars of the table in docs/running.md, by their names in its first column."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "running.md").read_text(encoding="utf-8")
    table = text.partition("| scalar |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_the_guide_names_every_scalar(fake, tmp_path):
    """A run with everything that is logged, and one of influence; going back to an earlier point is too rare for a test."""
    aim = dict(aim="forget_prob=0.002", method="npo", curvature="retain", clip_target=0.5, eval_every=8, epochs=12)
    influence = dict(method="influence", method_options={"clip": 1e-3})
    sent = set()
    fake.log = lambda numbers, step: sent.update(numbers)
    for name, options in (("aim", aim), ("influence", influence)):
        config = UnlearnConfig(batch_size=2, backend="reference", **options)
        run = Unlearner(tiny_model(), examples(4), examples(28)[4:], config, tokenizer=tiny_tokenizer())
        run.run(tmp_path / name, progress=False, report_to=["wandb"])
    documented = names_in_the_guide()
    assert len(set(documented)) == len(documented)
    assert sent | {"aim/back_to"} == set(documented)


# The libraries


def resumed_twice(name, directory):
    """Report two steps, and one more in a process that resumes the run after the first."""
    options = {"lr": 1e-5, "method": "npo", "option": ["retain=kl"], "alpha": None}
    for before, record in (([], RECORDS[0]), (RECORDS[:1], RECORDS[1])):
        with Trackers([name], directory, options) as trackers:
            trackers.start(before)
            trackers.write(record)
    return json.loads((directory / trackers_module.TRACKERS_FILE).read_text())[name]


def stand_in(name, calls):
    """Return modules by name; their functions note what they are called with, and have the signatures of the library's own."""
    module = types.ModuleType(name)

    def note(*call):
        calls.append(call)

    if name == "tensorboard":

        class SummaryWriter:
            def __init__(
                self, log_dir=None, comment="", purge_step=None, max_queue=10, flush_secs=120, filename_suffix=""
            ) -> None:
                note("start", log_dir.rpartition("/")[2], purge_step)

            def add_scalar(
                self, tag, scalar_value, global_step=None, walltime=None, new_style=False, double_precision=False
            ) -> None:
                note("log", tag, scalar_value, global_step)

            def add_text(self, tag, text_string, global_step=None, walltime=None) -> None:
                note("options", tag, text_string)

            def flush(self) -> None:
                pass

            def close(self) -> None:
                note("close")

        writer = types.ModuleType("torch.utils.tensorboard")
        writer.SummaryWriter = SummaryWriter
        return {"tensorboard": module, "torch.utils.tensorboard": writer}
    if name == "wandb":

        class Run:
            id = "abc"

            def log(self, data, step=None, commit=None):
                note("log", data, step)

            def finish(self, exit_code=None):
                note("close", exit_code)

        def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
                 config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None,
                 mode=None, force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None,
                 tensorboard=None, sync_tensorboard=None, monitor_gym=None, settings=None, anonymous=None):  # fmt: skip
            note("start", project, id, config, resume)
            return Run()

        module.init = init
        module.Settings = lambda *, console: None
    if name == "trackio":

        def init(project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None, config=None,
                 resume="never", settings=None, private=None, embed=True, auto_log_gpu=None, gpu_log_interval=10.0,
                 auto_log_cpu=None, cpu_log_interval=10.0, webhook_url=None, webhook_min_level=None):  # fmt: skip
            note("start", project, name, config, resume)

        def log(metrics, step=None):
            note("log", metrics, step)

        module.init = init
        module.log = log
        module.finish = lambda: note("close")
    if name == "mlflow":

        class Metric:
            def __init__(self, key, value, timestamp, step, model_id=None, dataset_name=None, dataset_digest=None, run_id=None):
                self.number = (key, value, step)

        class Param:
            def __init__(self, key, value):
                self.option = (key, value)

        class MlflowClient:
            def __init__(self, tracking_uri=None, registry_uri=None, workspace_store_uri=None):
                pass

            def get_experiment_by_name(self, name):
                return None

            def create_experiment(self, name, artifact_location=None, tags=None):
                return "7"

            def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
                note("start", experiment_id, run_name)
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

            def update_run(self, run_id, status=None, name=None):
                note("resume", run_id, status)

            def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
                note("log", run_id, [metric.number for metric in metrics], [param.option for param in params])

            def set_terminated(self, run_id, status=None, end_time=None):
                note("close", run_id, status)

        module.MlflowClient = MlflowClient
        module.entities = types.SimpleNamespace(Metric=Metric, Param=Param)
    return {name: module}


OPTIONS = {"lr": 1e-5, "method": "npo", "option": ["retain=kl"]}
TEXT = "    lr: 1e-05\n    method: npo\n    option: ['retain=kl']"


def expected_calls(name, run):
    one, two = NUMBERS.values()
    if name == "tensorboard":
        scalars = [[("log", key, value, step) for key, value in NUMBERS[step].items()] for step in NUMBERS]
        return [
            ("start", run, 1),
            ("options", "options", TEXT),
            *scalars[0],
            ("close",),
            ("start", run, 2),
            *scalars[1],
            ("close",),
        ]
    if name == "wandb":
        starts = [("start", "soul-kernels", identifier, OPTIONS, "allow") for identifier in (None, run)]
        return [starts[0], ("log", one, 1), ("close", 0), starts[1], ("log", two, 2), ("close", 0)]
    if name == "trackio":
        start = ("start", "soul-kernels", run, OPTIONS, "allow")
        return [start, ("log", one, 1), ("close",), start, ("log", two, 2), ("close",)]
    numbers = [[(key, value, step) for key, value in NUMBERS[step].items()] for step in NUMBERS]
    params = [(key, str(value)) for key, value in OPTIONS.items()]
    close = ("close", run, "FINISHED")
    return [("start", "7", "out"), ("log", run, [], params), ("log", run, numbers[0], []), close,
            ("resume", run, "RUNNING"), ("log", run, numbers[1], []), close]  # fmt: skip


@pytest.mark.parametrize("name", CLIENTS)
def test_calls_fit_the_library(name, tmp_path, monkeypatch, capsys):
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    calls = []
    for module_name, module in stand_in(name, calls).items():
        monkeypatch.setitem(sys.modules, module_name, module)
    (tmp_path / "out").mkdir()
    run = resumed_twice(name, tmp_path / "out")
    assert capsys.readouterr().err == ""
    assert calls == expected_calls(name, run)


def test_tensorboard_reads_the_curves(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = resumed_twice("tensorboard", tmp_path)
    with Trackers(["tensorboard"], tmp_path) as trackers:  # resumed after step 1: step 2 is taken again
        trackers.start(RECORDS[:1])
        trackers.write(RECORDS[1] | {"loss": 1.5})
    events = EventAccumulator(str(tmp_path / run)).Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert curves == {"epoch": [(1, 1), (2, 1)], "loss": [(1, 2.5), (2, 1.5)], "forget_prob": [(2, 0.5)]}


def test_wandb_offline(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = resumed_twice("wandb", tmp_path)
    assert "nothing more is reported" not in capfd.readouterr().err
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{run}/run-{run}.wandb"))
    assert files
    deadline = time.monotonic() + 60  # wandb's own process writes the last records after `finish` has returned
    while not all(b"loss" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_trackio_keeps_the_curves(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    run = resumed_twice("trackio", tmp_path)
    assert "nothing more is reported" not in capfd.readouterr().err
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    logs = storage.get_logs("soul-kernels", run)
    assert {line["step"]: line["loss"] for line in logs} == {1: 2.5, 2: 2.0}


def test_mlflow_keeps_the_curves(tmp_path, monkeypatch, capfd):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    run = resumed_twice("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    assert {metric.step: metric.value for metric in client.get_metric_history(run, "loss")} == {1: 2.5, 2: 2.0}
    assert client.get_run(run).data.params["method"] == "npo" and client.get_run(run).info.status == "FINISHED"
