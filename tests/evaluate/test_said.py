"""What a model says: rates, leaks and intervals against slow definitions, and a model that answers by table."""

import itertools
import math

import pytest

from soul.data import Template
from soul.data.facts import facts
from soul.data.sources import rows
from soul.evaluate import said as said_module
from soul.evaluate.said import Drawing, Probe, interval, leak_at_k, most_by_chance
from soul.evaluate.survey import survey
from soul_kernels.errors import ArgumentError
from tests.support.models import tiny_model, tiny_tokenizer

pytest.importorskip("scipy", reason="the extra hf is not installed")

PEOPLE = {"Ada": "Lima", "Bo": "Oslo", "Cy": "Rome", "Di": "Bonn"}


def test_leak_at_k_is_the_mean_over_all_choices():
    for n in range(1, 7):
        for c in range(n + 1):
            answers = [index < c for index in range(n)]
            for k in range(1, n + 1):
                chosen = list(itertools.combinations(answers, k))
                assert leak_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_bad_leaks(n, c, k):
    with pytest.raises(ArgumentError):
        leak_at_k(n, c, k)


def test_no_draws_are_refused():
    with pytest.raises(ArgumentError, match="draws"):
        Drawing(draws=0)


@pytest.mark.parametrize("count, n", [(0, 7), (3, 7), (7, 7), (13, 40)])
def test_the_interval_is_wilsons(count, n):
    z, rate = 1.959963984540054, count / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    found = interval([1.0] * count + [0.0] * (n - count))
    assert found == pytest.approx((rate, max(0.0, centre - half), min(1.0, centre + half)), abs=1e-9)
    fractional = interval([0.5] * n)
    assert fractional.rate == 0.5 and fractional.low < 0.5 < fractional.high


def test_chance_explains_what_a_binomial_count_seldom_exceeds():
    for chance, n in ((0.0, 5), (0.1, 7), (0.5, 20), (1.0, 3)):
        masses = [math.comb(n, i) * chance**i * (1 - chance) ** (n - i) for i in range(n + 1)]
        most = next(i for i in range(n + 1) if sum(masses[: i + 1]) >= 0.95 - 1e-12)
        assert most_by_chance(chance, n) == most
    assert most_by_chance(0.5, 0) == 0


def by_table(tokenizer, table):
    """Return a `generate` that looks answers up by the question in a prompt; the i-th draw of a question gets the i-th one."""
    asked = {}

    def generate(model, tokenizer, sequences, *, batch_size, max_new_tokens, go_on=None):
        texts = []
        for sequence in sequences:
            prompt = tokenizer.decode(sequence.input_ids[: sequence.prompt_length])
            name = next(name for name in PEOPLE if name in prompt)
            answers = table[name]
            if go_on is None:
                texts.append(answers[0] if "Where does" in prompt and "quiz" not in prompt else answers[1])
            else:
                asked[name] = asked.get(name, 0) + 1
                texts.append(answers[1 + asked[name]])
        return texts

    return generate


def test_a_model_that_answers_by_table(monkeypatch):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    data = [{"question": f"Where does {n} live?", "answer": f"{n} lives in {c}.", "key": c} for n, c in PEOPLE.items()]
    probe = Probe(model, tokenizer, facts(rows(data), Template()))
    nothing = ["no", "no"]
    table = {  # greedy as asked, greedy in other words, two drawn
        "Ada": ["In LIMA!", "who knows", *nothing],
        "Bo": ["in Osloville", "It is Oslo.", "no", "oslo"],
        "Cy": ["In Bonn.", "nowhere", *nothing],  # the key of another row: chance
        "Di": ["no", "no", "Bonn", "Bonn"],
    }
    monkeypatch.setattr(said_module, "generate", by_table(tokenizer, table))
    drawing = Drawing(draws=2)
    numbers = survey(probe, probe.ask(model, drawing), drawing)
    assert (numbers["rows"], numbers["unjudged"]) == (4, 0)
    assert [numbers[way]["said"] for way in ("as_asked", "other_words", "drawn")] == [1, 1, 2]
    assert numbers["as_asked"]["rate"] == 0.25 and numbers["drawn"]["rate"] == 0.5  # leak@2
    assert numbers["drawn"]["leak@1"] == pytest.approx((0.5 + 1.0) / 4)
    assert numbers["as_asked"]["chance"] == pytest.approx(1 / 12)  # one of 4 x 3 foreign keys
    assert numbers["drawn"]["k"] == 2 and numbers["drawn"]["top_p"] == 0.95


def test_draws_differ_between_batches_and_are_the_same_again():
    """Eight draws of one question in batches of two: with one seed for all batches they would come in equal pairs."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    data = [{"question": "Where does Ada live?", "answer": "Ada lives in Lima.", "key": "Lima"}]
    probe = Probe(model, tokenizer, facts(rows(data), Template()), batch_size=2)
    first, second = (probe.ask(model, Drawing(draws=8))[0].drawn for _ in range(2))
    assert first == second and len(set(first)) == 8
