"""Groups of a dataset and rows of an `EmbeddingStore` to one padded batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from .embeddings import EmbeddingStore
from .records import BeamDataError


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


def collate_groups(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], np.ndarray]:
    """What a batch holds whatever rows are seen by: all of [`DataCollatorForBeams`] but the embeddings; and the ids of
    the U different candidates, into which `candidate_indices` points."""
    query_ids = np.array([row["query_id"] for row in rows], dtype=np.int64)
    pool_sizes = np.array([len(row["candidate_ids"]) for row in rows])
    if not pool_sizes.all():
        raise BeamDataError(f"query {query_ids[pool_sizes.argmin()]}: expected at least one candidate, found none")
    candidate_mask = _mask(pool_sizes)  # (B, K)
    flat_ids = np.fromiter(chain.from_iterable(row["candidate_ids"] for row in rows), np.int64, int(pool_sizes.sum()))
    unique_ids, inverse = np.unique(flat_ids, return_inverse=True)
    candidate_indices = np.zeros(candidate_mask.shape, dtype=np.int64)
    candidate_indices[candidate_mask] = inverse  # (B, K)

    group_sizes = np.array([len(row["sequences"]) for row in rows])
    beam_mask = _mask(group_sizes)  # (B, G)
    flat_sequences = list(chain.from_iterable(row["sequences"] for row in rows))
    flat_lengths = np.fromiter(map(len, flat_sequences), np.int64, len(flat_sequences))
    lengths = np.zeros(beam_mask.shape, dtype=np.int64)
    lengths[beam_mask] = flat_lengths
    sequence_mask = _mask(lengths)  # (B, G, S)
    positions = np.fromiter(chain.from_iterable(flat_sequences), np.int64, int(flat_lengths.sum()))
    sequences = np.zeros(sequence_mask.shape, dtype=np.int64)
    sequences[sequence_mask] = positions
    _check_positions(sequences, pool_sizes, query_ids)

    rewards = {"score": _per_sequence([row["scores"] for row in rows], beam_mask, "scores", query_ids)}
    for name in (rows[0].get("columns") or {}) if rows else {}:
        rewards[name] = _per_sequence([row["columns"][name] for row in rows], beam_mask, name, query_ids)
    survived = _per_sequence([row.get("survived") for row in rows], beam_mask, "survived", query_ids) == 1.0
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


def _per_sequence(values: list[Any], beam_mask: np.ndarray, name: str, query_ids: np.ndarray) -> np.ndarray:
    """One number a sequence, as (B, G) float32; a row or an entry without a value is NaN."""
    sizes = beam_mask.sum(axis=1).tolist()
    full = [[None] * size if row is None else row for row, size in zip(values, sizes, strict=True)]
    for row, size, query in zip(full, sizes, query_ids, strict=True):
        if len(row) != size:
            raise BeamDataError(f"query {query}: expected {size} values of '{name}', one a sequence, found {len(row)}")
    # numpy turns None into NaN when a float array is asked for
    flat = np.array(list(chain.from_iterable(full)), dtype=np.float64)
    out = np.zeros(beam_mask.shape, dtype=np.float32)
    with np.errstate(over="ignore"):
        out[beam_mask] = flat
    if np.isinf(out).any():
        query = query_ids[np.isinf(out).any(axis=1)][0]
        raise BeamDataError(
            f"query {query}: expected '{name}' in the range of float32, up to 3.4e38, found "
            f"{flat[np.isinf(out[beam_mask])][0]:g}; scale the log's values, or drop the sequence"
        )
    return out
