"""The output directory of a run: its lock, the files allowed in it, and what a finished run leaves."""

import errno
import fcntl
import json
import os
import shutil
import warnings

import pytest

import soul
from soul.checkpoint import Checkpoints, Stopped, save_model
from soul.cli import main
from soul.data.examples import Example
from soul.models.loading import load
from soul.output.directory import occupy
from soul.output.files import scratch_path
from soul.run.config import UnlearnConfig
from soul.run.loop import unlearn
from tests.support.models import examples, tiny_model, tiny_tokenizer
from tests.support.runs import FAST, StopAfter, lines, run, same, unlearn_module, words, write_model_and_data


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return write_model_and_data(tmp_path_factory.mktemp("output"), tokenizer)


def test_a_run_that_has_ended_is_left_alone(folder, capsys):
    assert main(words(folder, "ended", "--epochs", "1")) == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "ended").iterdir()}
    assert main(words(folder, "ended", "--epochs", "1", "--resume")) == 0
    assert "this run has ended" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (folder / "ended").iterdir()} == before


def test_resume_of_a_run_that_has_ended_refuses_another_one(folder, tmp_path, capsys):
    """Status 0 would claim a model that was never made. Options are compared with the saved ones, rows with the saved
    digests. The paths of the files, and options that change no number, may differ.
    """
    for name in ("forget", "retain"):
        shutil.copy(folder / f"{name}.jsonl", tmp_path)
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copytree(folder / "model", tmp_path / "other")
    argv = words(tmp_path, "out", "--epochs", "1", "--lora-rank", "2")
    assert main(argv) == 0
    shutil.copy(tmp_path / "forget.jsonl", tmp_path / "moved.jsonl")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((tmp_path / "forget.jsonl").read_text().splitlines(True)[:4]))
    before = contents(tmp_path / "out")
    same = ["--save-every", "7", "--keep", "1", "--forget", str(tmp_path / "moved.jsonl")]
    assert main([*argv, *same, "--resume"]) == 0
    assert "this run has ended" in capsys.readouterr().out
    for message, more in (
        ("resume, lr: expected 0.001 as in the run that has ended, got 0.002", ["--lr", "2e-3"]),
        ("resume, seed: expected 0 as in the run that has ended, got 1", ["--seed", "1"]),
        ("resume, option: expected [] as in", ["--option", "retain=kl"]),
        ("resume, merge: expected False as in", ["--merge"]),
        (f"resume, model: expected '{tmp_path / 'model'}' as in", ["--model", str(tmp_path / "other")]),
        ("resume, content of forget: expected that of the run that has ended, got another one", ["--forget", str(fewer)]),
    ):
        assert main([*argv, *more, "--resume"]) == 2, message
        assert message in capsys.readouterr().err
    (tmp_path / "retain.jsonl").write_text((tmp_path / "retain.jsonl").read_text() + '{"prompt": "a", "completion": "b"}\n')
    assert main([*argv, "--resume"]) == 2
    assert "resume, content of retain: expected that of the run that has ended" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    for text in ("{}", "{", "[]"):  # {}: of a run in Python
        (tmp_path / "out" / "soul_config.json").write_text(text)
        assert main([*argv, "--resume"]) == 2
        assert "resume: expected the options of the run that has ended, got " in capsys.readouterr().err


def test_other_refusals_make_another_run_that_has_ended(folder, tmp_path, capsys):
    """The content of the refusals decides, not the path of the file."""
    refusals = tmp_path / "refusals.txt"
    moved = tmp_path / "moved.txt"
    refusals.write_text("No.\nI cannot say.\n")
    argv = words(folder, tmp_path / "out", "--epochs", "1", "--method", "po", "--resume", "--refusals")
    assert main([*argv, str(refusals)]) == 0
    refusals.rename(moved)
    assert main([*argv, str(moved)]) == 0
    assert "this run has ended" in capsys.readouterr().out
    moved.write_text("No.\n")
    assert main([*argv, str(moved)]) == 2
    assert "resume, content of refusals: expected that of the run that has ended" in capsys.readouterr().err


INFLUENCE = UnlearnConfig(method="influence", backend="reference")

FILES = ("soul_config.json", "data.json", "log.jsonl")  # that a resumed run writes again, in place


@pytest.mark.parametrize("name, link", [
    *((name, link) for name in (*FILES, "checkpoints") for link in ("symbolic", "dangling")),
    *((name, "hard") for name in FILES),
])  # fmt: skip
def test_a_link_in_the_output_of_a_resumed_run_is_refused(name, link, folder, tmp_path, capsys):
    """A user who may write in the directory must not make the run write elsewhere."""
    victim = tmp_path / "victim"
    output = tmp_path / "out"
    victim.mkdir() if name == "checkpoints" else victim.write_text("precious")
    output.mkdir()
    (output / "soul_config.json").write_text("{}")
    (output / name).unlink(missing_ok=True)
    if link == "hard":
        (output / name).hardlink_to(victim)
    else:
        (output / name).symlink_to(victim if link == "symbolic" else tmp_path / "nowhere")
    assert main(words(folder, output, "--epochs", "1", "--resume")) == 2
    kind = {"hard": "one of several names of a file"}.get(link, "a symbolic link")
    assert f"output: expected files of the run's own, got {output / name}, {kind}" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    assert list(victim.iterdir()) == [] if name == "checkpoints" else victim.read_text() == "precious"


