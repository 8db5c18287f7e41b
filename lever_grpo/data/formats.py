"""One record of a beam log to one `Group`: a function per file format, nothing else.

Sequences leave here in search order, as positions in the pool; see `orders.py` for the two orders and `pools.py` for
the pool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .groups import NOTES
from .orders import to_search_order
from .pools import fill_group, group_of_ids, own_pool
from .records import Group, Options, Where, as_id, as_ids, as_list, as_object, as_optional_score, as_score, is_number


SCORED_FIELDS = {
    "prompt_order",
    "search_order",
    "score",
    "beam",
    "survived",
    "shot_scores",
    "source",
    "gen_method",
    "eval_failed",
}
POINTER_FIELDS = {"pointer", "pointer_global", "pointer_pos", "eval_failed", "gen_method"}


def record_kind(record: Any) -> str | None:
    """Which of the layouts a record has: "pointer" (format 3), "lever_lm" (1 and 2), "group" or "scored" (4), or
    None."""
    if not isinstance(record, Mapping):
        return None
    if "pointer_candidates" in record:
        return "pointer"
    if "id_list" in record or "beams" in record:
        return "lever_lm"
    if "sequences" in record:
        return "group" if "scores" in record and "candidate_ids" in record else "scored"
    return None


def parse_record(
    key: str | None, record: Any, where: Where, options: Options, settings: Mapping[str, Any]
) -> Group | None:
    """One record to one group; None for metadata. `settings` is what the file's name says (`parse_log_name`)."""
    if key is not None and key.startswith("_"):
        return None
    if key is None and isinstance(record, Mapping) and record and all(name.startswith("_") for name in record):
        return None
    kind = record_kind(record)
    if kind is None:
        found = sorted(record) if isinstance(record, Mapping) else record
        where.fail("record", "one of 'id_list', 'beams', 'pointer_candidates', 'sequences'", found)
    if key is not None:
        if not key.isdecimal() or len(key) > 19:  # as long as the largest id
            where.fail("key", "the query's row index in the training split", key)
        query_id = as_id(int(key), where, "key")
        if "query_id" in record and as_id(record["query_id"], where, "query_id") != query_id:
            where.fail("query_id", f"the record's key {query_id}", record["query_id"])
    elif "query_id" in record:
        query_id = as_id(record["query_id"], where, "query_id")
    else:
        where.fail("query_id", "the query's row index", sorted(record))

    if kind == "lever_lm":
        group = parse_lever_lm(query_id, record, where, options, settings)
    elif kind == "pointer":
        group = parse_pointer(query_id, record, where, options)
    elif kind == "group":
        group = parse_group(query_id, record, where, options)
    else:
        group = parse_scored(query_id, record, where, options)
    if options.external_id_of is not None:
        group.external_id = options.external_id_of(query_id)
    return group


# ---------------------------------------------------------------- formats 1 and 2: Lever-LM, Lever-Plus beams


def parse_lever_lm(
    query_id: int, record: Mapping[str, Any], where: Where, options: Options, settings: Mapping[str, Any]
) -> Group:
    """Formats 1 and 2: `id_list` / `score_list`, with `shot_scores`, `few_shot_num` and `beams` where they are there.

    With per-shot gains the score is their sum, the gain over no demonstration at all. Without them it is what the
    file has: the last step's gain over the beam's own parent, which is not comparable between beams of different
    parents (`marginal`).
    """
    if options.score_weights:
        where.fail("score_column", "none, as beams of this format have one score", list(options.score_weights))
    id_list, scores, shot_scores = _lever_lm_lists(query_id, record, where)
    declared = record.get("few_shot_num", settings.get("few_shot"))
    sequences: list[list[int]] = []
    for i, beam in enumerate(id_list):
        ids = as_ids(beam, where, f"id_list[{i}]")
        if ids and ids[-1] == query_id:
            ids = ids[:-1]
        elif declared is None or len(ids) != declared:
            where.fail(
                f"id_list[{i}]",
                f"demonstrations and then the query's own id {query_id} as the last one",
                ids,
                "the beam is cut short, or the key is not the row index of this query",
            )
        if not ids:
            where.fail(f"id_list[{i}]", "at least one demonstration before the query's id", beam)
        sequences.append(ids[::-1])  # files prepend whatever construct_order says

    gains: list[list[float]] = []
    if shot_scores is not None:
        for i, (shots, ids) in enumerate(zip(shot_scores, sequences, strict=True)):
            shots = as_list(shots, where, f"shot_scores[{i}]")
            if len(shots) != len(ids):
                where.fail(f"shot_scores[{i}]", f"{len(ids)} gains, one a demonstration", shots)
            gains.append([as_score(v, where, f"shot_scores[{i}][{t}]") for t, v in enumerate(shots)])
        totals = [math.fsum(shots) for shots in gains]
    else:
        gains = [[] for _ in sequences]
        totals = [as_score(v, where, f"score_list[{i}]") for i, v in enumerate(scores)]
    group = group_of_ids(query_id, record, sequences, where, options)
    fill_group(
        group,
        totals,
        gains,
        survived=[True] * len(sequences),
        source=["search"] * len(sequences),
        columns={name: [None] * len(sequences) for name in options.reward_columns},
    )
    group.marginal = shot_scores is None and any(len(ids) > 1 for ids in sequences)
    group.zero_shot = _zero_shot(record, where, options)
    return group


