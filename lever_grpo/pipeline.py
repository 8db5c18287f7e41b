"""The whole way from a beam log to a post-trained selector and its report, as the recipes run it."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerState, TrainingArguments, set_seed
from trl import TrlParser

from .data import (
    DataCollatorForBeams,
    EmbeddingStore,
    complete_scores,
    drop_candidates,
    load_beams,
    load_sample,
    split_by_query,
)
from .data.records import BeamDataError
from .inference import evaluate_selectors
from .models import PRESETS, PointerSelector, PointerSelectorConfig
from .report import MethodResult, build_report, print_report, save_results, write_report
from .trainer import (
    GroupBeamGRPOConfig,
    GroupBeamGRPOTrainer,
    SelectorSFTConfig,
    SelectorSFTTrainer,
    SelectorTrainingArguments,
    fit_answer_agreement,
)
from .trainer.checkpoints import last_checkpoint


logger = logging.getLogger(__name__)
TrainingConfig = TypeVar("TrainingConfig", bound=SelectorTrainingArguments)
RUN_FOLDERS = ("checkpoints", "warm_start", "sft", "rce", "grpo")


@dataclass
class RecipeArguments:
    r"""
    What a recipe needs beside the trainer's arguments.

    Args:
        task (`str`, *optional*, defaults to `"emoji"`):
            Task of the packaged sample, used when `beam_data` is not given.
        beam_data (`list[str]`, *optional*):
            Beam log(s) of the training queries, in any format of [`load_beams`].
        embeddings (`str`, *optional*):
            Embeddings of all rows: a `.safetensors` or `.npy` file, or a folder of them. Needed with `beam_data`.
        candidate_pools (`str`, *optional*):
            Side file with the pools, for logs that do not hold them.
        validation_data, heldout_data (`str`, *optional*):
            Beam logs of other queries: to choose checkpoints on, and to report on. Without them, shares of the
            training queries are set aside.
        entities (`str`, *optional*):
            JSON file `{"row id": "what the row is about"}` (an image, a person): splits keep rows about the same thing
            together, and no query's pool holds another row about its own thing.
        validation_size, heldout_size (`float`, *optional*, defaults to `0.2`):
            Those shares.
        query_features, candidate_features (`list[str]`, *optional*):
            Embeddings that each side sees. Default: those of the sample, or all of the store on both sides.
        num_shots (`int`, *optional*, defaults to `2`):
            Length of the sequences that are learned and chosen.
        max_group_size (`int`, *optional*):
            Sequences kept per group: all survivors, and others evenly spaced by score. `None` keeps everything.
        max_samples (`int`, *optional*):
            Number of training queries to use, drawn with the seed.
        sft_ckpt (`str`, *optional*):
            Selector to start from (folder or Hub id). Without it, the supervised stage is run first.
        warm_start_steps (`int`, *optional*, defaults to `0`):
            Steps of [`fit_answer_agreement`] before the supervised stage; kept where validation says that it helps.
        answer_feature (`str`, *optional*, defaults to `"answer"`):
            The embedding of the answers that it needs.
        sft_epochs, sft_learning_rate, sft_num_beams:
            The supervised stage: its epochs, peak learning rate, and the best beams that it imitates.
        model_preset (`str`, *optional*, defaults to `"v3"`):
            Version of the selector, and below it the options of [`PointerSelectorConfig`] that recipes set.
        dry_run (`bool`, *optional*, defaults to `False`):
            Check everything, run two steps of each stage, write nothing.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an earlier run in `output_dir` may be deleted.
    """

    task: str = field(default="emoji", metadata={"help": "Task of the packaged sample, without --beam_data."})
    beam_data: list[str] | None = field(default=None, metadata={"help": "Beam log(s) of the training queries."})
    embeddings: str | None = field(default=None, metadata={"help": "Embeddings of all rows: a file or a folder."})
    candidate_pools: str | None = field(default=None, metadata={"help": "Side file with the candidate pools."})
    validation_data: str | None = field(default=None, metadata={"help": "Beam log to choose checkpoints on."})
    heldout_data: str | None = field(default=None, metadata={"help": "Beam log to report on."})
    entities: str | None = field(default=None, metadata={"help": "JSON file: row id -> what the row is about."})
    validation_size: float = field(default=0.2, metadata={"help": "Share of training queries, without such a log."})
    heldout_size: float = field(default=0.2, metadata={"help": "Share of training queries, without such a log."})
    query_features: list[str] | None = field(default=None, metadata={"help": "Embeddings of the query side."})
    candidate_features: list[str] | None = field(default=None, metadata={"help": "Embeddings of the candidates."})
    num_shots: int = field(default=2, metadata={"help": "Length of the sequences."})
    max_group_size: int | None = field(default=None, metadata={"help": "Sequences kept per group; default all."})
    max_samples: int | None = field(default=None, metadata={"help": "Training queries to use; default all."})
    sft_ckpt: str | None = field(default=None, metadata={"help": "Selector to start from: a folder or a Hub id."})
    warm_start_steps: int = field(
        default=0, metadata={"help": "Steps of the warm start on the agreement of answers; 0 leaves it out."}
    )
    answer_feature: str = field(default="answer", metadata={"help": "Embedding of the answers, for the warm start."})
    sft_epochs: float = field(default=5.0, metadata={"help": "Epochs of the supervised stage."})
    sft_learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of the supervised stage."})
    sft_num_beams: int = field(default=5, metadata={"help": "Best beams that the supervised stage imitates."})
    model_preset: str = field(default="v3", metadata={"help": f"One of {', '.join(PRESETS)}."})
    encoder: str | None = field(default=None, metadata={"help": "Encoder, if not the preset's; 'none': prior alone."})
    hidden_dim: int = field(default=64, metadata={"help": "Width of the network."})
    num_set_layers: int = field(default=0, metadata={"help": "Self-attention layers among the candidates."})
    similarity_prior: bool = field(default=True, metadata={"help": "Whether to start exactly at similarity."})
    prior_rank: int = field(default=32, metadata={"help": "Rank of the learned change of the metric."})
    dropout: float = field(default=0.3, metadata={"help": "Dropout of the network and of the prior."})
    dry_run: bool = field(default=False, metadata={"help": "Check everything, run two steps a stage, write nothing."})
    overwrite: bool = field(default=False, metadata={"help": "Whether to delete an earlier run in output_dir."})


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
            Makes batches of them.
        num_shots (`int`):
            Length of the sequences.
        entities (`dict[int, str]`):
            What each row is about.
        notes (`list[str]`):
            What a reader of the report must know, e.g. that scores were estimated.
    """

    name: str
    train: Dataset
    validation: Dataset
    heldout: Dataset
    collator: DataCollatorForBeams
    num_shots: int
    entities: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def parse(arguments: Sequence[str], config: type[TrainingConfig]) -> tuple[RecipeArguments, TrainingConfig]:
    """
    A recipe's arguments: those of `--config FILE` (YAML), and on top of them those of the command line.

    Raises:
        ValueError: for a key that no argument has.
    """
    # the parser knows `--config FILE` but not `--config=FILE`, and `--resume_from_checkpoint` with a value only
    parts = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    for i, part in reversed(list(enumerate(parts))):
        if part == "--resume_from_checkpoint" and (i + 1 == len(parts) or parts[i + 1].startswith("--")):
            parts.insert(i + 1, "true")
    parser: Any = TrlParser([RecipeArguments, config])  # type: ignore[list-item]
    recipe, args = parser.parse_args_and_config(parts, fail_with_unknown_args=True)
    resume = str(args.resume_from_checkpoint or "false").lower()
    if resume not in ("true", "false"):
        raise ValueError(
            f"resume_from_checkpoint={args.resume_from_checkpoint!r}: must be true or false; a run that is continued "
            "finds the last whole checkpoint of its output_dir itself."
        )
    args.resume_from_checkpoint = "true" if resume == "true" else None
    return recipe, args