def test_a_link_that_is_put_there_after_the_check_is_refused_too(tokenizer, tmp_path):
    victim = tmp_path / "victim"
    path = tmp_path / "log.jsonl"
    victim.write_text("precious")
    for link in (path.symlink_to, path.hardlink_to):
        link(victim)
        with pytest.raises(ValueError, match="output: expected files of the run's own, got .*log.jsonl, (a|one of)"):
            run(tokenizer, log=path)
        with pytest.raises(ValueError, match="output: expected files of the run's own, got .*log.jsonl, (a|one of)"):
            unlearn(tiny_model(), tokenizer, examples(2), examples(4)[2:], INFLUENCE, log=path)
        path.unlink()
    assert victim.read_text() == "precious"
    (tmp_path / "soul_config.json").symlink_to(victim)
    with pytest.raises(ValueError, match="soul_config.json, a symbolic link"):
        occupy(tmp_path)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("more", [(), ("--save-every", "1")], ids=["no checkpoints", "checkpoints"])
def test_an_output_removed_during_a_run_is_named_and_the_model_is_there(more, folder, tmp_path, capsys, monkeypatch):
    """The model is saved, so hours of work are not lost; the command must not claim that there is a log."""
    output = tmp_path / "out"
    real = unlearn_module.train_step
    steps_left = [2]

    def train_step(*args):
        steps_left[0] -= 1
        if steps_left[0] == 0:
            shutil.rmtree(output)
        return real(*args)

    monkeypatch.setattr(unlearn_module, "train_step", train_step)
    assert main(words(folder, output, "--epochs", "1", *more)) == 1
    out, err = capsys.readouterr()
    lost = "soul_config.json, data.json, log.jsonl"
    assert f"soul unlearn: {output} was removed during the run: the model is saved there, but {lost} are lost\n" in err
    assert "log.jsonl" not in out and (output / "model.safetensors").is_file()


def test_a_run_that_was_stopped_after_its_output_was_removed_goes_on(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    real = unlearn_module.train_step

    def train_step(*args):
        shutil.rmtree(output)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(unlearn_module, "train_step", train_step)
        patch.setattr("soul.checkpoint.local.Checkpoints.stop_requested", lambda self: True)
        assert main(words(folder, output, "--epochs", "2")) == 143
    assert main(words(folder, output, "--epochs", "2", "--resume")) == 0
    steps = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1


def test_an_output_that_another_run_has_taken_is_left_to_it(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    real = unlearn_module.train_step

    def train_step(*args):
        shutil.rmtree(output)
        with occupy(output):
            (output / "soul_config.json").write_text("{}")
        return real(*args)

    monkeypatch.setattr(unlearn_module, "train_step", train_step)
    assert main(words(folder, output, "--epochs", "1")) == 1
    assert f"soul unlearn: {output} was removed during the run, and another run uses it now" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["soul_config.json"]


def contents(output):
    return {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_one_run_at_a_time_in_an_output_directory(folder, capsys, monkeypatch):
    """The lock belongs to an open file, so it ends with the process, however that ends."""
    output = folder / "locked"
    argv = words(folder, "locked", "--epochs", "1", "--resume")
    with occupy(output):
        (output / "log.jsonl").write_text("of the other run")
        before = contents(output)
        assert main(argv) == 2
        assert f"output: expected a directory that no run is using, got {output}, which" in capsys.readouterr().err
        assert contents(output) == before
    assert main(argv) == 0
    for name in ("flock", None):  # a file system without locks, a system without them
        if name is None:
            monkeypatch.setattr("soul.output.directory.fcntl", None)
        else:
            monkeypatch.setattr(fcntl, name, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none")))
        with occupy(output):
            pass


def test_one_run_at_a_time_writes_checkpoints(tokenizer, tmp_path):
    """Another one would remove what is being written, and the two would mix their steps."""
    with Checkpoints(tmp_path).locked():
        (tmp_path / ".half.tmp").mkdir()
        with pytest.raises(
            ValueError, match="checkpoints: expected a directory that no run is using, got .*, which a run is using"
        ):
            run(tokenizer, Checkpoints(tmp_path, resume=True))
        assert [path.name for path in tmp_path.iterdir()] == [".half.tmp"]
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 2))
    run(tokenizer, Checkpoints(tmp_path, resume=True))  # whatever ends a run ends its lock


def test_a_refused_resume_leaves_the_description_of_the_run_unchanged(folder, tokenizer, capsys):
    output = folder / "said"
    options = ("--epochs", "1", "--save-every", "0", "--resume")
    output.mkdir()
    (output / "soul_config.json").write_text("{}")  # of a run that has ended before its first checkpoint
    assert main(words(folder, "said", *options, "--lr", "1e-4")) == 0
    assert json.loads((output / "soul_config.json").read_text())["lr"] == 1e-4
    (output / "model.safetensors").unlink(), (output / "config.json").unlink()
    (output / "checkpoints").mkdir()
    rows = [json.loads(line) for line in lines(folder / "forget.jsonl")]
    forget = [Example(row["prompt"], row["completion"]) for row in rows]
    model, _ = load(folder / "model", dtype="bfloat16")
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(output / "checkpoints", 1), model, forget)
    before = contents(output)
    (folder / "fewer.jsonl").write_text("\n".join(lines(folder / "forget.jsonl")[1:]))
    assert main(words(folder, "said", *options, "--forget", str(folder / "fewer.jsonl"))) == 2
    assert "resume, " in capsys.readouterr().err and contents(output) == before


def test_in_python_the_model_of_a_run_that_has_ended_is_not_replaced(folder):
    config = UnlearnConfig(**FAST | dict(epochs=1))
    names = [folder / name for name in ("model", "forget.jsonl", "retain.jsonl")]
    output = folder / "replaced"
    soul.Unlearner(*names, config, device="cpu").run(output, progress=False, resume=True)
    before = contents(output)
    with pytest.raises(ValueError, match="resume: expected a run that has not ended, got a finished model in "):
        soul.Unlearner(*names, config, device="cpu").run(output, progress=False, resume=True)
    assert contents(output) == before


def test_resume_wants_an_output_directory_of_its_own(folder, capsys):
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thing").write_text("x")
    assert main(words(folder, "foreign", "--resume")) == 2
    assert "resume: expected the output directory of a run, or a new one" in capsys.readouterr().err
    assert [p.name for p in (folder / "foreign").iterdir()] == ["thing"]


def test_a_generation_config_that_transformers_does_not_save_costs_no_model(tokenizer, tmp_path):
    """For example one with a temperature but without sampling, which transformers loads but does not save."""
    model = tiny_model()
    config = model.generation_config
    config.do_sample = False
    config.temperature = 0.6
    config.eos_token_id = 7
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="generation_config.json is a default"):
        save_model(model, tokenizer, tmp_path)
    assert model.generation_config is config and type(model).from_pretrained(tmp_path).generation_config.temperature != 0.6
    assert same(type(model).from_pretrained(tmp_path), model)


