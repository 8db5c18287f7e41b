"""What lies in the folder of a log while it is made, and whether a run may go on with it.

`settings.json` and `scorer.json` hold what a run that goes on must agree with, `pools.jsonl` the pools, and `shards/`
one file for each batch of queries. Every file is written beside its place and then renamed, so what is there is whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
from transformers.utils import cached_file

from ..atomic import atomic_file, refuse_links
from ..data.examples import Example
from ..data.fingerprint import file_digest
from .generate_arguments import GenerateArguments


# what may change when a run goes on: it has no say in what is written
FREE = (
    "output_dir", "log_name", "resume", "overwrite", "max_hours", "device", "cache_dir", "disable_tqdm",
    "server_batch_size", "server_concurrency", "server_timeout",
)  # fmt: skip
MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".model", ".txt", ".jinja")
BLOCK, EVERY = 1 << 12, 1 << 18  # bytes of large files that are read, and of which they stand for


def prepare(arguments: GenerateArguments, rows: dict[int, Example]) -> None:
    """Refuses to mix two logs in one folder."""
    output = Path(arguments.output_dir)
    files = ("settings.json", "scorer.json", "unreadable.json", "pools.jsonl", "failures.json", "manifest.json")
    own = [output / name for name in files]
    everything = (*own, output / "shards", output / "cache", output / arguments.log_name)
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
    # inputs of which an earlier version wrote no digest down are not compared
    differ = [
        name
        for name in {**there, **here}
        if there.get(name) != here.get(name) and (name in there or not name.startswith("inputs."))
    ]
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
    """Digests of what the arguments name."""
    named = {"candidate_pools": arguments.candidate_pools, "embeddings": arguments.embeddings}
    if arguments.selector is not None:  # a folder, or an id on the Hub
        named["selector"] = cached_file(arguments.selector, "model.safetensors")
    inputs = {name: file_digest(path) for name, path in named.items() if path is not None and Path(path).is_file()}
    if arguments.embeddings is not None and Path(arguments.embeddings).is_dir():
        arrays = sorted(Path(arguments.embeddings).glob("*.npy"))
        inputs["embeddings"] = _joined((array.name, file_digest(str(array))) for array in arrays)
    for name in ("model", "tokenizer", "text_encoder", "image_encoder"):
        folder = getattr(arguments, name)
        if folder is not None and Path(folder).is_dir():
            inputs[name] = model_digest(Path(folder), arguments.gguf_file if name == "model" else None)
    return {"rows": len(rows), "rows_sha256": rows_digest(rows), **inputs}


def model_digest(folder: Path, gguf_file: str | None = None) -> str:
    """
    A digest of a model's files (of the GGUF files that one only), by names, sizes and what they hold: of large ones
    the first 4 KiB of every 256, so that weights of any size take no time and a trained layer is not missed.
    """
    found = (*folder.iterdir(), *folder.glob("*_Pooling/config.json"))  # the latter is of sentence-transformers
    parts = []
    for path in sorted(path for path in found if path.suffix in MODEL_FILES and path.is_file()):
        if path.suffix == ".gguf" and path.name != (gguf_file or path.name):
            continue
        size, digest = path.stat().st_size, hashlib.sha256()
        with open(path, "rb") as stream:
            for start in range(0, size, EVERY):
                stream.seek(start)
                digest.update(stream.read(BLOCK if size > EVERY else size))
        parts.append((path.relative_to(folder).as_posix(), size, digest.hexdigest()))
    return _joined(parts)


def _joined(parts: Iterable[tuple]) -> str:
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()


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


def read_unreadable(output: Path) -> dict[str, str]:
    """Why rows are left out whose image cannot be read, by row id; empty where there are none."""
    path = output / "unreadable.json"
    return orjson.loads(path.read_bytes()) if path.exists() else {}


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