def load_task(recipe: RecipeArguments, seed: int = 0) -> TaskData:
    """
    The data of a run: the sample's task, or the user's logs, with what is missing split off.

    Raises:
        ValueError: if options contradict each other or files lack what a run needs.
    """
    options: dict[str, Any] = {"max_group_size": recipe.max_group_size}
    if recipe.beam_data is None:
        sample = load_sample(recipe.task)
        name, store = recipe.task, sample.store
        features = (sample.query_features, sample.candidate_features)
        paths: dict[str, Any] = dict(sample.splits)
        entities = sample.entities()
    else:
        if recipe.embeddings is None:
            raise ValueError("beam_data is given without embeddings: the selector sees rows through them; name them.")
        name, store = Path(recipe.beam_data[0]).stem, EmbeddingStore.open(recipe.embeddings)
        features = (tuple(store.names), tuple(store.names))
        paths = {"train": recipe.beam_data, "validation": recipe.validation_data, "heldout": recipe.heldout_data}
        paths = {split: path for split, path in paths.items() if path is not None}
        options["candidate_pools"] = recipe.candidate_pools
        entities = _read_entities(recipe.entities)
    collator = DataCollatorForBeams(
        store,
        tuple(recipe.query_features or features[0]),
        tuple(recipe.candidate_features or features[1]),
    )
    store.check_finite(sorted({*collator.query_features, *collator.candidate_features}))

    shots = recipe.num_shots
    train = load_beams(paths["train"], shots=shots, **options)
    notes: list[str] = []
    held_back: dict[str, Dataset] = {}
    for split, size in (("validation", recipe.validation_size), ("heldout", recipe.heldout_size)):
        if split in paths:
            held_back[split] = load_beams(paths[split], shots=shots, **{**options, "max_group_size": None})
            continue
        divided = split_by_query(train, size, seed, entities)
        train, queries = divided["train"], set(divided["test"]["query_id"])
        held_back[split], note = _completed(paths["train"], queries, entities, shots, options)
        notes.append(f"{split}: {len(queries)} queries set aside from the training log; {note}")
    # a selector remembers the candidates of its training pools: neither the queries that it is judged on nor other
    # rows about the same things may be among them
    unseen = {query for dataset in held_back.values() for query in dataset["query_id"]}
    judged = {entities[query] for query in unseen if query in entities}
    unseen |= {row for row, entity in entities.items() if entity in judged}
    train = drop_candidates(train, unseen, entities)
    if recipe.max_samples is not None and recipe.max_samples < len(train):
        train = train.shuffle(seed=seed).select(range(recipe.max_samples))
    _check_ids(collator.store, {"train": train, **held_back})
    return TaskData(name, train, held_back["validation"], held_back["heldout"], collator, shots, entities, notes)


