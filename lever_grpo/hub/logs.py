"""A beam log as a dataset repository: Parquet that the dataset viewer shows, a card, and the manifest."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from huggingface_hub import DatasetCard, DatasetCardData

from .. import __version__
from ..data import Example, load_beams
from .cards import CITATION, TAGS, json_block, versions, without_paths
from .push import CARD_FILE, commit_files, hub_api


MANIFEST_FILE = "manifest.json"
_ROWS_AT_A_TIME = 100  # a row group: small enough for the dataset viewer with images too

_COLUMNS = """\
| column | meaning |
| --- | --- |
| `query_id`, `candidate_ids` | row ids of the query and of its pool |
| `sequences` | pool positions in the order of picking, one list a scored sequence |
| `scores`, `shot_scores` | score of each sequence, and the gain of each of its shots; higher is better |
| `survived` | whether the search kept the sequence as a beam |
| `zero_shot` | score without demonstrations |
| `source`, `notes` | how a sequence was found; what was dropped or assumed while reading |
| `columns` | further rewards by name, where there are any |"""

_LIMITS = """\
* The scores are one frozen model's opinion, with one prompt; they need not hold for another.
* What was scored is what the search looked at: absent sequences are unknown, not bad."""


def push_log(
    log: str | os.PathLike | Dataset | DatasetDict,
    repo_id: str,
    *,
    rows: Sequence[Example] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    license: str | None = None,
) -> str:
    """
    Pushes a beam log as a dataset, in one commit.

    `load_dataset(repo_id)` gives the groups, one row a query; with `rows`, `load_dataset(repo_id, "rows")` gives what
    their ids stand for, with images that the dataset viewer shows.

    Args:
        log (`str`, `Path`, `Dataset` or `DatasetDict`):
            Output folder of `lever-grpo generate`, a log that [`load_beams`] reads without options, or groups that it
            gave.
        repo_id (`str`):
            Dataset repository, made if it is not there.
        rows (`list[Example]`, *optional*):
            Questions, answers and images. Left out by default: they may be somebody else's.
        private, token, revision:
            As in [`~hub.push_selector`].
        license (`str`, *optional*):
            Licence of the data, for the card.

    Returns:
        `str`: address of the repository.

    Raises:
        [`BeamDataError`]: the log cannot be read as it stands.
        ValueError: if `rows` lack a row that the log speaks of.

    Example:

    ```python
    >>> from lever_grpo.hub import push_log
    >>> push_log("outputs/my_log", "me/my-log")  # doctest: +SKIP
    'https://huggingface.co/datasets/me/my-log'

    ```
    """
    manifest = None
    if not isinstance(log, Dataset | DatasetDict):
        path = Path(log)
        about = (path if path.is_dir() else path.parent) / MANIFEST_FILE
        if about.exists():
            manifest = without_paths(json.loads(about.read_text(encoding="utf-8")))
        log = load_beams(path / manifest["arguments"]["log_name"] if manifest and path.is_dir() else path)
    splits: Mapping[str, Dataset] = log if isinstance(log, DatasetDict) else {"train": log}
    if rows is not None:
        _check_rows(splits, rows)
    api = hub_api()
    repo = api.create_repo(repo_id, repo_type="dataset", private=private, token=token, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path | bytes] = {}
        for name, groups in splits.items():
            files[f"beams/{name}.parquet"] = path = Path(folder, f"{name}.parquet")
            groups.to_parquet(path)
        if rows is not None:
            files["rows/rows.parquet"] = path = Path(folder, "rows.parquet")
            _write_rows(rows, path)
        if manifest is not None:
            files[MANIFEST_FILE] = json.dumps(manifest, indent=2, ensure_ascii=False).encode()
        files[CARD_FILE] = str(_log_card(repo.repo_id, splits, rows, manifest, license)).encode()
        message = f"beam log of lever_grpo {__version__}"
        commit_files(repo.repo_id, files, message, repo_type="dataset", token=token, revision=revision)
    return str(repo)


def _check_rows(splits: Mapping[str, Dataset], rows: Sequence[Example]) -> None:
    known = {row.id for row in rows}
    for name, groups in splits.items():
        spoken_of = {i for row in groups.select_columns(["query_id", "candidate_ids"]) for i in _ids_of(row)}
        missing = sorted(spoken_of - known)
        if missing:
            raise ValueError(
                f"rows: the log ({name}) speaks of {len(missing)} rows that are not among them ({missing[:5]}); give "
                "the rows of the task that the log was made of."
            )


def _ids_of(group: Mapping[str, Any]) -> Iterable[int]:
    return (group["query_id"], *group["candidate_ids"])


def _row_features(rows: Sequence[Example]) -> Features:
    features: dict[str, Any] = {
        "id": Value("int64"),
        "question": Value("string"),
        "answers": List(Value("string")),
        "entity": Value("string"),
        "external_id": Value("string"),
    }
    if any(row.image is not None for row in rows):
        features["image"] = Image()
    return Features(features)


def _write_rows(rows: Sequence[Example], path: Path) -> None:
    """Rows as Parquet, a part at a time; images as the bytes that they are on the disk."""
    schema = _row_features(rows).arrow_schema  # names the image column, for `datasets` and the viewer
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            part = [_record(row) for row in rows[start : start + _ROWS_AT_A_TIME]]
            writer.write_table(pa.Table.from_pylist(part, schema=schema))


def _record(row: Example) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": row.id,
        "question": row.question,
        "answers": list(row.answers),
        "entity": row.entity,
        "external_id": row.external_id,
    }
    if isinstance(row.image, Path):
        record["image"] = {"bytes": row.image.read_bytes(), "path": row.image.name}
    elif row.image is not None:
        record["image"] = {"bytes": row.image, "path": None}
    return record


def _log_card(
    repo_id: str,
    splits: Mapping[str, Dataset],
    rows: Sequence[Example] | None,
    manifest: Mapping[str, Any] | None,
    license: str | None,
) -> DatasetCard:
    files = [{"split": name, "path": f"beams/{name}.parquet"} for name in splits]
    configs: list[dict[str, Any]] = [{"config_name": "beams", "default": True, "data_files": files}]
    if rows is not None:
        configs.append({"config_name": "rows", "data_files": [{"split": "train", "path": "rows/rows.parquet"}]})
    name = repo_id.rsplit("/", 1)[-1]
    data = DatasetCardData(license=license, tags=[*TAGS, "beam-log"], pretty_name=name, configs=configs)
    lines = ["| split | queries | sequences | lengths | survivors | scores |"]
    lines.append("| --- | ---: | ---: | --- | ---: | --- |")
    for split, groups in splits.items():
        scores = [score for row in groups["scores"] for score in row]
        lengths = sorted({len(sequence) for row in groups["sequences"] for sequence in row})
        survivors = sum(sum(row) for row in groups["survived"])
        cells = (len(groups), len(scores), lengths, survivors, f"{min(scores):.4g} … {max(scores):.4g}")
        lines.append(f"| {split} | " + " | ".join(map(str, cells)) + " |")
    parts = [
        f"# {name}",
        "A *beam log*: what a frozen model thought of many sequences of demonstrations, for each query. One row is "
        "one *group*, a query with its pool of candidates and everything that was scored for it. `lever_grpo` trains "
        "demonstration selectors on such logs.",
        "\n".join(lines),
        f"## Use\n\n{_usage(repo_id, next(iter(splits)), rows is not None)}",
        f"## Columns\n\n{_COLUMNS}",
    ]
    if manifest is not None:
        parts.append(f"## Manifest\n\nHow the log was made (`{MANIFEST_FILE}`):\n\n{json_block(manifest)}")
    parts += [f"## Versions\n\n{versions()}", f"## Limits\n\n{_LIMITS}", f"## Citation\n\n{CITATION}"]
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _usage(repo_id: str, split: str, with_rows: bool) -> str:
    rows = f'\nrows = load_dataset("{repo_id}", "rows", split="train")  # what the ids stand for' if with_rows else ""
    return f"""\
```python
from datasets import load_dataset
from huggingface_hub import hf_hub_download
from lever_grpo import load_beams

groups = load_dataset("{repo_id}", split="{split}"){rows}
# a file for `load_beams` and for `--beam_data` of a recipe
path = hf_hub_download("{repo_id}", "beams/{split}.parquet", repo_type="dataset")
groups = load_beams(path)
```"""
