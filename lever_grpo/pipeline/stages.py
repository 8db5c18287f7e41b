"""The stages of a run, each from what the one before it left."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainerState, set_seed
from transformers.integrations import TensorBoardCallback, WandbCallback

from ..atomic import flush
from ..data import DataCollatorForBeams, DataCollatorForRawBeams
from ..models import PRESETS, ClipSelector, SelectorModel, load_selector
from ..trainer import (
    GroupBeamGRPOConfig,
    GroupBeamGRPOTrainer,
    SelectorSFTConfig,
    SelectorSFTTrainer,
    SelectorTrainer,
    fit_answer_agreement,
)
from ..trainer.checkpoints import last_checkpoint
from .arguments import RecipeArguments
from .task_data import TaskData


logger = logging.getLogger(__name__)
_SPEED = ("_runtime", "_per_second")
_SHARED_OPTIONS = {"num_set_layers"}  # of recipes, which not every kind of selector has


def build_selector(
    recipe: RecipeArguments, collator: DataCollatorForBeams | DataCollatorForRawBeams, **changes: Any
) -> SelectorModel:
    """An untrained selector for the data; `changes` override options of its configuration."""
    if recipe.model_preset not in PRESETS:
        raise ValueError(f"model_preset={recipe.model_preset!r} is unknown; the presets are {', '.join(PRESETS)}.")
    kind = PRESETS[recipe.model_preset]
    options: dict[str, Any] = {
        "hidden_dim": recipe.hidden_dim,
        "num_set_layers": recipe.num_set_layers,
        "similarity_prior": recipe.similarity_prior,
        "prior_rank": recipe.prior_rank,
        "dropout": recipe.dropout,
        "prior_dropout": recipe.dropout,
    }
    options.update({**recipe.model_options, **changes})
    known = {field.name for field in fields(kind.config_class)}
    unknown = sorted(options.keys() - known - _SHARED_OPTIONS)
    if unknown:
        raise ValueError(
            f"model_preset={recipe.model_preset!r}: its configuration, {kind.config_class.__name__}, has no option "
            f"{unknown[0]!r}; leave it out of model_init_kwargs."
        )
    options = {name: value for name, value in options.items() if name in known}
    if isinstance(collator, DataCollatorForRawBeams):
        options = {"modalities": collator.modalities, **kind.config_class.presets[recipe.model_preset], **options}
        return ClipSelector.from_clip(str(recipe.clip_model), **options)
    options |= {"query_features": collator.query_widths, "candidate_features": collator.candidate_widths}
    return kind(kind.config_class.from_preset(recipe.model_preset, **options))


def with_agreement(
    recipe: RecipeArguments,
    args: GroupBeamGRPOConfig,
    data: TaskData,
    start: SelectorModel,
    output: Path | None = None,
) -> SelectorModel:
    """
    The selector that RCE starts from: `start` or, with `agreement_steps`, `start` fitted to the agreement of answers
    and saved to `output/agreement`, where that is better on the validation queries by what post-training goes for.
    """
    if not recipe.agreement_steps:
        return start
    if start.prior is None:
        raise ValueError(
            f"agreement_steps={recipe.agreement_steps}: the agreement of answers is fitted in the similarity prior, "
            "and this selector has none; set agreement_steps to 0, or start from one with similarity_prior=True."
        )
    store, collator = data.collator.store, data.collator
    if data.policy_collator is not collator:
        raise ValueError(
            f"agreement_steps={recipe.agreement_steps} needs embeddings, and model_preset={recipe.model_preset!r} "
            "sees the rows themselves; set agreement_steps to 0."
        )
    if recipe.answer_feature not in store.names:
        raise ValueError(
            f"agreement_steps={recipe.agreement_steps} needs embeddings of the answers, and the store has no "
            f"feature {recipe.answer_feature!r} (it has {', '.join(store.names)}): name it with answer_feature, or "
            "set agreement_steps to 0."
        )
    # rows that are judged on stay out: only candidates of the training pools, and training queries
    ids = np.array(sorted({i for row in data.train for i in (row["query_id"], *row["candidate_ids"])}))
    numbers = {entity: number for number, entity in enumerate(sorted(set(data.entities.values())))}
    entities = [numbers.get(data.entities.get(i, ""), len(numbers) + i) for i in ids.tolist()]
    fitted = copy.deepcopy(start)
    fit_answer_agreement(
        fitted,
        torch.from_numpy(store.gather(ids, collator.query_features)),
        torch.from_numpy(store.gather(ids, collator.candidate_features)),
        torch.from_numpy(store.gather(ids, [recipe.answer_feature])),
        torch.tensor(entities),
        steps=recipe.agreement_steps,
        seed=args.seed,
    )
    if output is not None and PartialState().is_main_process:
        save_selector(fitted, output / "agreement", data)
    before, after = (validation_reward(args, data, policy) for policy in (start, fitted))
    logger.info("validation reward: %.4f before the agreement of answers, %.4f after it", before, after)
    return fitted if after > before else start


def validation_reward(args: GroupBeamGRPOConfig, data: TaskData, selector: SelectorModel) -> float:
    """The number that post-training chooses its checkpoint by."""
    with tempfile.TemporaryDirectory() as folder:
        options = copy.copy(args)
        options.output_dir, options.report_to, options.push_to_hub = folder, [], False
        trainer = GroupBeamGRPOTrainer(
            copy.deepcopy(selector),
            options,
            data.policy_collator,
            data.train,
            data.validation,
            score_picks=data.pick_scorer,
        )
        return trainer.evaluate()[f"eval_{str(trainer.args.metric_for_best_model).removeprefix('eval_')}"]


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


def train_sft(args: SelectorSFTConfig, data: TaskData, selector: SelectorModel, folder: Path) -> SelectorSFTTrainer:
    """Runs the supervised stage; its checkpoints go to `folder`."""
    options = _stage_options(args, folder)
    trainer = SelectorSFTTrainer(
        selector, options, data.policy_collator, data.train, data.validation, score_picks=data.pick_scorer
    )
    _train(trainer, folder)
    return trainer


def post_train(
    args: GroupBeamGRPOConfig, data: TaskData, selector: SelectorModel, folder: Path
) -> GroupBeamGRPOTrainer:
    """Runs RCE and GRPO; checkpoints go to `folder`."""
    options = _stage_options(args, folder)
    trainer = GroupBeamGRPOTrainer(
        selector,
        options,
        data.policy_collator,
        data.train,
        data.validation,
        row_texts=data.row_texts,
        score_picks=data.pick_scorer,
    )
    output = Path(str(args.output_dir))
    # what a run that goes on from the Hub needs beside the checkpoint: the stages before, and how rows are embedded
    trainer.hub_extras = {
        "rce": folder / "rce",
        "sft": output / "sft",
        "checkpoints/sft/trainer_state.json": output / "checkpoints" / "sft" / "trainer_state.json",
        **{file.name: file for file in data.encoders},
    }
    _train(trainer, folder)
    return trainer


def _stage_options(args: Any, folder: Path) -> Any:
    """Arguments of the stage whose folder it is: a run with a name has one in trackers for each stage, since trackio
    goes on with a run of the same name; on the Hub all stages have one repository."""
    options = copy.copy(args)
    options.output_dir = str(folder)
    options.hub_model_id = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    if args.run_name is not None:
        options.run_name = f"{args.run_name}-{folder.name}"
    return options


def _train(trainer: SelectorTrainer, folder: Path) -> None:
    """Trains from the start or from the last checkpoint in `folder`."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is not None:
            # set by TENSORBOARD_LOGGING_DIR, for all stages; otherwise it is inside the stage's own folder
            callback.logging_dir = os.path.join(callback.logging_dir, folder.name)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) if trainer.args.resume_from_checkpoint else None)


