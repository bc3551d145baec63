"""Other libraries print nothing before or between the lines of a command, in processes that import them for the first time."""

import pathlib
import subprocess
import sys

import pytest

from tests.support.models import tiny_model, tiny_tokenizer
from tests.support.runs import words, write_model_and_data

pytest.importorskip("peft", reason="the extra hf is not installed")
ROOT = pathlib.Path(__file__).parents[2]
HEAVY = ("transformers", "peft", "bitsandbytes", "torchao", "datasets", "sklearn", "matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = write_model_and_data(tmp_path_factory.mktemp("quiet"), tiny_tokenizer())
    tiny_model().save_pretrained(root / "model")  # transformers rightly warns of the other one's config.json
    return root


def printed(code: str) -> tuple[list[str], list[str]]:
    """Run a program in a process of its own; return the lines on its two streams, as the descriptors 1 and 2 got them."""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines(), ended.stderr.splitlines()


def test_adapters_are_trained_and_asked_without_a_word_of_other_libraries(folder):
    run = words(folder, "out", "--epochs=1", "--optimizer=adamw", "--lora-rank=4", "--no-samples")
    ask = ["ask", str(folder / "out"), "Who?", "--max-new-tokens=2", "--device=cpu"]
    out, err = printed(f"from soul.cli import main; main({run!r}); main({ask!r})")
    assert err == []
    assert [line.split(":")[0].split(" in ")[0] for line in out[:7]] == [
        "forget", "retain", "3 steps", "adapters, tokenizer and log.jsonl", "report", "Who?", str(folder / "out")
    ]  # fmt: skip


@pytest.mark.slow(reason="a process that imports all libraries; that of the command is always tested")
def test_the_library_loads_a_model_without_a_word_of_others(folder):
    """Bars of transformers are those of the program that loads."""
    code = f"""
        import transformers
        transformers.utils.logging.disable_progress_bar()
        from soul import Unlearner
        from soul.plan import shape_of
        shape_of({str(folder / "model")!r})
        Unlearner({str(folder / "model")!r}, forget={str(folder / "forget.jsonl")!r}, retain={str(folder / "retain.jsonl")!r},
                  adapters=dict(rank=4))
    """
    assert printed("if True:" + code) == ([], [])


def test_info_imports_no_library_to_tell_its_version():
    code = f"from soul.cli import main; main(['info']); import sys; print([name for name in {HEAVY} if name in sys.modules])"
    out, err = printed(code)
    assert err == [] and out[-1] == "[]"
    assert any(line.startswith("peft ") for line in out)
