"""What the model's own answers are worth: exact matches, or CIDEr for captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..data.examples import Example
from ..metrics.answers import exact_match, vqa_accuracy
from ..metrics.cider import Cider


ANNOTATORS = 10  # from so many reference answers on, a right answer is one that several of them gave

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
    Whether an answer is right: [`~metrics.exact_match`], or [`~metrics.vqa_accuracy`] from ten references on.

    Ten references are what ten people said, as in VQA; fewer are different ways to say what is right.

    Example:

    ```python
    >>> from lever_grpo.search import answer_accuracy
    >>> answer_accuracy("The Cat.", ["dog", "cat"]), answer_accuracy("cow", ["cat"]), answer_accuracy("a", ["A"])
    (1.0, 0.0, 1.0)
    >>> answer_accuracy("3.5", ["35"]), answer_accuracy("1,000", ["1000"]), answer_accuracy("-", ["+"])
    (0.0, 1.0, 0.0)
    >>> answer_accuracy("cat", ["cat"] * 2 + ["dog"] * 8)
    0.6

    ```
    """
    return vqa_accuracy(answer, references) if len(references) >= ANNOTATORS else exact_match(answer, references)
