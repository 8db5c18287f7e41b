"""Estimates of scores that a log does not hold, so that a greedy pick can be judged where it was not scored."""

from __future__ import annotations

import logging
import math
from itertools import permutations

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from .groups import group_features
from .records import BeamDataError


logger = logging.getLogger(__name__)
MAX_SEQUENCES = 20_000  # of one query; above that a log is not worth completing


def complete_scores(dataset: Dataset, fit_on: Dataset | None = None, shots: int = 2) -> Dataset:
    """
    Fills a partly scored log in: one row per query with **every** ordered sequence of the pool.

    A search scores singles and the extensions of the best ones, so the greedy pick of a new policy is often missing
    from a query's log. A missing sequence takes the mean score of its logged reorderings; where there are none, a
    ridge regression on the scores of its single demonstrations. Use the result to choose checkpoints and settings,
    never to report a result. How good the regression is, is logged (R² on sequences of queries it was not fitted to).

    Args:
        dataset (`Dataset`):
            Groups with singles and longer sequences side by side (`load_beams(…, shots=None)`); every single of every
            pool must be scored.
        fit_on (`Dataset`, *optional*):
            More such groups, on which the regression is fitted too (the training queries, say).
        shots (`int`, *optional*, defaults to `2`):
            Length of the sequences.

    Returns:
        `Dataset`: rows with `sequences`, `scores` and `estimated` (bool per sequence).

    Raises:
        `BeamDataError`: if a single was not scored, no sequence of that length was, or a pool has too many sequences.

    Example:

    ```python
    >>> from lever_grpo.data import complete_scores, load_sample
    >>> log = load_sample("country_facts").load("train").select(range(8))
    >>> full = complete_scores(log)
    >>> len(log[0]["sequences"]), len(full[0]["sequences"]), sum(full[0]["estimated"])
    (91, 240, 165)

    ```
    """
    rows = list(dataset)
    asked = {row["query_id"] for row in rows}
    # a query in both would be fitted twice, and R² would be measured on queries that the fit has seen
    others = [] if fit_on is None else [row for row in fit_on if row["query_id"] not in asked]
    singles = [_singles(row) for row in rows + others]
    offset, scale = _standard(singles)
    logged = [{tuple(s): v for s, v in zip(r["sequences"], r["scores"], strict=True)} for r in rows + others]

    design, target, owner = [], [], []
    for i, (known, single) in enumerate(zip(logged, singles, strict=True)):
        sequences = np.array([s for s in known if len(s) == shots], dtype=np.int64).reshape(-1, shots)
        design.append(_features((single - offset) / scale, sequences))
        target.append((np.array([known[tuple(s)] for s in sequences.tolist()]) - offset) / scale)
        owner.append(np.full(len(sequences), i))
    x, y, query = np.concatenate(design), np.concatenate(target), np.concatenate(owner)
    if not len(y):
        raise BeamDataError(
            f"no sequence of {shots} shots was scored: nothing to estimate from; choose another length"
        )
    half = query % 2 == 0
    if half.any() and (~half).any():
        residual = np.where(half, y - x @ _ridge(x[~half], y[~half]), y - x @ _ridge(x[half], y[half]))
        r2 = 1 - residual.var() / y.var() if y.var() else math.nan
        logger.info("completed %d queries; R² of the estimates on unseen queries: %.2f", len(rows), r2)
    weights = _ridge(x, y)

    completed = []
    for row, known, single in zip(rows, logged, singles, strict=False):
        pool = len(row["candidate_ids"])
        if math.perm(pool, shots) > MAX_SEQUENCES:
            raise BeamDataError(
                f"query {row['query_id']}: a pool of {pool} has {math.perm(pool, shots)} sequences of {shots} shots, "
                f"more than {MAX_SEQUENCES}; validate on fully scored queries or on the expected reward instead"
            )
        every = list(permutations(range(pool), shots))
        guesses = _features((single - offset) / scale, np.array(every)) @ weights * scale + offset
        reordered: dict[tuple[int, ...], list[float]] = {}
        for s, score in known.items():
            reordered.setdefault(tuple(sorted(s)), []).append(score)
        scores = []
        for sequence, guess in zip(every, guesses.tolist(), strict=True):
            same = reordered.get(tuple(sorted(sequence)))
            scores.append(known[sequence] if sequence in known else sum(same) / len(same) if same else guess)
        completed.append(
            {
                "query_id": row["query_id"],
                "candidate_ids": row["candidate_ids"],
                "sequences": [list(s) for s in every],
                "scores": scores,
                "survived": [False] * len(every),
                "zero_shot": row["zero_shot"],
                "estimated": [s not in known for s in every],
            }
        )
    features = group_features()
    return Dataset.from_list(completed).cast_column("sequences", features["sequences"])


def fully_scored(dataset: Dataset, any_length: bool = False) -> bool:
    """
    Whether every sequence of its length was scored for every query, so that any choice can be looked up; with
    `any_length`, every shorter sequence too.

    Example:

    ```python
    >>> from lever_grpo.data import fully_scored, load_sample
    >>> sample = load_sample("country_facts")
    >>> fully_scored(sample.load("heldout", shots=2)), fully_scored(sample.load("train", shots=2))
    (True, False)

    ```
    """

    def complete(row: dict) -> bool:
        different = set(map(tuple, row["sequences"]))
        lengths, pool = set(map(len, different)), len(row["candidate_ids"])
        wanted = range(1, max(lengths) + 1) if any_length else [max(lengths)]
        return lengths == set(wanted) and len(different) == sum(math.perm(pool, length) for length in wanted)

    return all(complete(row) for row in dataset.select_columns(["candidate_ids", "sequences"]))


def _singles(row: dict) -> NDArray[np.float64]:
    scores = np.full(len(row["candidate_ids"]), np.nan)
    for sequence, score in zip(row["sequences"], row["scores"], strict=True):
        if len(sequence) == 1:
            scores[sequence[0]] = score
    if np.isnan(scores).any():
        raise BeamDataError(
            f"query {row['query_id']}: {int(np.isnan(scores).sum())} candidates of the pool were not scored alone; "
            "expected every single, as a beam search scores them; load the log with shots=None"
        )
    return scores


def _standard(singles: list[NDArray]) -> tuple[float, float]:
    every = np.concatenate(singles)
    return float(every.mean()), float(every.std()) or 1.0


def _features(single: NDArray, sequences: NDArray) -> NDArray:
    """What the scores of single demonstrations say about a sequence of them, (N, 12)."""
    of_each = single[sequences]  # (N, S)
    first, last = of_each[:, 0], of_each[:, -1]
    best, worst = of_each.max(1, initial=-np.inf), of_each.min(1, initial=np.inf)
    top = np.full_like(first, single.max())
    mean = np.full_like(first, single.mean())
    return np.stack(
        [first, last, best, worst, of_each.mean(1), mean, top, first * last, first**2, last**2, best * top, first**0],
        axis=1,
    )


def _ridge(x: NDArray, y: NDArray, strength: float = 1e-3) -> NDArray:
    return np.linalg.solve(x.T @ x + strength * len(x) * np.eye(x.shape[1]), x.T @ y)
