"""`load_beams`: every kind of beam log as one dataset of groups, one row a group.

The builder does what `datasets` builders do (typed features, cache, processes, streaming); the formats are read in
`formats.py`, the files in `readers.py`. Fields of `BeamJsonConfig` are part of the cache's key, and so is the content
of the files.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.builder import Key
from datasets.data_files import DataFilesDict

from .columns import batches, read_tables
from .fingerprint import code_digest, data_files_list, plain_path, side_file_key
from .groups import NOTES, group_features
from .orders import parse_log_name
from .peek import peek, score_weights
from .pools import PoolSource, read_external_ids
from .readers import iter_texts, local_files
from .records import BeamDataError, Group, Options


logger = logging.getLogger(__name__)

# of a table in the Arrow file. Who looks at one column of a mapped file has a few pages of each table in memory, so
# that small tables would make memory grow with the file
TABLE_ROWS = 8192
TABLE_BYTES = 1 << 23


@dataclass
class BeamJsonConfig(datasets.BuilderConfig):
    """Options of [`BeamJson`]; the same as those of [`load_beams`], where they are described."""

    candidate_pools: Any = None
    shots: int | Sequence[int] | None = None
    reward_columns: Sequence[str] | None = None
    score_column: str | Mapping[str, float] | None = None
    higher_is_better: bool = True
    rebuild_pools: bool = False
    construct_order: str = "left"
    max_group_size: int | None = None
    external_ids: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        shots = [self.shots] if isinstance(self.shots, int) else self.shots
        if shots is not None and (not shots or len(set(shots)) != len(shots) or any(s < 1 for s in shots)):
            raise ValueError(f"shots must be a positive number or a list of different ones, got {self.shots!r}")
        if self.construct_order not in ("left", "right"):
            raise ValueError(f"construct_order must be 'left' or 'right', got {self.construct_order!r}")
        if self.max_group_size is not None and self.max_group_size < 1:
            raise ValueError(f"max_group_size must be at least 1, got {self.max_group_size!r}")
        if isinstance(self.reward_columns, str):
            raise ValueError(f"reward_columns must be a list of names, got the string {self.reward_columns!r}")

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        # a side file is named by its path, but it is its content that the groups are made from
        config_kwargs = dict(config_kwargs)
        for name in ("candidate_pools", "external_ids"):
            if config_kwargs.get(name) is not None:
                config_kwargs[name] = side_file_key(config_kwargs[name])
        return super().create_config_id(config_kwargs, custom_features)


class BeamJson(datasets.ArrowBasedBuilder):
    """Builder of datasets of groups from beam logs of formats 1 to 4, found from the content of the files.

    Most callers want [`load_beams`]. The builder itself is for those who need its steps.

    Example:

    ```python
    >>> import json, pathlib, tempfile
    >>> from lever_grpo.data import BeamJson
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> record = {"id_list": [[3, 4, 7]], "score_list": [0.1], "shot_scores": [[0.2, 0.1]], "candidate_ids": [3, 4, 5]}
    >>> _ = (folder / "log.json").write_text(json.dumps({"7": record}))
    >>> builder = BeamJson(data_files=str(folder / "log.json"), cache_dir=str(folder / "cache"))
    >>> builder.download_and_prepare()
    >>> builder.as_dataset("train")[0]["sequences"]  # search order: 4 was found first, and stands at position 1
    [[1, 0]]

    ```
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = BeamJsonConfig
    DEFAULT_WRITER_BATCH_SIZE = TABLE_ROWS
    config: BeamJsonConfig

    warn_while_reading = False  # streams have no finished dataset to count warnings in

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()  # the reward columns are known when the files are: see _split_generators

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        if not self.config.data_files:
            raise ValueError(f"at least one data file must be given, got data_files={self.config.data_files!r}")
        downloaded = dl_manager.download(self.config.data_files)
        files = [file for split in downloaded.values() for file in split]
        found, kinds, metadata = peek(files)
        columns = tuple(found) if self.config.reward_columns is None else tuple(self.config.reward_columns)
        absent = [name for name in columns if name not in found]
        if absent:
            raise BeamDataError(f"{files[0]}: expected the reward columns {absent}, found {sorted(found)}")
        self.info.features = group_features(columns, external_ids=self.config.external_ids is not None)
        self.info.description = json.dumps({"beam_log": metadata}, default=str)
        weights = score_weights(self.config.score_column, kinds, found)
        return [
            # lists are what datasets shards over processes; tuples and dicts go to every one of them
            datasets.SplitGenerator(
                name=name, gen_kwargs={"files": list(split), "columns": columns, "weights": weights}
            )
            for name, split in downloaded.items()
        ]

    def _generate_shards(self, files: list[str], **_: Any) -> Iterator[str]:
        yield from files

    def _generate_tables(
        self, files: list[str], columns: tuple[str, ...], weights: dict[str, float] | None
    ) -> Iterator[tuple[Key, pa.Table]]:
        config = self.config
        options = Options(
            construct_order=config.construct_order,
            score_weights=weights,
            reward_columns=columns,
            higher_is_better=config.higher_is_better,
            rebuild_pools=config.rebuild_pools,
            shots=None
            if config.shots is None
            else (config.shots,)
            if isinstance(config.shots, int)
            else tuple(config.shots),
            max_group_size=config.max_group_size,
            pool_of=PoolSource(config.candidate_pools)
            if config.candidate_pools is not None
            else lambda query_id: None,
            external_id_of=None if config.external_ids is None else read_external_ids(config.external_ids).get,
        )
        schema = group_features(columns, external_ids=config.external_ids is not None).arrow_schema
        for number, file in enumerate(files):
            notes: Counter[str] = Counter()
            for index, table in enumerate(_tables_of_file(file, options, schema)):
                if self.warn_while_reading:
                    notes.update(_count_notes(table))
                yield Key(number, index), table
            if self.warn_while_reading:
                _warn_of_notes(file, notes)


