"""What the supervised stage and the post-training stages share: losses over groups, metrics, the best checkpoint."""

import logging
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import EvalPrediction
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..atomic import flush
from ..data import fully_scored
from ..data.collator import LazyDataset
from ..hub.trainer import HubTrainer
from ..metrics import expected_reward, rank_correlations
from ..models import load_selector
from ..objectives import combine_rewards, reward_from_columns, sequence_coherence, sequence_diversity, step_entropy
from .checkpoints import find_damage, load_memory, save_memory
from .interruption import TerminateCallback
from .selector_config import SelectorTrainingArguments


logger = logging.getLogger(__name__)

# query ids and, for each, pool positions in search order -> scores in the log's units, NaN where there is none
ScorePicks = Callable[[Sequence[int], Sequence[Sequence[int]]], Sequence[float]]


class SelectorTrainer(HubTrainer):
    """
    Base of the trainers of this package: a [`~transformers.Trainer`] whose rows are whole groups.

    Losses come per group and are divided by the number of live groups of the **whole** step (all accumulation
    micro-batches, all processes), so neither padding nor accumulation nor the number of processes changes them.

    Subclasses define `group_losses`.
    """

    loss_is_scaled_for_ga = True
    args: SelectorTrainingArguments
    model: Any  # a PreTrainedModel, or peft's or a distributed wrapper's stand-in for one
    optimizer: Any
    data_collator: Any

    def __init__(
        self,
        model: Any,
        args: SelectorTrainingArguments,
        data_collator: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        score_picks: ScorePicks | None = None,
        **kwargs,
    ):
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs and would split batches over them, but the queries of a batch "
                "share candidates: start a process per GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
            )
        logs = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        if any(isinstance(log, TorchIterableDataset | IterableDataset) for log in (train_dataset, *logs)):
            raise ValueError(
                "a log that is streamed cannot be shuffled, split over processes or counted; load it without "
                "streaming=True: it is then mapped from disk, and takes no memory either."
            )
        accelerator: Any = args.accelerator_config  # made of what was given
        if accelerator.dispatch_batches:
            raise ValueError(
                "dispatch_batches=True would cut batches by queries, and their candidates are shared: leave it out."
            )
        if isinstance(model, str):
            model = load_selector(model)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        if args.metric_for_best_model is None and eval_dataset is not None:
            may_stop = getattr(model.config, "stop", False)
            complete = score_picks is not None or (
                not isinstance(eval_dataset, dict) and fully_scored(eval_dataset, any_length=may_stop)
            )
            prefix = f"eval_{next(iter(eval_dataset))}" if isinstance(eval_dataset, dict) else "eval"
            args.metric_for_best_model = f"{prefix}_greedy_reward" if complete else f"{prefix}_expected_reward"
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
        self.score_picks = score_picks
        reward = (self.reward_weights, args.reward, args.multi_objective_aggregation)
        if score_picks is not None and reward != ({"beam": 1.0}, "score", "sum_then_normalize"):
            raise ValueError(
                f"score_picks gives the score of a log, and the reward is another one (reward_weights={reward[0]}, "
                f"reward={reward[1]!r}, multi_objective_aggregation={reward[2]!r}); leave these at their defaults, or "
                "score_picks out."
            )
        # sums and counts since the last log, already gathered: they travel with the checkpoint
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)
        self._step_queries: list[int] = []
        self._terminate = TerminateCallback(self.accelerator)
        self.add_callback(self._terminate)

    def train(self, *args, **kwargs):
        with self._terminate.listening():
            return super().train(*args, **kwargs)

    def _get_dataloader(self, dataset, *args, **kwargs):
        if isinstance(dataset, Dataset) and dataset.format["type"] is None:
            dataset = LazyDataset(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def floating_point_ops(self, inputs):
        return 0  # the base class walks over all weights at every step, to count as of a language model's tokens

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

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weights of the levels of the reward that count."""
        given: Any = self.args.reward_weights or {"beam": 1.0}
        return {name: float(weight) for name, weight in given.items() if weight}

    def group_rewards(self, inputs: dict[str, Any]) -> Tensor:
        """The multi-level reward of every sequence, (B, G)."""
        mask = inputs["sequence_mask"].any(-1)  # (B, G)
        aggregation, levels = self.args.multi_objective_aggregation, self.reward_levels(inputs)
        try:
            return combine_rewards(levels, self.reward_weights, mask, aggregation=aggregation)
        except ValueError as error:  # it knows a place in the batch, and a reader of it wants one in the log
            columns = {"beam": self.args.reward, "task": self.args.task_reward}
            for name, level in levels.items():
                bad = (mask & ~level.isfinite()).nonzero().tolist()
                if bad:
                    row, beam = bad[0]
                    raise ValueError(
                        f"query {inputs['query_ids'][row]}, sequence {beam}: the {name!r} level of the reward "
                        f"({columns.get(name, name)}) is {level[row, beam].item()}; drop sequences without it, or "
                        "take another reward."
                    ) from error
            raise

    def reward_levels(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The levels of the reward that have a weight, (B, G) each, before it."""
        weights = self.reward_weights
        levels = {}
        if "beam" in weights:
            levels["beam"] = reward_from_columns(inputs["rewards"], self.args.reward)
        if "task" in weights:
            levels["task"] = reward_from_columns(inputs["rewards"], str(self.args.task_reward))
        if {"coherence", "diversity"} & weights.keys():
            query, candidates = self._comparable_embeds(inputs)
            sequences, sequence_mask = inputs["sequences"], inputs["sequence_mask"]
            if "coherence" in weights:
                levels["coherence"] = sequence_coherence(query, candidates, sequences, sequence_mask)
            if "diversity" in weights:
                levels["diversity"] = sequence_diversity(candidates, sequences, sequence_mask)
        return levels

    @torch.no_grad()
    def level_stats(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Mean and std of each level of the reward inside the groups, (B,) each; nothing where there is one level."""
        if len(self.reward_weights) == 1:
            return {}
        stats = {}
        mask = inputs["sequence_mask"].any(-1)  # (B, G)
        for name, level in self.reward_levels(inputs).items():
            stats[f"rewards/{name}/mean"], stats[f"rewards/{name}/std"] = masked_moments(level, mask)
        return stats

    def _comparable_embeds(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The features that query and candidates share by name: (B, D) and (B, K, D)."""
        if "items" in inputs:
            raise ValueError(
                "the rewards 'coherence' and 'diversity' compare given embeddings, and this batch holds raw images or "
                "texts, which the policy embeds itself; leave them out of reward_weights."
            )
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
        """The policy's output on a batch; `kwargs` as in [`SelectorModel.forward`]."""
        return model(
            query_embeds=inputs["query_embeds"],
            candidate_embeds=inputs["candidate_embeds"],
            candidate_indices=inputs["candidate_indices"],
            candidate_mask=inputs["candidate_mask"],
            sequences=inputs["sequences"],
            sequence_mask=inputs["sequence_mask"],
            **inputs.get("items", {}),
            **kwargs,
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        self._step_queries = [query for batch in batch_samples for query in batch["query_ids"].tolist()]
        count: Any = sum(self.live_groups(self.group_rewards(batch), batch).sum() for batch in batch_samples)
        sums = torch.stack([torch.as_tensor(count, device=device), self._terminate.asked(device)])
        count, asked = self.accelerator.reduce(sums, reduction="sum")
        self._terminate.agreed = bool(asked)
        return count

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
            self._accumulate({**stats, **self.level_stats(inputs), "loss": torch.where(live, losses, math.nan)})
        return (loss, stats) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # under fp16 the scaler leaves such steps out
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):
            queries = ", ".join(map(str, self._step_queries[:10])) + ", …" * (len(self._step_queries) > 10)
            raise FloatingPointError(
                f"step {self.state.global_step + 1}, queries {queries}: the norm of the gradient is {float(norm)}, "
                "expected a finite one; no weight was changed. Lower learning_rate or the scale of the embeddings, "
                "and go on from the last checkpoint with --resume_from_checkpoint true."
            )
        return norm

    # ---- metrics ----

    def _accumulate(self, stats: dict[str, Tensor]) -> None:
        names = sorted(stats)
        values = torch.stack([stats[name].detach().double() for name in names])  # (M, B)
        known = ~values.isnan()
        packed = torch.stack([values.nan_to_num(0.0).sum(-1), known.sum(-1).double()])  # (2, M)
        sums, counts = self.accelerator.reduce(packed, reduction="sum").tolist()
        for name, total, count in zip(names, sums, counts, strict=True):
            self._sums[name] += total
            self._counts[name] += count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Only the logs of training steps carry a learning rate; they take the metrics gathered since the last one.
        # The base class's loss is replaced too: its sum does not outlive an interruption, ours does.
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
            output = self.policy(model, inputs, return_step_log_probs=True)
            picks = self.greedy_picks(self.accelerator.unwrap_model(self.model), inputs)
            stats = {**stats, **self.level_stats(inputs), **self.selection_metrics(inputs, rewards, output, picks)}
            stats["loss"] = torch.where(live, losses, math.nan)
        return None, {name: value.float() for name, value in sorted(stats.items())}, live

    def selection_metrics(
        self, inputs: dict[str, Any], rewards: Tensor, output: Any, picks: Tensor
    ) -> dict[str, Tensor]:
        """What the policy does on held-out groups, (B,) each; NaN where the log cannot tell."""
        sequence_mask = inputs["sequence_mask"]  # (B, G, S)
        mask = sequence_mask.any(-1)  # (B, G)
        step_mask = output.step_mask  # (B, G, T)
        sequence_log_probs = output.log_probs.sum(-1)  # (B, G)
        group = [x.double().cpu().numpy() for x in (sequence_log_probs, rewards)] + [mask.cpu().numpy()]
        logged = torch.where(sequence_mask, inputs["sequences"], -1)  # (B, G, S)
        same = (logged == picks.unsqueeze(1)).all(-1) & mask  # (B, G)
        held = same.any(-1)  # (B,)
        greedy = rewards.gather(1, same.float().argmax(-1, keepdim=True)).squeeze(1)  # (B,)
        greedy = torch.where(held, greedy, self._scores_of(inputs["query_ids"], picks, ~held & mask.any(-1)))
        entropy = step_entropy(output.step_log_probs, sequence_mask=step_mask)  # (B, G, T)
        return {
            "reward": masked_mean(rewards, mask),
            "expected_reward": torch.from_numpy(expected_reward(*group)).to(rewards),
            "greedy_reward": greedy,
            "greedy_found": (~greedy.isnan()).float(),
            "rank_correlation": torch.from_numpy(rank_correlations(*group)).to(rewards),
            "entropy": masked_mean(entropy.flatten(1), step_mask.flatten(1)),
        }

    def _scores_of(self, query_ids: Tensor, picks: Tensor, asked: Tensor) -> Tensor:
        """Scores (B,) of the picks (B, S) that are `asked` (B,), by `score_picks`; NaN elsewhere."""
        scores = torch.full(asked.shape, math.nan, dtype=torch.float32, device=asked.device)
        if self.score_picks is not None and asked.any():
            sequences = [[position for position in row if position >= 0] for row in picks[asked].tolist()]
            found = self.score_picks(query_ids[asked].tolist(), sequences)
            scores[asked] = torch.tensor(found, dtype=torch.float32, device=asked.device)
        return scores

    def greedy_picks(self, selector: Any, inputs: dict[str, Any]) -> Tensor:
        """Greedy sequences (B, S) as long as the longest of each group; -1 behind their end."""
        lengths = inputs["sequence_mask"].sum(-1).amax(-1)  # (B,)
        picks = torch.full_like(inputs["sequences"][:, 0], -1)  # (B, S)
        # by length: a selection has one number of shots, and a small pool may not have as many as another group wants
        for shots in lengths.unique().tolist():
            rows = lengths == shots
            if shots:
                picks[rows, :shots] = selector.select(
                    query_embeds=inputs["query_embeds"][rows],
                    candidate_embeds=inputs["candidate_embeds"],
                    candidate_indices=inputs["candidate_indices"][rows],
                    candidate_mask=inputs["candidate_mask"][rows],
                    num_shots=shots,
                    **inputs.get("items", {}),
                ).sequences[:, 0]
        return picks

    # ---- checkpoints ----

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        at_start = skip_scheduler  # how the base class marks `eval_on_start`
        if at_start and self.state.log_history:  # a resumed run has judged its start already
            self._find_best_again(trial)
            return {}
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if at_start and self._keeps_best:
            self._determine_best_metric(metrics=metrics, trial=trial)
            # the base class takes step 0 for "no best step", so the place is set here
            self.state.best_model_checkpoint = self._checkpoint_of(0, trial)
            self._save_checkpoint(self.model_wrapped, trial)
        return metrics

    def _save_checkpoint(self, model, trial):
        folder = Path(self._checkpoint_of(self.state.global_step, trial))
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                flush([*folder.rglob("*"), folder, folder.parent])
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' for a full disk
            if find_damage(folder) is None:  # it is whole: what failed came behind it
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} could not be written ({' '.join(str(error).split())}), and what there was of it was "
                "removed: make room, or mend the folder, and go on with --resume_from_checkpoint true."
            ) from error

    @property
    def _keeps_best(self) -> bool:
        """Whether the best checkpoint is needed."""
        return self.args.load_best_model_at_end

    def _checkpoint_of(self, step: int, trial: Any) -> str:
        return os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{step}")

    def _find_best_again(self, trial: Any) -> None:
        """The folder of the best checkpoint is stored as it was written; the run may have moved since."""
        step = self.state.best_global_step
        if self._keeps_best and self.state.best_model_checkpoint is None and step is not None:
            if os.path.isdir(self._checkpoint_of(step, trial)):
                self.state.best_model_checkpoint = self._checkpoint_of(step, trial)

    def training_memory(self) -> dict[str, Any]:
        """What training remembers beside the base class's state, as JSON-able values; it travels with checkpoints."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_training_memory(self, memory: dict[str, Any]) -> None:
        """Takes back what `training_memory` gave."""
        self._sums = defaultdict(float, memory["sums"])
        self._counts = defaultdict(float, memory["counts"])

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_fsdp_enabled and self.state.global_step == 0:
            self.optimizer.state.clear()  # saving made one, by a step of zeros, which AdamW would count
        if self.args.should_save:
            save_memory(self.training_memory(), output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_training_memory(load_memory(checkpoint))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked entries of the last dimension, NaN where there is none."""
    return torch.where(mask, values, 0.0).double().sum(-1) / mask.sum(-1)  # scores may be as large as float32 allows


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std over the masked entries of each group."""
    values = values.double()  # the squares of scores of 1e30 or 1e-30 are no float32
    count = mask.sum(-1).clamp(min=1)
    mean = torch.where(mask, values, 0.0).sum(-1) / count
    deviation = torch.where(mask, values - mean.unsqueeze(-1), 0.0)
    return mean, (deviation.square().sum(-1) / count).sqrt()


def _mean_over_groups(prediction: EvalPrediction) -> dict[str, float]:
    """Means over all held-out groups that have the value."""
    means = {}
    statistics: Any = prediction.predictions  # those of `prediction_step`, gathered
    for name, values in statistics.items():
        known = values[values == values]
        if len(known):
            means[name] = float(known.mean(dtype="float64"))
    return means
