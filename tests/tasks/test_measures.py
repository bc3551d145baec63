"""Measures of tasks against sacrebleu, rouge-score and the model itself, and scorers of toxicity."""

import math
import sys
import types

import pytest
import torch

from soul.data.examples import Example
from soul.evaluate.model import EvaluateConfig
from soul.tasks import Task, TaskSet, evaluate_task, measures, prepare_task, scorer_of
from soul.tasks.evaluate import directions
from tests.support.models import examples, tiny_model, tiny_tokenizer

TRUTHS = ["In house 7 of street 1.", "They live in house 14, and so does everybody else here.", "Nobody knows."]
TEXTS = ["In house 7 of street 2, and in house 8.", "They live in house 14.", ""]


def test_bleu_is_that_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    scores = measures.bleu(TRUTHS, TEXTS)
    assert scores == [sacrebleu.corpus_bleu([text], [[truth]]).score for truth, text in zip(TRUTHS, TEXTS)]
    assert measures.bleu(TRUTHS, TRUTHS)[0] == pytest.approx(100) and scores[2] == 0


def test_rouge_l_is_that_of_rouge_score():
    rouge = pytest.importorskip("rouge_score.rouge_scorer", reason="the extra eval is not installed")
    scorer = rouge.RougeScorer(["rougeL"], use_stemmer=True)
    outputs = measures.SetOutputs(TRUTHS, TEXTS, {}, None)
    for measure, field in (("rouge_l_f1", "fmeasure"), ("rouge_l_recall", "recall")):
        score = measures.MEASURES[measure].compute(outputs)
        want = [getattr(scorer.score(truth, text)["rougeL"], field) for truth, text in zip(TRUTHS, TEXTS)]
        assert score.rows == want and score.numbers == {measure: pytest.approx(sum(want) / 3)}


