"""From a parsed group to dataset rows: repeats out, sign, lengths, size. The same for every file format.

The order of the sequences is never changed: files are sorted by score or not, and nothing may rely on it.
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from datasets import Features, List, Value

from .records import Group, Options


NOTES = ("repeats", "failed", "invalid", "marginal", "pool_rebuilt", "query_in_pool")


def group_features(reward_columns: tuple[str, ...] = (), external_ids: bool = False) -> Features:
    """Features of a dataset of groups. `columns` is left out when there are none: Parquet cannot hold an empty struct.

    Example:

    ```python
    >>> from lever_grpo.data.groups import group_features
    >>> group_features(("correct",))["columns"]
    {'correct': List(Value('float64'))}

    ```
    """
    features: dict[str, Any] = {
        "query_id": Value("int64"),
        "candidate_ids": List(Value("int64")),
        "sequences": List(List(Value("int32"))),
        "scores": List(Value("float64")),
        "shot_scores": List(List(Value("float64"))),
        "survived": List(Value("bool")),
        "zero_shot": Value("float64"),
        "source": List(Value("string")),
        "notes": {name: Value("int32" if name in NOTES[:3] else "bool") for name in NOTES},
    }
    if reward_columns:
        features["columns"] = {name: List(Value("float64")) for name in reward_columns}
    if external_ids:
        features["external_id"] = Value("string")
    return datasets.Features(features)


def group_rows(group: Group, options: Options) -> list[dict[str, Any]]:
    """Rows of one group: one row, or one row per length when `shots` is given. A length nobody has gives no row."""
    keep = _first_of_each(group)
    rows: list[dict[str, Any]] = []
    if options.shots is None:
        parts = [keep]
    else:
        lengths = [len(sequence) for sequence in group.sequences]
        parts = [[i for i in keep if lengths[i] == shots] for shots in options.shots]
    for part in parts:
        if options.max_group_size is not None and len(part) > options.max_group_size:
            scores = np.array([group.scores[i] for i in part])
            survived = np.array([group.survived[i] for i in part])
            part = [part[i] for i in thin_group(scores, survived, options.max_group_size)]
        if part:
            rows.append(_row(group, part, options, first=not rows))
    return rows


def _first_of_each(group: Group) -> list[int]:
    """Indices without exact repeats. Another order of the same demonstrations is another sequence."""
    first: dict[tuple[int, ...], int] = {}
    for i, sequence in enumerate(group.sequences):
        j = first.setdefault(sequence, i)
        if j != i:
            group.repeats += 1
            group.survived[j] = group.survived[j] or group.survived[i]
    return list(first.values())


def thin_group(scores: np.ndarray, survived: np.ndarray, size: int) -> list[int]:
    """Which `size` sequences of a larger group stay: all survivors, and others evenly spaced by score.

    Deterministic, and in the group's own order. When there are more survivors than places, they are spaced evenly
    themselves.

    Example:

    ```python
    >>> import numpy as np
    >>> from lever_grpo.data.groups import thin_group
    >>> scores = np.array([0.9, 0.1, 0.5, 0.2, 0.3])
    >>> thin_group(scores, scores > 0.8, 3)  # the survivor, the worst and the best of the others
    [0, 1, 2]

    ```
    """
    survivors, others = np.flatnonzero(survived), np.flatnonzero(~survived)
    if len(survivors) >= size:
        survivors, others = _evenly_spaced(scores, survivors, size), others[:0]
    else:
        others = _evenly_spaced(scores, others, size - len(survivors))
    return np.sort(np.concatenate([survivors, others])).tolist()


def _evenly_spaced(scores: np.ndarray, indices: np.ndarray, size: int) -> np.ndarray:
    if len(indices) <= size:
        return indices
    by_score = indices[np.argsort(scores[indices], kind="stable")]
    return by_score[np.floor(np.linspace(0, len(by_score) - 1, size) + 0.5).astype(np.int64)]


def _row(group: Group, part: list[int], options: Options, first: bool) -> dict[str, Any]:
    sign = 1.0 if options.higher_is_better else -1.0
    row: dict[str, Any] = {
        "query_id": group.query_id,
        "candidate_ids": group.candidate_ids,
        "sequences": [group.sequences[i] for i in part],
        "scores": [sign * group.scores[i] for i in part],
        "shot_scores": [[sign * gain for gain in group.shot_scores[i]] for i in part],
        "survived": [group.survived[i] for i in part],
        "zero_shot": sign * group.zero_shot,
        "source": [group.source[i] for i in part],
        # what was counted belongs to the query: on its first row only, so that the sum over rows is right
        "notes": {name: getattr(group, name) if first or name not in NOTES[:3] else 0 for name in NOTES},
    }
    if group.columns:
        row["columns"] = {name: [values[i] for i in part] for name, values in group.columns.items()}
    if options.external_id_of is not None:
        row["external_id"] = group.external_id
    return row
