"""What the supervised stage and the post-training stages share: losses over groups, metrics, the best checkpoint."""

import json
import logging
import math
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data import fully_scored
from ..objectives import combine_rewards, reward_from_columns, sequence_coherence, sequence_diversity, step_entropy


logger = logging.getLogger(__name__)


@dataclass
class SelectorTrainingArguments(TrainingArguments):
    r"""
    Arguments that [`SelectorSFTTrainer`] and [`GroupBeamGRPOTrainer`] share, on top of
    [`~transformers.TrainingArguments`].

    Args:
        reward (`str`, *optional*, defaults to `"score"`):
            Beam-level reward: the group's score, another column of the log, or the name of a reward preset.
        reward_weights (`dict[str, float]`, *optional*):
            Weights of the reward's levels `"beam"`, `"coherence"`, `"diversity"` and `"task"`. `None` is
            `{"beam": 1.0}`.
        task_reward (`str`, *optional*):
            Column or preset of the `"task"` level.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            How levels are summed; `"normalize_then_sum"` standardises each in its group first.
        disable_dropout (`bool`, *optional*, defaults to `False`):
            Whether to switch off all dropout of the model.
        kl_limit (`float`, *optional*):
            Checkpoints whose held-out KL to the start is above it are never the best. `None` for no limit.

    Some defaults differ from [`~transformers.TrainingArguments`]: `per_device_train_batch_size` and
    `per_device_eval_batch_size` 32 (queries), `logging_steps` 10, `eval_strategy` and `save_strategy` `"epoch"`,
    `load_best_model_at_end`, `eval_on_start` (the start is the first candidate for the best checkpoint) and
    `weight_decay` 0.01. `metric_for_best_model` is chosen from the held-out log when it is left out: the reward of the
    greedy pick where every sequence of every held-out query was scored, else the expected reward.
    """

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Queries (groups) per device and step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Queries (groups) per device in evaluation."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW. Raising it regularises more."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: 'no', 'steps' or 'epoch'."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: 'no', 'steps', 'epoch' or 'best'."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Whether to end with the best checkpoint."})
    eval_on_start: bool = field(
        default=True, metadata={"help": "Whether to evaluate the start, so that it can be the best checkpoint."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: the collator reads all."})
    reward: str = field(default="score", metadata={"help": "Beam-level reward: a column of the log or a preset."})
    reward_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Weights of the levels beam, coherence, diversity, task (as JSON)."}
    )
    task_reward: str | None = field(default=None, metadata={"help": "Column or preset of the task level."})
    multi_objective_aggregation: str = field(
        default="sum_then_normalize", metadata={"help": "'sum_then_normalize' or 'normalize_then_sum'."}
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Whether to switch off all dropout."})
    kl_limit: float | None = field(
        default=None, metadata={"help": "Checkpoints whose held-out KL is above it are never the best (nats per step)."}
    )

    # fields that may come as a JSON string from the command line
    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["reward_weights"]

    def __post_init__(self):
        # known only with the data: the trainer fills it in (TrainingArguments would take "loss")
        automatic = self.metric_for_best_model is None
        if self.eval_strategy == "no":
            self.load_best_model_at_end = self.eval_on_start = False
        super().__post_init__()
        if automatic:
            self.metric_for_best_model = None
        if isinstance(self.reward_weights, str):
            raise ValueError(f"reward_weights={self.reward_weights!r}: must be a JSON object such as '{{\"beam\": 1.0}}'.")
        unknown = set(self.reward_weights or {}) - {"beam", "coherence", "diversity", "task"}
        if unknown:
            raise ValueError(
                f"reward_weights has {sorted(unknown)}: the levels are beam, coherence, diversity and task."
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the columns of the log; leave it False.")

    def check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        """Raises `ValueError` when the field `name` is none of `choices`."""
        if getattr(self, name) not in choices:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}.")


class SelectorTrainer(Trainer):
    """
    Base of the trainers of this package: a [`~transformers.Trainer`] whose rows are whole groups.

    Losses come per group and are divided by the number of live groups of the **whole** step (all accumulation
    micro-batches, all processes), so neither padding nor accumulation nor the number of processes changes them.

    Subclasses define `group_losses`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: SelectorTrainingArguments,
        data_collator: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        **kwargs,
    ):
        if isinstance(model, str):
            model = AutoModel.from_pretrained(model)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        if args.metric_for_best_model is None and eval_dataset is not None:
            complete = not isinstance(eval_dataset, dict) and fully_scored(eval_dataset)
            args.metric_for_best_model = "eval_greedy_reward" if complete else "eval_expected_reward"
            args.greater_is_better = True
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=_mean_over_groups,
            **kwargs,
        )
        self.label_names = []
        # sums and counts since the last log, already gathered: they travel with the checkpoint
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)

    # ---- losses ----

    def group_losses(
        self, model: nn.Module, inputs: dict[str, Any], rewards: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """
        Loss of every group.

        Args:
            model (`nn.Module`):
                The policy, as wrapped for training.
            inputs (`dict[str, Any]`):
                A batch of [`DataCollatorForBeams`].
            rewards (`Tensor` of shape `(B, G)`):
                From `group_rewards`.

        Returns:
            `tuple[Tensor, Tensor, dict[str, Tensor]]`: losses (B,), the groups that count (B,) bool, and what to log,
            (B,) each, NaN where a group has no value.
        """
        raise NotImplementedError  # pragma: no cover

    def live_groups(self, rewards: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Which groups count in the loss, (B,) bool; by default those with at least one sequence."""
        return inputs["sequence_mask"].any((-1, -2))

    def group_rewards(self, inputs: dict[str, Any]) -> Tensor:
        """The multi-level reward of every sequence, (B, G)."""
        weights = {name: weight for name, weight in (self.args.reward_weights or {"beam": 1.0}).items() if weight}
        mask = inputs["sequence_mask"].any(-1)  # (B, G)
        levels = {}
        if "beam" in weights:
            levels["beam"] = reward_from_columns(inputs["rewards"], self.args.reward)
        if "task" in weights:
            if self.args.task_reward is None:
                raise ValueError("reward_weights has 'task': name its column or preset with task_reward.")
            levels["task"] = reward_from_columns(inputs["rewards"], self.args.task_reward)
        if {"coherence", "diversity"} & weights.keys():
            query, candidates = self._comparable_embeds(inputs)
            sequences, sequence_mask = inputs["sequences"], inputs["sequence_mask"]
            if "coherence" in weights:
                levels["coherence"] = sequence_coherence(query, candidates, sequences, sequence_mask)
            if "diversity" in weights:
                levels["diversity"] = sequence_diversity(candidates, sequences, sequence_mask)
        return combine_rewards(levels, weights, mask, aggregation=self.args.multi_objective_aggregation)

    def _comparable_embeds(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The features that query and candidates share by name: (B, D) and (B, K, D)."""
        config = self.model.config
        shared = [name for name in config.query_features if name in config.candidate_features]
        if not shared:
            raise ValueError(
                f"the rewards 'coherence' and 'diversity' compare queries with candidates, but their features "
                f"{list(config.query_features)} and {list(config.candidate_features)} share no name."
            )

        def columns(embeds: Tensor, features: dict[str, int]) -> Tensor:
            parts = dict(zip(features, embeds.split(list(features.values()), dim=-1), strict=True))
            return torch.cat([parts[name] for name in shared], dim=-1)

        candidates = columns(inputs["candidate_embeds"], config.candidate_features)  # (U, D)
        return columns(inputs["query_embeds"], config.query_features), candidates[inputs["candidate_indices"]]

    def policy(self, model: nn.Module, inputs: dict[str, Any], **kwargs) -> Any:
        """The policy's output on a batch; `kwargs` as in [`PointerSelector.forward`]."""
        return model(
            query_embeds=inputs["query_embeds"],
            candidate_embeds=inputs["candidate_embeds"],
            candidate_indices=inputs["candidate_indices"],
            candidate_mask=inputs["candidate_mask"],
            sequences=inputs["sequences"],
            sequence_mask=inputs["sequence_mask"],
            **kwargs,
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        count = sum(self.live_groups(self.group_rewards(batch), batch).sum() for batch in batch_samples)
        return self.accelerator.reduce(torch.as_tensor(count, device=device), reduction="sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rewards = self.group_rewards(inputs)  # (B, G)
        losses, live, stats = self.group_losses(model, inputs, rewards)  # (B,)
        total = torch.where(live, losses, 0.0).sum()
        if num_items_in_batch is None:
            loss = total / live.sum().clamp(min=1)
        else:
            # gradients are averaged over processes: undo that, so that the step divides by all live groups once
            loss = total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        if model.training:
            self._accumulate(stats, live)
        return (loss, stats) if return_outputs else loss

    # ---- metrics ----

    def _accumulate(self, stats: dict[str, Tensor], live: Tensor) -> None:
        names = sorted(stats)
        values = torch.stack([stats[name].detach().double() for name in names])  # (M, B)
        known = ~values.isnan()
        packed = torch.stack([values.nan_to_num(0.0).sum(-1), known.sum(-1).double()])  # (2, M)
        sums, counts = self.accelerator.reduce(packed, reduction="sum").tolist()
        for name, total, count in zip(names, sums, counts, strict=True):
            self._sums[name] += total
            self._counts[name] += count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # only the logs of training steps carry a learning rate; they take the metrics gathered since the last one
        if "learning_rate" in logs:
            logs.update({name: self._sums[name] / n for name, n in sorted(self._counts.items()) if n})
            logs.update(self.schedule_metrics())
            self._sums.clear()
            self._counts.clear()
        super().log(logs, start_time)

    def schedule_metrics(self) -> dict[str, float]:
        """Values of schedules that belong in every log."""
        return {}

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            rewards = self.group_rewards(inputs)
            losses, live, stats = self.group_losses(model, inputs, rewards)
            stats = {**stats, "loss": torch.where(live, losses, math.nan), **self.selection_metrics(inputs, rewards)}
        return None, {name: value.float() for name, value in sorted(stats.items())}, live

    def selection_metrics(self, inputs: dict[str, Any], rewards: Tensor) -> dict[str, Tensor]:
        """What the policy does on held-out groups, (B,) each; NaN where the log cannot tell."""
        selector = self.accelerator.unwrap_model(self.model)
        mask = inputs["sequence_mask"].any(-1)  # (B, G)
        output = self.policy(selector, inputs, return_step_log_probs=True)
        sequence_log_probs = output.log_probs.sum(-1)  # (B, G)
        within = sequence_log_probs.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0)
        picked, found = self.greedy_positions(selector, inputs)  # (B,), (B,)
        greedy = rewards.gather(1, picked.unsqueeze(1)).squeeze(1)
        entropy = step_entropy(output.step_log_probs)  # (B, G, S)
        steps = inputs["sequence_mask"]
        return {
            "reward": _masked_mean(rewards, mask),
            "expected_reward": (within * torch.where(mask, rewards, 0.0)).sum(-1),
            "greedy_reward": torch.where(found, greedy, math.nan),
            "greedy_found": found.float(),
            "rank_correlation": rank_correlation(sequence_log_probs, rewards, mask),
            "entropy": _masked_mean(entropy.flatten(1), steps.flatten(1)),
        }

    def greedy_picks(self, selector: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Greedy sequences (B, S) of the group's own length; -1 behind its end."""
        lengths = inputs["sequence_mask"].sum(-1).amax(-1)  # (B,)
        pools = inputs["candidate_mask"].sum(-1)
        shots = int(torch.minimum(lengths, pools).max().clamp(max=int(pools.min()), min=1))
        picks = selector.select(
            query_embeds=inputs["query_embeds"],
            candidate_embeds=inputs["candidate_embeds"],
            candidate_indices=inputs["candidate_indices"],
            candidate_mask=inputs["candidate_mask"],
            num_shots=shots,
        ).sequences.squeeze(1)  # (B, shots)
        padded = picks.new_full((picks.shape[0], inputs["sequences"].shape[-1]), -1)
        padded[:, :shots] = picks
        beyond = torch.arange(padded.shape[1], device=padded.device) >= lengths.unsqueeze(1)
        return padded.masked_fill(beyond, -1)

    def greedy_positions(self, selector: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Where in the group the greedy pick stands (B,), and whether it is there at all (B,)."""
        picks = self.greedy_picks(selector, inputs).unsqueeze(1)  # (B, 1, S)
        logged = torch.where(inputs["sequence_mask"], inputs["sequences"], -1)  # (B, G, S)
        same = (logged == picks).all(-1) & inputs["sequence_mask"].any(-1)
        return same.float().argmax(-1), same.any(-1)

    # ---- checkpoints ----

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        at_start = skip_scheduler  # how the base class marks `eval_on_start`
        if at_start and self.state.global_step > 0:
            return {}  # a resumed run has judged its start already
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if at_start and self.args.load_best_model_at_end:
            self._determine_best_metric(metrics=metrics, trial=trial)
            # the base class takes step 0 for "no best step", so the place is set here
            self.state.best_model_checkpoint = os.path.join(
                self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-0"
            )
            self._save_checkpoint(self.model_wrapped, trial)
        return metrics

    def _determine_best_metric(self, metrics, trial):
        limit, kl = self.args.kl_limit, metrics.get("eval_kl", 0.0)
        if limit is not None and kl > limit:
            return False
        return super()._determine_best_metric(metrics, trial)


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The latest whole checkpoint in a trainer's folder, `None` where there is none: one whose writing was cut off is
    passed over. The trainer's state is written last and must parse.
    """
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning("%s is not whole (no readable %s): an earlier one is used", path, TRAINER_STATE_NAME)
            continue
        return str(path)
    return None


def rank_correlation(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Spearman's correlation of each group (B, G) -> (B,), ties by their mean rank; NaN where a side is constant."""

    def centred_ranks(values: Tensor) -> Tensor:
        left, right = values.unsqueeze(-1), values.unsqueeze(-2)
        pairs = mask.unsqueeze(-2)
        ranks = ((left > right) & pairs).sum(-1) + 0.5 * ((left == right) & pairs).sum(-1)  # (B, G)
        return torch.where(mask, ranks - _masked_mean(ranks, mask).unsqueeze(-1), 0.0)

    a, b = centred_ranks(x), centred_ranks(y)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked entries of the last dimension, NaN where there is none."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)


def _mean_over_groups(prediction: EvalPrediction) -> dict[str, float]:
    """Means over all held-out groups that have the value."""
    means = {}
    for name, values in prediction.predictions.items():
        known = values[values == values]
        if len(known):
            means[name] = float(known.mean(dtype="float64"))
    return means
