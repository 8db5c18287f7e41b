"""
How well a policy's log-probabilities agree with the rewards of logged groups.

Shapes: B groups (queries), padded to G logged sequences each. Rewards are "higher is better".
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def expected_reward(log_probs: ArrayLike, rewards: ArrayLike, mask: ArrayLike | None = None) -> NDArray[np.float64]:
    """
    Expected reward under the policy restricted to the logged group: Σ_i softmax(log π)_i · R_i.

    Args:
        log_probs (`ArrayLike` of shape `(B, G)`):
            Log-probability of each logged sequence, summed over its shots. `-inf` is a sequence that is never chosen.
        rewards (`ArrayLike` of shape `(B, G)`):
            Their rewards.
        mask (`ArrayLike` of shape `(B, G)`, *optional*):
            True where the group has a sequence; padding is ignored, whatever its values.

    Returns:
        `NDArray` of shape `(B,)`.

    Example:
    ```python
    >>> import math
    >>> from lever_grpo.metrics import expected_reward
    >>> log_probs = [[math.log(0.3), math.log(0.1), 0.0]]
    >>> expected_reward(log_probs, [[4.0, 8.0, 99.0]], [[True, True, False]]).round(6).tolist()
    [5.0]

    ```
    """
    logits, values, live = live_groups(log_probs, rewards, mask)
    logits = np.where(live, logits, -np.inf)
    highest = logits.max(axis=1, keepdims=True)  # (B, 1)
    if not np.isfinite(highest).all():
        group = int(np.argmin(np.isfinite(highest[:, 0])))
        raise ValueError(
            f"group {group} has no sequence with a finite log-probability; the policy gives none of its logged "
            "sequences any mass: check the sequence mask, or drop the group."
        )
    weights = np.exp(logits - highest)
    return (weights * np.where(live, values, 0.0)).sum(axis=1) / weights.sum(axis=1)  # (B,)


def rank_correlations(log_probs: ArrayLike, rewards: ArrayLike, mask: ArrayLike | None = None) -> NDArray[np.float64]:
    """
    Spearman's rank correlation between log-probability and reward in each group (ties get mid-ranks).

    Args:
        log_probs, rewards, mask:
            As in [`expected_reward`].

    Returns:
        `NDArray` of shape `(B,)`: in [-1, 1]; NaN where it is undefined, that is, where all log-probabilities or all
        rewards of the group are equal.

    Example:
    ```python
    >>> from lever_grpo.metrics import rank_correlations
    >>> rank_correlations([[-3.0, -2.0, -1.0], [-1.0, -2.0, -3.0]], [[0.1, 0.2, 0.9], [5.0, 5.0, 5.0]]).tolist()
    [1.0, nan]

    ```
    """
    logits, values, live = live_groups(log_probs, rewards, mask)
    correlations = np.full(len(logits), np.nan)
    for group, alive in enumerate(live):
        x, y = mid_ranks(logits[group, alive]), mid_ranks(values[group, alive])
        x, y = x - x.mean(), y - y.mean()
        norm = np.sqrt((x @ x) * (y @ y))
        if norm > 0.0:
            correlations[group] = (x @ y) / norm
    return correlations


def rank_correlation(log_probs: ArrayLike, rewards: ArrayLike, mask: ArrayLike | None = None) -> float:
    """
    Mean of [`rank_correlations`] over the groups in which it is defined; NaN when it is defined in none.

    Example:
    ```python
    >>> from lever_grpo.metrics import rank_correlation
    >>> rank_correlation([[-3.0, -2.0, -1.0], [-1.0, -2.0, -3.0]], [[0.1, 0.2, 0.9], [5.0, 5.0, 5.0]])
    1.0

    ```
    """
    correlations = rank_correlations(log_probs, rewards, mask)
    defined = correlations[~np.isnan(correlations)]
    return float(defined.mean()) if len(defined) else float("nan")


def mid_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """
    Ranks from 1, equal values sharing the mean of the ranks that they take up.

    Example:
    ```python
    >>> from lever_grpo.metrics import mid_ranks
    >>> mid_ranks([10.0, 20.0, 20.0, 5.0]).tolist()
    [2.0, 3.5, 3.5, 1.0]

    ```
    """
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]


def live_groups(
    log_probs: ArrayLike, rewards: ArrayLike, mask: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """The three inputs of a group metric as arrays of one shape (B, G), with no NaN where the mask is True."""
    logits, values = np.asarray(log_probs, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    live = np.ones(logits.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if logits.ndim != 2 or logits.shape != values.shape or logits.shape != live.shape:
        raise ValueError(
            f"log_probs, rewards, mask have shapes {logits.shape}, {values.shape}, {live.shape}; expected one (B, G)."
        )
    bad = live & (np.isnan(logits) | ~np.isfinite(values))
    if bad.any():
        group, sequence = np.argwhere(bad)[0]
        raise ValueError(
            f"group {group}, sequence {sequence} has log-probability {logits[group, sequence]} and reward "
            f"{values[group, sequence]}; both must be numbers: mask out the sequences that have none."
        )
    return logits, values, live
