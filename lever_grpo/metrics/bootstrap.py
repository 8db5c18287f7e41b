"""
Bootstrap intervals for results measured on R seeds × Q queries.

What is resampled. The held-out queries are a sample, so they are drawn with replacement. A trained method also has
seeds, and every seed answers the same queries: the table is *crossed*, its cells share their row's and their column's
luck. Rows and columns are therefore drawn independently of each other, the "pigeonhole" bootstrap of Owen (2007, The
Annals of Applied Statistics 1(2)), whose variance is right for both main effects and conservative for the noise
of single cells (it counts that up to three times, which is small beside the queries' own spread). A deterministic
method has one row, and for it this is the ordinary bootstrap over queries.

Intervals are percentile intervals: the quantiles of the resampled means. With R seeds the bootstrap sees (R − 1) / R
of the variance between seeds, so with two or three seeds the interval is a little too narrow.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray


# Resampled tables are built in blocks of about this many cells: 16 MB of counts at a time, whatever their number.
_BLOCK_CELLS = 2_000_000


class Interval(NamedTuple):
    """
    A mean and its confidence interval.

    Attributes:
        mean (`float`): The mean of the data themselves, not of the resamples.
        ci_low (`float`): Lower end of the interval.
        ci_high (`float`): Upper end of the interval.

    Example:
    ```python
    >>> from lever_grpo.metrics import Interval
    >>> Interval(0.2, 0.1, 0.3)._asdict()
    {'mean': 0.2, 'ci_low': 0.1, 'ci_high': 0.3}

    ```
    """

    mean: float
    ci_low: float
    ci_high: float


def mean_interval(values: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """
    Mean over seeds and queries, with a percentile bootstrap interval.

    Args:
        values (`ArrayLike` of shape `(R, Q)` or `(Q,)`):
            One number per seed and query. With `R > 1` seeds and queries are resampled independently of each other.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage that is aimed at, in (0, 1).
        resamples (`int`, *optional*, defaults to `10_000`):
            Number of resampled tables.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling: the same input gives the same interval.

    Returns:
        [`Interval`]: mean, lower and upper end.

    Raises:
        ValueError: If a value is NaN or infinite, there is no value, or an option is outside its range.

    Example:
    ```python
    >>> from lever_grpo.metrics import mean_interval
    >>> interval = mean_interval([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0]])
    >>> interval.mean, round(interval.ci_low, 2), round(interval.ci_high, 2)
    (0.5, 0.17, 0.83)

    ```
    """
    return pooled_interval([values], confidence=confidence, resamples=resamples, seed=seed)


def paired_interval(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """
    Mean of `a − b` over seeds and queries, with the interval of the *differences*.

    Both methods answered the same queries, so what a query costs everybody cancels: this interval is usually much
    narrower than the two methods' own, and it is the one that says whether one is better.

    Args:
        a (`ArrayLike` of shape `(R, Q)` or `(Q,)`):
            Results of the first method.
        b (`ArrayLike` of shape `(R', Q)` or `(Q,)`):
            Results of the second one. A deterministic method (one row) is compared with every seed of the other one;
            otherwise `R' = R`, and row `i` of both belongs to the same seed.
        confidence, resamples, seed:
            As in [`mean_interval`].

    Returns:
        [`Interval`]: mean of `a − b`, lower and upper end.

    Example:
    ```python
    >>> from lever_grpo.metrics import paired_interval
    >>> paired_interval([[3.0, 5.0, 9.0], [3.0, 5.0, 9.0]], [2.0, 4.0, 8.0])
    Interval(mean=1.0, ci_low=1.0, ci_high=1.0)

    ```
    """
    return mean_interval(paired_differences(a, b), confidence=confidence, resamples=resamples, seed=seed)


def paired_differences(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """
    `a − b` per seed and query, a single row standing for every seed.

    Example:
    ```python
    >>> from lever_grpo.metrics.bootstrap import paired_differences
    >>> paired_differences([[3.0, 5.0], [4.0, 6.0]], [1.0, 2.0]).tolist()
    [[2.0, 3.0], [3.0, 4.0]]

    ```
    """
    first, second = seed_query_table(a, "a"), seed_query_table(b, "b")
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"a has {first.shape[1]} queries and b has {second.shape[1]}; a paired comparison needs the same queries "
            "in the same order: evaluate both methods on one held-out file."
        )
    if first.shape[0] != second.shape[0] and 1 not in (first.shape[0], second.shape[0]):
        raise ValueError(
            f"a has {first.shape[0]} seeds and b has {second.shape[0]}; seeds are paired row by row, unless one "
            "method is deterministic (one row): run both methods with the same seeds."
        )
    return first - second  # (max(R, R'), Q)


def pooled_interval(
    parts: Sequence[ArrayLike], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """
    Mean over the queries of several tasks, with a bootstrap interval that is stratified by task.

    The tasks are fixed, not sampled: each is resampled by itself (its queries, and its seeds), and the means are put
    together in proportion to the tasks' numbers of queries.

    Args:
        parts (`Sequence[ArrayLike]`, each of shape `(R_k, Q_k)` or `(Q_k,)`):
            One table per task, in a common unit. Their numbers of seeds and queries may differ.
        confidence, resamples, seed:
            As in [`mean_interval`].

    Returns:
        [`Interval`]: mean over all queries, lower and upper end.

    Example:
    ```python
    >>> from lever_grpo.metrics import pooled_interval
    >>> pooled_interval([[1.0, 1.0, 1.0], [[5.0], [5.0]]])
    Interval(mean=2.0, ci_low=2.0, ci_high=2.0)

    ```
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; it is a coverage in (0, 1): pass e.g. 0.95.")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1, and some thousands for stable ends.")
    if len(parts) == 0:
        raise ValueError("there is no table to pool; pass at least one.")
    tables = [seed_query_table(part, f"parts[{i}]" if len(parts) > 1 else "values") for i, part in enumerate(parts)]
    queries = sum(table.shape[1] for table in tables)
    rng = np.random.default_rng(seed)
    mean = 0.0
    means = np.zeros(resamples)
    for table in tables:
        share = table.shape[1] / queries
        mean += share * float(table.mean())
        means += share * _resampled_means(table, resamples, rng)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(mean, float(low), float(high))


