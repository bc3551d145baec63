"""Checkpoints when a disk is full, a file is damaged or the run is interrupted: no run is lost, and messages are true."""

import errno
import json
import os
import pathlib
import random
import re
import resource
import shutil
import warnings

import pytest
import safetensors.torch
import torch
from transformers import PreTrainedTokenizerBase

from soul.checkpoint import Checkpoints, Stopped, has_ended, save_model
from soul.checkpoint.format import read_checkpoint, write_tensors
from soul.checkpoint.local import ENDED_FILE, NAME
from soul.cli import main
from tests.support.models import tiny_model, tiny_tokenizer
from tests.support.runs import StopAfter, log_of, run, same, unlearn_module, weights, words, write_model_and_data


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return write_model_and_data(tmp_path_factory.mktemp("faults"), tokenizer)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def foreign(path):
    if path.suffix == ".json":
        path.write_text('{"hello": "world"}')
    else:
        safetensors.torch.save_file({"x": torch.zeros(2)}, path)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A directory of checkpoints, and the model and the records of the run that left them."""
    directory = tmp_path_factory.mktemp("saved")
    return directory, *run(tokenizer, Checkpoints(directory, every=2))


@pytest.mark.parametrize("damage", [truncate, flip, foreign, pathlib.Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "training.json"])
def test_a_damaged_checkpoint_is_passed_over(name, damage, saved, tokenizer, tmp_path):
    directory, whole, want = saved
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "step-6" / name)
    with pytest.warns(UserWarning, match="step-6: .*(readable|damaged).*; trying the one before it"):
        model, records = run(tokenizer, Checkpoints(tmp_path, every=2, resume=True))
    assert same(model, whole) and records == want and Checkpoints(tmp_path).steps() == [6, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the damaged one has been written anew
        assert run(tokenizer, Checkpoints(tmp_path, every=2, resume=True))[1] == want
    for step in (4, 6):
        damage(tmp_path / f"step-{step}" / name)
    fresh = tiny_model()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="resume: expected a whole checkpoint in .*, got damaged"):
        run(tokenizer, Checkpoints(tmp_path, resume=True), fresh)
    assert same(fresh, tiny_model())


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_safetensors(tensors, path):
    """Write with a file-size limit for this process: safetensors reports it in words of its own, not as an OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        write_tensors(tensors, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("broken", [
    ("os.fsync", full), ("write_tensors", full), ("write_tensors", full_for_safetensors), ("pathlib.Path.write_text", full),
    ("pathlib.Path.rename", full), ("pathlib.Path.mkdir", full),
], ids=lambda broken: f"{broken[0]}-{broken[1].__name__}")  # fmt: skip
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(broken, tokenizer, tmp_path, monkeypatch):
    whole, want = run(tokenizer)

    class FullAfter(Checkpoints):
        def save(self, step, *args):
            with monkeypatch.context() as patch:
                if step == 4:
                    patch.setattr(f"soul.checkpoint.local.{broken[0]}", broken[1])
                super().save(step, *args)

    with pytest.raises(OSError, match="step 4 could not be saved .*") as error:
        run(tokenizer, FullAfter(tmp_path, every=2, keep=1))
    assert re.search("No space left|File too large", str(error.value)) and not list(tmp_path.glob(".*.tmp"))
    assert Checkpoints(tmp_path).steps() == [2]
    model, records = run(tokenizer, Checkpoints(tmp_path, every=2, resume=True))
    assert same(model, whole) and records == want


def test_the_command_says_what_a_full_disk_left(folder, capsys, monkeypatch):
    """A disk full at a checkpoint, the model or the log: status 1, the reason, and the step that --resume continues from."""
    real = Checkpoints.save

    def save(self, step, *args):
        with monkeypatch.context() as patch:
            if step == 4:
                patch.setattr("soul.checkpoint.local.write_tensors", full)
            real(self, step, *args)

    argv = words(folder, "full", "--epochs", "2", "--save-every", "2")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        assert main(argv) == 1
    err = capsys.readouterr().err
    assert "step 4 could not be saved (No space left on device); with --resume it goes on after step 2" in err
    with monkeypatch.context() as patch:
        patch.setattr("transformers.GPT2LMHeadModel.save_pretrained", full)
        assert main([*argv, "--resume"]) == 1
    err = capsys.readouterr().err
    assert "the model could not be saved (No space left on device); with --resume it goes on after step 6" in err
    assert not (folder / "full" / "config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(unlearn_module, "_write_line", full)
        assert main([*argv, "--resume"]) == 1
    assert "No space left on device; with --resume it goes on after step 6" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    assert main(words(folder, "roomy", "--epochs", "2")) == 0
    assert weights(folder / "full") == weights(folder / "roomy") and log_of(folder / "full") == log_of(folder / "roomy")


def test_broken_weights_are_not_saved(tokenizer, tmp_path):
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        run(tokenizer, Checkpoints(tmp_path, every=1), lr=1e38, max_grad_norm=None)
    for step in Checkpoints(tmp_path).steps():
        saved = safetensors.torch.load_file(tmp_path / f"step-{step}" / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in saved.values())


class Interruption(KeyboardInterrupt):
    """A Ctrl-C of this test."""


def fail_at(number, error, patch):
    """Raise an error in one of the calls that change what is in a directory, and in all later ones of an OSError."""
    calls_left = [number]

    def failing(real):
        def call(*args, **options):
            calls_left[0] -= 1
            if calls_left[0] == 0 or (calls_left[0] < 0 and isinstance(error, OSError)):
                raise error
            return real(*args, **options)

        return call

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        patch.setattr(os, name, failing(getattr(os, name)))
    return calls_left


def files_below(output):
    return [path for path in (output / "checkpoints").rglob("*") if path.is_file()]


@pytest.mark.slow(reason="two runs for each call that could fail; the tests below fail at the ones that matter")
@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), Interruption()], ids=["error", "Ctrl-C"])
def test_errors_while_the_last_checkpoints_are_removed_leave_a_finished_run(error, folder, capsys, monkeypatch):
    """Raise an error, or press Ctrl-C, in each call after the model was saved. Then run the same command with --resume."""
    options = ("--epochs", "1", "--save-every", "3")  # one checkpoint, after the last step
    notes = []
    if not (folder / "undisturbed").exists():
        assert main(words(folder, "undisturbed", *options)) == 0
    for number in range(1, 100):
        output = folder / f"removed {type(error).__name__} {number}"
        armed = []

        def save(*args, number=number, armed=armed):
            save_model(*args)
            armed.append(fail_at(number, error, patch))

        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr("soul.run.unlearner.save_model", save)
            status = main(words(folder, output.name, *options))
        errors = capsys.readouterr().err
        messages = [str(warning.message) for warning in caught]
        if armed[0][0] > 0:  # the run made fewer calls
            assert status == 0 and not (output / "checkpoints").exists()
            break
        if isinstance(error, OSError):
            assert status == 0
            assert any("could not be removed" in message for message in messages) or files_below(output) == []
        else:
            assert status == 130 and f"interrupted; the model is saved in {output}" in errors
            assert ("checkpoints are left behind" in errors) == (output / "checkpoints").exists()
        notes.append((output / ENDED_FILE).is_file())
        assert weights(output) == weights(folder / "undisturbed")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert main(words(folder, output.name, *options, "--resume")) == 0
        assert ("this run has ended" in capsys.readouterr().out) == notes[-1]
        assert weights(output) == weights(folder / "undisturbed") and log_of(output) == log_of(folder / "undisturbed")
    assert len(notes) > 5 and notes == sorted(notes) and notes[-5:] == [True] * 5  # the note comes before the first removal


