"""The shards of a process: batches of queries that are searched together, and whether the frozen model still lives."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
from accelerate import PartialState
from tqdm.auto import tqdm

from ..data.examples import Example
from ..scorers import Scorer, ScorerError
from ..search.beam_search import beam_search
from ..search.judges import make_judge
from .generate_arguments import GenerateArguments
from .generate_folder import read_shard, read_unreadable, write_shard
from .generate_task import make_proposals


DEAD_BATCHES = 3  # so many batches in a row without one record, and the scorer is taken for dead

Shard = tuple[Path, dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]  # path, about, records, failures


def search_shards(
    arguments: GenerateArguments,
    scorer: Scorer,
    rows: dict[int, Example],
    pools: dict[int, list[Example]],
    todo: dict[Path, list[int]],
    began: float,
) -> None:
    """
    Searches the queries of each shard and writes it, until the time is up.

    A batch without a record may be the queries' fault or a dead scorer's. It is held back until a later batch has a
    record, or, at the end, until the scorer answers again what it has answered before.

    Raises:
        [`ScorerError`]: if it is the scorer; nothing of the batches that are held back is written.
    """
    state, proposals = PartialState(), make_proposals(arguments, pools)
    judge = None if arguments.judge == "none" else make_judge(arguments.judge_by, rows.values())
    limit = float("inf") if arguments.max_hours is None else began + 3600 * arguments.max_hours
    unreadable = read_unreadable(Path(arguments.output_dir))
    held: list[Shard] = []
    sequences, started = 0, time.monotonic()
    quiet = arguments.disable_tqdm or not state.is_main_process
    with tqdm(total=sum(map(len, todo.values())), unit=" queries", desc="beam search", disable=quiet) as progress:
        for number, (path, queries) in enumerate(todo.items()):
            if number and time.monotonic() >= limit:
                break
            asked = time.monotonic()
            records, failures = beam_search(
                scorer,
                [rows[query] for query in queries],
                [pools[query] for query in queries],
                arguments.search,
                proposals=proposals,
                judge=judge,
            )
            for failure in failures:
                failure["reason"] = unreadable.get(str(failure["query_id"]), failure["reason"])
            about: dict[str, Any] = {
                "queries": queries,
                "sequences": sum(len(record["sequences"]) for record in records),
                "survivors": sum(sum(record["survived"]) for record in records),
                "seconds": round(time.monotonic() - asked, 3),
            }
            if records:
                _flush(held)
            if records or all(failure["kind"] == "pool" for failure in failures):
                write_shard(path, about, records, failures)
            else:
                held.append((path, about, records, failures))
                if len(held) == DEAD_BATCHES:
                    raise _dead(held)
            sequences += about["sequences"]
            progress.set_postfix_str(f"{sequences / max(time.monotonic() - started, 1e-9):.0f} sequences/s", False)
            progress.update(len(queries))
    if held and not _lives(arguments, scorer, rows):
        raise _dead(held)
    _flush(held)


def _flush(held: list[Shard]) -> None:
    for shard in held:
        write_shard(*shard)
    held.clear()


def _lives(arguments: GenerateArguments, scorer: Scorer, rows: dict[int, Example]) -> bool:
    """Whether the scorer answers once more what it was asked for the first record of the log; if there is none, no."""
    for path in sorted(Path(arguments.output_dir, "shards").glob("*.jsonl")):
        for line in read_shard(path)[1]:
            record = orjson.loads(line)
            query, first = rows[record["query_id"]], rows[record["candidate_ids"][record["sequences"][0][0]]]
            return bool(
                beam_search(scorer, [query], [[first]], replace(arguments.search, num_shots=1, judge="none"))[0]
            )
    return False


def _dead(held: list[Shard]) -> ScorerError:
    failures = [failure for *_, batch in held for failure in batch if failure["kind"] != "pool"]
    ids = [failure["query_id"] for failure in failures]
    return ScorerError(
        f"the scorer gave nothing usable for {len(held)} batch{'es' * (len(held) > 1)} in a row (queries {ids[:5]}"
        f"{' …' * (len(ids) > 5)}; the last reason: {failures[-1]['reason']}). Nothing of this was written: mend the "
        "scorer and give the same command again. If it is the queries, leave them out."
    )
