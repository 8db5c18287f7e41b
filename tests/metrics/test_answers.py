"""Answers against the rules of the VQA challenge's evaluation, each shown by a case, and of SQuAD's F1."""

import random

import pytest

from lever_grpo.metrics import exact_match, normalize_vqa_answer, token_f1, vqa_accuracy
from lever_grpo.metrics.answers import _CONTRACTIONS


@pytest.mark.parametrize(
    "text, normal",
    [
        ("Red", "red"),
        (" red\n\tapple ", "red apple"),
        # number words, up to ten
        ("none", "0"),
        ("zero", "0"),
        ("One two THREE", "1 2 3"),
        ("ten eleven", "10 eleven"),
        # articles
        ("A man and an apple on the table", "man and apple on table"),
        ("a", ""),
        # contractions, in lower case whatever they were
        ("Dont", "don't"),
        ("it isnt", "it isn't"),
        ("youre", "you're"),
        ("don't", "don't"),
        ("couldnt've couldn'tve couldntve", "couldn't've couldn't've couldntve"),
        ("o'clock oclock", "o'clock o'clock"),
        ("somebody'd", "somebodyd"),
        ("somebodyd", "somebodyd"),
        ("she's shes", "she's shes"),
        ("Im", "im"),  # the entry of "Im" never applies
        ("were well", "were well"),  # not "we're we'll"
        # punctuation becomes a space …
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("cat,dog", "cat dog"),
        ("yes!", "yes"),
        # … or nothing if the mark stands beside a space anywhere: each mark by itself
        ("cat, dog,cow", "cat dogcow"),
        ("a-b - c/d", "ab c d"),
        ("x -y-z", "x yz"),
        # … or nothing, all of it, if a comma stands between digits
        ("1,000", "1000"),
        ("1,000 black/white", "1000 blackwhite"),
        ("100,978 (t-shirt)", "100978 tshirt"),
        # the apostrophe and the colon stay, as do marks that are not on the list
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("50% & $5*2", "50% & $5*2"),
        # periods go, unless a digit follows
        ("3.5", "3.5"),
        (".5", ".5"),
        ("yes.", "yes"),
        ("p.m.", "pm"),
        ("5. floor", "5 floor"),
        ("." * 33 + "x", ".x"),
        # punctuation first, words after it: what it leaves is a number word, an article, a contraction
        ("two-dogs", "2 dogs"),
        ("a.", ""),
        ("dont!", "don't"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_normalize_vqa_answer(text, normal):
    assert normalize_vqa_answer(text) == normal


def test_normalising_is_not_idempotent_where_the_rules_are_not():
    assert normalize_vqa_answer("n.o.n.e") == "0" and normalize_vqa_answer("somebodyd've") == "somebody'd've"
    assert normalize_vqa_answer("..." + "a.n" * 30) != normalize_vqa_answer(normalize_vqa_answer("..." + "a.n" * 30))


def test_contractions():
    """The published table: 120 entries, each lacking one apostrophe of its contraction but for three."""
    assert len(_CONTRACTIONS) == 120
    odd = {key: value for key, value in _CONTRACTIONS.items() if value.count("'") != key.count("'") + 1}
    assert odd == {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
    assert all(key.replace("'", "") == value.replace("'", "") for key, value in _CONTRACTIONS.items())
    assert {key for key in _CONTRACTIONS if key != key.lower()} == {"Id've", "I'dve", "Im", "Ive"}
    assert {key for key, value in _CONTRACTIONS.items() if value == "'ow's'at"} == {"ow's'at", "'ows'at", "'ow'sat"}
    absent = {"ill", "id", "shed", "shell", "shes", "were", "well", "lets", "its", "thatd", "ive"}
    assert not absent & _CONTRACTIONS.keys()


@pytest.mark.parametrize("matches, accuracy", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_vqa_accuracy_of_ten_references(matches, accuracy):
    references = ["cat"] * matches + ["dog"] * (10 - matches)
    random.Random(matches).shuffle(references)
    assert vqa_accuracy("cat", references) == accuracy


def test_vqa_accuracy_is_the_mean_over_the_annotators_left_out():
    rng = random.Random(0)
    for number in [2, 3, 4, 5, 9, 10, 11, 15]:
        for _ in range(20):
            references = rng.choices(["cat", "dog", "cow", "bird"], k=number - 1) + ["fish"]
            parts = []
            for left_out in range(number):
                others = references[:left_out] + references[left_out + 1 :]
                parts.append(min(1.0, others.count("cat") / min(3, len(others))))
            assert vqa_accuracy("cat", references) == pytest.approx(sum(parts) / number)


def test_vqa_accuracy_of_ties():
    """Two answers of five people each are both right."""
    references = ["cat", "dog"] * 5
    assert vqa_accuracy("cat", references) == vqa_accuracy("dog", references) == 1.0
    references = ["cat", "cat", "dog", "dog", "cow", "hen", "pig", "ram", "ewe", "fox"]
    assert vqa_accuracy("cat", references) == vqa_accuracy("dog", references) == 0.6


@pytest.mark.parametrize(
    "answer, references, accuracy",
    [
        # references that differ: both sides are normalised, and only then compared
        ("Two.", ["2"] * 5 + ["two"] * 3 + ["3"] * 2, 1.0),
        ("isnt", ["isn't"] * 3 + ["is"] * 7, 0.9),
        ("a cat", ["the cat"] * 2 + ["dog"] * 8, 0.6),
        ("1,000", ["1000"] * 4 + ["2000"] * 6, 1.0),
        ("yes", ["Yes"] * 9 + ["yes"], 1.0),
        # all the same: nothing is
        ("yes", ["yes"] * 10, 1.0),
        ("Yes", ["yes"] * 10, 0.0),
        ("2", ["two"] * 10, 0.0),
        ("3.5", ["3.5"] * 10, 1.0),
        # … but spaces, tabs and new lines, which do not make references differ either
        (" yes\n", ["yes", "yes\n", "\tyes"] + ["yes"] * 7, 1.0),
        ("Yes", ["yes", "yes "] + ["yes"] * 8, 0.0),
        # fewer than ten: min(3, n - 1) in the place of 3
        ("cat", ["cat", "dog"], 0.5),
        ("cat", ["cat", "dog", "cow"], 1 / 3),
        ("cat", ["cat", "cat", "dog"], (0.5 + 0.5 + 1) / 3),
        ("cat", ["cat"] * 3 + ["dog"] * 2, (3 * 2 / 3 + 2) / 5),
        # one reference
        ("The Cat.", ["cat"], 1.0),
        ("cow", ["cat"], 0.0),
        ("two", ["2"], 1.0),
        # nothing said
        ("", ["cat"] * 3 + ["dog"] * 7, 0.0),
        ("the", ["a"] * 3 + ["dog"] * 7, 0.9),
    ],
)
def test_vqa_accuracy(answer, references, accuracy):
    assert vqa_accuracy(answer, references) == pytest.approx(accuracy)
    assert vqa_accuracy(answer, references[::-1]) == vqa_accuracy(answer, tuple(references))


@pytest.mark.parametrize(
    "answer, references, right",
    [
        ("the  Red, apple!", ["red apple"], True),
        ("red", ["red apple"], False),
        ("", ["red"], False),
        ("cat", ["dog", "The cat."], True),
        ("a", ["A"], True),
        ("the", ["a"], False),
        ("-5", ["5"], False),
        ("3.5", ["35"], False),
        ("1,000", ["1000"], True),
        ("+", ["-"], False),
        ("two", ["2"], False),
        ("t-shirt", ["tshirt"], True),
        # vowel signs and accents are parts of letters, in either encoding
        ("दिन", ["दान"], False),
        ("ไม้", ["ไม่"], False),
        ("மலை", ["மாலை"], False),
        ("দিন", ["দান"], False),
        ("عِلم", ["عَلم"], False),
        ("दिन।", ["दिन"], True),
        ("cafe\u0301", ["caf\u00e9"], True),
        ("cafe", ["caf\u00e9"], False),
        # … but not what only changes the looks of a symbol
        ("rain \u2602\ufe0f", ["rain \u2602"], True),
        ("\u2764\ufe0f", ["\u2602\ufe0f"], False),
        ("3\ufe0f\u20e3", ["3"], True),
        # quotes, brackets and emphasis around numbers
        ('"3"', ["3"], True),
        ("(3)", ["3"], True),
        ("“3”", ["3"], True),
        ("**3**", ["3"], True),
        ("_3_", ["3"], True),
        ("(-3)", ["-3"], True),
        # marks that mean something there
        ("-3", ["3"], False),
        ("$3", ["3"], False),
        (".5", ["5"], False),
        ("1:30", ["130"], False),
        ("1/2", ["12"], False),
        ("5'10", ["510"], False),
        ("x^2", ["x2"], False),
    ],
)
def test_exact_match(answer, references, right):
    assert exact_match(answer, references) == float(right)
    assert (token_f1(answer, references) == 1.0) == right


@pytest.mark.parametrize(
    "answer, references, f1",
    [
        ("black cat", ["cat"], 2 / 3),  # precision 1/2, recall 1
        ("the cat, cat", ["cat"], 2 / 3),  # a word counts as often as both have it
        ("cat cat", ["cat cat dog"], 4 / 5),
        ("cat black", ["a black cat"], 1.0),  # order does not matter
        ("dog", ["cat", "hot dog", "dogs"], 2 / 3),  # the best reference
        ("dog", ["cat"], 0.0),
        ("", ["cat"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_token_f1(answer, references, f1):
    assert token_f1(answer, references) == pytest.approx(f1)


@pytest.mark.parametrize("metric", [vqa_accuracy, exact_match, token_f1])
def test_wrong_references(metric):
    with pytest.raises(ValueError, match=r"references=\[\] must be a list of answers, at least one"):
        metric("cat", [])
    with pytest.raises(ValueError, match="references='cat' must be a list"):
        metric("cat", "cat")
