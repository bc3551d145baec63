"""Attacks on a model that has forgotten: each against its definition, and the command on a tiny model."""

import json
import math

import pytest
import torch

from soul.cli import main
from soul.data.templates import Template
from soul.durability import ATTACKS, DurabilityConfig, durability
from soul.durability.attacks import JAILBREAKS, relearned, restored, rounded
from soul.durability.rows import Row, read_rows
from soul.durability.run import best, means
from soul.evaluate.model import answer_probability
from soul.models.causal_lm import sampled
from soul.models.encoding import encode_for
from soul.report.durability import returned
from tests.support.models import examples, tiny_model, tiny_tokenizer

ROWS = [Row(f"where does number {i} live?", f"In house {i * 7} of street {i}.") for i in range(8)]
torchao = pytest.importorskip("torchao", reason="the extra durability is not installed")


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama, tied", "gpt2, tied", "phi, head with a bias"])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_rounded_as_their_definition_says_and_given_back(family, bits):
    """Symmetric, 8 bits a row or 4 bits a group of at most 32, without head and vectors. GPT-2 stores weights transposed."""
    model = tiny_model(family)
    before = state(model)
    top = 2 ** (bits - 1)
    with rounded(model, bits) as fraction:
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert changed and all(name.endswith("weight") and "lm_head" not in name and "norm" not in name for name in changed)
        assert fraction == sum(before[name].numel() for name in changed) / sum(p.numel() for p in model.parameters())
        for name in changed:
            rows, got = (each.T if "gpt2" in family else each for each in (before[name], model.state_dict()[name]))
            size = rows.shape[1] if bits == 8 else math.gcd(rows.shape[1], 32)
            groups = rows.double().reshape(len(rows), -1, size)
            scale = groups.abs().amax(2, keepdim=True) / (top - 0.5)
            want = ((groups / scale).round().clamp(-top, top - 1) * scale).reshape(rows.shape)
            tie = ((groups / scale).frac().abs() - 0.5).abs().reshape(rows.shape) < 1e-3  # fp32 decides those, the largest too
            step = scale.expand_as(groups).reshape(rows.shape)
            off = (got - want).abs() / step
            assert (off[~tie] < 1e-4).all() and (off[tie] < 1.001).all() and tie.float().mean() < 0.2
    assert same(model, before)


def test_relearning_learns_and_is_undone():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = state(model)
    learned = examples(4)
    sequences = encode_for(model, tokenizer, learned, DurabilityConfig().asking(), "rows")
    start = answer_probability(model, sequences)
    options = dict(lr=1e-2, epochs=3, batch_size=2, seed=0, backend="reference", max_length=64)
    with relearned(model, tokenizer, learned, **options) as steps:
        assert steps == 6 and answer_probability(model, sequences) > 1.5 * start
    assert same(model, before) and not model.training and all(p.grad is None for p in model.parameters())
    assert answer_probability(model, sequences) == start


def test_weights_come_back_after_an_error():
    model = tiny_model()
    before = state(model)
    with pytest.raises(RuntimeError, match="planted"), restored(model):
        with torch.no_grad():
            next(model.parameters()).add_(1)
        raise RuntimeError("planted")
    assert same(model, before)


def test_drawn_answers_follow_the_distribution_of_the_model():
    """The first token of 4,000 draws against its probabilities; the same seed draws the same, and nobody's generator moves."""
    model = tiny_model("llama, untied")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # far from even
        ids = torch.tensor([[5, 9, 40]])
        want = model(ids).logits[0, -1].double().softmax(0)
    many = ids.expand(4000, -1)
    torch.manual_seed(7)
    generator = torch.get_rng_state()
    options = dict(max_new_tokens=1, pad_token_id=0)
    got = sampled(model, many, torch.ones_like(many), seed=1, **options)[:, -1]
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(got, sampled(model, many, torch.ones_like(many), seed=1, **options)[:, -1])
    assert not torch.equal(got, sampled(model, many, torch.ones_like(many), seed=2, **options)[:, -1])
    counts = torch.bincount(got, minlength=len(want)).double()
    big = want * 4000 > 5
    chi = ((counts - 4000 * want)[big] ** 2 / (4000 * want)[big]).sum()
    assert big.sum() > 20 and chi < big.sum() + 5 * (2 * big.sum()) ** 0.5


def test_questions_of_the_attacks():
    template = Template()
    row = Row("Who?", "She.", "Which person?")
    plain = row.example(template)
    assert row.example(template, JAILBREAKS[0]).prompt == plain.prompt.replace("Who?", f"{JAILBREAKS[0]}Who?")
    assert row.example(template, paraphrased=True).prompt == plain.prompt.replace("Who?", "Which person?")
    assert row._replace(paraphrase=None).example(template, paraphrased=True) == plain
    prompt = Row("Tell me:", " yes", templated=False).example(template, "Now. ")
    assert (prompt.prompt, prompt.answer) == ("Now. Tell me:", " yes")


def test_the_best_of_several_tries_counts_row_by_row():
    tries = [{"rouge": torch.tensor([0.1, 0.9])}, {"rouge": torch.tensor([0.5, 0.2])}]
    assert torch.equal(best(tries)["rouge"], torch.tensor([0.5, 0.9]))
    assert means(best(tries), [0]) == {"rouge": 0.5}