def _read_entities(path: str | None) -> dict[int, str]:
    if path is None:
        return {}
    try:
        return {int(row): str(entity) for row, entity in json.loads(Path(path).read_text("utf-8")).items()}
    except (ValueError, AttributeError) as error:
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


def build_selector(recipe: RecipeArguments, collator: DataCollatorForBeams, **changes: Any) -> PointerSelector:
    """An untrained selector for the data; `changes` override options of [`PointerSelectorConfig`]."""
    options: dict[str, Any] = {
        "query_features": collator.query_widths,
        "candidate_features": collator.candidate_widths,
        "hidden_dim": recipe.hidden_dim,
        "num_set_layers": recipe.num_set_layers,
        "similarity_prior": recipe.similarity_prior,
        "prior_rank": recipe.prior_rank,
        "dropout": recipe.dropout,
        "prior_dropout": recipe.dropout,
    }
    if recipe.encoder is not None:
        options["encoder"] = recipe.encoder
    return PointerSelector(PointerSelectorConfig.from_preset(recipe.model_preset, **{**options, **changes}))


def untrained(recipe: RecipeArguments, data: TaskData, seed: int, output: Path | None = None) -> PointerSelector:
    """
    The selector that the supervised stage starts from: as built or, with `warm_start_steps`, fitted to the agreement
    of answers and saved to `output/warm_start`, where that is better on the validation queries.
    """
    selector = build_selector(recipe, data.collator)
    if not recipe.warm_start_steps:
        return selector
    if recipe.answer_feature not in data.collator.store.names:
        raise ValueError(
            f"warm_start_steps={recipe.warm_start_steps} needs embeddings of the answers, and the store has no "
            f"feature {recipe.answer_feature!r} (it has {', '.join(data.collator.store.names)}): name it with "
            "answer_feature, or set warm_start_steps to 0."
        )
    # rows that are judged on stay out: only candidates of the training pools, and training queries
    ids = np.array(sorted({i for row in data.train for i in (row["query_id"], *row["candidate_ids"])}))
    store, collator = data.collator.store, data.collator
    numbers = {entity: number for number, entity in enumerate(sorted(set(data.entities.values())))}
    entities = [numbers.get(data.entities.get(i, ""), len(numbers) + i) for i in ids.tolist()]
    warm = copy.deepcopy(selector)
    fit_answer_agreement(
        warm,
        torch.from_numpy(store.gather(ids, collator.query_features)),
        torch.from_numpy(store.gather(ids, collator.candidate_features)),
        torch.from_numpy(store.gather(ids, [recipe.answer_feature])),
        torch.tensor(entities),
        steps=recipe.warm_start_steps,
        seed=seed,
    )
    if output is not None and PartialState().is_main_process:
        save_selector(warm, output / "warm_start")
    before, after = (
        evaluate_selectors({"start": start}, data.validation, collator, data.num_shots)[-2].rewards.mean()
        for start in (selector, warm)
    )
    logger.info("validation reward of the start: %.4f by similarity, %.4f by the warm start", before, after)
    return warm if after > before else selector


