"""Many plain records to one Arrow table, with the work done by columns instead of record by record.

A batch of records is *plain* when all are JSON text with the same fields, every value has the type that the format
asks for, and nothing is to be dropped, repaired or refused. Only then its numbers are copied out of the text, without
a Python object for each, and turned around with numpy. A batch that is not plain is halved, and what stays small goes
through `parse_record` and `group_rows`, which know all rules and raise all errors. Both ways give the same table.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import simdjson

from .formats import parse_record, record_kind
from .groups import NOTES, group_rows
from .orders import to_search_order
from .readers import Record, load_text, names_once
from .records import BeamDataError, Group, Options, Where


RECORDS_PER_BATCH = 512
BYTES_PER_BATCH = 1 << 20
PARSED_PER_BATCH = 64  # records that are no text
HALVE_ABOVE = 8  # fewer records are read one by one when they are not plain
NUMBER = {int, float}  # exact types: a boolean is none
REWARD = {int, float, bool, type(None)}
POOL_FIELDS = ("candidate_pool_ids", "candidate_ids", "pool")
COUNTED_FIELDS = {  # fields whose lists are counted one by one
    *POOL_FIELDS,
    *("id_list", "score_list", "shot_scores", "beams"),
    *("sequences", "scores", "survived", "source", "columns"),
}
ODD = 0x9E3779B97F4A7C15  # multiplier of the sequences' hash


class NotPlain(Exception):
    """A batch has to be read record by record."""


# a wrong type or an absent field shows in one of these, too; RuntimeError: a number that simdjson cannot hold
NOT_PLAIN = (NotPlain, AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError)


@dataclass
class Flat:
    """The values of B plain records with N sequences one after another, and the sizes that say where to cut."""

    order: str = ""  # what `ids` are: "lever_lm" beams, "row ids" or "positions" in search order
    query_ids: list[int] = field(default_factory=list)  # (B,)
    pools: bytearray = field(default_factory=bytearray)  # int64
    pool_sizes: list[int] = field(default_factory=list)  # (B,)
    group_sizes: list[int] = field(default_factory=list)  # (B,)
    lengths: list[int] = field(default_factory=list)  # (N,)
    ids: bytearray = field(default_factory=bytearray)  # int64, as they stand in the file
    gain_counts: list[int] = field(default_factory=list)  # (N,)
    gains: bytearray = field(default_factory=bytearray)  # float64
    scores: bytearray = field(default_factory=bytearray)  # float64 (N,)
    survived: list[Any] = field(default_factory=list)  # (N,), or empty for the default of the format
    source: list[Any] = field(default_factory=list)  # the same
    rewards: dict[str, bytearray] = field(default_factory=lambda: defaultdict(bytearray))  # float64 (N,), NaN is None
    zero_shot: list[Any] = field(default_factory=list)  # (B,)
    notes: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))  # (B,) each


def batches(texts: Iterable[Record]) -> Iterator[list[Record]]:
    """Cut a stream of records into lists of bounded size."""
    batch: list[Record] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text[2]) if isinstance(text[2], bytes) else BYTES_PER_BATCH // PARSED_PER_BATCH
        if len(batch) == RECORDS_PER_BATCH or size >= BYTES_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_tables(
    batch: list[Record],
    file: str,
    settings: Mapping[str, Any],
    options: Options,
    schema: pa.Schema,
    on_empty: Callable[[Group], None],
) -> Iterator[pa.Table]:
    """Tables of the rows of a batch, in order. `on_empty` is told of groups without a sequence.

    Raises:
        [`BeamDataError`]: a record cannot be read as it stands; it is the first such record of the batch.

    Example:

    ```python
    >>> from lever_grpo.data.columns import read_tables
    >>> from lever_grpo.data.groups import group_features
    >>> from lever_grpo.data.records import Options
    >>> text = b'{"id_list": [[3, 4, 7]], "shot_scores": [[0.5, 0.25]], "score_list": [0.25], "pool": [3, 4]}'
    >>> batch = [("7", "record '7'", text)]
    >>> [table] = read_tables(batch, "log.json", {}, Options(), group_features().arrow_schema, print)
    >>> table["sequences"].to_pylist(), table["scores"].to_pylist()
    ([[[1, 0]]], [[0.75]])

    ```
    """
    try:
        table = plain_table(batch, options, schema)
    except BeamDataError:
        raise  # the file of the pools cannot be read
    except NOT_PLAIN:
        table = None  # whatever it is, the careful way says what is wrong, if anything is
    if table is not None:
        yield table
        return
    if len(batch) > HALVE_ABOVE:
        middle = len(batch) // 2
        yield from read_tables(batch[:middle], file, settings, options, schema, on_empty)
        yield from read_tables(batch[middle:], file, settings, options, schema, on_empty)
        return
    rows: list[dict[str, Any]] = []
    for text in batch:
        key, label, record = load_text(file, text)
        try:
            group = parse_record(key, record, Where(file, label), options, settings)
        except RecursionError:
            raise BeamDataError(f"{file}: {label}: expected a record of few levels, found deep nesting") from None
        if group is None:
            continue
        if not group.sequences:
            on_empty(group)
        rows += group_rows(group, options)
    yield pa.Table.from_pylist(rows, schema=schema)


def plain_table(batch: list[Record], options: Options, schema: pa.Schema) -> pa.Table:
    """The rows of a plain batch.

    Raises:
        `NotPlain`, or an error of a conversion: the batch is not plain.
    """
    _need(not options.score_weights and {type(text) for _, _, text in batch} == {bytes})
    flat = Flat()
    parser = simdjson.Parser()
    fields = _names(parser.parse(batch[0][2]))
    kind = record_kind(dict.fromkeys(fields))
    pool = next((name for name in POOL_FIELDS if name in fields), None)
    has_query_id, has_zero_shot = "query_id" in fields, "zero_shot" in fields
    stated: list[Any] = []  # query ids in the records, which may have keys, too
    others = [name for name in fields if name not in COUNTED_FIELDS]
    for key, _, text in batch:
        # sequences that are objects are quicker as Python objects than one by one through simdjson
        record: Any = orjson.loads(text) if kind == "scored" else parser.parse(text)
        if list(record) != fields:
            raise NotPlain
        if has_query_id or key is None:
            stated.append(record["query_id"])
        query_id = stated[-1] if key is None else int(key)
        flat.query_ids.append(query_id)
        flat.zero_shot.append(record["zero_shot"] if has_zero_shot else None)
        _add_pool(flat, record[pool] if pool else options.pool_of(query_id))
        if kind == "scored":
            _add_scored(flat, record["sequences"], options)
            _need(names_once(text, record))
        else:
            _need(kind in ("lever_lm", "group"))
            add = _add_lever_lm if kind == "lever_lm" else _add_group
            # simdjson runs lists inside lists together: there must be none that was not counted
            lists, colons = add(flat, record, fields, options)
            for name in others:
                more = _marks(record[name])
                lists, colons = lists + more[0], colons + more[1]
            lists, colons = lists + (pool is not None), colons + len(fields)
            _need(text.count(b"[") == lists and (b"\\" not in text or b"\\u005" not in text))
            # each name brings a colon: there must be none that was not counted, or no object with a name twice
            _need(text.count(b":") == colons or names_once(text, orjson.loads(text)))
        del record  # the parser takes the next text when nothing refers to this one
    _need(all(key is None or (key.isdecimal() and len(key) <= 19) for key, _, _ in batch))  # as long as the largest id
    _need(not stated or (set(map(type, stated)) == {int} and stated == flat.query_ids))
    return _table(flat, options, schema)


# ---------------------------------------------------------------- one record each


def _add_pool(flat: Flat, pool: Any) -> None:
    flat.pool_sizes.append(len(pool))
    flat.pools += _numbers(pool, {int}, np.int64) if isinstance(pool, list) else pool.as_buffer(of_type="i")


def _add_lever_lm(flat: Flat, record: Any, fields: list[str], options: Options) -> tuple[int, int]:
    """Returns how many lists and colons it saw inside the values."""
    beams = record["id_list"]
    count = len(beams)
    flat.order = "lever_lm"
    flat.group_sizes.append(count)
    flat.lengths.extend(map(len, beams))
    flat.ids += beams.as_buffer(of_type="i")
    lists = 1 + count
    for name in ("score_list", "beams"):
        if name in fields:
            values = record[name]
            _need(isinstance(values, simdjson.Array) and len(values) == count)
    if "shot_scores" in fields:
        shots = record["shot_scores"]
        _need(len(shots) == count)
        flat.gain_counts.extend(map(len, shots))
        flat.gains += shots.as_buffer(of_type="d")
        lists += 1 + count + ("score_list" in fields)
    else:
        _need("beams" not in fields)
        flat.gain_counts += [0] * count
        flat.scores += record["score_list"].as_buffer(of_type="d")
        lists += 1
    more = _marks(record["beams"]) if "beams" in fields else (0, 0)
    return lists + more[0], more[1]


def _add_scored(flat: Flat, entries: Any, options: Options) -> None:
    _need(isinstance(entries, list) and set(map(type, entries)) == {dict})
    shapes = set(map(tuple, entries))
    fields = shapes.pop()
    _need(not shapes)
    order = "search_order" if "search_order" in fields else "prompt_order"
    survived = next((name for name in ("beam", "survived") if name in fields), None)
    source = next((name for name in ("source", "gen_method") if name in fields), None)
    _need("eval_failed" not in fields or all(entry["eval_failed"] is False for entry in entries))
    sequences = [entry[order] for entry in entries]
    shots = [entry["shot_scores"] for entry in entries] if "shot_scores" in fields else [[]] * len(entries)
    _need(set(map(type, sequences)) == set(map(type, shots)) == {list})
    if order == "prompt_order":
        sequences = [to_search_order(ids, options.construct_order) for ids in sequences]
    flat.order = "row ids"
    flat.group_sizes.append(len(entries))
    flat.lengths += map(len, sequences)
    flat.ids += _numbers(list(chain.from_iterable(sequences)), {int}, np.int64)
    flat.gain_counts += map(len, shots)
    flat.gains += _numbers(list(chain.from_iterable(shots)), NUMBER)
    flat.scores += _numbers([entry["score"] for entry in entries], NUMBER)
    flat.survived += [entry[survived] for entry in entries] if survived else []
    flat.source += [entry[source] for entry in entries] if source else []
    for name in options.reward_columns:
        flat.rewards[name] += _numbers([entry.get(name) for entry in entries], REWARD)


def _add_group(flat: Flat, record: Any, fields: list[str], options: Options) -> tuple[int, int]:
    """Returns how many lists and colons it saw inside the values, less the notes."""
    sequences = record["sequences"]
    count = len(sequences)
    flat.order = "positions"
    flat.group_sizes.append(count)
    flat.lengths.extend(map(len, sequences))
    flat.ids += sequences.as_buffer(of_type="i")
    flat.scores += record["scores"].as_buffer(of_type="d")
    _need("candidate_pool_ids" not in fields and len(record["scores"]) == count)
    lists, colons = 2 + count, 0
    if "shot_scores" in fields:
        shots = record["shot_scores"]
        _need(len(shots) == count)
        flat.gain_counts.extend(map(len, shots))
        flat.gains += shots.as_buffer(of_type="d")
        lists += 1 + count
    else:
        flat.gain_counts += [0] * count
    for name, values in (("survived", flat.survived), ("source", flat.source)):
        if name in fields:
            _need(len(record[name]) == count)
            values += record[name].as_list()
            lists += 1
    if "columns" in fields:
        columns = record["columns"]
        _need(isinstance(columns, simdjson.Object))
        colons = len(_names(columns))
        lists += colons
        for name in options.reward_columns:
            _need(len(columns[name]) == count)
            try:
                flat.rewards[name] += columns[name].as_buffer(of_type="d")
            except TypeError:  # it has None or booleans
                flat.rewards[name] += _numbers(columns[name].as_list(), REWARD)
    else:
        _need(not options.reward_columns)
    if "notes" in fields:
        _names(record["notes"])
        for name, value in record["notes"].as_dict().items():
            flat.notes[name].append(value)
    return lists, colons


def _numbers(values: list[Any], types: set[type], dtype: Any = np.float64) -> bytes:
    """Values of these exact types, as the bytes of an array; None is NaN, which JSON has not."""
    _need(set(map(type, values)) <= types)
    return np.array(values, dtype=dtype).tobytes()


def _names(record: Any) -> list[str]:
    """Field names, each there once."""
    names = list(record)
    _need(len(set(names)) == len(names) and not any("[" in name for name in names))
    return names


def _marks(value: Any) -> tuple[int, int]:
    """How often `[` and `:` stand in the text of a value that is not read."""
    text: Any = b""
    if isinstance(value, (simdjson.Array, simdjson.Object)):
        text = value.mini  # it is bytes, whatever the stub says
    elif isinstance(value, str):
        text = value.encode()
    return text.count(b"["), text.count(b":")


def _need(condition: Any) -> None:
    if not condition:
        raise NotPlain


# ---------------------------------------------------------------- flat values to a table


def _table(flat: Flat, options: Options, schema: pa.Schema) -> pa.Table:
    queries = np.array(flat.query_ids, dtype=np.int64)  # (B,)
    sizes = np.array(flat.group_sizes, dtype=np.int64)  # (B,)
    pool_sizes = np.array(flat.pool_sizes, dtype=np.int64)  # (B,)
    lengths = np.array(flat.lengths, dtype=np.int64)  # (N,)
    gain_counts = np.array(flat.gain_counts, dtype=np.int64)  # (N,)
    ids, pools = np.frombuffer(flat.ids, dtype=np.int64), np.frombuffer(flat.pools, dtype=np.int64)
    gains = np.frombuffer(flat.gains, dtype=np.float64)
    count = len(lengths)
    _need(sizes.min() > 0 and pool_sizes.min() > 0 and lengths.min() > 0)
    _need(sizes.sum() == count)
    _need((lengths.sum(), pool_sizes.sum(), gain_counts.sum()) == (len(ids), len(pools), len(gains)))
    _need(queries.min() >= 0 and ids.min() >= 0 and pools.min() >= 0)

    ends = np.cumsum(lengths)
    if flat.order == "lever_lm":
        _need((ids[ends - 1] == np.repeat(queries, sizes)).all())
        lengths = lengths - 1
        _need(lengths.min() > 0)
        ids = ids[_backwards(ends - 2, lengths)]
    record = np.repeat(np.repeat(np.arange(len(queries)), sizes), lengths)  # which one an id belongs to
    lookup = _Lookup(pools, pool_sizes, queries, ids)
    if flat.order == "positions":
        positions = ids
        _need((positions < pool_sizes[record]).all())
    else:
        positions = lookup(ids, record)
    _check_sequences(positions, lengths, sizes)

    _need(((gain_counts == 0) | (gain_counts == lengths)).all())
    notes: dict[str, Any] = dict(flat.notes)
    if flat.order == "lever_lm" and gain_counts.any():
        _need(gain_counts.all())
        stops = np.cumsum(gain_counts)
        if lengths.max() <= 2:
            # what `fsum` gives, as the sum of two numbers is rounded once in any case; its zero is positive
            scores = np.add.reduceat(gains, stops - gain_counts) + 0.0
        else:
            values = gains.tolist()
            scores = np.array(
                [math.fsum(values[j - n : j]) for j, n in zip(stops.tolist(), flat.gain_counts, strict=True)]
            )
    else:
        scores = np.frombuffer(flat.scores, dtype=np.float64)
        if flat.order == "lever_lm":
            notes["marginal"] = np.maximum.reduceat(lengths, np.cumsum(sizes) - sizes) > 1
    _need(len(scores) == count and notes.keys() <= set(NOTES))
    _need(set(map(type, flat.zero_shot)) <= NUMBER | {type(None)})

    sign = 1.0 if options.higher_is_better else -1.0
    zero_shot = np.array(flat.zero_shot, dtype=np.float64)  # None becomes NaN
    _need(np.isfinite(scores).all() and np.isfinite(gains).all() and not np.isinf(zero_shot).any())
    sequences: dict[str, pa.Array] = {  # (N,) each
        "sequences": _lists(lengths, pa.array(positions.astype(np.int32))),
        "scores": pa.array(sign * scores),
        "shot_scores": _lists(gain_counts, pa.array(sign * gains)),
        "survived": pa.array(flat.survived) if flat.survived else pa.repeat(flat.order == "lever_lm", count),
        "source": pa.array(flat.source) if flat.source else pa.repeat("search", count),
    }
    rewards = [
        _floats(flat.rewards[name]) if flat.rewards[name] else pa.nulls(count, pa.float64())
        for name in options.reward_columns
    ]
    _need(sequences["survived"].type == pa.bool_() and sequences["source"].type == pa.string())
    _need(all(len(array) == count for array in (*sequences.values(), *rewards)))
    _need(not any(array.null_count for array in sequences.values()))
    rows: dict[str, pa.Array] = {  # (B,) each
        "query_id": pa.array(queries),
        "candidate_ids": _lists(pool_sizes, pa.array(pools)),
        "zero_shot": pa.array(sign * zero_shot),
        "notes": _notes(notes, len(queries), schema.field("notes").type),
    }
    if options.external_id_of is not None:
        rows["external_id"] = pa.array(list(map(options.external_id_of, flat.query_ids)), pa.string())
    if options.shots is not None:
        _need(len(options.shots) == 1)
        keep = lengths == options.shots[0]
        sequences = {name: array.filter(pa.array(keep)) for name, array in sequences.items()}
        rewards = [array.filter(pa.array(keep)) for array in rewards]
        sizes = np.add.reduceat(keep, np.cumsum(sizes) - sizes, dtype=np.int64)
        rows = {name: array.filter(pa.array(sizes > 0)) for name, array in rows.items()}
        sizes = sizes[sizes > 0]
    _need(options.max_group_size is None or sizes.max(initial=0) <= options.max_group_size)
    rows |= {name: _lists(sizes, array) for name, array in sequences.items()}
    if rewards:
        rows["columns"] = pa.StructArray.from_arrays(
            [_lists(sizes, array) for array in rewards], list(options.reward_columns)
        )
    return pa.Table.from_arrays([rows[name].cast(schema.field(name).type) for name in schema.names], schema=schema)


class _Lookup:
    """Where an id stands in the pool of its record. Pools hold each id once, and not the query."""

    def __init__(self, pools: np.ndarray, pool_sizes: np.ndarray, queries: np.ndarray, ids: np.ndarray):
        blank = int(max(pools.max(), queries.max(), ids.max())) + 1
        self.span = blank + 1
        _need(len(queries) * self.span < 2**63)
        padded = _padded(pools, pool_sizes, blank)  # (B, K)
        self.order = np.argsort(padded, axis=1)
        padded = np.take_along_axis(padded, self.order, axis=1)
        _need(not ((padded[:, 1:] == padded[:, :-1]) & (padded[:, 1:] < blank)).any())
        records = np.arange(len(queries))
        self.keys = (padded + self.span * records[:, None]).ravel()  # ascending
        _need(not self._find(queries, records)[1].any())

    def _find(self, ids: np.ndarray, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys = records * self.span + ids
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return places, self.keys[places] == keys

    def __call__(self, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
        places, found = self._find(ids, records)
        _need(found.all())
        return self.order.ravel()[places]


def _padded(values: np.ndarray, sizes: np.ndarray, blank: int) -> np.ndarray:
    mask = np.arange(sizes.max()) < sizes[:, None]
    _need(mask.size <= 4 * len(values) + 2**16)  # one long row among short ones would take a lot of memory
    padded = np.full(mask.shape, blank, dtype=np.int64)
    padded[mask] = values
    return padded


def _backwards(last: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices `last, last - 1, …`, as many as each length says."""
    stops = np.cumsum(lengths)
    return np.repeat(last + stops - lengths, lengths) - np.arange(stops[-1])


