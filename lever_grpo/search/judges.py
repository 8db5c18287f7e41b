"""What the model's own answers are worth: exact matches, or CIDEr for captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from ..data.examples import Example
from ..metrics.answers import exact_match, vqa_accuracy
from ..metrics.cider import Cider


ANNOTATORS = 10  # from so many reference answers on, a right answer is one that several of them gave

Judge = Callable[[str, Sequence[str]], float]  # answer, references -> what the answer is worth
COLUMNS = {"accuracy": "correct", "cider": "cider"}  # judge: where the log has it
MAX_NEW_TOKENS = {"accuracy": 10, "cider": 30}  # judge: length of an answer, at most; few captions are longer


def make_judge(judge_by: str, rows: Iterable[Example] = ()) -> Judge:
    """
    The judge of a task. Make it once, of all rows of the task, and give it to every search: it depends on them.

    Args:
        judge_by (`str`):
            `"accuracy"` or `"cider"`, which is [`~metrics.cider.Cider`].
        rows (`Iterable[Example]`, *optional*):
            All rows of the task, whatever is searched of it. They decide on the metric of `"accuracy"`, one for all:
            [`~metrics.vqa_accuracy`] if most have ten references or more, where references that a row lacks count as
            blank ones, which [`~data.load_vqa`] leaves out; else [`~metrics.exact_match`]. Without rows it is
            [`answer_accuracy`]. Their answers are the corpus of `"cider"`.

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
    >>> rows = [Example(i, "What is it?", ("cat",) * (9 if i == 0 else 10)) for i in range(3)]
    >>> make_judge("accuracy", rows)("dog", ["dog"] + ["cat"] * 8)  # nine of ten said something
    0.3
    >>> rows = [Example(0, "Caption:", ("A cat sleeps.", "A sleeping cat.")), Example(1, "Caption:", ("Dogs run.",))]
    >>> round(make_judge("cider", rows)("Dogs run and run.", rows[1].answers), 2)
    2.73

    ```
    """
    if judge_by not in COLUMNS:
        raise ValueError(f"judge_by={judge_by!r} must be one of {', '.join(COLUMNS)}.")
    if judge_by == "cider":
        return Cider(row.answers for row in rows)
    counts = [len(row.answers) for row in rows]
    if not counts:
        return answer_accuracy
    return _annotators_accuracy if median(counts) >= ANNOTATORS else exact_match


def answer_accuracy(answer: str, references: Sequence[str]) -> float:
    """
    Whether an answer to a single question is right: [`~metrics.exact_match`], or [`~metrics.vqa_accuracy`] from ten
    references on.

    Ten references are what ten people said, as in VQA; fewer are different ways to say what is right. Questions of one
    task are better judged by [`make_judge`], which has one metric for all.

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


def _annotators_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy of ten annotators, of whom those that are not there said nothing, as the official files have it."""
    return vqa_accuracy(answer, [*references, *[""] * (ANNOTATORS - len(references))])
