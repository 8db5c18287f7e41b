"""Per-query results of one method, the input of every report."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..atomic import atomic_file
from ..metrics.bootstrap import seed_query_table
from ..metrics.selection import lookup_reward, score_percentile, sequences_of_length


# The rows of the report, in the order of a table; other methods stand before the oracle, in the order they are given.
BASELINES = ("zero_shot", "random", "similarity", "similarity_image", "similarity_all", "mix", "mmr")
TRAINED = ("sft", "agreement", "rce", "grpo")
ORACLE = "oracle"
# how a policy's log-probabilities agree with the rewards of the logged sequences: one number a seed
AGREEMENTS = ("rank_correlation", "calibration_error")

LABELS = {
    "zero_shot": "zero-shot",
    "similarity_image": "similarity of images",
    "similarity_all": "similarity, all features",
    "mix": "similarity, text and image in turn",
    "mmr": "similarity with diversity (MMR)",
    "sft": "SFT",
    "agreement": "agreement of answers",
    "rce": "RCE",
    "grpo": "GRPO",
}


@dataclass(frozen=True, eq=False)
class MethodResult:
    """
    What one method chose on the held-out queries and what that was worth: R seeds (1 for a deterministic method) × Q
    queries. Tables may be given as lists, and a vector counts as one seed.

    Args:
        name (`str`):
            Name of the row: `zero_shot`, `random`, `similarity`, `sft`, `rce`, `grpo`, `oracle`, or any other.
        rewards (`ArrayLike` of shape `(R, Q)`):
            Reward of the choice for each query.
        percentiles (`ArrayLike` of shape `(R, Q)`, *optional*):
            Percentile of the choice among all sequences of its length, in [0, 100].
        correct (`ArrayLike` of shape `(R, Q)`, *optional*):
            Accuracy of the answer in [0, 1], where it is known for every query. For a random choice, the expectation.
        picks (`ArrayLike` of shape `(R, Q, S)`, *optional*):
            The choices: pool positions in search order.
        rank_correlation, calibration_error (`ArrayLike` of shape `(R,)`, *optional*):
            Of a policy, over all logged sequences: [`~lever_grpo.metrics.rank_correlation`] and
            [`~lever_grpo.metrics.calibration_error`] of log-probability and reward.

    Raises:
        ValueError: If shapes disagree, or a value is not finite or outside its range.

    Example:
    ```python
    >>> from lever_grpo.report import MethodResult
    >>> result = MethodResult("grpo", rewards=[[-1.0, -2.0], [-1.5, -2.0]], picks=[[[0, 1], [2, 0]], [[0, 1], [0, 2]]])
    >>> result.seeds, result.queries
    (2, 2)

    ```
    """

    name: str
    rewards: NDArray[np.float64]
    percentiles: NDArray[np.float64] | None = None
    correct: NDArray[np.float64] | None = None
    picks: NDArray[np.int64] | None = None
    rank_correlation: NDArray[np.float64] | None = None
    calibration_error: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        rewards = seed_query_table(self.rewards, f"{self.name}: rewards")
        object.__setattr__(self, "rewards", rewards)
        for field, highest in (("percentiles", 100.0), ("correct", 1.0)):
            values = getattr(self, field)
            if values is None:
                continue
            values = seed_query_table(values, f"{self.name}: {field}")
            if values.shape != rewards.shape:
                raise ValueError(f"{self.name}: {field} has shape {values.shape}, rewards have {rewards.shape}.")
            if values.min() < 0.0 or values.max() > highest:
                raise ValueError(
                    f"{self.name}: {field} runs from {values.min()} to {values.max()}; expected [0, {highest:g}]."
                )
            object.__setattr__(self, field, values)
        if self.picks is not None:
            picks = np.asarray(self.picks)
            picks = picks[None] if picks.ndim == 2 else picks
            if picks.ndim != 3 or picks.shape[:2] != rewards.shape or not np.issubdtype(picks.dtype, np.integer):
                raise ValueError(
                    f"{self.name}: picks have shape {picks.shape} and type {picks.dtype}; expected integers of shape "
                    f"{rewards.shape} + (shots,)."
                )
            object.__setattr__(self, "picks", picks.astype(np.int64))
        for field in AGREEMENTS:
            values = getattr(self, field)
            if values is None:
                continue
            values = np.atleast_1d(np.asarray(values, dtype=np.float64))
            if values.shape != rewards.shape[:1] or not np.isfinite(values).all():
                raise ValueError(
                    f"{self.name}: {field} is {values.tolist()}; expected a finite number for each of the "
                    f"{len(rewards)} seeds of rewards."
                )
            object.__setattr__(self, field, values)

    @property
    def seeds(self) -> int:
        """Number of seeds R."""
        return self.rewards.shape[0]

    @property
    def queries(self) -> int:
        """Number of held-out queries Q."""
        return self.rewards.shape[1]

    @classmethod
    def from_picks(
        cls,
        name: str,
        picks: ArrayLike,
        sequences: Sequence[Sequence[Sequence[int]]],
        scores: Sequence[ArrayLike],
        correct: Sequence[ArrayLike] | None = None,
    ) -> "MethodResult":
        """
        Look the picks up in a log that scored every sequence of their length.

        Args:
            name (`str`):
                Name of the row.
            picks (`ArrayLike` of shape `(Q, S)` or `(R, Q, S)`):
                Pool positions in search order.
            sequences, scores (`Sequence`, length Q):
                Per query, the logged sequences and their scores (other lengths may be among them).
            correct (`Sequence`, length Q, *optional*):
                Per query, whether each logged sequence led to the right answer, or `None` where that is not known. The
                result has no accuracy if it is not known of a pick.

        Example:
        ```python
        >>> from lever_grpo.report import MethodResult
        >>> log = [[[0, 1], [1, 0]], [[0, 1], [1, 0]]]
        >>> result = MethodResult.from_picks("sft", [[0, 1], [1, 0]], log, scores=[[-1.0, -2.0], [-3.0, -2.0]])
        >>> result.rewards.tolist(), result.percentiles.tolist()
        ([[-1.0, -2.0]], [[100.0, 100.0]])

        ```
        """
        table = np.asarray(picks)
        table = table[None] if table.ndim == 2 else table  # (R, Q, S)
        rewards, found = lookup_reward(table, sequences, scores)  # (R, Q)
        if not found.all():
            seed, query = np.argwhere(~found)[0]
            raise ValueError(
                f"{name}: {int((~found).sum())} of {found.size} picks are not in the log, the first is "
                f"{table[seed, query].tolist()} of query {query}; an exact evaluation needs every sequence of "
                f"{table.shape[-1]} shots scored: score the missing ones, or use a fully scored file."
            )
        same_length = [
            sequences_of_length(logged, values, table.shape[-1])[1]
            for logged, values in zip(sequences, scores, strict=True)
        ]
        accuracy = None if correct is None else lookup_reward(table, sequences, correct)[0]
        if accuracy is not None and np.isnan(accuracy).any():
            accuracy = None
        return cls(name, rewards, score_percentile(rewards, same_length), accuracy, table)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-able lists; `MethodResult(**d)` brings it back."""
        tables = {
            "rewards": self.rewards,
            "percentiles": self.percentiles,
            "correct": self.correct,
            "picks": self.picks,
            **{field: getattr(self, field) for field in AGREEMENTS},
        }
        return {"name": self.name} | {key: None if table is None else table.tolist() for key, table in tables.items()}