def test_every_try_draws_anew(monkeypatch):
    seeds = []

    def noted(*args, seed, **options):
        seeds.append(seed)
        return sampled(*args, seed=seed, **options)

    monkeypatch.setattr("soul.durability.run.sampled", noted)
    config = DurabilityConfig(attacks=("sample",), relearn_rows=1, tries=3, max_new_tokens=2, backend="reference")
    durability(tiny_model(), tiny_tokenizer(), ROWS[:2], ROWS[2:4], config, progress=lambda line: None)
    assert len(set(seeds)) == len(seeds) == 3


def test_what_returned_is_a_share_of_what_was_forgotten():
    outcome = {"forget": {"prob": 0.4, "rouge": 0.5}, "start": {"prob": 0.2, "rouge": 0.5}}
    assert returned(outcome, {"prob": 0.6, "rouge": 0.5}) == pytest.approx(0.5)  # ROUGE was not forgotten
    assert returned(outcome, {"prob": 0.1, "rouge": 0.1}) is None and returned(outcome, {}) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("durability")
    model = tiny_model()
    for name in ("model", "base"):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    rows = [dict(zip(("question", "answer"), row)) for row in ROWS]
    (folder / "forget.jsonl").write_text("".join(json.dumps({**r, "paraphrased_question": "and?"}) + "\n" for r in rows[:4]))
    (folder / "retain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    return folder


def words(folder, *more):
    paths = [word for name in ("forget", "retain") for word in (f"--{name}", str(folder / f"{name}.jsonl"))]
    how = "--relearn-rows 2 --relearn-epochs 2 --tries 2 --max-new-tokens 4 --device cpu --backend reference"
    return ["evaluate", "--durability", "--model", str(folder / "model"), *paths, *how.split(), *more]


def test_the_command_attacks_a_model_and_shows_what_returned(folder, capsys):
    others = ("--against", str(folder / "base"), "--retain-model", str(folder / "base"))
    assert main(words(folder, *others, "--output", str(folder / "out"))) == 0
    lines = capsys.readouterr().out.splitlines()
    results = json.loads((folder / "out" / "durability.json").read_text())
    names = [outcome["name"] for outcome in results["outcomes"]]
    assert names == ["unlearned", *ATTACKS, "before", "retrained"] and len(lines) == 1 + len(names)
    by_name = {outcome["name"]: outcome for outcome in results["outcomes"]}
    assert by_name["relearn"]["rows"] == 2 and by_name["int8"]["rows"] == 4 and by_name["sample"]["forget"].keys() == {"rouge"}
    assert by_name["before"]["forget"] == by_name["retrained"]["forget"]
    assert by_name["int8"]["start"] == by_name["unlearned"]["forget"] != by_name["int8"]["forget"]
    for name in ("int8", "int4", "relearn_retain"):
        assert by_name[name]["retain"] != by_name["unlearned"]["retain"]
    page = (folder / "out" / "report.md").read_text()
    assert "What is" not in page and "relearned, forget rows" in page and (folder / "out" / "report.html").exists()


def test_an_attack_leaves_the_next_one_the_same_model():
    """In another order the numbers are the same."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    options = dict(relearn_rows=2, relearn_epochs=1, relearn_lr=1e-2, max_new_tokens=4, backend="reference")

    def outcomes(*names):
        config = DurabilityConfig(attacks=names, **options)
        return {one.name: one for one in durability(model, tokenizer, ROWS[:4], ROWS[4:], config, progress=lambda line: None)}

    assert outcomes("relearn", "int8") == outcomes("int8", "relearn")


@pytest.mark.parametrize("more, message", [
    (("--attacks", "relearn,relern"), "attacks: expected one of"),
    (("--attacks", "int8,int8"), "attacks: expected names of attacks, none twice"),
    (("--relearn-rows", "4"), "relearn_rows: expected at most 3 of 4 rows with the attack 'relearn', got 4"),
    (("--relearn-lr", "0"), "relearn_lr: expected"),
    (("--tries", "0"), "tries: expected"),
    (("--retain-logs", "x"), "retain_logs: expected nothing with --durability"),
    (("--retain", ""), "expected"),
])  # fmt: skip
def test_bad_options_are_named_before_a_model_is_loaded(more, message, folder, capsys, monkeypatch):
    monkeypatch.setattr("soul.commands.durability.load", None)
    assert main(words(folder, "--output", str(folder / "never"), *more)) == 2
    assert message in capsys.readouterr().err and not (folder / "never").exists()


def test_rows_that_cannot_be_asked_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row, message in (
        ({"text": "a"}, "columns: expected question and answer, or prompt and completion, got text; "),
        ({"question": "a", "answer": 3}, "column 'answer': expected a string, got int"),
        ({"question": "a", "answer": "b", "paraphrased_question": " "}, "column 'paraphrased_question': expected some text"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(ValueError, match=message):
            read_rows(path, "forget")
    path.write_text("")
    with pytest.raises(ValueError, match="at least one"):
        read_rows(path, "forget")
    path.write_text(json.dumps({"prompt": "a", "response": "b"}))
    assert read_rows(path, "forget") == [Row("a", "b", templated=False)]
    with pytest.raises(ValueError, match="attacks: expected a column paraphrased_question for 'paraphrase', got none"):
        durability(None, None, ROWS, ROWS, DurabilityConfig(attacks=("paraphrase",)))
