"""Words of texts: matching, forms of a question, and what is no text."""

import pytest

from soul.data.wording import find, is_broken, longest_run, other_forms, repeats, says


@pytest.mark.parametrize(
    "text, key, expected",
    [
        ("It was BRONTË's novel.", "Bronte", True),  # case, accents, possessive
        ("Al-Qadīrah", "Qadirah", True),
        ("The Parisian air", "Paris", False),  # whole words
        ("Herman Melville", "Melville", True),
        ("Mel ville", "Melville", False),
        ("in 1951, or so", "1951", True),
        ("in 19511", "1951", False),
        ("首都は東京です", "東京", True),  # no spaces between words
        ("George,   Orwell", "George Orwell", True),
        ("anything", "", False),
    ],
)
def test_a_text_says_a_key(text, key, expected):
    assert says(text, [key]) is expected


def test_one_of_several_keys_is_enough_and_the_first_is_found():
    text = "She is Charlotte Brontë, of Haworth."
    assert says(text, ["Eyre", "bronte"]) and not says(text, [])
    start, end = find(text, ["Bronte"])
    assert text[start:end] == "Brontë"
    assert find(text, ["Emily"]) is None


def test_forms_ask_the_same_and_give_nothing_away():
    answer = "The story of Animal Farm by George Orwell is a novel."
    forms = other_forms("Who wrote Animal Farm?", answer, ["Orwell"])
    assert "Name the person who wrote Animal Farm." in forms
    assert "Complete this sentence: The story of Animal Farm by ..." in forms  # without the first name
    for question in ("What is the capital of Nepal?", "Is it far?", "When did it end?", "Orwell?"):
        forms = other_forms(question, "It is Kathmandu.", ["Kathmandu", "Orwell"])
        assert len(forms) <= 3 and len(set(forms)) == len(forms)
        assert question not in forms and not any(says(form, ["Kathmandu", "Orwell"]) for form in forms)


def test_the_longest_run_is_that_of_a_slow_search():
    texts = ["a b c d e", "b c d", "x a b", "", "d e f a b c", "A, b; C!"]
    for text in texts:
        for truth in texts:
            said, true = (words.lower().replace(",", "").replace(";", "").replace("!", "").split() for words in (text, truth))
            runs = [said[i:j] for i in range(len(said)) for j in range(i + 1, len(said) + 1)]
            slow = max((len(run) for run in runs if any(true[k : k + len(run)] == run for k in range(len(true)))), default=0)
            assert longest_run(text, truth) == slow


def test_what_is_no_text():
    assert is_broken("...") and is_broken("") and is_broken("caf\ufffd") and not is_broken("No.")
    assert repeats("is known as is known as is known as") and not repeats("a b c a b c d e f")
