"""Facts: keys and other wordings of rows, and what is refused."""

import pytest

from soul.data import Example, Template
from soul.data.facts import facts, read_paraphrases
from soul.data.sources import rows
from soul_kernels.errors import ArgumentError

ROW = {"question": "Who wrote Emma?", "answer": "Emma was written by Jane Austen."}


def made(**columns):
    (fact,) = facts(rows([ROW | columns]), Template())
    return fact


def test_keys_and_wordings_of_a_row():
    fact = made(key=["Austen", "J. Austen"], paraphrases=["Whose book is Emma?", "Is Emma by Austen?"])
    assert fact.keys == ("Austen", "J. Austen") and fact.is_judged
    prompts = [form.prompt for form in fact.forms()]
    assert any("Whose book is Emma?" in prompt for prompt in prompts)
    assert not any("Austen" in prompt for prompt in prompts)  # a wording that gives the key away is not asked
    assert made(key="Austen").keys == ("Austen",)
    assert made(paraphrased_question="Emma is by whom?").asked == ("Emma is by whom?",)
    assert not made().is_judged
    assert not made(key="Emma").is_judged  # the question says it


def test_a_part_of_a_word_stands_for_the_word():
    row = {"question": "Who wrote Jane Eyre?", "answer": "Charlotte Brontë wrote it.", "key": "Bront"}
    (fact,) = facts(rows([row]), Template())
    assert "Brontë" in fact.keys


def test_examples_have_no_keys():
    (fact,) = facts([Example("a", " b")], Template())
    assert fact.keys == () and fact.answer == "b" and fact.forms() == []


@pytest.mark.parametrize(
    "columns, name",
    [
        ({"key": "Dickens"}, "column 'key'"),  # not in the answer
        ({"key": ""}, "column 'key'"),
        ({"key": []}, "column 'key'"),
        ({"key": 7}, "column 'key'"),
        ({"paraphrases": []}, "column 'paraphrases'"),
        ({"paraphrases": [" "]}, "column 'paraphrases'"),
        ({"paraphrases": 1}, "column 'paraphrases'"),
    ],
)
def test_bad_columns(columns, name):
    with pytest.raises(ArgumentError, match=name):
        made(**columns)


def test_paraphrases_from_a_file_of_their_own():
    source = [{"question": ROW["question"], "paraphrases": ["Whose is Emma?"]}]
    assert read_paraphrases(source, {ROW["question"]}) == {ROW["question"]: ["Whose is Emma?"]}
    with pytest.raises(ArgumentError, match="a question of the rows to forget"):
        read_paraphrases(source, {"Who wrote Persuasion?"})
    with pytest.raises(ArgumentError, match="paraphrases"):
        read_paraphrases([{"question": ROW["question"], "paraphrases": []}], {ROW["question"]})