def test_perplexity_is_that_of_all_tokens_together_in_pieces():
    """A text of two pieces counts as a whole; eager PyTorch is the oracle."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    text = " ".join(example.prompt + example.answer for example in examples(6))
    rows = [{"text": text}, {"text": examples(9)[8].answer}]
    task = Task("t", "f", sets={"other": TaskSet(rows, "retain", ("perplexity",))})
    numbers = evaluate_task(model, tokenizer, prepare_task(task), EvaluateConfig(max_length=24, backend="reference")).numbers
    loss = count = 0
    ids = tokenizer(text).input_ids[1:] + [tokenizer.eos_token_id]
    for piece in [[0, *ids[i : i + 23]] for i in range(0, len(ids), 23)] + [tokenizer(rows[1]["text"]).input_ids + [1]]:
        logits = model(torch.tensor([piece])).logits[0, :-1].double()
        loss += torch.nn.functional.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum").item()
        count += len(piece) - 1
    assert numbers == {"other_perplexity": pytest.approx(math.exp(loss / count), rel=1e-5)}
    assert measures.perplexity([1e6], [1]) == math.inf


def test_directions_follow_from_measure_and_role():
    sets = {
        "forget": TaskSet("f", "forget", ("bleu", "perplexity", "toxicity")),
        "forget_not": TaskSet("r", "retain", ("bleu", "perplexity")),
        "unseen": TaskSet("u", "unseen", ("bleu", "toxicity")),
    }
    want = {
        "forget_bleu": "lower", "forget_perplexity": "higher", "forget_not_bleu": "higher", "forget_not_perplexity": "lower",
        "unseen_bleu": "neither", "unseen_toxicity": "lower", "unseen_toxic_rate": "lower", "privacy_min_k_auc": "neither",
    }  # fmt: skip
    assert directions(Task("t", "f", sets=sets), list(want)) == want


def test_toxicity_is_the_mean_and_the_rate_above_one_half():
    task = Task("t", "f", sets={"asked": TaskSet([{"prompt": e.prompt} for e in examples(4)], "forget", ("toxicity",))})
    asked = []

    def scorer(texts):
        asked.extend(texts)
        return [0.1, 0.5, 0.6, 0.8]

    prepared, config = prepare_task(task), EvaluateConfig(max_new_tokens=4, backend="reference")
    result = evaluate_task(tiny_model(), tiny_tokenizer(), prepared, config, scorer=scorer)
    assert result.numbers == {"asked_toxicity": pytest.approx(0.5), "asked_toxic_rate": 0.5}
    assert [text for _, text, _ in result.texts["asked"]] == asked and result.rows["asked"]["toxicity"] == [0.1, 0.5, 0.6, 0.8]
    with pytest.raises(ValueError, match="scorer: expected a scorer of toxicity for the task t, got None"):
        evaluate_task(tiny_model(), tiny_tokenizer(), prepared, config)


def test_refusal_rate(monkeypatch, tmp_path):
    """An answer refuses if it has a refusal of the task's file in it, whatever else it says, and not the right answer."""
    (tmp_path / "refusals.txt").write_text("I won't say that.\nNo comment!\n")
    answers = ["Well, NO COMMENT on this", "I don't know.", "I won't say that.", "In house 7. No comment."]
    rows = [{"prompt": e.prompt, "response": truth} for e, truth in zip(examples(4), [" a", " b", " c", " in house 7"])]
    sets = {"asked": TaskSet([{"prompt": row["prompt"]} for row in rows], "unseen", ("refusal_rate",)),
            "known": TaskSet(rows, "retain", ("refusal_rate", "probability"))}  # fmt: skip
    task = Task("t", "f", sets=sets, refusals=str(tmp_path / "refusals.txt"))
    monkeypatch.setattr("soul.tasks.evaluate.generate", lambda *args, **options: answers)
    result = evaluate_task(tiny_model(), tiny_tokenizer(), prepare_task(task), EvaluateConfig(backend="reference"))
    assert result.rows["asked"]["refusal_rate"] == [1, 0, 1, 1] and result.rows["known"]["refusal_rate"] == [1, 0, 1, 0]
    assert result.numbers["asked_refusal_rate"] == 0.75 and result.numbers["known_refusal_rate"] == 0.5
    assert directions(task, ["known_refusal_rate", "asked_refusal_rate"]) == {
        "known_refusal_rate": "lower", "asked_refusal_rate": "neither"}  # fmt: skip
    (tmp_path / "refusals.txt").write_text("")
    with pytest.raises(ValueError, match="refusals: expected at least one refusal"):
        prepare_task(task)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Two classifiers of random weights: with independent labels, as toxic-bert, and with labels that exclude each other."""
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    root = tmp_path_factory.mktemp("classifiers")
    labels = {0: "toxic", 1: "insult", 2: "calm"}
    for name, kind in (("independent", "multi_label_classification"), ("exclusive", "single_label_classification")):
        torch.manual_seed(1)
        config = transformers.BertConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, id2label=labels,
            max_position_embeddings=16, problem_type=kind, pad_token_id=1, initializer_range=0.5)  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
        torch.nn.init.normal_(model.classifier.weight, std=3)
        model.save_pretrained(root / name)
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(root / name)
    return root


def test_a_classifier_scores_texts(classifiers):
    """Without a label the highest probability counts, and with one its own; texts longer than the classifier takes are cut."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = ["In house 7.", "Question: where does number 3 live, and since when, and what is it that everybody knows of it?"]
    for name, function in (("independent", torch.sigmoid), ("exclusive", lambda logits: logits.softmax(-1))):
        model = AutoModelForSequenceClassification.from_pretrained(classifiers / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(classifiers / name)
        alone = [tokenizer(text, truncation=True, max_length=16, return_tensors="pt") for text in texts]
        want = torch.cat([function(model(**inputs).logits) for inputs in alone]).detach()
        got = scorer_of(f"{classifiers / name}:insult")(texts)
        assert got == pytest.approx(want[:, 1].tolist(), abs=1e-5) and abs(got[0] - got[1]) > 1e-4
        if name == "independent":
            assert scorer_of(str(classifiers / name))(texts) == pytest.approx(want.amax(1).tolist(), abs=1e-5)


def test_scorers_that_cannot_be_had(classifiers, tmp_path):
    for name, message in (
        (
            f"{classifiers / 'exclusive'}",
            "scorer: expected .*:LABEL, the label that says toxic, got .*; its labels exclude each",
        ),
        (f"{classifiers / 'independent'}:rude", "scorer: expected a label of .*: toxic, insult, calm, got rude"),
        (f"{tmp_path}", "scorer: expected profanity-check, a directory with a classifier, or a hub name"),
        ("nobody/nothing", r"scorer: expected a classifier of texts, got nobody/nothing \(\w+"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer_of(name)


def test_the_offline_scorer_is_asked_for_probabilities(monkeypatch):
    module = types.ModuleType("profanity_check")
    module.predict_prob = lambda texts: [len(text) / 10 for text in texts]
    monkeypatch.setitem(sys.modules, "profanity_check", module)
    assert scorer_of("profanity-check")(["a", "abc"]) == [0.1, 0.3]


def test_profanity_check_itself():
    pytest.importorskip("profanity_check", reason="the extra detox is not installed")
    nice, rude = scorer_of("profanity-check")(["Thank you for the flowers.", "You are a stupid piece of shit."])
    assert nice < 0.3 < 0.7 < rude


def test_verbatim_measures_of_a_passage(monkeypatch):
    """A model that continues every passage word by word has all of them at their best."""
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    rows = [{"prompt": e.prompt, "response": e.answer} for e in examples(3)]
    wanted = ("bleu", "rouge_l_recall", "exact_memorization", "extraction_strength", "probability")
    task = Task("t", "f", sets={"passages": TaskSet(rows, "forget", wanted)})
    generated = {}

    def generate(model, tokenizer, sequences, **options):
        generated.update(options)
        return [Example(row["prompt"], row["response"]).content for row in rows]

    monkeypatch.setattr("soul.tasks.evaluate.generate", generate)
    tokenizer = tiny_tokenizer()
    result = evaluate_task(tiny_model(), tokenizer, prepare_task(task), EvaluateConfig(backend="reference"))
    assert result.numbers["passages_bleu"] == pytest.approx(100) and result.numbers["passages_rouge_l_recall"] == 1
    assert list(result.numbers) == [f"passages_{name}" for name in wanted] and result.numbers["passages_probability"] < 0.1
    # no more text than the longest answer has tokens, its end included
    assert generated["max_new_tokens"] == 1 + max(len(tokenizer(row["response"]).input_ids) - 1 for row in rows)
