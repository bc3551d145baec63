"""The commands with ``--task``: a tiny model learns passages, is evaluated on them, and forgets them; and bad input."""

import json
import sys
import types

import pytest
import torch
import yaml

from soul.cli import main
from soul.data import sources
from soul.data.protocols import PKU_COLUMNS
from soul.models.loading import load
from soul.tasks import TASKS, Task, TaskSet, evaluate_task, prepare_task, register, task_of
from tests.support.models import examples, tiny_model, tiny_tokenizer

RUN = ["--device=cpu", "--backend=reference"]
TEXT = "".join(f"{e.prompt}{e.answer} " for e in examples(40))
CUT = ["--task-option=prompt_tokens=8,12", "--task-option=response_tokens=8", "--task-option=tokens=0:40"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a text, and rows of the kinds that the tasks read."""
    root = tmp_path_factory.mktemp("tasks")
    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text(TEXT)

    def write(name, *rows):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("retain", *({"question": f"Where is number {i}?", "answer": f"In house {i}."} for i in range(4)))
    write("texts", *({"text": e.prompt + e.answer} for e in examples(4)))
    write("prompts", *({"prompt": {"text": e.prompt, "toxicity": 0.7}} for e in examples(3)))
    for split in ("train", "test"):
        write(split, *(dict(zip(PKU_COLUMNS, (f"Why {i}?", f"bad {i}", f"good {i}", False, True))) for i in range(3)))
    write("verbmem_forget", *({"prompt": e.prompt, "gt": e.answer} for e in examples(3)))
    for name in ("knowmem_forget_qa", "knowmem_retain_qa"):
        write(name, *({"question": f"Where is {name} {i}?", "answer": f"In house {i}."} for i in range(3)))
    for name in ("privleak_forget", "privleak_holdout", "raw_forget", "raw_retain1"):
        write(name, *({"text": f"{name}: {e.answer}"} for e in examples(5)))
    return root


def words(folder, command, output, *more, model="model"):
    return [command, f"--model={folder / model}", f"--output={folder / output}", *RUN, *more]


def evaluated(folder, output):
    return json.loads((folder / output / "task.json").read_text())


@pytest.fixture(scope="module")
def before(folder):
    """The model after it has learned the passages."""
    copyright_task = ["--task=copyright", f"--text={folder / 'text.txt'}", *CUT]
    learn = ["--epochs=60", "--lr=2e-2", "--until-prob=0.9", "--eval-every=10"]
    assert main(words(folder, "memorize", "before", *copyright_task, *learn)) == 0
    return copyright_task


def test_copyright_end_to_end(folder, before, capsys):
    """Learned passages are known; unlearning lowers every measure of them, and the report says in which direction better is."""
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    pytest.importorskip("rouge_score", reason="the extra eval is not installed")
    retain = f"--retain={folder / 'retain.jsonl'}"
    assert main(words(folder, "unlearn", "after", *before, retain, "--method=graddiff", "--lr=1e-2", "--epochs=8",
                      "--no-samples", model="before")) == 0  # fmt: skip
    out = capsys.readouterr().out
    name = f"passages:{folder / 'before'}@{folder / 'text.txt'}?prompt=8&response=8&tokens=0:40"
    assert f"task copyright: --forget {name}\n" in out and "forget: 2 rows" in out
    more = [f"--task-option=other={folder / 'texts.jsonl'}", f"--json={folder / 'flat.json'}"]
    evaluate = words(folder, "evaluate", "numbers", *before, f"--against={folder / 'before'}", *more, model="after")
    assert main(evaluate) == 0
    content = evaluated(folder, "numbers")
    after, at_first = content["numbers"], content["numbers_against"]
    assert list(after) == list(at_first) and json.loads((folder / "flat.json").read_text()) == after
    assert at_first["passages_8_exact_memorization"] > 0.9 and at_first["passages_8_bleu"] > 60
    for measure in ("bleu", "rouge_l_recall", "exact_memorization", "extraction_strength"):
        assert after[f"passages_8_{measure}"] < at_first[f"passages_8_{measure}"]
        assert content["better"][f"passages_12_{measure}"] == "lower"
        assert content["better"][f"unseen_12_{measure}"] == "neither"
    assert content["better"]["other_perplexity"] == "lower" and after["other_perplexity"] > 1
    said = [json.loads(line) for line in (folder / "numbers" / "task_texts.jsonl").read_text().splitlines()]
    (first, second) = [line for line in said if line["set"] == "passages_8" and line["model"] == str(folder / "before")]
    assert TEXT.startswith(first["prompt"] + " " * first["answer"].startswith(" "))
    rows_of_log = json.loads((folder / "numbers" / "task_rows.json").read_text())[str(folder / "after")]
    assert len(rows_of_log["passages_8"]["bleu"]) == 2
    page = (folder / "numbers" / "report.md").read_text()
    assert "passages 8 bleu" in page and "lower is better" in page and "What the model says" in page
    assert f"{at_first['passages_8_bleu']:>24.6g}" in capsys.readouterr().out


def test_a_prompt_is_a_baseline_that_changes_the_answers_and_no_weight(folder, before, monkeypatch):
    """The instruction stands before prompts of all sets, and beside it the model is asked without."""
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    (folder / "say.txt").write_text("Answer: In house")
    asked = []
    from soul.tasks import evaluate

    real = evaluate.generate

    def generate(model, tokenizer, sequences, **options):
        asked.append([tokenizer.decode(sequence.input_ids[: sequence.prompt_length]) for sequence in sequences])
        return real(model, tokenizer, sequences, **options)

    monkeypatch.setattr(evaluate, "generate", generate)
    sha = (folder / "before" / "model.safetensors").read_bytes()
    options = [*before, f"--system-prompt={folder / 'say.txt'}", f"--against={folder / 'before'}", "--rows=1"]
    assert main(words(folder, "evaluate", "prompted", *options, model="before")) == 0
    half = len(asked) // 2
    for (with_instruction,), (without,) in zip(asked[:half], asked[half:]):
        assert with_instruction.removeprefix("<s>") == "Answer: In house\n\n" + without.removeprefix("<s>")
    content = evaluated(folder, "prompted")
    assert content["system_prompt"] == "Answer: In house"
    assert content["numbers"] != content["numbers_against"]
    assert (folder / "before" / "model.safetensors").read_bytes() == sha


def test_detox(folder, monkeypatch):
    """Answers of PKU-SafeRLHF are forgotten by refusals; three sets of prompts are scored offline."""
    monkeypatch.setitem(sys.modules, "profanity_check", types.SimpleNamespace(predict_prob=lambda texts: [0.6] * len(texts)))
    data = ["--task=detox", f"--task-option=data={folder}", "--task-option=rows=2"]
    sets = [f"--task-option=prompts={folder / 'prompts.jsonl'}", f"--task-option=other={folder / 'texts.jsonl'}"]
    run = ["--method=po", "--lr=1e-3", "--epochs=1", "--no-samples"]
    assert main(words(folder, "unlearn", "detoxed", *data, *run)) == 0
    recorded = json.loads((folder / "detoxed" / "soul_config.json").read_text())
    assert recorded["refusals"].endswith("detox.txt") and recorded["forget"] == f"saferlhf:unsafe@{folder}?rows=2"
    assert main(words(folder, "evaluate", "toxicity", *data, *sets, "--max-new-tokens=4", model="detoxed")) == 0
    content = evaluated(folder, "toxicity")
    assert content["scorer"] == "profanity-check" and list(content["numbers"]) == [
        *(f"{name}_{number}" for name in ("forget", "pku") for number in ("toxicity", "toxic_rate", "refusal_rate")),
        "prompts_toxicity", "prompts_toxic_rate", "other_perplexity",
    ]  # fmt: skip
    assert content["numbers"]["prompts_toxicity"] == pytest.approx(0.6) and content["numbers"]["pku_toxic_rate"] == 1


def test_muse_against_a_retrained_model(folder):
    """The formats of MUSE; a model against itself leaks nothing."""
    pytest.importorskip("rouge_score", reason="the extra eval is not installed")
    data = ["--task=muse", f"--task-option=data={folder}", "--max-new-tokens=4"]
    assert main(words(folder, "evaluate", "retrained", *data)) == 0
    retrained = f"--task-option=retrained={folder / 'retrained' / 'task.json'}"
    assert main(words(folder, "evaluate", "leaks", *data, retrained)) == 0
    numbers = evaluated(folder, "leaks")["numbers"]
    assert numbers["privacy_leakage"] == 0 and 0 <= numbers["privacy_min_k_auc"] <= 1
    assert {"verbmem_rouge_l_f1", "knowmem_forget_rouge_l_f1", "knowmem_retain_rouge_l_f1"} <= set(numbers)


def test_tofu_is_measured_as_without_a_task(monkeypatch):
    """The task fills in where TOFU's files are, and what is forgotten."""
    from soul.commands import evaluate

    seen = {}
    monkeypatch.setattr(evaluate, "_run_models", lambda args, *_: seen.update(vars(args)) or exec("raise ValueError"))
    with pytest.raises(ValueError):
        main(["evaluate", "--model=m", "--output=o", "--task=tofu", "--task-option=split=forget05", "--task-option=data=d",
              "--system-prompt=default"])  # fmt: skip
    assert (seen["data"], seen["split"]) == ("d", "forget05")
    assert seen["template"].startswith("Pretend that you know nothing") and seen["template"].endswith("{answer}")


def test_a_task_of_ones_own_in_a_file_and_in_python(folder, monkeypatch):
    content = {
        "forget": str(folder / "retain.jsonl"),
        "retain": str(folder / "texts.jsonl"),
        "instruction": "Say nothing.",
        "sets": {"houses": {"source": str(folder / "retain.jsonl"), "role": "forget", "measures": ["probability"]}},
    }
    (folder / "houses.yaml").write_text(yaml.safe_dump(content))
    assert main(words(folder, "evaluate", "own", f"--task={folder / 'houses.yaml'}", "--system-prompt=default")) == 0
    assert evaluated(folder, "own")["system_prompt"] == "Say nothing."
    monkeypatch.setitem(TASKS, "houses", TASKS["wmdp"])  # so that the name is free again afterwards
    del TASKS["houses"]
    sets = {"houses": TaskSet(content["sets"]["houses"]["source"], "forget", ("probability",))}
    register(
        "houses", lambda options: Task(f"houses of {options['street']}", content["forget"], sets=sets), {"street": "which"}
    )
    task = task_of("houses", {"street": "Main Street"})
    model, tokenizer = load(folder / "model")
    from soul.evaluate.model import EvaluateConfig

    numbers = evaluate_task(model, tokenizer, prepare_task(task), EvaluateConfig(backend="reference")).numbers
    assert task.name == "houses of Main Street" and 0 < numbers["houses_probability"] < 1
    with pytest.raises(ValueError, match="task: expected a new name"):
        register("tofu", TASKS["tofu"].build)


@pytest.mark.parametrize("parameters, optimizer, method, model, options", [
    (7_000_000_000, "soul", "graddiff", "locuslab/tofu_ft_llama2-7b", {"lr": 5e-6, "alpha": 2.0, "epochs": 5}),
    (3_000_000_000, "adamw", None, "locuslab/tofu_ft_llama2-7b", {"lr": 5e-6, "alpha": 0.3, "epochs": 5}),
    (135_000_000, "soul", "graddiff", None, None),
    (7_000_000_000, "soul", "npo", None, None),
])  # fmt: skip
def test_published_options_are_those_of_the_nearest_size(parameters, optimizer, method, model, options):
    run = task_of("tofu").nearest(parameters, method, optimizer)
    assert (run and run.model) == model and (run and dict(run.options)) == options
    assert task_of("detox").nearest(2_000_000_000, None, "soul").model == "facebook/opt-1.3b"


def test_published_options_are_filled_in_unless_the_run_has_an_aim_or_a_rate(monkeypatch, capsys):
    from soul.commands import unlearn

    monkeypatch.setattr(unlearn, "train", lambda args: seen.update(vars(args)) or 0)
    for more, filled in (([], {"lr": 1e-5, "alpha": 5.0, "epochs": 5}), (["--lr=3"], {"lr": 3, "alpha": None, "epochs": None}),
                         (["--aim=auto"], {"lr": None}), (["--alpha=2"], {"lr": 1e-5, "alpha": 2}),
                         (["--retain=mine"], {"retain": "mine", "forget": "tofu:forget10"})):  # fmt: skip
        seen = {}
        assert main(["unlearn", "--model=llama-2-7b", "--task=tofu", "--method=po", "--output=o", *more]) == 0
        assert {name: seen[name] for name in filled} == filled
        printed = capsys.readouterr().out
        assert printed.startswith("task tofu: --forget tofu:forget10 ") and ("--lr" in printed) == (
            filled.get("lr", 1e-5) == 1e-5
        )


BAD = [
    (["unlearn", "--task=copyright"], "text: expected a text to forget, got none; pass --text FILE"),
    (
        ["unlearn", "--task=copyright", "--text={}/text.txt"],
        "retain: expected rows to keep, got none; the task copyright leaves",
    ),
    (["unlearn"], "forget: expected rows to forget, got none; pass --forget, or --task"),
    (["unlearn", "--text={}/text.txt", "--forget=x"], "task: expected a name with the option of a task, got none, and text"),
    (["unlearn", "--task=tofoo"], "task: expected one of tofu, copyright, detox, muse, wmdp, or a YAML file, got 'tofoo'"),
    (["unlearn", "--task=tofu", "--task-option=part=1"], "task_option: expected an option of tofu, got part; options: split: "),
    (["unlearn", "--task=tofu", "--task-option=split"], "task_option: expected NAME=VALUE, each name once, got split"),
    (["memorize"], "data: expected rows to be learned, got none"),
    (["memorize", "--task=muse", "--data=x"], "data: expected nothing with --task, got x"),
    (
        ["evaluate", "--task=copyright", "--text={}/text.txt", "--task-option=prompt_tokens=9000"],
        "text.txt: expected a text of at least 9100 tokens, for a prompt of 9000",
    ),
    (["evaluate", "--task=copyright", "--text={}/text.txt", "--task-option=tokens=5"], "tokens: expected FIRST:LAST, got 5"),
    (
        ["evaluate", "--task=detox", "--task-option=data={}/texts.jsonl"],
        "texts.jsonl, line 1: expected columns prompt, response_0",
    ),
    (
        ["evaluate", "--task=muse", "--task-option=data={}", "--task-option=retrained={}/none.json"],
        "retrained: expected the task",
    ),
    (
        ["evaluate", "--task=muse", "--task-option=data={}", "--scorer=profanity-check"],
        "scorer: expected nothing unless the task",
    ),
    (
        ["evaluate", "--task=muse", "--task-option=data={}", "--data=d"],
        "data: expected nothing with this task or with --lm-eval",
    ),
    (
        ["evaluate", "--task=muse", "--task-option=data={}", "--max-new-tokens=9000"],
        "max_new_tokens, verbmem: expected at most th",
    ),
    (["evaluate", "--task=muse", "--task-option=data={}", "--template=chat"], "tokenizer: expected one with a chat template"),
    (
        ["evaluate", "--task=muse", "--task-option=data={}", "--system-prompt={}/none.txt"],
        "system_prompt: expected default, or a",
    ),
    (["evaluate", "--task=muse", "--task-option=data={}", "--against={}/model"], "against: expected another model"),
    (["evaluate", "--task={}/none.yaml"], "none.yaml, which is not a file"),
    (["evaluate", "--task=tofu", "--against=m"], "against: expected nothing with TOFU's metrics, got m"),
    (["evaluate", "--task=tofu", "--data=d"], "data: expected nothing with --task tofu, got d; pass --task-option data=DIR"),
]


@pytest.mark.parametrize("line, message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_named_before_a_model_is_loaded(folder, line, message, monkeypatch, capsys):
    def fail(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("soul.commands.evaluate_task.load", fail)
    monkeypatch.setattr("soul.commands.unlearn.Unlearner", fail)
    command, *options = [word.replace("{}", str(folder)) for word in line]
    assert main(words(folder, command, "bad", *options)) == 2
    assert message in capsys.readouterr().err and not (folder / "bad").exists()


def test_a_scorer_that_is_not_installed_is_named_first(folder, monkeypatch, capsys):
    from soul._extras import require

    def missing(module, extra):
        return require("no_such_package" if module == "profanity_check" else module, extra)

    monkeypatch.setattr("soul.tasks.toxicity.require", missing)
    data = ["--task=detox", f"--task-option=data={folder}"]
    sets = [f"--task-option=prompts={folder / 'prompts.jsonl'}", f"--task-option=other={folder / 'texts.jsonl'}"]
    assert main(words(folder, "evaluate", "bad", *data, *sets)) == 2
    assert "pip install 'soul-kernels[detox]'" in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [
    ("- a\n", "expected a mapping, got list"),
    ("forget: [\n", "task: expected a YAML file, got"),
    ("retain: x\n", "expected the keys name, forget, got none named forget"),
    ("forget: x\ncolour: red\n", "expected keys among name, forget, retain, learn, sets"),
    ("forget: x\nsets: {a: {source: y, role: forget}}\n", "sets, a: expected the keys source, role, measures, got none"),
    ("forget: x\nsets: {a: {source: y, role: keep, measures: bleu}}\n", "a, role: expected one of 'forget', 'retain', "),
    ("forget: x\nsets: {a: {source: y, role: forget, measures: [blue]}}\n", "a, measures: expected one of 'bleu', "),
    ("forget: x\nsets: {a: {source: y, role: forget, measures: []}}\n", "a, measures: expected at least one, got none"),
])  # fmt: skip
def test_files_that_are_no_tasks(tmp_path, content, message):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(ValueError) as error:
        task_of(str(tmp_path / "own.yaml"))
    assert message in str(error.value)


def test_sources_of_the_published_tasks_are_those_of_the_hub():
    """Names only: there is no network here."""
    muse, wmdp, detox = task_of("muse"), task_of("wmdp", {"corpus": "bio"}), task_of("detox")
    assert muse.sets["verbmem"].source == "hub:muse-bench/MUSE-News:verbmem/forget" and muse.forget.endswith(":raw/forget")
    assert (wmdp.forget, wmdp.harness) == ("wmdp:bio-forget", ("wmdp_bio", "mmlu"))
    assert detox.forget == "saferlhf:unsafe?rows=200" and detox.sets["prompts"].source == "hub:allenai/real-toxicity-prompts"


@pytest.mark.slow(reason="lm-eval takes half a minute to import and to list its tasks")
def test_the_harness_on_a_task_from_a_file(folder):
    """The accuracy of lm-eval on one multiple-choice task of our own is that of summed log-probabilities."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    questions = [
        {"question": f"Where does number {i} live?", "choices": [f"house {i}", "on the moon", f"in {i}"], "label": i % 3}
        for i in range(6)
    ]
    (folder / "own").mkdir()
    (folder / "own" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    task = {
        "task": "soul_houses", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "own" / "rows.jsonl")}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "own" / "soul_houses.yaml").write_text(yaml.safe_dump(task))
    assert main(words(folder, "evaluate", "harness", f"--lm-eval={folder / 'own'}/soul_houses")) == 0
    content = evaluated(folder, "harness")
    model, tokenizer = load(folder / "model")
    hits = []
    for row in questions:
        sums = []
        for choice in row["choices"]:
            prompt = len(tokenizer(row["question"]).input_ids)
            ids = tokenizer(f"{row['question']} {choice}", return_tensors="pt").input_ids
            logps = model(ids).logits[0, :-1].detach().log_softmax(-1).gather(1, ids[0, 1:, None])
            sums.append(logps[prompt - 1 :].sum().item())
        hits.append(int(torch.tensor(sums).argmax()) == row["label"])
    assert content["numbers"] == {"soul_houses_acc": pytest.approx(sum(hits) / 6)}
    assert content["better"] == {"soul_houses_acc": "higher"}
    assert main(words(folder, "evaluate", "none", "--lm-eval=no_such_task_at_all")) == 2


def test_rows_of_verbmem_are_prompts_and_what_follows_them(folder):
    (example, *_) = sources.read_examples(folder / "verbmem_forget.jsonl")
    assert (example.prompt, example.answer) == (examples(1)[0].prompt, examples(1)[0].answer)