def similarity_baseline(collator: DataCollatorForBeams) -> PointerSelector | None:
    """The selector that picks by cosine over the features both sides share; `None` where they share none."""
    if not collator.query_widths.keys() & collator.candidate_widths.keys():
        return None
    return PointerSelector(
        PointerSelectorConfig(
            query_features=collator.query_widths,
            candidate_features=collator.candidate_widths,
            similarity_prior=True,
            prior_rank=0,
            hidden_dim=4,
        )
    )


def sft_config(recipe: RecipeArguments, args: GroupBeamGRPOConfig) -> SelectorSFTConfig:
    """Arguments of the supervised stage: those of the run, but for its length, learning rate and number of beams."""
    known = {f.name for f in fields(SelectorSFTConfig) if f.init}
    options = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
    options.update(
        num_train_epochs=recipe.sft_epochs,
        learning_rate=recipe.sft_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup_ratio,
        num_beams=recipe.sft_num_beams,
        max_steps=-1,
        disable_dropout=False,  # the run switches it off for the ratios of GRPO, which this stage has none of
        push_to_hub=False,
    )
    return SelectorSFTConfig(**options)


def train_sft(args: SelectorSFTConfig, data: TaskData, selector: PointerSelector, folder: Path) -> SelectorSFTTrainer:
    """Runs the supervised stage; its checkpoints go to `folder`."""
    options = copy.copy(args)
    options.output_dir = str(folder)
    trainer = SelectorSFTTrainer(selector, options, data.collator, data.train, data.validation)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) if args.resume_from_checkpoint else None)
    return trainer


def post_train(
    args: GroupBeamGRPOConfig, data: TaskData, selector: str | PointerSelector, folder: Path
) -> GroupBeamGRPOTrainer:
    """Runs RCE and GRPO; checkpoints go to `folder`."""
    options = copy.copy(args)
    options.output_dir = str(folder)
    options.hub_model_id = (
        args.hub_model_id or Path(str(args.output_dir)).name
    )  # not the name of the checkpoints' folder
    trainer = GroupBeamGRPOTrainer(selector, options, data.collator, data.train, data.validation)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) if args.resume_from_checkpoint else None)
    return trainer