def stack_seeds(results: Sequence[MethodResult]) -> MethodResult:
    """
    Join the results of one method from several runs into one with a row per seed. When all runs agree in everything,
    the method is deterministic and one row is kept.

    Args:
        results (`Sequence[MethodResult]`):
            Results of the same method on the same queries, in the order of the seeds.

    Example:
    ```python
    >>> from lever_grpo.report import MethodResult, stack_seeds
    >>> stack_seeds([MethodResult("rce", [1.0, 2.0]), MethodResult("rce", [1.0, 3.0])]).rewards.tolist()
    [[1.0, 2.0], [1.0, 3.0]]
    >>> stack_seeds([MethodResult("similarity", [1.0, 2.0])] * 5).seeds
    1

    ```
    """
    if not results:
        raise ValueError("there is no result to stack; pass at least one.")
    names = {result.name for result in results}
    if len(names) > 1:
        raise ValueError(f"results of {sorted(names)} cannot be seeds of one method; stack each method by itself.")
    tables: dict[str, Any] = {}
    for field in ("rewards", "percentiles", "correct", "picks", *AGREEMENTS):
        rows = [getattr(result, field) for result in results]
        missing = sum(row is None for row in rows)
        # files of earlier versions have no agreement
        if 0 < missing < len(rows) and field not in AGREEMENTS:
            raise ValueError(
                f"{results[0].name}: {missing} of {len(rows)} runs have no {field}; record it in all runs or in none."
            )
        tables[field] = None if missing else np.concatenate(rows)
    if all((table == table[:1]).all() for table in tables.values() if table is not None):
        tables = {field: None if table is None else table[:1] for field, table in tables.items()}
    return MethodResult(results[0].name, **tables)


def save_results(results: Sequence[MethodResult], path: str | os.PathLike) -> None:
    """
    Write per-query results as JSON, so that a later run can pool them over seeds and tasks.

    Example:
    ```python
    >>> import tempfile
    >>> from lever_grpo.report import MethodResult, load_results, save_results
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_results([MethodResult("sft", [1.0, 2.0])], f"{folder}/results.json")
    ...     load_results(f"{folder}/results.json")["sft"].rewards.tolist()
    [[1.0, 2.0]]

    ```
    """
    text = json.dumps([result.to_dict() for result in results], allow_nan=False)
    with atomic_file(Path(path)) as stream:
        stream.write((text + "\n").encode())


def load_results(path: str | os.PathLike) -> dict[str, MethodResult]:
    """Read what [`save_results`] wrote, by name of the method."""
    rows: list[Mapping[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
    return {row["name"]: MethodResult(**row) for row in rows}


def method_label(name: str) -> str:
    """Name of a method for readers: `grpo_literal` → "GRPO literal"."""
    first, _, rest = name.partition("_")
    if name in LABELS:
        return LABELS[name]
    return f"{LABELS.get(first, first)} {rest.replace('_', ' ')}".strip()


def method_order(names: Sequence[str], oracle: str = ORACLE) -> list[str]:
    """The names in the order of the tables: baselines, trained methods, others as given, the oracle."""
    known = [name for name in (*BASELINES, *TRAINED) if name in names]
    others = [name for name in names if name not in known and name != oracle]
    return known + others + ([oracle] if oracle in names else [])
