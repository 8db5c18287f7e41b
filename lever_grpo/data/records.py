"""One group of a beam log in memory, the error every reader raises, and the checks of single values.

Nothing here knows a file format. `Options` carries what the user asked for, `Where` says where a value was found, so
that every error can name the file, the record, the field, what was expected and what stood there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NoReturn

from datasets.exceptions import DatasetGenerationError


MAX_ID = 2**63 - 1  # ids are stored as int64


class BeamDataError(DatasetGenerationError, ValueError):
    """A beam log cannot be read as it stands. The message names file, record, field, expected and found.

    It is a `DatasetGenerationError` so that `datasets` passes it on unwrapped, also from worker processes.

    Example:

    ```python
    >>> from lever_grpo.data.records import BeamDataError
    >>> issubclass(BeamDataError, ValueError)
    True

    ```
    """


@dataclass(frozen=True)
class Where:
    """Place of a value in a file: `Where("a.json", "record '7211'").fail("scores[2]", "a finite number", nan)`."""

    file: str
    record: str

    def fail(self, name: str, expected: str, found: Any, fix: str = "") -> NoReturn:
        try:
            shown = repr(found)
        except RecursionError:
            shown = f"a deeply nested {type(found).__name__}"
        if len(shown) > 120:
            shown = shown[:117] + "..."
        message = f"{self.file}: {self.record}, field '{name}': expected {expected}, found {shown}"
        raise BeamDataError(message + (f"; {fix}" if fix else ""))


@dataclass
class Group:
    """Everything one record says about one query. `sequences` hold pool positions in search order."""

    query_id: int
    candidate_ids: list[int]
    sequences: list[tuple[int, ...]]
    scores: list[float]
    shot_scores: list[list[float]]
    survived: list[bool]
    source: list[str]
    columns: dict[str, list[float | None]] = field(default_factory=dict)
    zero_shot: float = math.nan
    external_id: str | None = None
    repeats: int = 0
    failed: int = 0
    invalid: int = 0
    marginal: bool = False
    pool_rebuilt: bool = False
    query_in_pool: bool = False


@dataclass(frozen=True)
class Options:
    """What the reader of a record must know of `BeamJsonConfig`, with defaults resolved."""

    construct_order: str = "left"
    score_weights: dict[str, float] | None = None
    reward_columns: tuple[str, ...] = ()
    higher_is_better: bool = True
    rebuild_pools: bool = False
    shots: tuple[int, ...] | None = None
    max_group_size: int | None = None
    pool_of: Callable[[int], Sequence[int] | None] = lambda query_id: None
    external_id_of: Callable[[int], str | None] | None = None


def as_id(value: Any, where: Where, name: str) -> int:
    """A row id: a whole number from 0 to 2**63 - 1. Booleans, floats and strings are refused."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        where.fail(name, "a row id (a whole number)", value)
    number = operator.index(value)
    if not 0 <= number <= MAX_ID:
        where.fail(name, "a row id from 0 to 2**63 - 1", value, "ids are row positions in the training split")
    return number


def as_ids(values: Any, where: Where, name: str) -> list[int]:
    """A list of row ids."""
    values = as_list(values, where, name)
    # all at once first: most files are right, and this runs for every id of the log
    if not values or (set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= MAX_ID):
        return values
    return [as_id(value, where, f"{name}[{i}]") for i, value in enumerate(values)]


def as_list(values: Any, where: Where, name: str) -> list[Any]:
    """A JSON list (or the tuple or array that stands for one)."""
    if isinstance(values, list):
        return values
    if isinstance(values, tuple):
        return list(values)
    if hasattr(values, "tolist") and getattr(values, "ndim", 0) > 0:
        return values.tolist()
    where.fail(name, "a list", values)


def as_object(value: Any, where: Where, name: str) -> Mapping[str, Any]:
    """A JSON object; an empty one where the field is missing or null."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        where.fail(name, "an object", value)
    return value


def as_score(value: Any, where: Where, name: str) -> float:
    """A finite number. NaN, infinities, missing values and text are refused."""
    if isinstance(value, str) or not isinstance(value, Real):
        where.fail(name, "a finite number", value, "drop the sequence from the log, or mark it 'eval_failed': true")
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        number = math.inf
    if not math.isfinite(number):
        where.fail(name, "a finite number", value, "drop the sequence from the log, or mark it 'eval_failed': true")
    return number


def as_optional_score(value: Any, where: Where, name: str) -> float | None:
    """A finite number, or None where the log has no value."""
    return None if value is None else as_score(value, where, name)


def is_number(value: Any) -> bool:
    """True for what can be a reward: ints, floats and booleans."""
    return isinstance(value, Real)
