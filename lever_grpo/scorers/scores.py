"""From the log-probabilities of an answer's tokens to the score of a sequence of demonstrations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike


def mean_log_prob(token_log_probs: ArrayLike) -> float:
    """
    Mean log-probability of an answer's tokens.

    Args:
        token_log_probs (array of shape (T,)):
            What [`Scorer.score`] gives for one prompt, in nats. NaN and infinities are passed on.

    Returns:
        `float`: the mean, in nats per token.

    Raises:
        ValueError: if there are no tokens, or the array is not one-dimensional.

    Example:

    ```python
    >>> from lever_grpo.scorers.scores import mean_log_prob
    >>> mean_log_prob([-1.0, -0.5])
    -0.75

    ```
    """
    values = np.asarray(token_log_probs, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"token_log_probs has the shape {values.shape}: expected (T,), one value for each token of the answer, "
            "and at least one"
        )
    return float(values.mean())


def infoscore(new_mean: float, parent_mean: float) -> float:
    """
    Lever-LM's score: how much of the answer's probability was won, exp(new) - exp(parent).

    Args:
        new_mean (`float`):
            Mean log-probability of the answer's tokens with the demonstrations.
        parent_mean (`float`):
            The same without all of them (cumulative score), or without the last one (gain of a step).

    Returns:
        `float`: between -1 and 1.

    Example:

    ```python
    >>> import math
    >>> from lever_grpo.scorers.scores import infoscore
    >>> round(infoscore(math.log(0.5), math.log(0.2)), 6)
    0.3

    ```
    """
    return math.exp(new_mean) - math.exp(parent_mean)


def logprob_gain(new_mean: float, parent_mean: float) -> float:
    """
    Difference of mean log-probabilities, new - parent: unlike `infoscore` it also tells small probabilities apart.

    Args:
        new_mean (`float`):
            Mean log-probability of the answer's tokens with the demonstrations.
        parent_mean (`float`):
            The same without all of them (cumulative score), or without the last one (gain of a step).

    Returns:
        `float`: in nats per token.

    Example:

    ```python
    >>> from lever_grpo.scorers.scores import logprob_gain
    >>> logprob_gain(-0.5, -2.0)
    1.5

    ```
    """
    return new_mean - parent_mean


# Both add up over steps: the score of a sequence over zero-shot is the sum of the gains of its steps.
SCORES: dict[str, Callable[[float, float], float]] = {"infoscore": infoscore, "logprob_gain": logprob_gain}
