"""
How good chosen demonstration sequences are, given the logged scores of the sequences they were chosen from.

Shapes: Q queries, N logged sequences of a query (it may differ between queries), S shots, R seeds. A pick
is a row of S pool positions in search order. Scores are "higher is better" everywhere.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def sequences_of_length(
    sequences: Sequence[Sequence[int]] | NDArray, scores: ArrayLike, length: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """
    The logged sequences of one query that have `length` shots, with their scores.

    Args:
        sequences (`Sequence[Sequence[int]]`):
            Pool positions in search order; lengths may be mixed.
        scores (`ArrayLike` of shape `(N,)`):
            One score per sequence.
        length (`int`):
            Number of shots that is kept.

    Returns:
        `tuple[NDArray, NDArray]`: sequences of shape (N', length) and scores of shape (N',), in the log's order.

    Example:
    ```python
    >>> from lever_grpo.metrics import sequences_of_length
    >>> pairs, scores = sequences_of_length([[0], [1], [0, 1], [1, 0]], [-3.0, -2.0, -1.0, -0.5], length=2)
    >>> pairs.tolist(), scores.tolist()
    ([[0, 1], [1, 0]], [-1.0, -0.5])

    ```
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (len(sequences),):
        raise ValueError(f"scores have shape {values.shape}, expected ({len(sequences)},): one score per sequence.")
    keep = [i for i, sequence in enumerate(sequences) if len(sequence) == length]
    rows = np.array([list(sequences[i]) for i in keep], dtype=np.int64).reshape(len(keep), length)
    return rows, values[keep]


