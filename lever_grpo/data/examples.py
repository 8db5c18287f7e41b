"""Rows of a task: what stands in prompts as a demonstration or as the query."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """
    A question with its answers, and an image where the task has them.

    Args:
        id (`int`):
            Row of the task, and of its embeddings; not negative.
        question (`str`):
            The text that the prompt shows.
        answers (`tuple[str, ...]`):
            Reference answers. The first stands in demonstrations and is the one that is scored.
        image (`Path` or `bytes`, *optional*):
            The image's file, or its encoded bytes.
        entity (`str`, *optional*):
            What the row is about (its image, a person, …): rows about one thing are not each other's demonstrations.
        external_id (`str`, *optional*):
            The id of the row in the files that it came from.

    Raises:
        ValueError: if the id is negative, there is no answer, or one is empty.

    Example:

    ```python
    >>> from lever_grpo.data import Example
    >>> Example(0, "What is the capital of Peru?", ("Lima",)).answers[0]
    'Lima'

    ```
    """

    id: int
    question: str
    answers: tuple[str, ...]
    image: Path | bytes | None = None
    entity: str | None = None
    external_id: str | None = None

    def __post_init__(self) -> None:
        if self.id < 0:
            raise ValueError(f"id={self.id}: a row id is the row of the embeddings, from 0 on.")
        if not self.answers or not all(answer.strip() for answer in self.answers):
            raise ValueError(f"row {self.id}: answers={list(self.answers)}: at least one, and none of them empty.")