def sign_flip_p_value(parts: ArrayLike | Sequence[ArrayLike], resamples: int = 10_000, seed: int = 0) -> float:
    """
    Two-sided permutation p-value of "the mean paired difference is zero", by flipping the queries' signs.

    If the two methods were exchangeable, each query's difference could as well have had the other sign. Seeds are
    averaged first, so the test speaks about these seeds on other queries; the intervals of this module also count the
    luck of the seeds. All sign patterns are enumerated when there are at most `resamples` of them; otherwise
    `resamples` random ones and p = (1 + hits) / (1 + resamples), which is never zero (Phipson and Smyth, 2010).

    Args:
        parts (`ArrayLike` of shape `(R, Q)` or `(Q,)`, or a list of tables):
            Paired differences; a list holds one table per task, in a common unit.
        resamples (`int`, *optional*, defaults to `10_000`):
            Number of random sign patterns.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the patterns.

    Returns:
        `float`: p-value in (0, 1].

    Example:
    ```python
    >>> from lever_grpo.metrics import sign_flip_p_value
    >>> sign_flip_p_value([1.0, 2.0, 3.0])  # 2 of the 8 sign patterns are as extreme
    0.25

    ```
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1, and some thousands for a stable p-value.")
    several = isinstance(parts, list | tuple) and len(parts) > 0 and np.ndim(parts[0]) == 2
    tables: list[Any] = list(cast(Sequence, parts)) if several else [parts]
    differences = np.concatenate([seed_query_table(table, "differences").mean(axis=0) for table in tables])  # (Q,)
    queries = len(differences)
    # Sums of the same numbers in another order differ in their last digits: a tie with the data counts as a hit.
    threshold = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    if queries < 63 and 2**queries <= resamples:
        bits = np.arange(2**queries)[:, None] >> np.arange(queries) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ differences) >= threshold))
    rng = np.random.default_rng(seed)
    hits = 0
    for size in _block_sizes(resamples, queries):
        signs = 2 * rng.integers(0, 2, (size, queries), dtype=np.int8) - 1
        hits += int(np.sum(np.abs(signs.astype(np.float64) @ differences) >= threshold))
    return (1 + hits) / (1 + resamples)


def seed_query_table(values: ArrayLike, name: str = "values") -> NDArray[np.float64]:
    """
    `values` as a float table of shape (R, Q); a vector is one row. Anything that is not finite is an error.

    Example:
    ```python
    >>> from lever_grpo.metrics.bootstrap import seed_query_table
    >>> seed_query_table([1, 2, 3]).shape
    (1, 3)

    ```
    """
    table = np.asarray(values, dtype=np.float64)
    table = table[None, :] if table.ndim == 1 else table
    if table.ndim != 2 or table.size == 0:
        raise ValueError(
            f"{name} has shape {np.shape(values)}; expected (seeds, queries) or (queries,) with at least one of each."
        )
    bad = ~np.isfinite(table)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"{name} holds {int(bad.sum())} value(s) that are not finite, the first at seed {row}, query {column} "
            f"({table[row, column]}); a mean over them would hide a failed evaluation: score these queries again, or "
            "leave them out of every method."
        )
    return table


def _resampled_means(table: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of `resamples` tables whose rows and columns were drawn with replacement, as products with draw counts."""
    seeds, queries = table.shape
    means = [
        np.einsum("bq,bq->b", _draw_counts(size, seeds, rng) @ table, _draw_counts(size, queries, rng))
        for size in _block_sizes(resamples, queries)
    ]
    return np.concatenate(means) / (seeds * queries)  # (resamples,)


def _draw_counts(size: int, items: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each of `items` was drawn in `size` draws of `items` with replacement."""
    drawn = rng.integers(0, items, (size, items)) + items * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * items).reshape(size, items).astype(np.float64)  # (size, items)


def _block_sizes(resamples: int, queries: int) -> list[int]:
    """`resamples` cut into blocks of at most `_BLOCK_CELLS` cells."""
    block = max(1, min(resamples, _BLOCK_CELLS // queries))
    return [block] * (resamples // block) + ([resamples % block] if resamples % block else [])