def _tables_of_file(file: str, options: Options, schema: pa.Schema) -> Iterator[pa.Table]:
    settings = parse_log_name(file)
    empty: list[str] = []

    def note_empty(group: Group) -> None:
        empty.append(str(group.query_id))

    parts: list[pa.Table] = []
    for batch in batches(iter_texts(file)):
        parts += read_tables(batch, file, settings, options, schema, note_empty)
        if sum(map(len, parts)) >= TABLE_ROWS or sum(table.nbytes for table in parts) >= TABLE_BYTES:
            yield pa.concat_tables(parts)
            parts = []
    if any(map(len, parts)):
        yield pa.concat_tables(parts)
    if empty:
        shown = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        logger.warning("%s: %d queries have no usable sequence and give no group: %s", file, len(empty), shown)


def load_beams(
    paths: Any,
    *,
    candidate_pools: str | PathLike | Mapping[int, Sequence[int]] | None = None,
    shots: int | Sequence[int] | None = None,
    reward_columns: Sequence[str] | None = None,
    score_column: str | Mapping[str, float] | None = None,
    higher_is_better: bool = True,
    rebuild_pools: bool = False,
    construct_order: str = "left",
    max_group_size: int | None = None,
    external_ids: str | PathLike | Mapping[int, Any] | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    cache_dir: str | PathLike | None = None,
) -> Any:
    """Load beam logs of any known format as a dataset of groups: one row holds one query and all its sequences.

    Args:
        paths (`str`, `Path`, `list` or `dict`):
            File, folder, pattern or a list of them; JSON, JSON lines (both also gzipped) or Parquet, found from the
            content. A dict of split name to these gives a `DatasetDict`.
        candidate_pools (`str`, `Path` or `dict`, *optional*):
            Where the pools are when the log does not hold them: a dict of query id to candidate ids, or a file with
            `query_id` and `candidate_ids` (or `pool`) in each record. A pool inside the log is preferred.
        shots (`int` or `list[int]`, *optional*):
            Keep the sequences with this many demonstrations. A list gives one row per length, so that no group mixes
            lengths. By default a row holds whatever lengths its record has.
        reward_columns (`list[str]`, *optional*):
            Numeric fields of the sequences to keep in `columns`, beside the score. By default all that the first
            records of each file have. Where a sequence has no value, the value is `None`.
        score_column (`str` or `dict[str, float]`, *optional*):
            Column, or weighted sum of columns, to take as the score instead of the log's own. Format 3 files have no
            score of their own: by default `vqa_correct + vqa_acc_score`, or `beam_score` where these are not there.
        higher_is_better (`bool`, *optional*, defaults to `True`):
            Set it to `False` for logs whose best sequence has the lowest score: scores, per-shot scores and the
            zero-shot score are negated. Reward columns are not.
        rebuild_pools (`bool`, *optional*, defaults to `False`):
            Take the ids of the beams themselves, sorted, as the pool where there is no other. These are about ten
            good candidates and no bad ones, so a policy learns less from them, and numbers are not comparable with
            those on real pools.
        construct_order (`str`, *optional*, defaults to `"left"`):
            How `prompt_order` lists of format 4 were built: `"left"` puts a new demonstration before the others,
            `"right"` after. Formats 1 to 3 do not need it (see `lever_grpo.data.orders`).
        max_group_size (`int`, *optional*):
            Thin larger groups to this size: all survivors stay, and others evenly spaced by score. Deterministic.
        external_ids (`str`, `Path` or `dict`, *optional*):
            Row id to external id (a question id, say), as a dict or a JSON file; adds a column `external_id`.
        streaming (`bool`, *optional*, defaults to `False`):
            Return an `IterableDataset` that reads the files as it goes and writes no cache.
        num_proc (`int`, *optional*):
            Number of processes that read; work is split by file.
        cache_dir (`str` or `Path`, *optional*):
            Where the Arrow files go; by default the cache of `datasets`. Edited files and changed options are noticed.

    Returns:
        `Dataset`, or `IterableDataset`, or a dict of these, with the columns

        * `query_id`, `candidate_ids` (K,): row ids of the query and of its pool;
        * `sequences` (G, S): pool positions in search order; `scores` (G,); `survived` (G,), kept by the search as a
          beam;
        * `shot_scores` (G, S): gain of every shot, empty lists where unknown; `zero_shot`: NaN where unknown;
        * `columns`: further rewards by name, each (G,), absent when there are none; `source` (G,): how a sequence was
          found;
        * `notes`: what was dropped or assumed for this query (`repeats`, `failed`, `invalid`, `marginal`,
          `pool_rebuilt`, `query_in_pool`).

    Raises:
        [`BeamDataError`]: a record cannot be read as it stands.

    Example:

    ```python
    >>> import json, pathlib, tempfile
    >>> from lever_grpo.data import load_beams
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> record = {"id_list": [[3, 4, 7], [5, 4, 7]], "score_list": [0.1, 0.2], "shot_scores": [[0.2, 0.1], [0.2, 0.2]]}
    >>> _ = (folder / "log.json").write_text(json.dumps({"7": record}))
    >>> groups = load_beams(folder / "log.json", candidate_pools={7: [3, 4, 5]}, cache_dir=folder / "cache")
    >>> groups[0]["sequences"], [round(score, 2) for score in groups[0]["scores"]]
    ([[1, 0], [1, 2]], [0.3, 0.4])

    ```
    """
    by_split = paths if isinstance(paths, Mapping) else {"train": paths}
    data_files = DataFilesDict({str(name): data_files_list(local_files(value)) for name, value in by_split.items()})
    builder = BeamJson(
        cache_dir=plain_path(cache_dir),
        hash=code_digest(),
        data_files=data_files,
        candidate_pools=plain_path(candidate_pools),
        shots=shots if shots is None or isinstance(shots, int) else list(shots),
        reward_columns=None if reward_columns is None else list(reward_columns),
        score_column=score_column,
        higher_is_better=higher_is_better,
        rebuild_pools=rebuild_pools,
        construct_order=construct_order,
        max_group_size=max_group_size,
        external_ids=plain_path(external_ids),
    )
    one_split = None if isinstance(paths, Mapping) else "train"
    if streaming:
        builder.warn_while_reading = True
        return builder.as_streaming_dataset(split=one_split)
    files = sum(len(split) for split in data_files.values())
    builder.download_and_prepare(num_proc=None if num_proc is None else max(1, min(num_proc, files)))
    for name, about in builder.info.splits.items():
        if about.num_examples == 0:
            wanted = f" with shots={shots}" if shots is not None else ""
            raise BeamDataError(f"{data_files[name][0]}: expected at least one group{wanted}, found none")
    result = builder.as_dataset(split=one_split)
    for name, split in {one_split: result}.items() if one_split else result.items():
        first = data_files[name][0]
        _warn_of_notes(first, _count_notes(split.data))
    return result