def save_selector(selector: Any, folder: Path) -> None:
    """Saves a selector so that `folder` either holds all of it or does not exist."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    selector.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def run(recipe: RecipeArguments, args: GroupBeamGRPOConfig | SelectorSFTConfig) -> dict[str, Any] | None:
    """
    SFT (unless `sft_ckpt` is given), RCE, GRPO, report; with a [`SelectorSFTConfig`], SFT and its report alone.

    The output folder holds the selectors `sft/`, `rce/` and `grpo/`, the trainers' checkpoints in `checkpoints/`, and
    `report.json`, `report.md`, `results.json` and the figures.

    Args:
        recipe ([`RecipeArguments`]):
            Data, model and supervised stage.
        args ([`GroupBeamGRPOConfig`] or [`SelectorSFTConfig`]):
            Post-training, or the supervised stage.

    Returns:
        `dict`: the report, on the main process; `None` on the others and after a dry run.
    """
    if recipe.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            _dry_run(recipe, args, Path(folder))
        return None
    output = Path(str(args.output_dir))
    state = PartialState()
    with state.main_process_first():
        if state.is_main_process:
            _prepare_output(output, recipe, args)
        data = load_task(recipe, args.seed)
    if isinstance(args, SelectorSFTConfig):
        history = start_with_sft(recipe, args, data, output)
        selectors = {"sft": str(output / "sft")}
    else:
        selectors, history = train(recipe, args, data, output)
    if not state.is_main_process:
        return None
    return report(recipe, args, data, selectors, history, output)


def train(
    recipe: RecipeArguments, args: GroupBeamGRPOConfig, data: TaskData, output: Path
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Runs the stages that have not been run yet; gives the folder of each selector, and the joined log."""
    checkpoints = output / "checkpoints"
    selectors = {"sft": recipe.sft_ckpt or str(output / "sft")}
    history: list[dict[str, Any]] = []
    if recipe.sft_ckpt is None:
        history += start_with_sft(recipe, sft_config(recipe, args), data, output)
    last = "grpo" if args.grpo_epochs > 0 else "rce"
    if not (output / last).exists():
        trainer = post_train(args, data, selectors["sft"], checkpoints / "grpo")
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(checkpoints / "grpo" / "trainer_state.json"))
            if last == "grpo" and args.rce_epochs > 0:
                save_selector(PointerSelector.from_pretrained(checkpoints / "grpo" / "rce"), output / "rce")
            save_selector(trainer.accelerator.unwrap_model(trainer.model), output / last)
        if args.push_to_hub:
            trainer.push_to_hub()
        trainer.accelerator.wait_for_everyone()
    history += _log_history(checkpoints / "grpo" / "trainer_state.json")
    selectors.update({name: str(output / name) for name in ("warm_start", "rce", "grpo") if (output / name).exists()})
    return selectors, history


def start_with_sft(
    recipe: RecipeArguments, args: SelectorSFTConfig, data: TaskData, output: Path
) -> list[dict[str, Any]]:
    """Trains the supervised selector into `output/sft`, unless it is there; gives its log."""
    folder = output / "checkpoints" / "sft"
    if not (output / "sft").exists():
        set_seed(args.seed)
        trainer = train_sft(args, data, untrained(recipe, data, args.seed, output), folder)
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            save_selector(trainer.accelerator.unwrap_model(trainer.model), output / "sft")
        trainer.accelerator.wait_for_everyone()
    return _log_history(folder / "trainer_state.json")


def judge(data: TaskData, selectors: dict[str, str]) -> list[MethodResult]:
    """What every method chose on the held-out queries, the baselines included."""
    policies = {name: PointerSelector.from_pretrained(folder) for name, folder in selectors.items()}
    similarity = similarity_baseline(data.collator)
    if similarity is not None:
        policies = {"similarity": similarity, **policies}
    return evaluate_selectors(policies, data.heldout, data.collator, data.num_shots)


def report(
    recipe: RecipeArguments,
    args: SelectorTrainingArguments,
    data: TaskData,
    selectors: dict[str, str],
    history: Sequence[dict[str, Any]],
    output: Path,
) -> dict[str, Any]:
    """Judges the selectors on the held-out queries; writes and prints the report."""
    results = judge(data, selectors)
    summary = build_report(
        results,
        log_history=history,
        settings={"task": data.name, "queries": len(data.train), "seed": args.seed, **_settings(recipe, args)},
        sections={"Notes": "\n".join(data.notes)} if data.notes else None,
        title=f"{data.name}: what post-training gained",
        reward_name="score",
        kl_band=(args.kl_low, args.kl_high) if isinstance(args, GroupBeamGRPOConfig) else None,
        best_step=_best_step(output),
    )
    save_results(results, output / "results.json")
    write_report(summary, output)
    print_report(summary)
    return summary


