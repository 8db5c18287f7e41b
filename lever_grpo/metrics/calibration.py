"""
Whether a policy is as sure of a logged sequence as its reward warrants.

Shapes and units as in `groups`: B groups, padded to G logged sequences each; rewards are "higher is better". The
policy's probabilities are those within the group: softmax(log π) over its logged sequences.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .groups import expected_reward, live_groups


class CalibrationBin(NamedTuple):
    """
    Logged sequences to which a policy gives about the same probability.

    Attributes:
        sequences (`int`): Their number.
        probability (`float`): Mean of their probabilities within their groups.
        gap_closed (`float`): Share of the gap from a random to the best sequence that they close.

    Example:
    ```python
    >>> from lever_grpo.metrics import CalibrationBin
    >>> CalibrationBin(sequences=20, probability=0.4, gap_closed=0.7)._asdict()
    {'sequences': 20, 'probability': 0.4, 'gap_closed': 0.7}

    ```
    """

    sequences: int
    probability: float
    gap_closed: float


def calibration_curve(
    log_probs: ArrayLike, rewards: ArrayLike, mask: ArrayLike | None = None, bins: int = 10
) -> list[CalibrationBin]:
    """
    How good sequences are that a policy finds so and so probable: a reliability diagram for graded rewards.

    The sequences of all groups are sorted into bins by their probability, about the same number in each (Nixon et al.,
    *Measuring Calibration in Deep Learning*, CVPR 2019 workshops), for most probabilities are near 1/G. In each bin
    the share is a ratio of means, as in [`gap_closed`]: mean(R − random) / mean(best − random), where random and best
    are the mean and the highest reward of the sequence's group. 0 is no better than random, 1 is always the best. A
    policy that knows something has a rising curve.

    Groups whose rewards all tie have no gap and are left out.

    Args:
        log_probs, rewards, mask:
            As in [`expected_reward`].
        bins (`int`, *optional*, defaults to `10`):
            Number of bins. Equal probabilities share one, so there may be fewer.

    Returns:
        `list[CalibrationBin]`: from the least to the most probable sequences; empty when all groups tie.

    Example:
    ```python
    >>> from lever_grpo.metrics import calibration_curve
    >>> for row in calibration_curve([[-2.0, -2.0, -1.0, -1.0]], [[0.0, 1.0, 2.0, 3.0]], bins=2):
    ...     print(row.sequences, round(row.probability, 3), round(row.gap_closed, 3))
    2 0.134 -0.667
    2 0.366 0.667

    ```
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1.")
    policy, below, live = _within_groups(log_probs, rewards, mask)
    gap = -below.sum(axis=1) / live.sum(axis=1)  # (B,) of the best to a random choice
    # a gap that is only rounding is a tie, as in `gap_closed`
    size = np.where(live, np.abs(rewards), 0.0).max(axis=1, initial=0.0)  # (B,)
    kept = live & (gap > 1e-12 * size)[:, None]  # (B, G)
    if not kept.any():
        return []
    probability, short = np.exp(policy[kept]), below[kept]  # (N,)
    gaps = np.broadcast_to(gap[:, None], live.shape)[kept]  # (N,)
    # edges are probabilities that occur, so that no bin is empty
    edges = np.unique(np.sort(probability)[np.arange(bins) * len(probability) // bins])
    place = np.searchsorted(edges, probability, side="right") - 1  # (N,)
    return [
        CalibrationBin(
            sequences=int(here.sum()),
            probability=float(probability[here].mean()),
            gap_closed=float(1.0 + short[here].sum() / gaps[here].sum()),
        )
        for here in (place == index for index in range(len(edges)))
    ]


def calibration_error(log_probs: ArrayLike, rewards: ArrayLike, mask: ArrayLike | None = None) -> float:
    """
    Certainty that no reward pays for, in nats: the mean over groups of KL(π ‖ softmax(R / τ)), at the best τ.

    softmax(R / τ) is what maximises E[R] + τ · entropy, so among all policies with its expected reward it is the least
    certain one (Jaynes, *Information Theory and Statistical Mechanics*, 1957). The KL is smallest at the τ of
    [`matched_temperature`], where the two have the same expected reward; it is then the difference of their entropies:
    how much surer the policy is than it would have to be to get what it gets.

    It does not say how much the policy gets: a uniform one makes no claim and has no error (τ = ∞). Read it beside
    [`expected_reward`] or [`rank_correlation`].

    Args:
        log_probs, rewards, mask:
            As in [`expected_reward`]. All groups have one τ; where a unit of reward means different things in
            different groups, standardise the rewards in each first.

    Returns:
        `float`: from 0, for a policy that is softmax(R / τ) in every group at some τ > 0, to the mean of log G.

    Example:
    ```python
    >>> from lever_grpo.metrics import calibration_error
    >>> rewards = [[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]]
    >>> round(calibration_error([[0.0, 2.0, 4.0], [6.0, 2.0, 0.0]], rewards), 6)  # τ = 0.5
    0.0
    >>> round(calibration_error([[0.0, 0.0, 9.0], [0.0, 9.0, 0.0]], rewards), 2)  # sure, and wrong in the second
    1.05

    ```
    """
    policy, below, live = _within_groups(log_probs, rewards, mask)
    target = _log_softmax(below / matched_temperature(log_probs, rewards, mask), live)  # (B, G)
    chosen = np.isfinite(policy)  # a sequence that is never chosen, or padding, adds nothing
    surer = np.where(chosen, policy, 0.0) - np.where(chosen, target, 0.0)  # (B, G)
    return max(0.0, float((np.exp(policy) * surer).sum(axis=1).mean()))


def matched_temperature(log_probs: ArrayLike, rewards: ArrayLike, mask: ArrayLike | None = None) -> float:
    """
    The τ at which softmax(R / τ) has the policy's expected reward within the groups, mean over groups.

    It is also the τ ≥ 0 that minimises KL(π ‖ softmax(R / τ)): the derivative with respect to 1/τ is the difference of
    the two expected rewards.

    Args:
        log_probs, rewards, mask:
            As in [`expected_reward`].

    Returns:
        `float`: in the unit of the rewards. `inf` for a policy that is no better than a random choice; near 0 for one
        that always takes the best.

    Example:
    ```python
    >>> from lever_grpo.metrics import matched_temperature
    >>> round(matched_temperature([[0.0, 2.0, 4.0]], [[0.0, 1.0, 2.0]]), 6)
    0.5
    >>> matched_temperature([[0.0, 0.0, 0.0]], [[0.0, 1.0, 2.0]])
    inf

    ```
    """
    policy, below, live = _within_groups(log_probs, rewards, mask)
    wanted = float(expected_reward(policy, below, live).mean())
    scale = -float(below.min())

    def reached(inverse: float) -> float:
        return float(expected_reward(inverse * below, below, live).mean())

    if scale == 0.0 or reached(0.0) >= wanted - 1e-12 * scale:
        return float("inf")
    low, high = 0.0, 1.0 / scale
    while reached(high) < wanted and high * scale < 1e9:
        low, high = high, 2.0 * high
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if reached(middle) < wanted else (low, middle)
    return 1.0 / high


def _within_groups(
    log_probs: ArrayLike, rewards: ArrayLike, mask: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Log-probabilities within the groups (-inf at padding), R − max R (0 at padding) and the mask, each (B, G)."""
    expected_reward(log_probs, rewards, mask)  # refuses a group in which no sequence has a probability
    logits, values, live = live_groups(log_probs, rewards, mask)
    best = np.where(live, values, -np.inf).max(axis=1, keepdims=True)  # (B, 1)
    return _log_softmax(logits, live), np.where(live, values - best, 0.0), live


def _log_softmax(logits: NDArray[np.float64], live: NDArray[np.bool_]) -> NDArray[np.float64]:
    logits = np.where(live, logits, -np.inf)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))  # (B, G)
