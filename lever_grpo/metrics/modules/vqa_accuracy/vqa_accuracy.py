"""VQA accuracy of free-form answers, with the normalisation of the VQA challenge's evaluation."""

from typing import Any

import datasets
import evaluate

from lever_grpo.metrics.answers import vqa_accuracy


_CITATION = """\
@inproceedings{antol2015vqa,
  title     = {{VQA}: Visual Question Answering},
  author    = {Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
               Zitnick, C. Lawrence and Parikh, Devi},
  booktitle = {International Conference on Computer Vision (ICCV)},
  year      = {2015}
}
"""


class VqaAccuracy(evaluate.Metric):
    """
    Mean VQA accuracy; see [`~lever_grpo.metrics.vqa_accuracy`] for the rules.

    Args:
        predictions (`list[str]`):
            One answer for each question.
        references (`list[list[str] | str]`):
            For each question what people answered, ten answers in VQA, or one right answer.
        per_item (`bool`, *optional*, defaults to `False`):
            Whether to return the accuracy of each answer, too.

    Returns:
        `dict`: `vqa_accuracy`, the mean, from 0 to 1, and with `per_item` the list `vqa_accuracies`.

    Raises:
        ValueError: If a question has no reference or one that is not a string, or there are no predictions.

    Example:
    ```python
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:  # evaluate.load makes the same object, in a folder of its own
    ...     metric = VqaAccuracy(cache_dir=folder)
    ...     metric.compute(predictions=["Two"], references=[["2"] * 3 + ["3"] * 7])
    {'vqa_accuracy': 0.9}

    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation=_CITATION,
            inputs_description=VqaAccuracy.__doc__ or "",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
            homepage="https://visualqa.org/evaluation.html",
            reference_urls=["https://github.com/GT-Vision-Lab/VQA"],
        )

    def add(self, *, prediction: str, reference: Any, **kwargs: Any) -> None:
        """Adds one answer and its reference or references."""
        super().add(prediction=prediction, reference=_as_list(reference), **kwargs)

    def add_batch(self, *, predictions: Any, references: Any, **kwargs: Any) -> None:
        """Adds answers and the reference or references of each."""
        super().add_batch(predictions=predictions, references=[_as_list(given) for given in references], **kwargs)

    def _compute(self, predictions: list[str], references: list[list[str]], per_item: bool = False) -> dict[str, Any]:
        accuracies = [vqa_accuracy(*item) for item in zip(predictions, references, strict=True)]
        if not accuracies:
            raise ValueError("there are no predictions to take the mean of; add at least one.")
        result: dict[str, Any] = {"vqa_accuracy": sum(accuracies) / len(accuracies)}
        return result | {"vqa_accuracies": accuracies} if per_item else result


def _as_list(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"references {given!r} must be a string, or a list of strings, at least one.")
    return list(texts)