def test_a_full_disk_after_the_model_was_saved_is_no_error(tmp_path, monkeypatch):
    """Without room for the log the checkpoints stay. Without room for the note they are removed, which makes room."""
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    for name in ("config.json", "log.jsonl"):
        (tmp_path / name).write_text("{}")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="the model is saved; checkpoints are left behind"):
        patch.setattr(os, "fsync", full)
        checkpoints.end(tmp_path)
    assert checkpoints.steps() == [3] and not has_ended(tmp_path, checkpoints)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(pathlib.Path, "write_text", full)
        checkpoints.end(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "log.jsonl"}
    assert has_ended(tmp_path, checkpoints)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(tokenizer, tmp_path, monkeypatch):
    """What remains of it is whole, or no longer has the name of a checkpoint."""
    _, want = run(tokenizer)
    for name in ("rename", "unlink"):
        directory = tmp_path / name

        class Stubborn(Checkpoints):
            def commit(self, *args, name=name):
                with monkeypatch.context() as patch:
                    owner = pathlib.Path if name == "rename" else os  # Python 3.10 binds os.rename early
                    real = getattr(owner, name)

                    def call(path, *args, **options):
                        if name == "unlink" or NAME.fullmatch(os.path.basename(path)):
                            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
                        return real(path, *args, **options)

                    patch.setattr(owner, name, call)
                    super().commit(*args)

        with pytest.warns(UserWarning, match="could not be removed"):
            _, records = run(tokenizer, Stubborn(directory, every=2, keep=1))
        assert records == want
        steps = Checkpoints(directory).steps()
        assert steps == ([6, 4, 2] if name == "rename" else [6])
        for step in steps:
            read_checkpoint(directory / f"step-{step}")  # none is damaged
    run(tokenizer, Checkpoints(tmp_path / "unlink", resume=True))
    assert [path.name for path in (tmp_path / "unlink").iterdir()] == ["step-6"]  # the halves are gone