def test_a_directory_that_cannot_be_written(tokenizer, tmp_path, folder, capsys):
    """Root may write everywhere, but not below a file."""
    (tmp_path / "file").write_text("x")
    model = tiny_model()
    with pytest.raises(OSError):
        run(tokenizer, Checkpoints(tmp_path / "file" / "c", every=1), model)
    assert same(model, tiny_model())  # found out before the first step
    assert main(words(folder, "forget.jsonl/out")) == 2
    assert "output: expected a new or an empty directory" in capsys.readouterr().err


def test_saving_a_model_leaves_nothing_of_a_save_that_was_killed(tokenizer, tmp_path):
    scratch_path(tmp_path).mkdir()
    scratch_path(tmp_path).write_text("half of a file")
    save_model(tiny_model(), tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names and not any(n.endswith(".tmp") for n in names)


def plant(directory):
    """Put files that are not ours into a directory; return their names."""
    (directory / ".x.tmp").write_text("x")
    (directory / ".y.tmp").symlink_to(directory.parent)
    (directory / ".z.tmp").symlink_to(directory / "nothing")
    scratch_path(directory).symlink_to(directory.parent)
    (directory / ".d.tmp").mkdir()
    return {path.name for path in directory.iterdir()}


def test_files_of_somebody_else_are_neither_removed_nor_in_the_way(tokenizer, tmp_path):
    for name in ("output", "checkpoints"):
        (tmp_path / name).mkdir()
    planted = {name: plant(tmp_path / name) for name in ("output", "checkpoints")}
    save_model(tiny_model(), tokenizer, tmp_path / "output")
    (tmp_path / "checkpoints" / "step-9").write_text("no checkpoint")
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep=1)
    run(tokenizer, checkpoints)
    assert checkpoints.steps() == [6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints.remove()
    for name, names in planted.items():
        assert names <= {path.name for path in (tmp_path / name).iterdir()}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == planted["checkpoints"] | {"step-9"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_files_have_the_modes_that_the_umask_asks_for(umask, tokenizer, tmp_path):
    """Modes of a saved model, a checkpoint and a reference cache; safetensors creates files of mode 0600."""
    before = os.umask(umask)
    try:
        run(tokenizer, Checkpoints(tmp_path / "checkpoints", every=6), method="npo", reference_cache=str(tmp_path / "cache"))
        save_model(tiny_model(), tokenizer, tmp_path)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert {"model.safetensors", "tokenizer.json", "checkpoints/step-6/model.safetensors"} <= modes.keys()
    assert any(name.startswith("cache/logps-") for name in modes)
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
