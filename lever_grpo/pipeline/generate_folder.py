"""What lies in the folder of a log while it is made, and whether a run may go on with it.

`settings.json` and `scorer.json` hold what a run that goes on must agree with, `pools.jsonl` the pools, and `shards/`
one file for each batch of queries. Every file is written beside its place and then renamed, so what is there is whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from ..atomic import atomic_file, refuse_links
from ..data.examples import Example
from ..data.fingerprint import file_digest
from .generate_arguments import GenerateArguments


# what may change when a run goes on: it has no say in what is written
FREE = ("output_dir", "log_name", "resume", "overwrite", "max_hours", "device", "cache_dir", "disable_tqdm")


def prepare(arguments: GenerateArguments, rows: dict[int, Example]) -> None:
    """Refuses to mix two logs in one folder."""
    output = Path(arguments.output_dir)
    own = [output / name for name in ("settings.json", "scorer.json", "pools.jsonl", "failures.json", "manifest.json")]
    everything = (*own, output / "shards", output / arguments.log_name)
    refuse_links(everything)
    earlier = [path for path in everything if path.exists()]
    if earlier and arguments.overwrite:
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif earlier and not (arguments.resume and own[0].exists()):
        raise ValueError(
            f"output_dir={arguments.output_dir!r} holds an earlier log ({', '.join(p.name for p in earlier)}); go on "
            "with it with --resume true, delete it with --overwrite true, or name another folder."
        )
    given = {name: value for name, value in asdict(arguments).items() if name not in FREE}
    agree(own[0], {"arguments": given, "inputs": _inputs(arguments, rows)}, f"output_dir={arguments.output_dir!r}")


def agree(path: Path, settings: dict[str, Any], what: str) -> None:
    """Writes settings down, or compares them with those that are there."""
    wanted = orjson.loads(orjson.dumps(settings))  # as they read back: tuples are lists
    if not path.exists():
        write_json(path, wanted)
        return
    there, here = _flat(orjson.loads(path.read_bytes())), _flat(wanted)
    differ = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differ:
        shown = "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in differ[:5])
        raise ValueError(
            f"{what} does not agree with {path.name} of the log that is to go on ({shown}). Go on with the same "
            "settings, name another folder, or start again with --overwrite true."
        )


def rows_digest(rows: dict[int, Example]) -> str:
    """A digest of all that is known of the rows of a task, the content of their images included."""
    # many questions may be about one image, which is read once
    files = {row.image for row in rows.values() if isinstance(row.image, Path)}
    images: dict[Any, str] = {path: file_digest(str(path)) for path in files}
    digest = hashlib.sha256()
    for row in rows.values():
        image = hashlib.sha256(row.image).hexdigest() if isinstance(row.image, bytes) else images.get(row.image)
        digest.update(repr((row.id, row.question, row.answers, row.entity, image)).encode())
    return digest.hexdigest()


def _inputs(arguments: GenerateArguments, rows: dict[int, Example]) -> dict[str, Any]:
    """Digests of what the arguments name by path."""
    named = {"candidate_pools": arguments.candidate_pools}
    if arguments.selector is not None:
        named["selector"] = str(Path(arguments.selector, "model.safetensors"))
    inputs = {name: file_digest(path) for name, path in named.items() if path is not None and Path(path).is_file()}
    return {"rows": len(rows), "rows_sha256": rows_digest(rows), **inputs}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as stream:
        stream.write(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")


def write_pools(path: Path, queries: Sequence[int], pools: Sequence[Sequence[int]]) -> None:
    """The pools of the queries that have one."""
    with atomic_file(path) as stream:
        for query, pool in zip(queries, pools, strict=True):
            if pool:
                stream.write(orjson.dumps({"query_id": query, "candidate_ids": pool}) + b"\n")


def read_pools(path: Path, queries: Sequence[int], rows: dict[int, Example]) -> dict[int, list[Example]]:
    """The pool of each query; an empty one where the file has none."""
    records = map(orjson.loads, path.read_bytes().splitlines())
    pools = {record["query_id"]: [rows[i] for i in record["candidate_ids"]] for record in records}
    return {query: pools.get(query, []) for query in queries}


def write_shard(path: Path, about: dict[str, Any], records: list[dict], failures: list[dict]) -> None:
    """What a batch of queries gave: a line about it, the records, the failures."""
    lines = [
        {"_shard": {**about, "records": len(records)}},
        *records,
        *({"_failure": failure} for failure in failures),
    ]
    with atomic_file(path) as stream:
        stream.writelines(orjson.dumps(line) + b"\n" for line in lines)


def read_shard(path: Path) -> tuple[dict[str, Any], list[bytes], list[dict[str, Any]]]:
    """The same again; records as the lines that they are in the log."""
    head, *lines = path.read_bytes().splitlines(keepends=True)
    about = orjson.loads(head)["_shard"]
    count = about["records"]
    return about, lines[:count], [orjson.loads(line)["_failure"] for line in lines[count:]]
