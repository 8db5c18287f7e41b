"""Beam logs in the layouts of the Lever-LM family, with their file names, as `load_beams` reads them back."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from .orders import parse_log_name
from .records import BeamDataError, Where


logger = logging.getLogger(__name__)


def export_lever_lm(
    dataset: Iterable[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    construct_order: str = "left",
    task: str = "vqa",
    dataset_name: str = "dataset",
    model: str = "model",
    sampler: str = "sampler",
    scorer: str = "infoscore",
) -> Path:
    """
    Writes the surviving beams of a log as a Lever-LM file.

    Beams are sorted by descending score. `score_list` holds the last step's gain over the beam's own parent, as these
    files do, and `shot_scores` the gains of all steps, from which `load_beams` makes the score again. Where a query's
    survivors have no `shot_scores`, its `score_list` holds the scores themselves, without `shot_scores` beside it.
    What the search scored besides the survivors, and the zero-shot score, are lost: the layout has no place for them.

    The pools have no place in it either. They go to a file of the same name in the folder `pools` beside it, for
    `load_beams(…, candidate_pools=…)`.

    Args:
        dataset (`Dataset` or rows of one):
            Groups as `load_beams` gives them, one row a query; all survivors of one length.
        path (`str` or `Path`):
            A `.json` file, or a folder, in which the file gets the name that the family uses.
        construct_order (`str`, *optional*, defaults to `"left"`):
            How the search built its prompts, for the file's name. The ids are the same either way: the file has the
            demonstration found last first, which is the prompt's order for `"left"` and its reverse for `"right"`.
        task, dataset_name, model, sampler, scorer (`str`, *optional*):
            Parts of the file's name. Only `model` may hold a hyphen, and none a slash.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: a part of the name cannot be read back from it.
        [`BeamDataError`]: there is no survivor, survivors have different lengths, a score is not finite, or a query is
            there twice.

    Example:

    ```python
    >>> import tempfile
    >>> from lever_grpo.data import load_beams
    >>> from lever_grpo.data.export import export_lever_lm
    >>> row = {"query_id": 7, "candidate_ids": [3, 4, 5], "sequences": [[1, 0], [0, 2]], "scores": [0.5, 0.1],
    ...        "shot_scores": [[0.25, 0.25], [0.1, 0.0]], "survived": [True, False]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = export_lever_lm([row], folder, dataset_name="okvqa", model="SmolLM2-135M", sampler="text_sim")
    ...     print(path.name)
    ...     print(path.read_text())
    ...     load_beams(path, candidate_pools=path.parent / "pools" / path.name, cache_dir=folder)[0]["sequences"]
    vqa-okvqa-SmolLM2-135M-text_sim-scorer:infoscore-construct_order:left-beam_size:1-few_shot:2-candidate_num:3-sample_num:1.json
    {"7": {"id_list": [[3, 4, 7]], "score_list": [0.25], "shot_scores": [[0.25, 0.25]]}}
    [[1, 0]]

    ```
    """
    parts = {"task": task, "dataset": dataset_name, "model": model, "sampler": sampler, "scorer": scorer}
    return _export(dataset, path, {**parts, "construct_order": construct_order}, lever_plus=False)


def export_lever_plus(
    dataset: Iterable[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    construct_order: str = "left",
    task: str = "vqa",
    dataset_name: str = "dataset",
    model: str = "model",
    sampler: str = "sampler",
    scorer: str = "infoscore",
) -> Path:
    """
    Writes the surviving beams of a log as a Lever-Plus beam file.

    That is what [`export_lever_lm`] writes, and for each query `few_shot_num` and `beams`, each with its `shots` in
    the order they were found, `final_score` (the last step's gain, as in `score_list`) and `full_sequence`. Every
    survivor must have `shot_scores`.

    Args and errors are those of [`export_lever_lm`].

    Example:

    ```python
    >>> import json, tempfile
    >>> from lever_grpo.data.export import export_lever_plus
    >>> row = {"query_id": 7, "candidate_ids": [3, 4, 5], "sequences": [[1, 0]], "scores": [0.5],
    ...        "shot_scores": [[0.25, 0.25]], "survived": [True]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     json.loads(export_lever_plus([row], f"{folder}/log.json").read_text())["7"]["beams"][0]["shots"]
    [{'id': 4, 'score': 0.25}, {'id': 3, 'score': 0.25}]

    ```
    """
    parts = {"task": task, "dataset": dataset_name, "model": model, "sampler": sampler, "scorer": scorer}
    return _export(dataset, path, {**parts, "construct_order": construct_order}, lever_plus=True)


def _export(
    dataset: Iterable[Mapping[str, Any]], path: str | os.PathLike, parts: Mapping[str, str], lever_plus: bool
) -> Path:
    if parts["construct_order"] not in ("left", "right"):
        raise ValueError(f"construct_order must be 'left' or 'right', got {parts['construct_order']!r}")
    records: dict[int, dict[str, Any]] = {}
    pools: dict[int, list[int]] = {}
    empty = 0
    for row in dataset:
        where = Where("log", f"query {row['query_id']}")
        if row["query_id"] in pools:
            where.fail("query_id", "one row a query", row["query_id"], "load the log with one number of shots")
        pools[row["query_id"]] = list(row["candidate_ids"])
        if any(row["survived"]):
            records[row["query_id"]] = _record(row, where, lever_plus)
        else:
            empty += 1
    lengths = {len(beam) - 1 for record in records.values() for beam in record["id_list"]}
    if len(lengths) != 1:
        raise BeamDataError(
            f"log: expected surviving sequences of one length, found {sorted(lengths) or 'no survivor'} in "
            f"{len(pools)} queries; choose a length with load_beams(…, shots=…)"
        )
    if empty:
        logger.warning("%d of %d queries have no survivor and are not in the file", empty, len(pools))
    pools = {query: pools[query] for query in records}
    file = Path(path)
    if file.suffix != ".json":
        sizes = {
            "beam_size": max(len(record["id_list"]) for record in records.values()),
            "few_shot": lengths.pop(),
            "candidate_num": max(map(len, pools.values())),
            "sample_num": len(records),
        }
        file = file / _log_name({**parts, **sizes})
    # the pools first: where the log is, its pools are
    for path, content in ((file.parent / "pools" / file.name, pools), (file, records)):
        with atomic_file(path) as stream:
            stream.write(json.dumps(content, allow_nan=False).encode())
    return file


def _record(row: Mapping[str, Any], where: Where, lever_plus: bool) -> dict[str, Any]:
    """One query of a Lever-LM file."""
    query, pool, scores = row["query_id"], row["candidate_ids"], row["scores"]
    survivors = [i for i, survived in enumerate(row["survived"]) if survived]
    survivors.sort(key=lambda i: -scores[i])
    gains = [list((row.get("shot_scores") or [[]] * len(scores))[i]) for i in survivors]
    for i, shots in zip(survivors, gains, strict=True):
        if not all(map(math.isfinite, [scores[i], *shots])):
            where.fail(f"scores[{i}]", "finite numbers", [scores[i], *shots])
        if shots and len(shots) != len(row["sequences"][i]):
            where.fail(f"shot_scores[{i}]", f"{len(row['sequences'][i])} gains, one a demonstration", shots)
    # the demonstration that was found last stands first, whatever the prompt's order
    id_list = [[pool[p] for p in reversed(row["sequences"][i])] + [query] for i in survivors]
    if not all(gains):
        if lever_plus:
            where.fail("shot_scores", "a gain a shot, which Lever-Plus files hold", gains, "use export_lever_lm")
        return {"id_list": id_list, "score_list": [scores[i] for i in survivors]}
    record: dict[str, Any] = {"id_list": id_list, "score_list": [shots[-1] for shots in gains], "shot_scores": gains}
    if lever_plus:
        record["few_shot_num"] = len(gains[0])
        record["beams"] = [
            {
                "shots": [{"id": i, "score": score} for i, score in zip(ids[-2::-1], shots, strict=True)],
                "final_score": shots[-1],
                "full_sequence": ids,
            }
            for ids, shots in zip(id_list, gains, strict=True)
        ]
    return record


def _log_name(settings: Mapping[str, Any]) -> str:
    name = (
        "{task}-{dataset}-{model}-{sampler}-scorer:{scorer}-construct_order:{construct_order}-beam_size:{beam_size}"
        "-few_shot:{few_shot}-candidate_num:{candidate_num}-sample_num:{sample_num}.json"
    ).format(**settings)
    if parse_log_name(name) != settings:
        raise ValueError(
            f"the file name {name!r} would not be read back: of task, dataset_name, model, sampler and scorer only "
            "model may hold a hyphen, none a slash, and none may be empty"
        )
    return name
