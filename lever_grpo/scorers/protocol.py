"""The three methods that a search needs of a frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..data.examples import Example


class ScorerError(RuntimeError):
    """The frozen model could not be asked about a prompt; the message names the query."""


@dataclass(frozen=True)
class Prompt:
    """
    Demonstrations in front of a query.

    Args:
        query ([`Example`]):
            The question that is asked; the scored answer is its first one.
        demonstrations (`tuple[Example, ...]`):
            In **prompt order**: the last one stands next to the query.
    """

    query: Example
    demonstrations: tuple[Example, ...] = ()


class Scorer(Protocol):
    """A frozen model behind three methods. Prompts may come in any number and order; results keep their order."""

    def score(self, prompts: Sequence[Prompt]) -> list[NDArray[np.float64] | None]:
        """
        Log-probabilities of the tokens of each query's first answer after its prompt, (T,) each, in nats. `None` for a
        prompt that the model cannot be asked (too long, a broken image); why is logged with the query's id and, by
        scorers that have this attribute, kept in `problems` until the next call, a dict of prompts to reasons. Values
        are passed on as the model gives them: the search checks that they are finite.
        """
        ...

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int = 10) -> list[str | None]:
        """The model's own answer to each prompt, by greedy decoding; `None` as in `score`."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a manifest must hold to repeat the scores: model, revision, dtype, prompt, versions. JSON-able."""
        ...
