"""CIDEr-D: how much a caption says what people say of the same picture, and not of others."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from .answers import is_letter_part


PARTS = "".join(filter(is_letter_part, map(chr, range(0x20000))))  # all of them: no script stands further behind
WORD = rf"\w[\w{PARTS}]*"
# abbreviations and numbers in one piece, the endings that the Penn Treebank splits off, words with their hyphens
TOKEN = re.compile(
    rf"(?:[^\W\d]\.){{2,}}|\d+(?:[.,:/]\d+)+(?:-{WORD})*|n't\b|'(?:s|m|d|re|ve|ll)\b|{WORD}(?:-{WORD})*"
)


class Cider:
    """
    CIDEr-D of single captions, with the document frequencies of a whole task.

    The fewer items have an n-gram (1 to 4 words) in their references, the more it weighs. So a score depends on the
    corpus, and only scores with the same corpus can be compared.

    The numbers are those of `pycocoevalcap`. Its tokenizer, a Java program, is not used: captions are split here, much
    as it does, into lower case words without punctuation (and without symbols and brackets, which it keeps). Languages
    that put no spaces between words must come with them.

    Args:
        corpus (`Iterable[Sequence[str]]`):
            The references of each item of the task; at least two items.

    Raises:
        ImportError: if `pycocoevalcap` is not installed.
        ValueError: if there are fewer than two items, or an item has no list of references.

    Source: Vedantam, Zitnick and Parikh, *CIDEr: Consensus-based Image Description Evaluation*, CVPR 2015.

    Example:

    ```python
    >>> from lever_grpo.metrics.cider import Cider
    >>> score = Cider([["A black cat sleeps."], ["Two dogs run."], ["A red bus."]])
    >>> round(score("a black cat sleeps", ["A black cat sleeps."]), 6), score("a bus", ["Two dogs run."])
    (10.0, 0.0)

    ```
    """

    def __init__(self, corpus: Iterable[Sequence[str]]):
        try:
            from pycocoevalcap.cider.cider_scorer import CiderScorer
        except ImportError as error:
            raise ImportError("CIDEr needs the package pycocoevalcap: pip install 'lever_grpo[captions]'") from error
        self._scorer = CiderScorer()
        self._documents = 0
        for references in corpus:
            self._hold(None, references)
            self._scorer.compute_doc_freq()  # adds to what it has counted before
            self._documents += 1
        if self._documents < 2:
            raise ValueError(
                f"the corpus has {self._documents} item(s), which makes every n-gram worth nothing: give the "
                "references of all items of the task, at least 2."
            )
        self._scorer.document_frequency = Counter(self._scorer.document_frequency)  # does not grow by being asked

    def __call__(self, prediction: str, references: Sequence[str]) -> float:
        """The score of a caption, from 0 to 10; one of fewer than four words has no n-grams of four, and gets less."""
        self._hold(prediction, references)
        # the package takes the number of documents from this length, and scores as many of them as there are captions
        self._scorer.crefs += [None] * (self._documents - 1)
        return float(self._scorer.compute_cider()[0])

    def _hold(self, prediction: str | None, references: Sequence[str]) -> None:
        """Makes this the only item of the package's scorer."""
        if isinstance(references, str) or not references:
            raise ValueError(f"references={references!r} must be a list of captions, at least one.")
        self._scorer.ctest, self._scorer.crefs = [], []
        self._scorer.cook_append(None if prediction is None else _words(prediction), list(map(_words, references)))


def cider(
    predictions: Sequence[str], references: Sequence[Sequence[str]], corpus: Iterable[Sequence[str]] | None = None
) -> NDArray[np.float64]:
    """
    CIDEr-D of each caption; their mean is what is reported for a model.

    Args:
        predictions (`Sequence[str]`, length N):
            One caption for each item.
        references (`Sequence[Sequence[str]]`, length N):
            The captions that people gave.
        corpus (`Iterable[Sequence[str]]`, *optional*):
            Where the document frequencies are from: the references of all items of the task; see [`Cider`]. By
            default it is `references`, so that the scores depend on which items are given.

    Returns:
        `NDArray` of shape `(N,)`: scores from 0 to 10.

    Raises:
        ImportError: if `pycocoevalcap` is not installed.
        ValueError: if the lengths differ, or as [`Cider`] says.

    Example:

    ```python
    >>> from lever_grpo.metrics.cider import cider
    >>> references = [["A black cat sleeps.", "The cat is asleep."], ["Two dogs run in the park."]]
    >>> cider(["A cat sleeps.", "Two dogs run in the park!"], references).round(2).tolist()
    [1.98, 10.0]

    ```
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references: expected one for each.")
    score = Cider(references if corpus is None else corpus)
    return np.array([score(*item) for item in zip(predictions, references, strict=True)], dtype=np.float64)


def _words(text: str) -> str:
    """Lower case words with spaces between them, punctuation left out."""
    text = unicodedata.normalize("NFC", text.lower())
    return " ".join(TOKEN.findall(text.replace("’", "'").replace("n't", " n't")))
