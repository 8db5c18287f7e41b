"""Whole runs, as the recipes start them, and what they report."""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..atomic import one_run, refuse_links
from ..data import DataCollatorForBeams, load_sample
from ..data.readers import local_files
from ..hub.cards import LOG_FILE, describe_log
from ..hub.push import push_or_warn, push_selector
from ..hub.resume import fetch_run
from ..inference import evaluate_selectors
from ..models import PointerSelector, PointerSelectorConfig, load_selector
from ..report import MethodResult, build_report, print_report, save_results, write_report
from ..trainer import GroupBeamGRPOConfig, SelectorSFTConfig, SelectorTrainingArguments
from .arguments import RecipeArguments
from .generate_folder import write_json
from .stages import build_selector, post_train, sft_config, start_with_sft, train, train_sft, with_agreement
from .task_data import TaskData, load_task


logger = logging.getLogger(__name__)
RUN_FOLDERS = ("checkpoints", "sft", "agreement", "rce", "grpo")


def run(recipe: RecipeArguments, args: GroupBeamGRPOConfig | SelectorSFTConfig) -> dict[str, Any] | None:
    """
    SFT (unless `sft_ckpt` is given), RCE, GRPO, report; with a [`SelectorSFTConfig`], SFT and its report alone.

    The output folder holds the selectors `sft/`, `rce/` and `grpo/`, the trainers' checkpoints in `checkpoints/`, and
    `report.json`, `report.md`, `results.json`, the figures, and `log.json`, which says what was learned from. With
    `push_to_hub`, the last selector goes to the Hub with its card and the report; a push that fails is an error in the
    log and no exception.

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
    if recipe.resume_from_hub is not None:
        args.resume_from_checkpoint = "true"
    state = PartialState()
    if state.is_main_process:
        _fetch_from_hub(output, recipe, args)
    with one_run(output, wanted=state.is_main_process):
        return _run(recipe, args, output, state)


def _run(
    recipe: RecipeArguments, args: GroupBeamGRPOConfig | SelectorSFTConfig, output: Path, state: PartialState
) -> dict[str, Any] | None:
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
    summary = report(recipe, args, data, selectors, history, output)
    _write_log_file(recipe, output)
    if args.push_to_hub:
        repo_id = args.hub_model_id or output.absolute().name
        options: dict[str, Any] = {"private": args.hub_private_repo, "token": args.hub_token}
        options["revision"] = args.hub_revision
        push_or_warn(lambda: push_selector(output, repo_id, **options), output, repo_id)
    return summary


def judge(data: TaskData, selectors: dict[str, str]) -> list[MethodResult]:
    """What every method chose on the held-out queries, the baselines included."""
    policies = {name: load_selector(folder) for name, folder in selectors.items()}
    shared = [name for name in data.collator.query_widths if name in data.collator.candidate_widths]
    baselines = {"similarity": data.similarity_features}
    if set(shared) != set(data.similarity_features):
        baselines["similarity_all"] = tuple(shared)
    similar = {name: similarity_baseline(data.collator, features) for name, features in baselines.items() if features}
    if data.policy_collator is data.collator:
        return evaluate_selectors({**similar, **policies}, data.heldout, data.collator, data.num_shots)
    # selectors that see the rows themselves, and baselines that see embeddings
    others = evaluate_selectors(similar, data.heldout, data.collator, data.num_shots)
    trained = evaluate_selectors(policies, data.heldout, data.policy_collator, data.num_shots)
    return [*others[:-1], *(result for result in trained if result.name in policies), others[-1]]


def similarity_baseline(collator: DataCollatorForBeams, features: Sequence[str]) -> PointerSelector:
    """The selector that picks by the mean cosine of some features that both sides see."""
    config = PointerSelectorConfig(
        query_features=collator.query_widths,
        candidate_features=collator.candidate_widths,
        encoder="none",
        similarity_prior=True,
        prior_pairs={f"{name}:{name}": 1 / len(features) for name in features},
        prior_rank=0,
    )
    return PointerSelector(config)


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


def _write_log_file(recipe: RecipeArguments, output: Path) -> None:
    """What the selectors learned from, for their card; a manifest that cannot be read is not worth a run."""
    files = [load_sample(recipe.task).train] if recipe.beam_data is None else local_files(recipe.beam_data)
    try:
        write_json(output / LOG_FILE, describe_log(files))
    except (OSError, ValueError) as error:
        logger.warning("%s was not written: %s", output / LOG_FILE, error)


def _best_step(output: Path) -> int | None:
    path = output / "checkpoints" / "grpo" / "trainer_state.json"
    return TrainerState.load_from_json(str(path)).best_global_step if path.exists() else None


def _settings(recipe: RecipeArguments, args: SelectorTrainingArguments) -> dict[str, Any]:
    """What a reader wants to know of the run: the recipe, and the trainer's arguments that are this package's own."""
    own = {f.name for f in fields(args)} - {f.name for f in fields(TrainingArguments)}
    shared = ("learning_rate", "weight_decay", "per_device_train_batch_size", "num_train_epochs")
    values = {
        f.name: getattr(recipe, f.name)
        for f in fields(recipe)
        if f.name not in ("task", "dry_run", "overwrite", "resume_from_hub")
    }
    values.update({name: getattr(args, name) for name in (*shared, *sorted(own))})
    return {name: value for name, value in values.items() if value is not None}


def _fetch_from_hub(output: Path, recipe: RecipeArguments, args: SelectorTrainingArguments) -> None:
    """The run that is to go on, unless it is here already."""
    if recipe.resume_from_hub is None or any((output / name).exists() for name in RUN_FOLDERS):
        return
    stage = "sft" if isinstance(args, SelectorSFTConfig) else "grpo"
    fetch_run(recipe.resume_from_hub, output, stage=stage, token=args.hub_token, revision=args.hub_revision)


def _prepare_output(output: Path, recipe: RecipeArguments, args: SelectorTrainingArguments) -> None:
    """Refuses to mix two runs in one folder."""
    refuse_links(output / name for name in RUN_FOLDERS)
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
    _check_trackers(args.report_to)
    quiet.report_to = []
    if recipe.sft_ckpt is None:
        supervised = quiet if isinstance(quiet, SelectorSFTConfig) else sft_config(recipe, quiet)
        supervised.max_steps = 2
        selector = train_sft(supervised, data, build_selector(recipe, data.policy_collator), folder / "sft").model
    else:
        selector = load_selector(recipe.sft_ckpt)
    stages = "SFT"
    if isinstance(quiet, GroupBeamGRPOConfig):
        short = replace(recipe, agreement_steps=min(2, recipe.agreement_steps))
        selector = with_agreement(short, quiet, data, selector)
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


def _check_trackers(names: str | list[str] | None) -> None:
    """Raises a `ValueError` that names a tracker which is unknown or not installed."""
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"report_to={names!r}: {error}") from error


def _two_steps_a_stage(args: GroupBeamGRPOConfig) -> GroupBeamGRPOConfig:
    """The stages of a run, two steps each."""
    short = copy.copy(args)
    short.rce_epochs = float(args.rce_epochs > 0)
    short.curriculum_epochs = float(args.grpo_epochs > 0 and args.curriculum_epochs > 0)
    short.grpo_epochs = short.curriculum_epochs + float(args.grpo_epochs > args.curriculum_epochs)
    short.num_train_epochs = short.rce_epochs + short.grpo_epochs
    short.max_steps = int(2 * short.num_train_epochs)
    return short