def log_metadata(dataset: Any) -> dict[str, Any]:
    """What the log's file names and `_`-prefixed records say, by file name; empty when they say nothing.

    Example:

    ```python
    >>> from lever_grpo.data import load_sample, log_metadata
    >>> log_metadata(load_sample("country_facts").load("heldout"))
    {}

    ```
    """
    info = getattr(dataset, "info", None)  # a list of rows has none
    try:
        return json.loads(getattr(info, "description", None) or "{}").get("beam_log", {})
    except json.JSONDecodeError:
        return {}  # a description that somebody else wrote


def _count_notes(table: Any) -> dict[str, int]:
    notes = table.column("notes")
    return {name: pc.sum(pc.struct_field(notes, name)).as_py() or 0 for name in NOTES}


def _warn_of_notes(file: str, notes: Mapping[str, int]) -> None:
    """One line for each thing that was dropped or assumed, with its count."""
    texts = {
        "repeats": "{n} exact repeats of a sequence were dropped",
        "failed": "{n} failed or fallback evaluations were dropped",
        "invalid": "{n} sequences that repeat a demonstration or hold the query itself were dropped",
        "marginal": "{n} groups have no per-shot scores: their scores are the last step's gain over each beam's own "
        "parent, and "
        "beams of different parents are not comparable by them",
        "pool_rebuilt": "{n} pools were rebuilt from the beams and hold survivors only; pass candidate_pools for the "
        "real ones",
        "query_in_pool": "{n} pools held the query itself, which was taken out; check the candidate sampler",
    }
    for name, text in texts.items():
        if notes.get(name):
            logger.warning("%s: %s", file, text.format(n=notes[name]))
