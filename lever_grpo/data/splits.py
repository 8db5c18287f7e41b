"""Splits of a dataset of groups that never separate the rows of one query."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, DatasetDict


def split_by_query(dataset: Dataset, test_size: float | int = 0.1, seed: int = 0) -> DatasetDict:
    """Split into `train` and `test` by query; queries are drawn at random, as neighbours in a file are alike.

    Args:
        dataset (`Dataset`):
            Groups, with a column `query_id`. A query may have several rows (one per length, say).
        test_size (`float` or `int`, *optional*, defaults to `0.1`):
            Share of the queries (between 0 and 1) or their number.
        seed (`int`, *optional*, defaults to `0`):
            The same seed gives the same queries, whatever the order of the rows.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lever_grpo.data import split_by_query
    >>> parts = split_by_query(Dataset.from_dict({"query_id": [1, 1, 2, 2, 3, 3]}), test_size=1, seed=0)
    >>> sorted(set(parts["train"]["query_id"]) & set(parts["test"]["query_id"])), len(parts["test"])
    ([], 2)

    ```
    """
    ids = np.asarray(dataset.with_format("numpy")["query_id"][:])
    queries = np.unique(ids)
    count = test_size if isinstance(test_size, int) else round(test_size * len(queries))
    if not 0 < count < len(queries):
        raise ValueError(
            f"test_size must leave queries on both sides: got {test_size!r}, that is {count} of {len(queries)} queries"
        )
    chosen = np.random.default_rng(seed).permutation(queries)[:count]
    is_test = np.isin(ids, chosen)
    return DatasetDict(
        train=dataset.select(np.flatnonzero(~is_test)),
        test=dataset.select(np.flatnonzero(is_test)),
    )