def _lever_lm_lists(
    query_id: int, record: Mapping[str, Any], where: Where
) -> tuple[list[Any], list[Any], list[Any] | None]:
    beams = record.get("beams")
    if beams is not None:
        beams = as_list(beams, where, "beams")
    id_list = record.get("id_list")
    if id_list is None:
        id_list = [_beam_ids(beam, query_id, where, f"beams[{i}]") for i, beam in enumerate(beams or [])]
    id_list = as_list(id_list, where, "id_list")
    shot_scores = record.get("shot_scores")
    if shot_scores is None and beams:
        shot_scores = [
            _beam_gains(beam, ids, where, f"beams[{i}]")
            for i, (beam, ids) in enumerate(zip(beams, id_list, strict=False))
        ]
    scores = record.get("score_list")
    if scores is None and shot_scores is None:
        where.fail("score_list", "a score per beam", sorted(record))
    lists = {"score_list": scores, "shot_scores": shot_scores, "beams": beams}
    for name, values in lists.items():
        if values is not None and len(as_list(values, where, name)) != len(id_list):
            where.fail(name, f"{len(id_list)} entries, one a beam of 'id_list'", values)
    return id_list, [] if scores is None else as_list(scores, where, "score_list"), shot_scores


def _beam_ids(beam: Any, query_id: int, where: Where, name: str) -> list[int]:
    """The file-order ids of a format 2 beam: its `full_sequence`, else its shots (search order) reversed, and the
    query."""
    if not isinstance(beam, Mapping) or ("full_sequence" not in beam and "shots" not in beam):
        where.fail(name, "'shots' or 'full_sequence'", beam)
    if "full_sequence" in beam:
        return as_ids(beam["full_sequence"], where, f"{name}.full_sequence")
    return [shot for shot, _ in _shots(beam, where, name)][::-1] + [query_id]


def _shots(beam: Mapping[str, Any], where: Where, name: str) -> list[tuple[int, Any]]:
    """Id and score of each shot."""
    shots = []
    for t, shot in enumerate(as_list(beam["shots"], where, f"{name}.shots")):
        shot = as_object(shot, where, f"{name}.shots[{t}]")
        shots.append((as_id(shot.get("id"), where, f"{name}.shots[{t}].id"), shot.get("score")))
    return shots


def _beam_gains(beam: Any, file_ids: Any, where: Where, name: str) -> list[float]:
    """Gains in search order, joined by id: the order of `shots` need not be trusted."""
    if not isinstance(beam, Mapping) or "shots" not in beam:
        where.fail(name, "'shots' with a score each, as 'shot_scores' is not there", beam)
    shots = _shots(beam, where, name)
    gain_of = dict(shots)
    picked = [i for i in as_ids(file_ids, where, f"id_list of {name}")[::-1] if i in gain_of]
    if len(picked) != len(shots):
        where.fail(f"{name}.shots", f"the demonstrations of {list(file_ids)}", sorted(gain_of, key=str))
    return [as_score(gain_of[i], where, f"{name}.shots[{t}].score") for t, i in enumerate(picked)]


# ---------------------------------------------------------------- format 3: Lever-Plus RL files


