"""A saved model goes to a stand-in of the hub, and a push that cannot work is refused before the run that leads to it."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from soul.cli import NOT_PUSHED, main
from soul.commands.push import push_run
from soul.commands.unlearn import NOT_REACHED
from soul.hub.card import has_card
from soul.hub.push import NotPushed, files_to_push, publish
from soul.run.config import UnlearnConfig
from soul.run.unlearner import Unlearner
from soul_kernels.errors import ArgumentError
from tests.support.hub import running_hub
from tests.support.models import examples, tiny_model, tiny_tokenizer
from tests.support.runs import words, write_model_and_data

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the extra hf is not installed")
SAVED = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ROOT = pathlib.Path(__file__).parent.parent.parent
SHORT = ("--epochs=1", "--optimizer=adamw", "--no-samples")
AT_HOME = {"soul_config.json", "data.json", "log.jsonl", "report.json", "report.html", "report.md", "soul_ended.txt"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, where this machine is logged in."""
    constants = importlib.import_module("huggingface_hub.constants")
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its service has no stand-in; the hub also takes Git LFS
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits before it tries again
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_and_data(tmp_path_factory.mktemp("hub"), tiny_tokenizer())


@pytest.fixture(scope="module")
def ended(folder):
    """The output directory of a run that has ended, with a file of a user beside the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soul_kernels.backends.runs_on_cpu", lambda: False)  # as for a user without a GPU
        assert main(words(folder, "ended", *SHORT)) == 0
    (folder / "ended" / "notes.json").write_text("{}")
    return folder / "ended"


def test_a_run_is_pushed_at_its_end(folder, hub, capsys, without_kernels):
    assert main(words(folder, "pushed", *SHORT, "--push-to-hub=model", "--hub-private")) == 0
    files = hub.files("me/model")
    assert hub.repositories["me/model"]["private"] and SAVED <= files.keys()
    output = folder / "pushed"
    assert files == {name: (output / name).read_bytes() for name in files} and not AT_HOME & files.keys()
    assert capsys.readouterr().out.splitlines()[-1] == f"pushed: {hub.url}/me/model"
    assert not {"push_to_hub", "hub_private"} & json.loads((output / "soul_config.json").read_text()).keys()
    assert not any(str(folder).encode() in content for content in files.values())  # no directory of this machine
    del hub.repositories["me/model"]["files"]["config.json"]
    assert main(words(folder, "pushed", *SHORT, "--push-to-hub=model", "--resume")) == 0  # it has ended: pushed again
    assert "config.json" in hub.files("me/model")


def test_exactly_the_files_of_the_model_go_up(ended, hub, tmp_path):
    assert {path.name for path in ended.iterdir()} - {"notes.json"} == AT_HOME | {p.name for p in files_to_push(ended)}
    theirs = {"LICENSE": b"MIT", "onnx/config.json": b"{}"}
    hub.add("me/model", **theirs, **{"adapter_config.json": b"{}", "model-00001-of-00002.safetensors": b""})
    assert main(["push", str(ended), "me/model"]) == 0
    names = {path.name for path in files_to_push(ended)}
    assert hub.files("me/model").keys() == names | theirs.keys()  # and no mixture of two models
    assert main(["push", str(ended), "me/model", "--with-report"]) == 0
    assert {"report.html", "report.md"} <= hub.files("me/model").keys() and "report.json" not in hub.files("me/model")


@pytest.mark.slow(reason="starts a process")
def test_in_a_process_of_its_own_with_the_settings_of_huggingface_hub(ended, hub):
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "soul", "push", str(ended), "model"]
    result = subprocess.run(command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"pushed: {hub.url}/me/model\n"), result.stderr
    assert hub.files("me/model")["model.safetensors"] == (ended / "model.safetensors").read_bytes()


def test_links_stay_at_home(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "vocab.json").symlink_to(tmp_path / "secret")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "chat.jinja").write_text("secret")
    (tmp_path / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    assert [path.name for path in files_to_push(tmp_path)] == ["config.json"]


@pytest.mark.parametrize("base, pushed", [("/home/me/secret/before", "./before"), ("org/base", "org/base")])
def test_adapters_do_not_name_a_directory_of_this_machine(base, pushed, hub, tmp_path):
    text = json.dumps({"base_model_name_or_path": base, "r": 8})
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n[More Information Needed]")  # as peft leaves it
    hub.is_private_by_default = True  # by the settings of the account
    publish(tmp_path, "me/adapters")
    assert hub.repositories["me/adapters"]["private"]
    assert json.loads(hub.files("me/adapters")["adapter_config.json"]) == {"base_model_name_or_path": pushed, "r": 8}
    assert (tmp_path / "adapter_config.json").read_text() == text and has_card(tmp_path)


def test_an_edited_card_is_pushed_as_it_is(ended, hub):
    path = ended / "README.md"
    original = path.read_text()
    path.write_text(f"{original}\nMore.\n")
    publish(ended, "me/model")
    assert hub.files("me/model")["README.md"].endswith(b"\nMore.\n")
    path.write_text(original)


@pytest.mark.parametrize("repository, token, message", [
    ("me/a/b", "hf_writes", "push_to_hub: expected OWNER/NAME, a repository on the hub, got 'me/a/b'"),
    ("./out", "hf_writes", "push_to_hub: expected OWNER/NAME, a repository on the hub, got './out'"),
    ("me/model", None, "push_to_hub: expected a login at the hub, got none; run: hf auth login, or set HF_TOKEN"),
    ("me/model", "hf_wrong", "push_to_hub: expected a valid login at the hub, got status 401"),
    ("you/model", "hf_writes", "push_to_hub: expected a login that may write to you/model, got status 403: "),
    ("you/hidden", "hf_writes", "push_to_hub: expected a login that may write to you/hidden, got status 404: Repository not f"),
    ("me/model", "hf_reads", "push_to_hub: expected a login that may write to me/model, got status 403: you must use a write"),
])  # fmt: skip
def test_what_cannot_be_pushed_is_refused_before_the_run(repository, token, message, folder, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    if token == "hf_reads" or repository == "you/hidden":
        hub.add(repository, private=repository == "you/hidden")
    before = json.dumps(sorted(hub.repositories))
    assert main(words(folder, "refused", f"--push-to-hub={repository}")) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "refused").exists() and json.dumps(sorted(hub.repositories)) == before


def test_a_private_model_does_not_go_into_a_public_repository(ended, hub, capsys):
    hub.add("me/model")
    assert main(["push", str(ended), "me/model", "--private"]) == 2
    assert "REPOSITORY: expected a private repository, got me/model, which exists and is public" in capsys.readouterr().err
    assert not hub.files("me/model")


def test_offline_nothing_is_asked(folder, hub, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(words(folder, "refused", "--push-to-hub=me/model")) == 2
    assert "push_to_hub: expected a hub that may be reached, got HF_HUB_OFFLINE" in capsys.readouterr().err
    assert hub.asked == [] and not (folder / "refused").exists()


def test_other_options_that_do_not_fit(folder, hub, tmp_path, capsys):
    assert main(words(folder, "refused", "--hub-private")) == 2
    assert "hub_private: expected nothing without --push-to-hub" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "me/model"]) == 2
    assert "OUTPUT: expected the output directory of a run that has ended" in capsys.readouterr().err
    assert main(words(folder, "refused", "--push-to-hub=me/model", "--dry-run", "--lr=1e-5")) == 0
    assert hub.asked == []


@pytest.mark.parametrize("place", ["/upload/", "/commit/"])
def test_a_hub_that_is_gone_in_the_middle_costs_nothing_but_the_push(place, folder, ended, hub, monkeypatch, capsys):
    hub.add("me/model")
    hub.dies_at = place
    push = words(folder, "ended", *SHORT, "--push-to-hub=me/model", "--resume")  # the run has ended, so this pushes only
    assert main(push) == NOT_PUSHED
    error = capsys.readouterr().err
    assert f"the model is saved in {ended}, and was not pushed to me/model (" in error and "(Error while upl" not in error
    assert error.rstrip().endswith(f"push it again: soul push {ended} me/model")
    assert SAVED <= {path.name for path in ended.iterdir()} and not hub.files("me/model")  # no half of a model
    hub.dies_at, hub.is_dead = None, False
    assert main(["push", str(ended), "me/model"]) == 0
    assert hub.files("me/model")["model.safetensors"] == (ended / "model.safetensors").read_bytes()


def test_a_hub_that_is_gone_at_the_start_ends_the_run_before_it_begins(folder, hub, capsys):
    hub.is_dead = True
    assert main(words(folder, "refused", "--push-to-hub=me/model")) == 2
    error = capsys.readouterr().err
    assert "push_to_hub: expected an answer of the hub, got " in error and "push later with: soul push" in error


def test_a_run_that_missed_its_aim_is_not_pushed(ended, hub, capsys):
    args = type("args", (), dict(push_to_hub="me/model", dry_run=False, output=str(ended)))
    push_run(args, NOT_REACHED)
    assert f"not pushed; to push it all the same: soul push {ended} me/model" in capsys.readouterr().out and hub.asked == []


def test_from_python(hub, tmp_path, without_kernels):
    config = UnlearnConfig(epochs=1, batch_size=2, lr=1e-3, backend="reference", method="graddiff", optimizer="adamw")
    unlearner = Unlearner(tiny_model(), examples(2), examples(4)[2:], config, tokenizer=tiny_tokenizer())
    with pytest.raises(ArgumentError, match="push: expected a run that has saved its model, got none"):
        unlearner.push("me/model")
    unlearner.run(tmp_path / "an output", progress=False)
    assert unlearner.push("model", private=True) == f"{hub.url}/me/model"
    card = hub.files("me/model")["README.md"].decode()
    assert "- graddiff" in card and "| lr | 0.001 |" in card
    with pytest.raises(NotPushed, match=f"the model is saved in .*: soul push '{tmp_path / 'an output'}' me/model"):
        hub.dies_at = "/tree/"
        unlearner.push("model")
