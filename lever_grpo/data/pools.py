"""The pool of a record: in the record, in a side file, or rebuilt from the beams where that is asked for by name."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from .readers import iter_records
from .records import BeamDataError, Group, Options, Where, as_id, as_ids


def own_pool(record: Mapping[str, Any], where: Where) -> list[int] | None:
    for name in ("candidate_pool_ids", "candidate_ids", "pool"):
        if record.get(name) is not None:
            pool = as_ids(record[name], where, name)
            if len(set(pool)) != len(pool):
                twice = sorted({i for i in pool if pool.count(i) > 1})
                where.fail(name, "each candidate once", twice)
            if not pool:
                where.fail(name, "at least one candidate", pool)
            return pool
    return None


def group_of_ids(
    query_id: int, record: Mapping[str, Any], sequences: list[list[int]], where: Where, options: Options
) -> Group:
    """Find the pool and turn sequences of row ids into positions. A sequence that cannot be used gets no positions."""
    pool, rebuilt = own_pool(record, where), False
    if pool is None:
        given = options.pool_of(query_id)
        if given is not None:
            pool = own_pool({"candidate_ids": given}, where)
    if pool is None:
        if not options.rebuild_pools:
            where.fail(
                "candidate_ids",
                "the pool of candidates, which Lever-LM files do not hold",
                sorted(record),
                "pass candidate_pools=<file or dict of query id to candidate ids>; "
                "rebuild_pools=True takes the few ids of the beams instead",
            )
        # sorted: in order of the beams, a candidate's position would tell how good it is
        pool, rebuilt = sorted({i for ids in sequences for i in ids} - {query_id}), True
    group = Group(query_id, pool, [], [], [], [], [])
    group.pool_rebuilt = rebuilt
    if query_id in pool:
        # the answer itself would stand in the prompt, so the query leaves its pool before positions are taken
        group.candidate_ids = pool = [i for i in pool if i != query_id]
        group.query_in_pool = True
    position = {candidate: p for p, candidate in enumerate(pool)}
    for i, ids in enumerate(sequences):
        if len(set(ids)) != len(ids) or query_id in ids:
            group.sequences.append(())  # taken out, and counted, by fill_group
            continue
        missing = [candidate for candidate in ids if candidate not in position]
        if missing:
            where.fail(
                f"sequence {i}", f"ids of the query's pool of {len(pool)}", missing, "is it the pool of this log?"
            )
        group.sequences.append(tuple(position[candidate] for candidate in ids))
    return group


def fill_group(
    group: Group,
    scores: list[float],
    shot_scores: list[list[float]],
    survived: list[bool],
    source: list[str],
    columns: dict[str, list[float | None]],
) -> None:
    """Set the per-sequence lists, leaving out the sequences that repeat a demonstration or hold the query itself."""
    keep = [i for i, sequence in enumerate(group.sequences) if sequence]
    group.invalid += len(group.sequences) - len(keep)
    group.sequences = [group.sequences[i] for i in keep]
    group.scores = [scores[i] for i in keep]
    group.shot_scores = [shot_scores[i] for i in keep]
    group.survived = [survived[i] for i in keep]
    group.source = [source[i] for i in keep]
    group.columns = {name: [values[i] for i in keep] for name, values in columns.items()}


class PoolSource:
    """Candidate pools from outside the log, looked up by query id and read on first use.

    Args:
        source (`str`, `Path` or `Mapping[int, Sequence[int]]`):
            A dict of query id to candidate ids, or a file: one JSON object of these, or records (JSON, JSON lines,
            Parquet) with `query_id` and one of `candidate_ids`, `candidate_pool_ids`, `pool`. A format 3 or 4 beam
            log is such a file.

    Example:

    ```python
    >>> from lever_grpo.data.pools import PoolSource
    >>> pools = PoolSource({7: [3, 1, 4]})
    >>> pools(7), pools(8)
    ([3, 1, 4], None)
    >>> list(pools)
    [7]

    ```
    """

    def __init__(self, source: str | Path | Mapping[Any, Sequence[int]]):
        self.source = source

    def __call__(self, query_id: int) -> list[int] | None:
        pool = self._pools.get(query_id)
        return None if pool is None else pool.tolist()

    def __iter__(self) -> Iterator[int]:
        """Ids of the queries that have a pool."""
        return iter(self._pools)

    @cached_property
    def _pools(self) -> dict[int, array[int]]:
        # arrays: a list of numbers takes five times the memory
        if isinstance(self.source, Mapping):
            where = Where("candidate_pools", "the dict")
            return {_row(key, where): array("q", as_ids(pool, where, str(key))) for key, pool in self.source.items()}
        pools: dict[int, array[int]] = {}
        path = str(self.source)
        for key, label, record in iter_records(path):
            if key is not None and key.startswith("_"):
                continue
            where = Where(path, label)
            if key is not None and not isinstance(record, Mapping):
                record = {"candidate_ids": record}
            if not isinstance(record, Mapping) or (key is None and "query_id" not in record):
                where.fail("record", "'query_id' and 'candidate_ids'", record)
            pool = own_pool(record, where)
            if pool is None:
                where.fail("candidate_ids", "the pool of the query", sorted(record))
            query = _row(key, where) if key is not None else as_id(record["query_id"], where, "query_id")
            pools[query] = array("q", pool)
        return pools


def read_external_ids(source: str | Path | Mapping[Any, Any]) -> dict[int, str]:
    """Row id to external id, as text; from a dict or a JSON file of one."""
    where = Where("external_ids", "the dict")
    if not isinstance(source, Mapping):
        where = Where(str(source), "the object")
        source = {key: value for key, _, value in iter_records(str(source))}
    if None in source:
        raise BeamDataError(f"{where.file}: external_ids: expected an object of row id to external id, found records")
    return {_row(key, where): str(value) for key, value in source.items()}


def _row(key: Any, where: Where) -> int:
    """The row id that a key of an object stands for: JSON has no other keys than texts."""
    if isinstance(key, str):
        if not (key.isdecimal() and len(key) <= 19):  # as long as the largest id
            where.fail("key", "a row id (a whole number)", key)
        key = int(key)
    return as_id(key, where, "key")
