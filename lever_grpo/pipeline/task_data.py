"""The queries that a run trains, validates and reports on."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoProcessor

from ..data import (
    DataCollatorForBeams,
    DataCollatorForRawBeams,
    EmbeddingStore,
    SampleTask,
    complete_scores,
    drop_candidates,
    keep_sources,
    load_beams,
    load_examples,
    load_sample,
    sample_examples,
    split_by_query,
)
from ..data.examples import Example
from ..data.records import BeamDataError
from ..models import PRESETS, ClipSelector
from ..search.features import ENCODERS_FILE, MAPS_FILE
from .arguments import RecipeArguments
from .evaluate_arguments import EvaluateArguments
from .pick_scorer import PickScorer


logger = logging.getLogger(__name__)


@dataclass
class TaskData:
    """
    What a run trains, validates and reports on.

    Args:
        name (`str`):
            Name for titles.
        train, validation, heldout (`datasets.Dataset`):
            Groups of three disjoint sets of queries.
        collator ([`DataCollatorForBeams`]):
            Makes batches of them, with the embeddings.
        policy_collator ([`DataCollatorForBeams`] or [`DataCollatorForRawBeams`]):
            Makes the batches that the selector sees: with the embeddings, or with the rows themselves.
        num_shots (`int`):
            Length of the sequences.
        similarity_features (`tuple[str, ...]`):
            Embeddings of the similarity baseline.
        entities (`dict[int, str]`):
            What each row is about.
        notes (`list[str]`):
            What a reader of the report must know, e.g. that scores were estimated.
        encoders (`list[Path]`):
            Files that say how the embeddings are made of rows, which go with every selector.
        row_texts (`dict[int, str]`):
            Question and answer of each row, where the rows are known.
        pick_scorer ([`PickScorer`], *optional*):
            Scores validation picks that their log does not hold, with `score_picks`.
    """

    name: str
    train: Dataset
    validation: Dataset
    heldout: Dataset
    collator: DataCollatorForBeams
    policy_collator: DataCollatorForBeams | DataCollatorForRawBeams
    num_shots: int
    similarity_features: tuple[str, ...] = ()
    entities: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    encoders: list[Path] = field(default_factory=list)
    row_texts: dict[int, str] = field(default_factory=dict)
    pick_scorer: PickScorer | None = None


def load_task(recipe: RecipeArguments, seed: int = 0) -> TaskData:
    """
    The data of a run: the sample's task, or the user's logs, with what is missing split off.

    Raises:
        ValueError: if options contradict each other or files lack what a run needs.
    """
    options: dict[str, Any] = {"max_group_size": recipe.max_group_size}
    sample = load_sample(recipe.task) if recipe.beam_data is None else None
    if sample is not None:
        name, store = recipe.task, sample.store
        paths: dict[str, Any] = dict(sample.splits)
        entities = sample.entities()
    else:
        assert recipe.beam_data is not None
        if recipe.embeddings is None:
            raise ValueError("beam_data is given without embeddings: the selector sees rows through them; name them.")
        name, store = Path(recipe.beam_data[0]).stem, EmbeddingStore.open(recipe.embeddings)
        paths = {"train": recipe.beam_data, "validation": recipe.validation_data, "heldout": recipe.heldout_data}
        paths = {split: path for split, path in paths.items() if path is not None}
        options["candidate_pools"] = recipe.candidate_pools
        entities = _read_entities(recipe.entities)
    collator, similarity = make_collator(recipe, store, sample)
    store.check_finite(sorted({*collator.query_features, *collator.candidate_features}))

    if recipe.heldout_fold is not None:
        paths.pop("heldout", None)
    shots = recipe.num_shots
    trained: int | list[int] = shots
    if recipe.min_shots is not None:
        if not 1 <= recipe.min_shots <= shots:
            raise ValueError(f"min_shots={recipe.min_shots} must lie in 1…num_shots, which is {shots}.")
        trained = list(range(recipe.min_shots, shots + 1))
    train = load_beams(paths["train"], shots=trained, **options)
    notes: list[str] = []
    held_back: dict[str, Dataset] = {}
    # the held-out queries first: they are the same whatever else is set aside
    for split, size, fold in (
        ("heldout", recipe.heldout_size, recipe.heldout_fold or 0),
        ("validation", recipe.validation_size, 0),
    ):
        if split in paths:
            of_length = trained if split == "validation" else shots
            held_back[split] = load_beams(paths[split], shots=of_length, **{**options, "max_group_size": None})
            continue
        divided = split_by_query(train, size, seed, entities, fold)
        train, queries = divided["train"], set(divided["test"]["query_id"])
        held_back[split], note = _completed(paths["train"], queries, entities, shots, options)
        notes.append(f"{split}: {len(queries)} queries set aside from the training log; {note}")
    # a selector remembers the candidates of its training pools: neither the queries that it is judged on nor other
    # rows about the same things may be among them
    unseen = {query for dataset in held_back.values() for query in dataset["query_id"]}
    judged = {entities[query] for query in unseen if query in entities}
    unseen |= {row for row, entity in entities.items() if entity in judged}
    train = drop_candidates(train, unseen, entities)
    if recipe.sources is not None:
        train = keep_sources(train, recipe.sources)
    if recipe.heldout_fold is not None:  # pools of held-out queries hold rows that training has seen
        held_back["heldout"] = drop_candidates(held_back["heldout"], unseen)
    if recipe.max_samples is not None and recipe.max_samples < len(train):
        train = train.shuffle(seed=seed).select(range(recipe.max_samples))
    _check_ids(collator.store, {"train": train, **held_back})
    place = sample.folder if sample is not None else Path(str(recipe.embeddings))
    folder = place if place.is_dir() else place.parent
    encoders = [path for name in (ENCODERS_FILE, MAPS_FILE) if (path := folder / name).exists()]
    rows = _rows(recipe, sample)
    pick_scorer = None
    if recipe.score_picks:
        if recipe.validation_data is None:
            raise ValueError(
                "score_picks is set without validation_data: it needs a log of its own of `lever-grpo generate`, as "
                "scores of queries that are set aside from the training log are estimated; name one."
            )
        validation = held_back["validation"]
        pools = dict(zip(validation["query_id"], validation["candidate_ids"], strict=True))
        pick_scorer = PickScorer(recipe.validation_data, pools)
    return TaskData(
        name,
        train,
        held_back["validation"],
        held_back["heldout"],
        collator,
        _raw_collator(recipe, rows) or collator,
        shots,
        similarity,
        entities,
        notes,
        encoders,
        {row.id: f"{row.question} {row.answers[0]}" for row in rows},
        pick_scorer,
    )


def _rows(recipe: RecipeArguments, sample: SampleTask | None) -> list[Example]:
    """The rows themselves, where they are known."""
    if recipe.task_file is not None:
        return load_examples(recipe.task_file)
    return [] if sample is None else sample_examples(sample.name)


def _raw_collator(recipe: RecipeArguments, rows: list[Example]) -> DataCollatorForRawBeams | None:
    """Batches of the rows themselves, for a selector that embeds them; `None` for the others."""
    if PRESETS.get(recipe.model_preset) is not ClipSelector:
        return None
    if recipe.clip_model is None:
        raise ValueError(
            f"model_preset={recipe.model_preset!r} starts from a CLIP: name one by clip_model, a folder or a Hub id."
        )
    if not rows:
        raise ValueError(f"model_preset={recipe.model_preset!r} sees the rows themselves: name them by task_file.")
    seen = ("image", "text") if any(row.image is not None for row in rows) else ("text",)
    modalities = recipe.model_options.get("modalities", seen)
    processor = AutoProcessor.from_pretrained(recipe.clip_model, trust_remote_code=False)
    return DataCollatorForRawBeams(rows, processor, modalities)


def make_collator(
    chosen: RecipeArguments | EvaluateArguments, store: EmbeddingStore, sample: SampleTask | None
) -> tuple[DataCollatorForBeams, tuple[str, ...]]:
    """How selectors see the rows, and the embeddings of the similarity baseline: those that were chosen, else the
    sample's, else all; but a query is not shown with its own answer unless somebody says so."""
    names = tuple(store.names)
    asked = tuple(name for name in names if "answer" not in name)
    if not (asked or chosen.query_features):
        raise ValueError(
            f"the embeddings are those of answers alone ({', '.join(names)}), which a query does not come with; give "
            "some of the queries, or name query_features."
        )
    collator = DataCollatorForBeams(
        store,
        tuple(chosen.query_features or (sample.query_features if sample else asked)),
        tuple(chosen.candidate_features or (sample.candidate_features if sample else names)),
    )
    shared = [name for name in collator.query_features if name in collator.candidate_features]
    # a choice of features on the command line may leave out some that the pools were ranked by
    ranked_by = [name for name in (sample.similarity_features if sample else ()) if name in shared]
    similarity = tuple(chosen.similarity_features or ranked_by or shared)
    if set(similarity) - set(shared):
        raise ValueError(
            f"similarity_features={list(similarity)}: the two sides share {', '.join(shared) or 'nothing'}; name some "
            "of these."
        )
    return collator, similarity