def lookup_reward(
    picks: ArrayLike, sequences: Sequence[Sequence[Sequence[int]]], scores: Sequence[ArrayLike]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """
    The logged score of each pick, where the log has it.

    Args:
        picks (`ArrayLike` of shape `(Q, S)` or `(R, Q, S)`):
            Pool positions in search order; the order matters.
        sequences (`Sequence`, length Q):
            Per query, the logged sequences (other lengths may be among them).
        scores (`Sequence`, length Q):
            Per query, the score of each logged sequence, or another logged column such as "correct", where `None` is a
            value that is not known.

    Returns:
        `tuple[NDArray, NDArray]`: values, NaN where the pick is not in the log or its value is not known, and the mask
        of those found; both of the shape of `picks` without its last axis.

    Raises:
        ValueError: If the log scores one sequence twice, differently.

    Example:
    ```python
    >>> from lever_grpo.metrics import lookup_reward
    >>> values, found = lookup_reward([[0, 1], [1, 0]], [[[0, 1], [1, 0]], [[0, 1]]], [[-1.0, -0.5], [-2.0]])
    >>> values.tolist(), found.tolist()
    ([-1.0, nan], [True, False])

    ```
    """
    chosen = np.asarray(picks)
    if chosen.ndim < 2 or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(
            f"picks have shape {chosen.shape} and type {chosen.dtype}; expected integer pool positions, shape (Q, S)."
        )
    queries, length = chosen.shape[-2:]
    _check_queries(queries, sequences=sequences, scores=scores)
    values = np.full(chosen.shape[:-1], np.nan)  # (..., Q)
    found = np.zeros(chosen.shape[:-1], dtype=bool)  # (..., Q)
    for query in range(queries):
        logged, logged_scores = sequences_of_length(sequences[query], scores[query], length)  # (N, S), (N,)
        same = (chosen[..., query, None, :] == logged).all(axis=-1)  # (..., N)
        for index in np.ndindex(same.shape[:-1]):
            hits = logged_scores[same[index]]
            if len(hits) == 0:
                continue
            if len(np.unique(hits)) > 1:  # NaN, a value that is not known, equals itself here
                raise ValueError(
                    f"query {query}: the log scores sequence {chosen[index + (query,)].tolist()} {len(hits)} times, "
                    f"as {hits.tolist()}; a sequence has one score: remove the repeats from the log."
                )
            values[index + (query,)] = hits[0]
            found[index + (query,)] = True
    return values, found


def random_reward(scores: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """
    Exact expectation of a uniformly random choice among the scored sequences, per query.

    Args:
        scores (`Sequence`, length Q):
            Per query, the scores of every sequence of the length that is compared.

    Returns:
        `NDArray` of shape `(Q,)`.

    Example:
    ```python
    >>> from lever_grpo.metrics import random_reward
    >>> random_reward([[1.0, 3.0], [0.0, 0.0, 3.0]]).tolist()
    [2.0, 1.0]

    ```
    """
    return np.array([_scores(scores, query).mean() for query in range(len(scores))])  # (Q,)


def oracle_reward(scores: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """
    The best score of each query: what a selector that sees the answer would get.

    Example:
    ```python
    >>> from lever_grpo.metrics import oracle_reward
    >>> oracle_reward([[1.0, 3.0], [0.0, 0.0, 3.0]]).tolist()
    [3.0, 3.0]

    ```
    """
    return np.array([_scores(scores, query).max() for query in range(len(scores))])  # (Q,)


def score_percentile(values: ArrayLike, scores: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """
    Percentile of each picked score among all scored sequences of its length.

    It is the share of the *other* sequences that the pick beats, a tie counting half (mid-rank): 100 is the only best,
    0 the only worst, and a uniformly random pick has 50 in expectation, with any ties. One sequence alone has 50.

    Args:
        values (`ArrayLike` of shape `(Q,)` or `(R, Q)`):
            Scores of the picks.
        scores (`Sequence`, length Q):
            Per query, the scores of every sequence of that length, the pick's among them.

    Returns:
        `NDArray`: percentiles in [0, 100], of the shape of `values`.

    Example:
    ```python
    >>> from lever_grpo.metrics import score_percentile
    >>> score_percentile([3.0, 1.0], [[0.0, 1.0, 3.0], [0.0, 1.0, 1.0, 2.0, 2.0]]).tolist()
    [100.0, 37.5]

    ```
    """
    picked = np.asarray(values, dtype=np.float64)
    _check_queries(picked.shape[-1], scores=scores)
    percentiles = np.empty_like(picked)
    for query in range(picked.shape[-1]):
        logged = _scores(scores, query)  # (N,)
        pick = picked[..., query, None]  # (..., 1)
        below = (logged < pick).sum(axis=-1)
        equal = (logged == pick).sum(axis=-1)  # the pick itself included
        if (equal == 0).any():
            raise ValueError(
                f"query {query}: picked score {pick[equal == 0].ravel()[0]} is not among its {len(logged)} logged "
                "scores; take values from lookup_reward, in the precision of the log."
            )
        others = len(logged) - 1
        percentiles[..., query] = 100.0 * (below + 0.5 * (equal - 1)) / others if others else 50.0
    return percentiles


def regret(values: ArrayLike, scores: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """
    How much the best scored sequence of each query is above the pick (0 = the pick is the best).

    Args:
        values (`ArrayLike` of shape `(Q,)` or `(R, Q)`):
            Scores of the picks.
        scores (`Sequence`, length Q):
            Per query, the scores of every sequence of the length that is compared.

    Returns:
        `NDArray`: regrets of the shape of `values`.

    Example:
    ```python
    >>> from lever_grpo.metrics import regret
    >>> regret([1.0, 3.0], [[1.0, 1.5], [3.0, 2.0]]).tolist()
    [0.5, 0.0]

    ```
    """
    picked = np.asarray(values, dtype=np.float64)
    _check_queries(picked.shape[-1], scores=scores)
    return oracle_reward(scores) - picked  # (..., Q)


def gap_closed(pick: ArrayLike, random: ArrayLike, oracle: ArrayLike) -> float:
    """
    Share of the random-to-oracle gap that the picks close: (mean pick − mean random) / (mean oracle − mean random).

    It is the ratio of *means over queries* (and seeds), not the mean of per-query ratios: a query on which nothing
    matters has a gap near zero, and its ratio would drown the others.

    Args:
        pick, random, oracle (`ArrayLike`):
            Rewards of the picks, of a random choice and of the best choice, any shapes.

    Returns:
        `float`: 0 = random, 1 = oracle, negative below random.

    Raises:
        ValueError: If the mean of `oracle` is not above the mean of `random`, or a value is not finite.

    Example:
    ```python
    >>> from lever_grpo.metrics import gap_closed
    >>> gap_closed(pick=[2.0, 3.0], random=[1.0, 1.0], oracle=[3.0, 4.0])
    0.6

    ```
    """
    means = {}
    for name, values in {"pick": pick, "random": random, "oracle": oracle}.items():
        array = np.asarray(values, dtype=np.float64)
        if array.size == 0 or not np.isfinite(array).all():
            raise ValueError(
                f"{name} is empty or holds a NaN or infinite reward; the gap is a ratio of means over all queries: "
                "score the missing ones, or leave these queries out of every method."
            )
        means[name] = float(array.mean())
    gap = means["oracle"] - means["random"]
    # Equal means that were summed in different orders differ by rounding only; their gap is zero, not 1e-17.
    if gap <= 1e-12 * max(abs(means["oracle"]), abs(means["random"])):
        raise ValueError(
            f"mean oracle reward {means['oracle']} is not above mean random reward {means['random']}: the share of an "
            "empty gap is undefined. Every sequence ties, or the scores' sign is reversed (higher must be better)."
        )
    return (means["pick"] - means["random"]) / gap


def changed_share(picks_a: ArrayLike, picks_b: ArrayLike) -> float:
    """
    Share of choices that differ in any position. The order matters: (3, 5) and (5, 3) are different prompts.

    Args:
        picks_a, picks_b (`ArrayLike` of shape `(Q, S)` or `(R, Q, S)`):
            Picks of the two methods for the same queries; one seed is compared with every seed of the other.

    Returns:
        `float`: share in [0, 1], over queries and seeds.

    Example:
    ```python
    >>> from lever_grpo.metrics import changed_share
    >>> changed_share([[3, 5], [1, 2]], [[5, 3], [1, 2]])
    0.5

    ```
    """
    a, b = np.asarray(picks_a), np.asarray(picks_b)
    a, b = (x[None] if x.ndim == 2 else x for x in (a, b))
    if (
        a.ndim != 3
        or b.ndim != 3
        or a.shape[1:] != b.shape[1:]
        or (a.shape[0] != b.shape[0] and 1 not in (len(a), len(b)))
    ):
        raise ValueError(
            f"picks have shapes {np.shape(picks_a)} and {np.shape(picks_b)}; expected (Q, S) or (R, Q, S) with the "
            "same queries, shots and seeds (one seed may stand for all)."
        )
    return float((a != b).any(axis=-1).mean())


def _scores(scores: Sequence[ArrayLike], query: int) -> NDArray[np.float64]:
    """The scores of one query as a vector, checked."""
    values = np.asarray(scores[query], dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"query {query}: scores have shape {values.shape} and {int((~np.isfinite(values)).sum())} value(s) that "
            "are not finite; expected at least one, all finite: drop failed evaluations when the log is read."
        )
    return values


def _check_queries(queries: int, **columns: Sequence) -> None:
    """Every per-query list has one entry per query."""
    for name, column in columns.items():
        if len(column) != queries:
            raise ValueError(f"{name} has {len(column)} entries for {queries} queries; expected one entry per query.")
