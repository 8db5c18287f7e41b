"""What the model's own answers are worth: exact matches, or CIDEr for captions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from ..data.examples import Example
from ..metrics.cider import Cider


ANNOTATORS = 10  # from so many reference answers on, a right answer is one that three of them gave

_PUNCTUATION = re.compile(r",(?=\d{3})|[^\w\s](?!\d)")  # that of -5 and 3.5 stays

Judge = Callable[[str, Sequence[str]], float]  # answer, references -> what the answer is worth
COLUMNS = {"accuracy": "correct", "cider": "cider"}  # judge: where the log has it
MAX_NEW_TOKENS = {"accuracy": 10, "cider": 30}  # judge: length of an answer, at most; few captions are longer


def make_judge(judge_by: str, rows: Iterable[Example] = ()) -> Judge:
    """
    The judge of a task. Make it once, of all rows of the task, and give it to every search: CIDEr depends on them.

    Args:
        judge_by (`str`):
            `"accuracy"`, which is [`answer_accuracy`], or `"cider"`, which is [`~metrics.cider.Cider`].
        rows (`Iterable[Example]`, *optional*):
            All rows of the task, whatever is searched of it. Their answers are the corpus of `"cider"`.

    Returns:
        `Callable[[str, Sequence[str]], float]`: answer and references → what the answer is worth.

    Raises:
        ImportError: if `"cider"` lacks its package.
        ValueError: if the judge is unknown, or `"cider"` gets fewer than two rows.

    Example:

    ```python
    >>> from lever_grpo.data import Example
    >>> from lever_grpo.search.judges import make_judge
    >>> make_judge("accuracy")("a cat", ["cat"])
    1.0
    >>> rows = [Example(0, "Caption:", ("A cat sleeps.", "A sleeping cat.")), Example(1, "Caption:", ("Dogs run.",))]
    >>> round(make_judge("cider", rows)("Dogs run and run.", rows[1].answers), 2)
    2.73

    ```
    """
    if judge_by not in COLUMNS:
        raise ValueError(f"judge_by={judge_by!r} must be one of {', '.join(COLUMNS)}.")
    return answer_accuracy if judge_by == "accuracy" else Cider(row.answers for row in rows)


def answer_accuracy(answer: str, references: Sequence[str]) -> float:
    """
    Whether an answer is right: 1 if it is one of the references, upper case, punctuation and articles aside.

    With ten references or more, as in VQA, where they are what ten people said, it is `min(1, matches / 3)`.

    Example:

    ```python
    >>> from lever_grpo.search import answer_accuracy
    >>> answer_accuracy("The Cat.", ["dog", "cat"]), answer_accuracy("cow", ["cat"]), answer_accuracy("a", ["A"])
    (1.0, 0.0, 1.0)
    >>> answer_accuracy("3.5", ["35"]), answer_accuracy("1,000", ["1000"]), answer_accuracy("-", ["+"])
    (0.0, 1.0, 0.0)
    >>> round(answer_accuracy("cat", ["cat"] * 2 + ["dog"] * 8), 3)
    0.667

    ```
    """
    matches = sum(_normal(answer) == _normal(reference) for reference in references)
    return min(1.0, matches / 3) if len(references) >= ANNOTATORS else float(matches > 0)


def _normal(text: str) -> str:
    words = _PUNCTUATION.sub("", text.lower()).split() or text.lower().split()  # of "+" nothing would be left
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)