def parse_pointer(query_id: int, record: Mapping[str, Any], where: Where, options: Options) -> Group:
    """Format 3: `pointer_candidates`, evaluated one by one. Failed and fallback evaluations are dropped and counted.

    The pointer is the order in which a selector picked, that is search order. It is a position in the pool when
    `pointer_global` stands beside it, and a row id when it does not.
    """
    entries = as_list(record["pointer_candidates"], where, "pointer_candidates")
    pool = own_pool(record, where)
    kept: list[Mapping[str, Any]] = []
    sequences: list[list[int]] = []
    scores: list[float] = []
    failed = 0
    for i, entry in enumerate(entries):
        name = f"pointer_candidates[{i}]"
        if not isinstance(entry, Mapping):
            where.fail(name, "an object with 'pointer'", entry)
        if entry.get("eval_failed") or "fallback" in str(entry.get("vqa_eval_mode", "")).lower():
            failed += 1
            continue
        sequences.append(_pointer_ids(entry, pool, where, name))
        scores.append(_weighted_score(entry, where, name, options))
        kept.append(entry)
    group = group_of_ids(query_id, record, sequences, where, options)
    fill_group(
        group,
        scores,
        shot_scores=[[] for _ in kept],
        survived=[entry.get("gen_method", "beam") == "beam" for entry in kept],
        source=[str(entry.get("gen_method", "search")) for entry in kept],
        columns=_columns(kept, where, "pointer_candidates", options),
    )
    group.failed += failed
    group.zero_shot = _zero_shot(record, where, options)
    return group


def _pointer_ids(entry: Mapping[str, Any], pool: list[int] | None, where: Where, name: str) -> list[int]:
    pointer = entry.get("pointer")
    if pointer is None and entry.get("pointer_global") is None:
        where.fail(f"{name}.pointer", "a list of positions or row ids", sorted(entry))
    if entry.get("pointer_global") is not None:
        ids, positions, field = entry["pointer_global"], pointer, "pointer"
    else:
        ids, positions, field = pointer, entry.get("pointer_pos"), "pointer_pos"
    ids = as_ids(ids, where, f"{name}.pointer_global")
    if positions is not None and pool is not None:
        positions = as_ids(positions, where, f"{name}.{field}")
        found = [pool[p] if p < len(pool) else None for p in positions]
        if found != ids:
            where.fail(f"{name}.{field}", f"the pool positions of {ids}", positions, f"they stand for {found}")
    return ids


def _weighted_score(entry: Mapping[str, Any], where: Where, name: str, options: Options) -> float:
    if not options.score_weights:
        numeric = sorted(k for k, v in entry.items() if is_number(v) and k not in POINTER_FIELDS)
        where.fail(
            f"{name}.score",
            "a column to use as the score",
            numeric,
            "pass score_column='…' or a dict of column weights",
        )
    total = 0.0
    for column, weight in options.score_weights.items():
        total += weight * as_score(entry.get(column), where, f"{name}.{column}")
    return total


# ---------------------------------------------------------------- format 4: everything the search scored


def parse_scored(query_id: int, record: Mapping[str, Any], where: Where, options: Options) -> Group:
    """Format 4 as JSON: a pool and `sequences` of objects with a `prompt_order` or `search_order` of row ids and a
    `score`."""
    entries = as_list(record["sequences"], where, "sequences")
    kept: list[Mapping[str, Any]] = []
    sequences: list[list[int]] = []
    for i, entry in enumerate(entries):
        name = f"sequences[{i}]"
        if not isinstance(entry, Mapping):
            where.fail(name, "an object with 'prompt_order' or 'search_order'", entry)
        if entry.get("eval_failed"):
            continue
        if "search_order" in entry:
            ids = as_ids(entry["search_order"], where, f"{name}.search_order")
        elif "prompt_order" in entry:
            ids = to_search_order(
                as_ids(entry["prompt_order"], where, f"{name}.prompt_order"), options.construct_order
            )
        else:
            where.fail(name, "'prompt_order' or 'search_order'", sorted(entry))
        if not ids:
            where.fail(name, "at least one demonstration", entry, "the score without any belongs into 'zero_shot'")
        sequences.append(ids)
        kept.append(entry)
    gains = []
    for i, (entry, ids) in enumerate(zip(kept, sequences, strict=True)):
        shots = as_list(entry.get("shot_scores") or [], where, f"sequences[{i}].shot_scores")
        if shots and len(shots) != len(ids):
            where.fail(f"sequences[{i}].shot_scores", f"{len(ids)} gains, one a demonstration", shots)
        gains.append([as_score(v, where, f"sequences[{i}].shot_scores[{t}]") for t, v in enumerate(shots)])
    if options.score_weights:
        scores = [_weighted_score(entry, where, f"sequences[{i}]", options) for i, entry in enumerate(kept)]
    else:
        scores = [as_score(entry.get("score"), where, f"sequences[{i}].score") for i, entry in enumerate(kept)]
    group = group_of_ids(query_id, record, sequences, where, options)
    fill_group(
        group,
        scores,
        gains,
        survived=[bool(entry.get("beam", entry.get("survived", False))) for entry in kept],
        source=[str(entry.get("source", entry.get("gen_method", "search"))) for entry in kept],
        columns=_columns(kept, where, "sequences", options),
    )
    group.failed += len(entries) - len(kept)
    group.zero_shot = _zero_shot(record, where, options)
    return group