def test_the_log_is_on_the_disk_before_its_checkpoints_are_removed(folder, monkeypatch):
    flushed = set()
    at_removal = []
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def remove(self):
        at_removal.append(set(flushed))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Checkpoints, "remove", remove)
    assert main(words(folder, "flushed", "--epochs", "1")) == 0
    (flushed,) = at_removal
    names = ("log.jsonl", "soul_config.json", "data.json", "model.safetensors", "config.json")
    assert {name for name in names if (folder / "flushed" / name).stat().st_ino in flushed} == set(names)


def test_a_flipped_bit_in_the_newest_checkpoint_is_not_taken_for_another_run(tokenizer, tmp_path):
    """The bit changes an option or a name, and the JSON can still be parsed. The checkpoint before it is used."""
    _, want = run(tokenizer, Checkpoints(tmp_path, every=2))
    path = tmp_path / "step-6" / "training.json"
    whole = path.read_bytes()
    described = json.loads(whole)["state"]["run"]
    begin = whole.index(b'"run"')
    positions = [*range(0, len(whole), 401), *range(begin, whole.index(b'"environment"'), 11)]
    checkpoints = Checkpoints(tmp_path, resume=True)
    readable = 0
    for position in positions:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << random.randrange(7)]) + whole[position + 1 :])
        checkpoints.check(described)
        readable += parses(path)
    assert readable > 30
    path.write_bytes(whole.replace(b'"lr": 0.001', b'"lr": 0.003', 1))
    with pytest.warns(UserWarning, match="step-6: damaged .checksum of training.json.; trying the one before it"):
        assert run(tokenizer, Checkpoints(tmp_path, resume=True))[1] == want


def parses(path):
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


def test_a_resumed_run_does_not_depend_on_the_files_it_was_loaded_from(tokenizer, tmp_path):
    """Safetensors maps files into memory, so tensors that were not copied would change with the file."""

    class Overwritten(Checkpoints):
        def load(self, *args):
            records = super().load(*args)
            for path in self.directory.glob("step-*/*"):
                with open(path, "rb+") as file:
                    file.write(b"x" * path.stat().st_size)
            return records

    whole, want = run(tokenizer)
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 3))
    model, records = run(tokenizer, Overwritten(tmp_path, resume=True))
    assert same(model, whole) and records == want


def test_a_full_disk_while_the_tokenizer_is_saved_ends_with_1(folder, capsys, monkeypatch):
    """The tokenizers library raises a plain Exception with words of its own."""
    real = PreTrainedTokenizerBase.save_pretrained

    def save_pretrained(*args, **options):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            return real(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    argv = words(folder, "full at the tokenizer", "--epochs", "1", "--save-every", "1")
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_pretrained)
        assert main(argv) == 1
    err = capsys.readouterr().err
    assert "the model could not be saved (File too large); with --resume it goes on after step 3" in err
    assert not (folder / "full at the tokenizer" / "config.json").exists()
    assert main([*argv, "--resume"]) == 0
