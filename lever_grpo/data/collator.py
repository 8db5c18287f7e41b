"""Groups of a dataset and rows of an `EmbeddingStore` to one padded batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from .embeddings import EmbeddingStore
from .records import BeamDataError


READ = ("query_id", "candidate_ids", "sequences", "scores")  # what every row has


@dataclass
class DataCollatorForBeams:
    """Make a batch of groups of any sizes, lengths and pools.

    Each candidate is looked up once a batch, however many pools hold it. Padding is zeros under a mask; a reward
    column that has no value for a sequence is NaN there, so that it cannot pass for a reward of zero.

    Args:
        store (`EmbeddingStore`):
            Embeddings of all rows, by row id.
        query_features (`list[str]`):
            Names of the embeddings that a query is seen by, side by side.
        candidate_features (`list[str]`):
            Names of the embeddings that a candidate is seen by.

    Returns:
        A dict with `query_embeds` (B, Dq) and `candidate_embeds` (U, Dc) float32, U the different candidates of the
        batch; `candidate_indices` (B, K) int64 into these and `candidate_mask` (B, K); `sequences` (B, G, S) int64
        pool positions in search order and `sequence_mask` (B, G, S); `rewards`, a dict of (B, G) float32: `score` and
        every reward column; `survived` (B, G); `query_ids` (B,).

    Example:

    ```python
    >>> import numpy as np
    >>> from lever_grpo.data import DataCollatorForBeams, EmbeddingStore
    >>> store = EmbeddingStore({"question": np.eye(8, dtype=np.float16)})
    >>> collate = DataCollatorForBeams(store, ["question"], ["question"])
    >>> row = {"query_id": 7, "candidate_ids": [3, 4], "sequences": [[1, 0], [0]], "scores": [0.5, 0.1]}
    >>> batch = collate([row])
    >>> batch["sequences"].shape, batch["sequence_mask"].sum().item()
    (torch.Size([1, 2, 2]), 3)

    ```
    """

    store: EmbeddingStore
    query_features: Sequence[str]
    candidate_features: Sequence[str]

    def __post_init__(self) -> None:
        self.store.width(self.query_features)  # unknown names fail here, not in a worker
        self.store.width(self.candidate_features)

    @property
    def query_widths(self) -> dict[str, int]:
        """Width of each feature of the query, in the order they lie in `query_embeds`."""
        return {name: self.store.widths[name] for name in self.query_features}

    @property
    def candidate_widths(self) -> dict[str, int]:
        """Width of each feature of a candidate, in the order they lie in `candidate_embeds`."""
        return {name: self.store.widths[name] for name in self.candidate_features}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        groups, candidate_ids = collate_groups(rows)
        query_ids = groups["query_ids"].numpy()
        return {
            "query_embeds": torch.from_numpy(self.store.gather(query_ids, self.query_features)),
            "candidate_embeds": torch.from_numpy(self.store.gather(candidate_ids, self.candidate_features)),
            **groups,
        }


class LazyRows(Sequence[Mapping[str, Any]]):
    """Some rows of a dataset, read when they are asked for: as dicts, or by columns, as they lie in Arrow."""

    def __init__(self, dataset: Dataset, by_column: Dataset, indices: list[int]):
        self._dataset, self._by_column, self._indices = dataset, by_column, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._dicts[index]

    @cached_property
    def _dicts(self) -> list[dict[str, Any]]:
        return self._dataset.__getitems__(self._indices)

    def columns(self) -> dict[str, pa.Array]:
        """What `collate_groups` reads; of `columns`, each under `columns.<name>`."""
        table = self._by_column[self._indices].flatten()
        arrays = {name: table[name].combine_chunks() for name in table.column_names}
        # a column without any value has a type without lists
        return {name: x.cast(pa.list_(pa.null())) if x.type == pa.null() else x for name, x in arrays.items()}


class LazyDataset(TorchDataset):
    """A dataset whose batches a `DataLoader` hands to the collator as [`LazyRows`].

    Args:
        dataset (`datasets.Dataset`):
            Rows of [`load_beams`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from lever_grpo.data.collator import LazyDataset, collate_groups
    >>> row = {"query_id": 7, "candidate_ids": [3, 4], "sequences": [[1, 0], [0]], "scores": [0.5, 0.1]}
    >>> rows = LazyDataset(Dataset.from_list([row])).__getitems__([0])
    >>> collate_groups(rows)[0]["sequences"].tolist(), rows[0]["scores"]
    ([[[1, 0], [0, 0]]], [0.5, 0.1])

    ```
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        read = [name for name in (*READ, "survived", "columns") if name in dataset.column_names]
        self.by_column = dataset.select_columns(read).with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> LazyRows:
        return LazyRows(self.dataset, self.by_column, indices)


def collate_groups(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], np.ndarray]:
    """What a batch holds whatever rows are seen by: all of [`DataCollatorForBeams`] but the embeddings; and the ids of
    the U different candidates, into which `candidate_indices` points."""
    columns = _columns(rows)
    query_ids = np.array(_numbers(columns["query_id"], np.int64))
    [pool_sizes], ids = _unnest(columns["candidate_ids"], 1)
    if not pool_sizes.all():
        raise BeamDataError(f"query {query_ids[pool_sizes.argmin()]}: expected at least one candidate, found none")
    candidate_mask = _mask(pool_sizes)  # (B, K)
    unique_ids, inverse = np.unique(_numbers(ids, np.int64), return_inverse=True)
    candidate_indices = np.zeros(candidate_mask.shape, dtype=np.int64)
    candidate_indices[candidate_mask] = inverse  # (B, K)

    [group_sizes, flat_lengths], positions = _unnest(columns["sequences"], 2)
    beam_mask = _mask(group_sizes)  # (B, G)
    lengths = np.zeros(beam_mask.shape, dtype=np.int64)
    lengths[beam_mask] = flat_lengths
    sequence_mask = _mask(lengths)  # (B, G, S)
    sequences = np.zeros(sequence_mask.shape, dtype=np.int64)
    sequences[sequence_mask] = _numbers(positions, np.int64)
    _check_positions(sequences, pool_sizes, query_ids)

    rewards = {"score": _per_sequence(columns["scores"], beam_mask, "scores", query_ids)}
    for path, values in columns.items():
        if path.startswith("columns."):
            name = path.removeprefix("columns.")
            rewards[name] = _per_sequence(values, beam_mask, name, query_ids)
    survived = np.zeros(beam_mask.shape, dtype=bool)
    if "survived" in columns:
        survived = _per_sequence(columns["survived"], beam_mask, "survived", query_ids) == 1.0
    groups = {
        "candidate_indices": torch.from_numpy(candidate_indices),
        "candidate_mask": torch.from_numpy(candidate_mask),
        "sequences": torch.from_numpy(sequences),
        "sequence_mask": torch.from_numpy(sequence_mask),
        "rewards": {name: torch.from_numpy(values) for name, values in rewards.items()},
        "survived": torch.from_numpy(survived),
        "query_ids": torch.from_numpy(query_ids),
    }
    return groups, unique_ids


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A list or an Arrow array of each column."""
    if isinstance(rows, LazyRows):
        return rows.columns()
    columns = {name: [row[name] for row in rows] for name in READ}
    columns["survived"] = [row.get("survived") for row in rows]
    for name in (rows[0].get("columns") or {}) if rows else {}:
        columns[f"columns.{name}"] = [row["columns"][name] for row in rows]
    return columns


def _unnest(values: Any, levels: int) -> tuple[list[np.ndarray], Any]:
    """How long the lists of each level are, and what is in the innermost, one after another."""
    sizes = []
    for _ in range(levels):
        if isinstance(values, pa.Array):
            sizes.append(values.value_lengths().to_numpy(zero_copy_only=False))
            values = values.flatten()
        else:
            sizes.append(np.fromiter(map(len, values), np.int64, len(values)))
            values = list(chain.from_iterable(values))
    return sizes, values


def _numbers(values: Any, dtype: Any) -> np.ndarray:
    """A list or an Arrow array of numbers; one that is not there is NaN."""
    if isinstance(values, pa.Array):
        return values.cast(pa.from_numpy_dtype(dtype)).to_numpy(zero_copy_only=False)
    return np.array(values, dtype=dtype)


def _check_positions(sequences: np.ndarray, pool_sizes: np.ndarray, query_ids: np.ndarray) -> None:
    bad = (sequences < 0) | (sequences >= pool_sizes[:, None, None])
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise BeamDataError(
            f"query {query_ids[row]}: sequences must hold positions in the pool of {pool_sizes[row]}, "
            f"found {sorted(set(sequences[row][bad[row]].tolist()))}"
        )


def _mask(sizes: np.ndarray) -> np.ndarray:
    """(…,) sizes to (…, max size) booleans."""
    return np.arange(max(int(sizes.max(initial=0)), 1)) < sizes[..., None]


def _per_sequence(values: Any, beam_mask: np.ndarray, name: str, query_ids: np.ndarray) -> np.ndarray:
    """One number a sequence, as (B, G) float32; a row or an entry without a value is NaN."""
    if isinstance(values, pa.Array):
        known = values.is_valid().to_numpy(zero_copy_only=False)  # (B,)
        values = values.drop_null()
    else:
        known = np.array([row is not None for row in values], dtype=bool)
        values = [row for row in values if row is not None]
    [sizes], flat = _unnest(values, 1)
    expected = beam_mask.sum(axis=1)[known]
    if (sizes != expected).any():
        bad = int((sizes != expected).argmax())
        raise BeamDataError(
            f"query {query_ids[known][bad]}: expected {expected[bad]} values of '{name}', one a sequence, found "
            f"{sizes[bad]}"
        )
    flat = _numbers(flat, np.float64)
    out = np.zeros(beam_mask.shape, dtype=np.float32)
    out[beam_mask] = np.nan
    given = beam_mask & known[:, None]
    with np.errstate(over="ignore"):
        out[given] = flat
    if np.isinf(out).any():
        query = query_ids[np.isinf(out).any(axis=1)][0]
        raise BeamDataError(
            f"query {query}: expected '{name}' in the range of float32, up to 3.4e38, found "
            f"{flat[np.isinf(out[given])][0]:g}; scale the log's values, or drop the sequence"
        )
    return out