def _best_step(output: Path) -> int | None:
    path = output / "checkpoints" / "grpo" / "trainer_state.json"
    return TrainerState.load_from_json(str(path)).best_global_step if path.exists() else None


def _log_history(path: Path) -> list[dict[str, Any]]:
    return TrainerState.load_from_json(str(path)).log_history if path.exists() else []


def _settings(recipe: RecipeArguments, args: SelectorTrainingArguments) -> dict[str, Any]:
    """What a reader wants to know of the run: the recipe, and the trainer's arguments that are this package's own."""
    own = {f.name for f in fields(args)} - {f.name for f in fields(TrainingArguments)}
    shared = ("learning_rate", "weight_decay", "per_device_train_batch_size", "num_train_epochs")
    values = {
        f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in ("task", "dry_run", "overwrite")
    }
    values.update({name: getattr(args, name) for name in (*shared, *sorted(own))})
    return {name: value for name, value in values.items() if value is not None}


def _prepare_output(output: Path, recipe: RecipeArguments, args: SelectorTrainingArguments) -> None:
    """Refuses to mix two runs in one folder."""
    earlier = [output / name for name in RUN_FOLDERS if (output / name).exists()]
    if not earlier or args.resume_from_checkpoint:
        return
    if not recipe.overwrite:
        raise ValueError(
            f"output_dir={str(output)!r} holds an earlier run ({', '.join(path.name for path in earlier)}); continue "
            "it with --resume_from_checkpoint true, delete it with --overwrite true, or name another folder."
        )
    for path in earlier:
        shutil.rmtree(path)


def _dry_run(recipe: RecipeArguments, args: GroupBeamGRPOConfig | SelectorSFTConfig, folder: Path) -> None:
    """Two steps of every stage that the run has, in a folder that is deleted."""
    data = load_task(recipe, args.seed)
    quiet = copy.copy(args)
    quiet.eval_strategy = quiet.save_strategy = "no"
    quiet.load_best_model_at_end = quiet.eval_on_start = quiet.push_to_hub = False
    quiet.resume_from_checkpoint = None
    quiet.report_to = []
    selector: str | PointerSelector | None = recipe.sft_ckpt
    if selector is None:
        supervised = quiet if isinstance(quiet, SelectorSFTConfig) else sft_config(recipe, quiet)
        supervised.max_steps = 2
        short = replace(recipe, warm_start_steps=min(2, recipe.warm_start_steps))
        selector = train_sft(supervised, data, untrained(short, data, args.seed), folder / "sft").model
    stages = "SFT"
    if isinstance(quiet, GroupBeamGRPOConfig):
        trainer = post_train(_two_steps_a_stage(quiet), data, selector, folder / "grpo")
        trainer.evaluate()
        stages = f"RCE, early and late GRPO: {trainer.stage_plan.steps}"
    sizes = [len(part) for part in (data.train, data.validation, data.heldout)]
    logger.warning(
        "dry run: all is well with %d training, %d validation and %d held-out queries; steps of %s. Nothing was "
        "written.",
        *sizes,
        stages,
    )


def _two_steps_a_stage(args: GroupBeamGRPOConfig) -> GroupBeamGRPOConfig:
    """The stages of a run, two steps each."""
    short = copy.copy(args)
    short.rce_epochs = float(args.rce_epochs > 0)
    short.curriculum_epochs = float(args.grpo_epochs > 0 and args.curriculum_epochs > 0)
    short.grpo_epochs = short.curriculum_epochs + float(args.grpo_epochs > args.curriculum_epochs)
    short.num_train_epochs = short.rce_epochs + short.grpo_epochs
    short.max_steps = int(2 * short.num_train_epochs)
    return short
