"""A hub that does not answer is asked once, then said to be unreachable in one line; what is in its cache is read at once."""

import importlib
import os
import pathlib
import socketserver
import subprocess
import sys
import threading
import time

import pytest

from soul._connection import _problem
from soul.cli import main
from soul.data.sources import rows
from soul_kernels.errors import ArgumentError
from tests.support.models import tiny_model, tiny_tokenizer
from tests.support.runs import write_model_and_data

pytest.importorskip("transformers", reason="the extra hf is not installed")
ROOT = pathlib.Path(__file__).parents[1]
UNREACHABLE = "expected a path, or a name that is in the cache while {url} cannot be reached, got {name} ("


class Dead(socketserver.ThreadingTCPServer):
    """A server that hangs up, and counts how often it was called."""

    daemon_threads = True

    def __init__(self):
        self.calls = 0
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request, client_address):
        self.calls += 1
        self.shutdown_request(request)


@pytest.fixture
def dead():
    with Dead() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        yield server
        server.shutdown()


@pytest.fixture
def hub(dead, monkeypatch):
    """The dead server, in place of the hub of this process."""
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", dead.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", dead.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits before it tries again
    _problem.cache_clear()
    yield dead
    assert not constants.HF_HUB_OFFLINE  # as before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_and_data(tmp_path_factory.mktemp("connection"), tiny_tokenizer())


@pytest.mark.parametrize("command", ["plan", "unlearn", "ask"])
def test_a_model_of_an_unreachable_hub_is_refused_after_one_request(command, folder, hub, capsys):
    data = [f"--{name}={folder / name}.jsonl" for name in ("forget", "retain")]
    more = {"plan": ["--model"], "unlearn": [*data, f"--output={folder / 'out'}", "--model"], "ask": []}[command]
    assert main([command, *more, "nobody/nothing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"soul {command}: model: {UNREACHABLE.format(url=hub.url, name='nobody/nothing')}"), line
    assert line.endswith("); check the connection, and HF_ENDPOINT and proxies if they are set")
    assert hub.calls == 1


def test_a_base_below_local_adapters_is_named(folder, hub, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "base_model_name_or_path": "nobody/base"}')
    tiny_tokenizer().save_pretrained(tmp_path)
    assert main(["ask", str(tmp_path), "Who?"]) == 2
    assert UNREACHABLE.format(url=hub.url, name="nobody/base") in capsys.readouterr().err
    assert hub.calls == 1


def test_data_of_an_unreachable_hub_are_refused_after_one_request(hub):
    pytest.importorskip("datasets")
    with pytest.raises(ArgumentError, match="hub:nobody/data: expected a path, or a name that is in the cache while"):
        rows("hub:nobody/data")
    assert hub.calls == 1


def test_local_models_ask_nobody(folder, hub):
    assert main(["plan", "--model", str(folder / "model")]) == 0
    assert hub.calls == 0


@pytest.mark.slow(reason="a process; the cache of huggingface_hub is chosen when it is imported")
def test_a_model_in_the_cache_is_loaded_after_one_request(dead, tmp_path):
    repository = tmp_path / "models--nobody--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    for part in (tiny_model(), tiny_tokenizer()):
        part.save_pretrained(repository / "snapshots" / ("a" * 40))
    settings = {"HF_ENDPOINT": dead.url, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "soul", "ask", "nobody/model", "Who?", "--max-new-tokens=2", "--device=cpu"]
    ended = subprocess.run(command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert dead.calls == 1


@pytest.mark.parametrize("name, remedy", [
    ("llama-3-8b", "did you mean llama-3.1-8b or "), ("Llama-2-7B", "did you mean llama-2-7b"),
    ("lama-3.1-8b", "did you mean llama-3.1-8b"),
])  # fmt: skip
def test_a_slip_in_the_name_of_a_preset_is_answered_without_the_hub(name, remedy, hub, capsys):
    assert main(["plan", "--model", name]) == 2
    assert f"llama-3-70b, got {name}; {remedy}" in capsys.readouterr().err
    assert hub.calls == 0