def parse_group(query_id: int, record: Mapping[str, Any], where: Where, options: Options) -> Group:
    """Format 4 as a row of our own dataset (Parquet, or JSON lines of it): sequences are pool positions in search
    order."""
    pool = as_ids(record["candidate_ids"], where, "candidate_ids")
    entries = as_list(record["sequences"], where, "sequences")
    n = len(entries)
    sequences = []
    for i, entry in enumerate(entries):
        positions = as_ids(entry, where, f"sequences[{i}]")
        if not positions or max(positions) >= len(pool):
            where.fail(f"sequences[{i}]", f"positions in the pool of {len(pool)}", positions)
        sequences.append([pool[p] for p in positions])

    def column(name: str, values: Any) -> list[Any]:
        values = as_list(values, where, name)
        if len(values) != n:
            where.fail(name, f"{n} entries, one a sequence", f"{len(values)} entries")
        return values

    stored = as_object(record.get("columns"), where, "columns")
    if options.score_weights:
        named = [
            dict(zip(stored, row, strict=True)) for row in zip(*(column(c, stored[c]) for c in stored), strict=True)
        ]
        scores = [_weighted_score(row, where, f"columns[{i}]", options) for i, row in enumerate(named or [{}] * n)]
    else:
        scores = [as_score(v, where, f"scores[{i}]") for i, v in enumerate(column("scores", record["scores"]))]
    gains = [
        [
            as_score(v, where, f"shot_scores[{i}][{t}]")
            for t, v in enumerate(as_list(shots or [], where, f"shot_scores[{i}]"))
        ]
        for i, shots in enumerate(column("shot_scores", record.get("shot_scores") or [[]] * n))
    ]
    for i, shots in enumerate(gains):
        if shots and len(shots) != len(sequences[i]):
            where.fail(f"shot_scores[{i}]", f"{len(sequences[i])} gains, one a demonstration", shots)
    columns: dict[str, list[float | None]] = {}
    for name in options.reward_columns:
        values = stored.get(name)
        values = [None] * n if values is None else column(f"columns.{name}", values)
        columns[name] = [as_optional_score(v, where, f"columns.{name}[{i}]") for i, v in enumerate(values)]
    group = group_of_ids(query_id, record, sequences, where, options)
    fill_group(
        group,
        scores,
        gains,
        survived=[bool(v) for v in column("survived", record.get("survived") or [False] * n)],
        source=[str(v) for v in column("source", record.get("source") or ["search"] * n)],
        columns=columns,
    )
    group.zero_shot = _zero_shot(record, where, options)
    for name, value in as_object(record.get("notes"), where, "notes").items():
        if name not in NOTES:
            where.fail("notes", f"names among {', '.join(NOTES)}", name)
        counted = type(getattr(group, name)) is int
        if type(value) is not type(getattr(group, name)) or counted and not 0 <= value < 2**31:
            where.fail(f"notes.{name}", "a whole number below 2**31" if counted else "true or false", value)
        setattr(group, name, getattr(group, name) + value if counted else getattr(group, name) or value)
    return group


# ---------------------------------------------------------------- shared by the formats


def _columns(
    entries: Sequence[Mapping[str, Any]], where: Where, name: str, options: Options
) -> dict[str, list[float | None]]:
    return {
        column: [
            as_optional_score(entry.get(column), where, f"{name}[{i}].{column}") for i, entry in enumerate(entries)
        ]
        for column in options.reward_columns
    }


def _zero_shot(record: Mapping[str, Any], where: Where, options: Options) -> float:
    value = record.get("zero_shot")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    if options.score_weights:  # it is in units of the log's own score
        return math.nan
    return as_score(value, where, "zero_shot")