def _check_sequences(positions: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> None:
    """No sequence holds a position twice, no group a sequence twice."""
    padded = np.ascontiguousarray(_padded(positions, lengths, -1).T)  # (S, N)
    for i, step in enumerate(padded):
        _need(not ((padded[:i] == step) & (step >= 0)).any())
    # equal sequences of a group have equal hashes; the careful way looks into hashes that are equal by chance
    hashes = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
    for step in padded:
        hashes = hashes * np.uint64(ODD) + step.astype(np.uint64)
    hashes.sort()
    _need((hashes[1:] != hashes[:-1]).all())


def _lists(sizes: np.ndarray, values: pa.Array) -> pa.ListArray:
    offsets = np.zeros(len(sizes) + 1, dtype=np.int32)
    np.cumsum(sizes, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _floats(values: bytearray) -> pa.Array:
    numbers = np.frombuffer(values, dtype=np.float64)
    return pa.array(numbers, mask=np.isnan(numbers))


def _notes(notes: Mapping[str, Any], count: int, types: pa.StructType) -> pa.StructArray:
    arrays = []
    for name, note in zip(NOTES, types, strict=True):
        kind = int if name in NOTES[:3] else bool
        values = notes.get(name, [kind()] * count)
        _need(len(values) == count and (isinstance(values, np.ndarray) or set(map(type, values)) == {kind}))
        _need(min(values) >= 0)
        arrays.append(pa.array(values, note.type))
    return pa.StructArray.from_arrays(arrays, NOTES)
