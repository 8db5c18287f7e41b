"""How questions and answers become the text of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.examples import Example


@dataclass(frozen=True)
class PromptTemplate:
    """
    The text of a prompt, in pieces, so that each can be tokenised once.

    Args:
        question (`str`, *optional*, defaults to `"Question: {question}\\nAnswer:"`):
            The part of a demonstration, and of the query, before the answer.
        answer (`str`, *optional*, defaults to `" {answer}"`):
            The answer that follows; what is scored is its tokens (and those of `stop`, with `score_stop`).
        stop (`str`, *optional*, defaults to `"\\n"`):
            What ends an answer; answering stops there.
        separator (`str`, *optional*, defaults to `"\\n"`):
            What stands between a demonstration's end and what follows it.
        instruction (`str`, *optional*, defaults to `""`):
            What stands in front of everything.
        score_stop (`bool`, *optional*, defaults to `False`):
            Whether the tokens of `stop` count in the score of an answer.

    Example:

    ```python
    >>> from lever_grpo.data import Example
    >>> from lever_grpo.scorers import PromptTemplate
    >>> template = PromptTemplate(question="Q: {question}\\nA:", separator="")
    >>> template.text([Example(0, "1 + 1?", ("2",))], Example(1, "2 + 2?", ("4",)))
    'Q: 1 + 1?\\nA: 2\\nQ: 2 + 2?\\nA:'

    ```
    """

    question: str = "Question: {question}\nAnswer:"
    answer: str = " {answer}"
    stop: str = "\n"
    separator: str = "\n"
    instruction: str = ""
    score_stop: bool = False

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            if f"{{{name}}}" not in getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} must hold {{{name}}}, the place of the {name}.")

    def of_query(self, example: Example) -> str:
        """The query's part of the prompt."""
        return self.question.replace("{question}", example.question)

    def of_answer(self, example: Example) -> str:
        """What is scored after the prompt."""
        answer = self.answer.replace("{answer}", example.answers[0])
        return answer + self.stop if self.score_stop else answer

    def of_demonstration(self, example: Example) -> str:
        """A demonstration, up to and with what separates it from the next piece."""
        answer = self.answer.replace("{answer}", example.answers[0])
        return self.of_query(example) + answer + self.stop + self.separator

    def text(self, demonstrations: list[Example], query: Example) -> str:
        """The whole prompt, up to where the answer begins."""
        return self.instruction + "".join(map(self.of_demonstration, demonstrations)) + self.of_query(query)
