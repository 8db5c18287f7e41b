"""Choices that need no training: what a selector is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from ..data import EmbeddingStore


def random_picks(dataset: Dataset, num_shots: int, seed: int = 0) -> NDArray[np.int64]:
    """
    Random sequences without repeats.

    Args:
        dataset (`datasets.Dataset`):
            Rows with `query_id` and `candidate_ids`.
        num_shots (`int`):
            Number S of demonstrations.
        seed (`int`, *optional*, defaults to `0`):
            Each query has its own generator, seeded by this number and its id.

    Returns:
        `NDArray` of shape `(Q, S)`: pool positions in search order.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lever_grpo.inference import random_picks
    >>> random_picks(Dataset.from_list([{"query_id": 5, "candidate_ids": [7, 8, 9]}]), num_shots=3).tolist()
    [[0, 1, 2]]

    ```
    """
    return np.array(
        [
            np.random.default_rng([seed, row["query_id"]]).permutation(len(row["candidate_ids"]))[:num_shots]
            for row in dataset
        ]
    )


def mmr_picks(
    dataset: Dataset, store: EmbeddingStore, features: Sequence[str], num_shots: int, trade_off: float = 0.5
) -> NDArray[np.int64]:
    r"""
    Similar to the query, unlike each other: maximal marginal relevance (Carbonell and Goldstein, 1998).

    The next pick is the candidate with the largest \\( \lambda \cos(q, c) - (1 - \lambda) \max_{p} \cos(c, p) \\), p
    the picks so far.

    Args:
        dataset (`datasets.Dataset`):
            Rows with `query_id` and `candidate_ids`.
        store ([`EmbeddingStore`]), features (`list[str]`):
            The embeddings whose mean cosine is the similarity.
        num_shots (`int`):
            Number S of demonstrations.
        trade_off (`float`, *optional*, defaults to `0.5`):
            λ in [0, 1]: 1 is similarity alone.

    Returns:
        `NDArray` of shape `(Q, S)`: pool positions in search order.

    Raises:
        ValueError: if `trade_off` is outside of [0, 1].

    Example:

    ```python
    >>> import numpy as np
    >>> from datasets import Dataset
    >>> from lever_grpo.data import EmbeddingStore
    >>> from lever_grpo.inference import mmr_picks
    >>> store = EmbeddingStore({"question": np.array([[1, 0], [1, 0.1], [1, 0.11], [0.7, -0.7]], np.float32)})
    >>> pools = Dataset.from_list([{"query_id": 0, "candidate_ids": [1, 2, 3]}])
    >>> mmr_picks(pools, store, ["question"], 2).tolist(), mmr_picks(pools, store, ["question"], 2, 1.0).tolist()
    ([[0, 2]], [[0, 1]])

    ```
    """
    if not 0 <= trade_off <= 1:
        raise ValueError(f"trade_off={trade_off}: must be in [0, 1]; 1 is similarity alone.")

    def picked(relevance: NDArray[np.float32], among: NDArray[np.float32]) -> list[int]:
        return _greedy(
            num_shots,
            lambda chosen: trade_off * relevance - (1 - trade_off) * among[:, chosen].max(axis=1, initial=-1),
        )

    return np.array([picked(*cosines) for cosines in _cosines(dataset, store, features)])


def mixed_picks(dataset: Dataset, store: EmbeddingStore, features: Sequence[str], num_shots: int) -> NDArray[np.int64]:
    """
    By each of the features in turn: the nearest candidate by the first, then of the others the nearest by the second …

    Args:
        dataset (`datasets.Dataset`):
            Rows with `query_id` and `candidate_ids`.
        store ([`EmbeddingStore`]), features (`list[str]`):
            Embeddings, e.g. of the question and of the image.
        num_shots (`int`):
            Number S of demonstrations.

    Returns:
        `NDArray` of shape `(Q, S)`: pool positions in search order.

    Example:

    ```python
    >>> import numpy as np
    >>> from datasets import Dataset
    >>> from lever_grpo.data import EmbeddingStore
    >>> from lever_grpo.inference import mixed_picks
    >>> text, image = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]], np.eye(4, dtype=np.float32)[[0, 0, 1, 0]]
    >>> store = EmbeddingStore({"question": text, "image": image})
    >>> mixed_picks(Dataset.from_list([{"query_id": 0, "candidate_ids": [1, 2, 3]}]), store, store.names, 2).tolist()
    [[0, 2]]

    ```
    """

    def picked(similar: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> list[int]:
        return _greedy(num_shots, lambda chosen: similar[len(chosen) % len(features)][0])

    by_feature = (_cosines(dataset, store, [name]) for name in features)
    return np.array([picked(similar) for similar in zip(*by_feature, strict=True)])


def best_logged(rows: Iterable[Mapping[str, Any]], num_shots: int) -> NDArray[np.int64] | None:
    """The best sequence of `num_shots` that the log has of each query, (Q, S); `None` where it has none of a query."""
    picks = []
    for row in rows:
        scored = [(score, s) for s, score in zip(row["sequences"], row["scores"], strict=True) if len(s) == num_shots]
        if not scored:
            return None
        picks.append(max(scored)[1])
    return np.array(picks)


def _greedy(num_shots: int, value_after: Callable[[list[int]], NDArray[np.float32]]) -> list[int]:
    """Picks one after the other by what each candidate, (K,), is worth after those that are picked."""
    chosen: list[int] = []
    while len(chosen) < num_shots:
        value = value_after(chosen).copy()
        value[chosen] = -np.inf
        chosen.append(int(value.argmax()))
    return chosen


def _cosines(
    dataset: Dataset, store: EmbeddingStore, features: Sequence[str]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Mean cosines over the features of each query to its pool, (K,), and among the pool, (K, K)."""
    for row in dataset:
        ids = [row["query_id"], *row["candidate_ids"]]
        total = np.zeros((len(ids), len(ids)), dtype=np.float32)
        for name in features:
            found = store.gather(ids, [name])
            found /= np.linalg.norm(found, axis=1, keepdims=True).clip(min=1e-12)
            total += found @ found.T
        total /= len(features)
        yield total[0, 1:], total[1:, 1:]
