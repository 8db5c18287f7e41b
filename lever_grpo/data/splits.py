"""Parts of a dataset of groups: splits that never separate the rows of one query, and groups with fewer sequences."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict


_PER_SEQUENCE = ("sequences", "scores", "shot_scores", "survived", "source", "estimated", "ref_log_probs")


def split_by_query(
    dataset: Dataset,
    test_size: float | int = 0.1,
    seed: int = 0,
    entities: Mapping[int, Hashable] | None = None,
    fold: int = 0,
) -> DatasetDict:
    """Split into `train` and `test` by query; queries are drawn at random, as neighbours in a file are alike.

    Args:
        dataset (`Dataset`):
            Groups, with a column `query_id`. A query may have several rows (one per length, say).
        test_size (`float` or `int`, *optional*, defaults to `0.1`):
            Share of the queries (between 0 and 1) or their number.
        seed (`int`, *optional*, defaults to `0`):
            The same seed gives the same queries, whatever the order of the rows.
        entities (`dict[int, Hashable]`, *optional*):
            What each query is about (an image, a country): queries about the same thing stay on one side. `test` then
            has at least `test_size` queries, and as few more as the last entity brings.
        fold (`int`, *optional*, defaults to `0`):
            Which part of that size `test` is. With one seed the folds are disjoint: with `test_size=0.2`, folds 0 to 4
            hold every query once, as cross-validation wants it.

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
    shuffled = np.random.default_rng(seed).permutation(queries)
    # the borders of shares are rounded one by one, so that the last fold ends with the last query
    first, last = (
        min(part * count if isinstance(test_size, int) else round(part * test_size * len(queries)), len(queries))
        for part in (fold, fold + 1)
    )
    if fold < 0 or first == len(queries):
        raise ValueError(f"fold={fold}: must be at least 0, and below 1 / test_size; got test_size={test_size!r}.")
    if entities:
        groups: dict[Hashable, list[int]] = {}
        for query in shuffled.tolist():
            groups.setdefault(("entity", entities[query]) if query in entities else ("query", query), []).append(query)
        shuffled = np.array([query for group in groups.values() for query in group])
        ends = np.cumsum([len(group) for group in groups.values()])
        first, last = (0 if border == 0 else int(ends[np.searchsorted(ends, border)]) for border in (first, last))
        if first == 0 and last == len(queries):
            raise ValueError(
                f"test_size={test_size!r} takes all {len(queries)} queries, as those about one thing stay together; "
                "make it smaller, or leave the entities out"
            )
    chosen = shuffled[first:last]
    is_test = np.isin(ids, chosen)
    return DatasetDict(
        train=dataset.select(np.flatnonzero(~is_test)),
        test=dataset.select(np.flatnonzero(is_test)),
    )


def drop_candidates(
    dataset: Dataset, ids: Collection[int] = (), entities: Mapping[int, Hashable] | None = None
) -> Dataset:
    """Take candidates out of the pools, with every sequence that holds one of them.

    A selector remembers the candidates that it was trained with. Held-out queries that stood in training pools as
    candidates, or training queries whose pool holds a row about the same thing, make training look better than it is:
    what was learned there is not there when it counts.

    Args:
        dataset (`Dataset`):
            Groups of [`load_beams`].
        ids (collection of `int`, *optional*):
            Rows that no pool may hold, such as the validation and held-out queries.
        entities (`dict[int, Hashable]`, *optional*):
            What each row is about (an image, a country). A candidate about the same thing as its query is taken out.
            Rows that are not in it are about nothing else.

    Returns:
        `Dataset`: the groups that still hold a sequence, in their order; pool positions are renumbered.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lever_grpo.data import drop_candidates
    >>> row = {"query_id": 0, "candidate_ids": [4, 5, 6], "sequences": [[0, 2], [1, 2]], "scores": [-1.0, -2.0]}
    >>> drop_candidates(Dataset.from_list([row]), ids=[4])[0]
    {'query_id': 0, 'candidate_ids': [5, 6], 'sequences': [[0, 1]], 'scores': [-2.0]}

    ```
    """
    banned = frozenset(ids)
    about = entities or {}
    missing = object()

    def clean(row: dict[str, Any]) -> dict[str, Any]:
        entity = about.get(row["query_id"], missing)
        kept = [i for i, c in enumerate(row["candidate_ids"]) if c not in banned and about.get(c) != entity]
        if len(kept) == len(row["candidate_ids"]):
            return row
        position = {old: new for new, old in enumerate(kept)}
        live = [i for i, sequence in enumerate(row["sequences"]) if all(c in position for c in sequence)]
        cleaned = keep_sequences(row, live)
        cleaned["sequences"] = [[position[i] for i in sequence] for sequence in cleaned["sequences"]]
        return {**cleaned, "candidate_ids": [row["candidate_ids"][i] for i in kept]}

    return _not_empty(dataset.map(clean, load_from_cache_file=False))


def keep_sources(dataset: Dataset, sources: Collection[str]) -> Dataset:
    """Groups of nothing but the sequences that come from some sources.

    What a search went on to was chosen for its scores, so it says how good a sequence may be in hindsight, and nothing
    of how good the policy's own are; drawn sequences (`"random"`, `"selector"`) do.

    Args:
        dataset (`Dataset`):
            Groups of [`load_beams`].
        sources (collection of `str`):
            Values of `source`: `"search"`, `"random"`, `"similarity"` and `"selector"` in logs of `lever-grpo
            generate`.

    Returns:
        `Dataset`: the groups that still hold a sequence, in their order.

    Raises:
        ValueError: if no sequence comes from one of the sources.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lever_grpo.data import keep_sources
    >>> row = {"query_id": 0, "sequences": [[0, 2], [1, 2]], "scores": [-1.0, -2.0], "source": ["search", "random"]}
    >>> keep_sources(Dataset.from_list([row]), ["random"])[0]
    {'query_id': 0, 'sequences': [[1, 2]], 'scores': [-2.0], 'source': ['random']}

    ```
    """
    found = {source for row in dataset["source"] for source in row}
    unknown = sorted(set(sources) - found)
    if unknown:
        raise ValueError(
            f"sources={list(sources)}: no sequence of the log comes from {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(map(repr, sorted(found)))}."
        )

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        return keep_sequences(row, [i for i, source in enumerate(row["source"]) if source in sources])

    return _not_empty(dataset.map(cut, load_from_cache_file=False))


def keep_sequences(row: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A row with some of its sequences, by their numbers, and what belongs to these."""
    count = len(row["sequences"])
    parts: dict[str, Any] = {
        name: [row[name][i] for i in kept]
        for name in _PER_SEQUENCE
        if row.get(name) is not None and len(row[name]) == count
    }
    if row.get("columns"):
        parts["columns"] = {
            name: None if values is None else [values[i] for i in kept] for name, values in row["columns"].items()
        }
    return {**row, **parts}


def _not_empty(groups: Dataset) -> Dataset:
    return groups.select([i for i, sequences in enumerate(groups["sequences"]) if len(sequences)])
