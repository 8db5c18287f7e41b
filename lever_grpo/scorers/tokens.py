"""The tokens of a prompt, made of pieces that are tokenised once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from ..data.examples import Example
from .prompts import PromptTemplate
from .protocol import Prompt


class PromptTokens:
    """
    Token ids of prompts and of answers: the beginning-of-sequence token where the tokenizer adds one, the instruction,
    each demonstration, the query.

    The instruction and the demonstrations are tokenised as they stand in front of a question: two line breaks in a row
    can be one token alone and two before a word. Each piece is tokenised once and kept.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the model.
        template ([`PromptTemplate`]):
            Text of the pieces.
    """

    def __init__(self, tokenizer: Any, template: PromptTemplate):
        self.tokenizer, self.template = tokenizer, template
        self._known: dict[tuple[str, str], tuple[int, ...]] = {}
        start = tokenizer.bos_token_id
        # not every tokenizer that has a beginning-of-sequence token adds it
        adds_start = start is not None and tokenizer("a").input_ids[:1] == [start]
        self.start: tuple[int, ...] = (start,) if adds_start else ()

    def of_prompts(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Everything before the answer of each prompt's query."""
        template = self.template
        ahead = template.question.partition("{question}")[0]  # comes after the instruction and every demonstration
        shots = {id(shot): shot for prompt in prompts for shot in prompt.demonstrations}
        texts = [template.instruction, *map(template.of_demonstration, shots.values())]
        (instruction, *encoded) = self.of_texts(texts, ahead)
        of_shot = dict(zip(shots, encoded, strict=True))
        queries = self.of_texts(template.of_query(prompt.query) for prompt in prompts)
        return [
            tuple(
                chain(
                    self.start,
                    instruction,
                    *(self.of_image(shot) + of_shot[id(shot)] for shot in prompt.demonstrations),
                    self.of_image(prompt.query) + query,
                )
            )
            for prompt, query in zip(prompts, queries, strict=True)
        ]

    def of_image(self, example: Example) -> tuple[int, ...]:
        """What stands in front of an example's text; nothing, where a model reads no images."""
        return ()

    def of_answers(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """The answer of each prompt's query."""
        return self.of_texts(self.template.of_answer(prompt.query) for prompt in prompts)

    def of_texts(self, texts: Iterable[str], ahead: str = "") -> list[tuple[int, ...]]:
        """Each text when `ahead` comes after it."""
        texts = list(texts)
        new = [text for text in dict.fromkeys(texts) if (text, ahead) not in self._known]
        if new:
            after = self.tokenizer(ahead, add_special_tokens=False).input_ids if ahead else []
            encoded = self.tokenizer([text + ahead for text in new], add_special_tokens=False).input_ids
            for text, ids in zip(new, encoded, strict=True):
                kept = ids[: len(ids) - len(after)]
                if kept + after != ids:  # the text merges with what comes after it
                    kept = self.tokenizer(text, add_special_tokens=False).input_ids
                self._known[text, ahead] = tuple(kept)
        return [self._known[text, ahead] for text in texts]