def _read_entities(path: str | None) -> dict[int, str]:
    if path is None:
        return {}
    try:
        return {int(row): str(entity) for row, entity in json.loads(Path(path).read_text("utf-8")).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path}: expected a JSON object {{"row id": "entity"}}; {error}') from error


def _completed(
    path: Any, queries: set[int], entities: dict[int, str], shots: int, options: dict[str, Any]
) -> tuple[Dataset, str]:
    """Groups of some queries of a log, with estimates of what was not scored where that is possible."""
    options = {**options, "max_group_size": None}

    def of_queries(log: Dataset) -> Dataset:
        chosen = log.select([i for i, query in enumerate(log["query_id"]) if query in queries])
        return drop_candidates(chosen, entities=entities)

    log = load_beams(path, **options)
    try:
        completed = complete_scores(of_queries(log), fit_on=log, shots=shots)
        return completed, "sequences that were not scored are estimated"
    except BeamDataError as error:
        logger.warning("the greedy pick cannot be judged on these queries (%s); the expected reward is used", error)
        return of_queries(load_beams(path, shots=shots, **options)), "judged by the expected reward within the group"


def _check_ids(store: EmbeddingStore, splits: dict[str, Dataset]) -> None:
    for split, dataset in splits.items():
        if not len(dataset):
            raise ValueError(f"the {split} log has no group of the wanted length; check num_shots and the files.")
        ids = {i for row in dataset for i in (row["query_id"], *row["candidate_ids"])}
        store.check_ids(np.array(sorted(ids)))
