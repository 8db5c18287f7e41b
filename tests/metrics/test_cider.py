"""CIDEr against the package's own class, and by hand."""

import math
import sys

import numpy as np
import pytest

from lever_grpo.metrics.cider import Cider, _words, cider


REFERENCES = [
    ["A man's dog isn't running.", "The dog of a man stands still; it looks tired."],
    ["Two cats -- black and white -- sleep on a bed.", "Cats asleep on the bed", "A bed with two cats."],
    ["A red bus drives down the street."],
    ["People wait for a bus in the street, and a dog waits, too.", "A street with people and a dog"],
    ["A half-eaten sandwich on a plate"],
]
PREDICTIONS = ["a dog is not running", "two cats sleep on a bed", "A RED BUS!", "a bus a bus a bus", ""]


@pytest.fixture
def package():
    return pytest.importorskip("pycocoevalcap.cider.cider")


@pytest.mark.parametrize("corpus", [None, REFERENCES])
def test_equals_the_package(package, corpus):
    gts = {i: [_words(text) for text in texts] for i, texts in enumerate(REFERENCES)}
    res = {i: [_words(text)] for i, text in enumerate(PREDICTIONS)}
    mean, scores = package.Cider().compute_score(gts, res)
    ours = cider(PREDICTIONS, REFERENCES, corpus)
    assert ours.dtype == np.float64 and ours.tolist() == scores.tolist() and ours.mean() == pytest.approx(mean)
    assert ours.max() > 3 and ours[-1] == 0


def test_by_hand(package):
    """Two items: an n-gram of both weighs nothing, the others all weigh log 2, which cancels."""
    references = [["A black cat sleeps.", "The cat is asleep."], ["Two dogs run in the park."]]
    # "a cat sleeps" shares a, cat, sleeps and (cat sleeps) with the first, cat with the second less its "the";
    # the Gaussian is of the difference in length, 1, with a standard deviation of 6
    shared = 3 / math.sqrt(3 * 4) + 1 / math.sqrt(2 * 3) + 1 / math.sqrt(3 * 3)
    expected = 10 * shared * math.exp(-1 / 72) / 4 / 2
    assert cider(["A cat sleeps.", "Two dogs run in the park!"], references) == pytest.approx([expected, 10.0])


def test_the_corpus_makes_scores_independent_of_what_is_scored_together(package):
    together = cider(PREDICTIONS, REFERENCES)
    score = Cider(iter(REFERENCES))
    order = [3, 0, 4, 0, 2, 1]
    assert [score(PREDICTIONS[i], REFERENCES[i]) for i in order] == together[order].tolist()
    some = slice(1, 3)
    assert cider(PREDICTIONS[some], REFERENCES[some], REFERENCES).tolist() == together[some].tolist()
    assert cider(PREDICTIONS[some], REFERENCES[some]).tolist() != together[some].tolist()
    more = cider(PREDICTIONS * 3, REFERENCES * 3, REFERENCES)  # more than the corpus has
    assert more.tolist() == together.tolist() * 3


def test_rare_words_weigh_more(package):
    score = Cider(REFERENCES)
    assert score("a sandwich", ["a sandwich here"]) > score("a here", ["a sandwich here"]) > 0


@pytest.mark.parametrize(
    "text, words",  # as the Penn Treebank tokenizer splits them, lower case, without its list of punctuation
    [
        ("A man's dog isn't running.", "a man 's dog is n't running"),
        ("Two cats -- black-and-white -- sleep, eat; and play!", "two cats black-and-white sleep eat and play"),
        ("The time is 3:30 p.m. on a 1,000-year-old clock", "the time is 3:30 p.m. on a 1,000-year-old clock"),
        ("A woman can’t ride 'STOP' bikes...", "a woman ca n't ride stop bikes"),
        ("It's the dogs' bowl,a U.S. one: a café\n", "it 's the dogs bowl a u.s. one a café"),
        ("?!", ""),
        ("मेज़ पर किताब है।", "मेज़ पर किताब है"),
        ("cafe\u0301 \u2764\ufe0f", "caf\u00e9"),
    ],
)
def test_words(text, words):
    assert _words(text) == words


def test_wrong_input(package):
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        cider(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"the corpus has 1 item\(s\)"):
        cider(["a"], [["a"]])
    with pytest.raises(ValueError, match="references='a cat' must be a list of captions"):
        cider(["a", "b"], ["a cat", ["b"]])
    with pytest.raises(ValueError, match=r"references=\[\] must"):
        Cider(REFERENCES)("a", [])
    assert len(cider([], [], REFERENCES)) == 0


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    with pytest.raises(ImportError, match=r"pip install 'lever_grpo\[captions\]'"):
        cider(["a"], [["a"]])