def _finish_tracking(trainer: SelectorTrainer) -> None:
    """Ends the W&B run of a stage, which the trainer leaves open and the next stage would write into."""
    if any(isinstance(callback, WandbCallback) for callback in trainer.callback_handler.callbacks):
        import wandb

        wandb.finish()


def save_selector(selector: Any, folder: Path, data: TaskData) -> None:
    """Saves a selector, and how its embeddings are made of rows where that is known, so that `folder` either holds all
    of it or does not exist."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        selector.save_pretrained(partial)
        if isinstance(data.policy_collator, DataCollatorForRawBeams):
            data.policy_collator.processor.save_pretrained(partial)
        else:
            for file in data.encoders:
                shutil.copy(file, partial)
        flush([*partial.rglob("*"), partial])
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{folder} could not be written ({' '.join(str(error).split())}): make room, or mend the folder, and go "
            "on with --resume_from_checkpoint true."
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    flush([folder.parent])


def train(
    recipe: RecipeArguments, args: GroupBeamGRPOConfig, data: TaskData, output: Path
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Runs the stages that have not been run yet; gives the folder of each selector, and the joined log."""
    checkpoints = output / "checkpoints"
    if data.pick_scorer is not None:
        data.pick_scorer.keep_in(checkpoints / "picks")
    selectors = {"sft": recipe.sft_ckpt or str(output / "sft")}
    history: list[dict[str, Any]] = []
    if recipe.sft_ckpt is None:
        history += start_with_sft(recipe, sft_config(recipe, args), data, output)
    last = "grpo" if args.grpo_epochs > 0 else "rce"
    if not (output / last).exists():
        start = with_agreement(recipe, args, data, load_selector(selectors["sft"]), output)
        trainer = post_train(args, data, start, checkpoints / "grpo")
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(checkpoints / "grpo" / "trainer_state.json"))
            if last == "grpo" and args.rce_epochs > 0:
                save_selector(load_selector(checkpoints / "grpo" / "rce"), output / "rce", data)
            save_selector(trainer.accelerator.unwrap_model(trainer.model), output / last, data)
        _finish_tracking(trainer)
        trainer.accelerator.wait_for_everyone()
    # a log between two train logs says nothing of its stage: the plan does
    log = _log_history(checkpoints / "grpo" / "trainer_state.json")
    plan = args.stage_plan(max([1, *(entry["step"] for entry in log)]))
    history += [{**entry, "stage": plan.stage(max(entry["step"] - 1, 0))} for entry in log]
    selectors.update({name: str(output / name) for name in ("agreement", "rce", "grpo") if (output / name).exists()})
    return selectors, history


def start_with_sft(
    recipe: RecipeArguments, args: SelectorSFTConfig, data: TaskData, output: Path
) -> list[dict[str, Any]]:
    """Trains the supervised selector into `output/sft`, unless it is there; gives its log."""
    folder = output / "checkpoints" / "sft"
    if data.pick_scorer is not None:
        data.pick_scorer.keep_in(folder.with_name("picks"))
    if not (output / "sft").exists():
        set_seed(args.seed)
        trainer = train_sft(args, data, build_selector(recipe, data.policy_collator), folder)
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            save_selector(trainer.accelerator.unwrap_model(trainer.model), output / "sft", data)
        _finish_tracking(trainer)
        trainer.accelerator.wait_for_everyone()
    return [{**entry, "stage": "sft"} for entry in _log_history(folder / "trainer_state.json")]


def _log_history(path: Path) -> list[dict[str, Any]]:
    """What was logged, without what tells of the machine: the same run gives the same log."""
    if not path.exists():
        return []
    entries = TrainerState.load_from_json(str(path)).log_history
    return [
        {name: value for name, value in entry.items() if not name.endswith(_SPEED)}
        for entry in entries
        if "train_runtime" not in entry  # the end of a training, or of its last part
    ]
