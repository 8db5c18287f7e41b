"""Post-training of a selector on logged groups: reward-weighted cross-entropy, then offline GRPO."""

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..objectives import (
    compute_softmax_weights,
    curriculum_mask,
    effective_beams,
    exact_kl,
    group_advantages,
    group_policy_loss,
    kl_estimate,
    rce_loss,
    step_entropy,
    tied_groups,
)
from ..objectives.policy_losses import WEIGHTED_LOSS_TYPES
from .callbacks import CurriculumCallback, KLBetaCallback, PolicyControl, RestoreBestCallback, TemperatureCallback
from .group_beam_grpo_config import GroupBeamGRPOConfig
from .group_table import CollatorWithCandidateIds, GroupTableCallback, group_rows
from .reference import REFERENCE_COLUMN, CollatorWithReference, add_reference_log_probs
from .schedules import STAGES, StagePlan, warmup_cosine
from .selector_trainer import SelectorTrainer, masked_moments


FROZEN_POLICIES_NAME = "frozen_policies.safetensors"


class GroupBeamGRPOTrainer(SelectorTrainer):
    r"""
    Post-trains a selector on a beam log, in one run of three stages:

    1. **RCE**: \\( L = -\sum_i w_i \log \pi(y_i \mid q) \\), \\( w = \operatorname{softmax}(R / \tau) \\), τ falling;
    2. **GRPO, early**: \\( L = L_{\text{policy}} + \beta\, \mathrm{KL}(\pi \| \pi_{\text{ref}}) \\) on the best beams;
    3. **GRPO, late**: the same on whole groups.

    It departs from GRPO as published ([2402.03300](https://huggingface.co/papers/2402.03300)) as follows: groups are
    logged, not sampled, so ratios correct only for the policy's own movement since π_old; π_old is refreshed on a
    schedule; the KL is exact; tied groups leave the loss, the KL term and the denominator; the loss is a mean over
    groups. π_ref is the model as given; π_old starts as the policy at the first GRPO step.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The supervised selector to start from, or the folder or Hub id of one.
        args ([`GroupBeamGRPOConfig`]):
            Arguments.
        data_collator ([`DataCollatorForBeams`]):
            Makes batches of groups.
        train_dataset, eval_dataset (`datasets.Dataset`):
            Rows of [`load_beams`]. Evaluation is exact where every sequence of a held-out query was scored.
        peft_config (`peft.PeftConfig`, *optional*):
            Trains an adapter instead of the whole selector.
        row_texts (`dict[int, str]`, *optional*):
            What rows say, by row id, for the table of `log_groups`, which has their ids without it.
        score_picks (`Callable`, *optional*):
            Scores greedy picks that the evaluation log does not hold: query ids and their pool positions, in search
            order, → scores in the log's units, NaN where there is none. With it checkpoints are chosen by the reward
            of the greedy pick also where not every sequence was scored, as with three demonstrations or more.
        **kwargs:
            Passed to [`~transformers.Trainer`].

    Example:

    ```python
    >>> import tempfile
    >>> from lever_grpo import GroupBeamGRPOConfig, GroupBeamGRPOTrainer, PointerSelector, PointerSelectorConfig
    >>> from lever_grpo.data import DataCollatorForBeams, load_sample

    >>> sample = load_sample("country_facts")
    >>> collator = DataCollatorForBeams(sample.store, sample.query_features, sample.candidate_features)
    >>> config = PointerSelectorConfig(
    ...     query_features=collator.query_widths, candidate_features=collator.candidate_widths, similarity_prior=True
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     args = GroupBeamGRPOConfig(
    ...         output_dir=folder, max_steps=4, eval_strategy="no", save_strategy="no", report_to="none", use_cpu=True,
    ...         disable_tqdm=True, logging_strategy="no",
    ...     )
    ...     train_dataset = sample.load("train", shots=2)
    ...     trainer = GroupBeamGRPOTrainer(PointerSelector(config), args, collator, train_dataset)
    ...     trainer.train().global_step
    {'train_runtime': ...}
    4

    ```
    """

    _tag_names = ["lever-grpo", "grpo"]
    args: GroupBeamGRPOConfig

    def __init__(
        self,
        model,
        args,
        data_collator,
        train_dataset=None,
        eval_dataset=None,
        peft_config=None,
        row_texts=None,
        **kwargs,
    ):
        self.row_texts = row_texts
        self.policy_control = _control_at_start(args)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, peft_config, **kwargs)
        self.reference = copy.deepcopy(self.model).requires_grad_(False).eval().to(self.args.device)
        self.old_policy = copy.deepcopy(self.reference)
        self._begun_step = -1
        self._batch_std: Tensor | None = None
        self._held_out_stds: dict[int, tuple[Any, Tensor]] = {}  # with the logs, so that their numbers stay theirs
        self._max_length = 0

        epochs = (args.rce_epochs, args.grpo_epochs)
        band = {"kl_low": args.kl_low, "kl_high": args.kl_high}
        self._curriculum = CurriculumCallback(
            self.policy_control, *epochs, args.curriculum_epochs, args.curriculum_top_k
        )
        self.add_callback(self._curriculum)
        if self._keeps_best and args.rce_epochs > 0 and args.restore_best:
            self.add_callback(RestoreBestCallback())
        self.add_callback(
            TemperatureCallback(
                self.policy_control,
                *epochs,
                args.rce_temperature_start,
                args.rce_temperature_end,
                adaptive=args.adaptive_temperature,
                **band,
            )
        )
        if args.adaptive_beta:
            self.add_callback(
                KLBetaCallback(self.policy_control, factor=args.beta_factor, smoothing=args.beta_smoothing, **band)
            )
        if args.loss_type == "dr_grpo":
            given = eval_dataset if train_dataset is None else train_dataset
            logs = given.values() if isinstance(given, dict) else [given] if given is not None else []
            lengths = (len(sequence) for log in logs for row in log for sequence in row["sequences"])
            self._max_length = max(lengths, default=0)
        self._has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())
        if args.precompute_ref_log_probs and train_dataset is not None:
            self.train_dataset = add_reference_log_probs(
                train_dataset, self._reference_log_probs, self.data_collator, args.per_device_eval_batch_size
            )
            self.data_collator = CollatorWithReference(self.data_collator)
        self._group_table: GroupTableCallback | None = None
        if args.log_groups:
            self._group_table = GroupTableCallback(self)
            self.add_callback(self._group_table)
            self.data_collator = CollatorWithCandidateIds(self.data_collator)

    def train(self, *args, **kwargs):
        # not what an earlier training came to; the callbacks hold this object
        vars(self.policy_control).update(vars(_control_at_start(self.args)))
        return super().train(*args, **kwargs)

    # ---- the objective ----

    def live_groups(self, rewards: Tensor, inputs: dict[str, Any]) -> Tensor:
        if self.policy_control.stage == "rce":
            return super().live_groups(rewards, inputs)
        return ~tied_groups(rewards, self._compared_beams(rewards, inputs["sequence_mask"].any(-1)))

    def _compared_beams(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """The beams (B, G) that advantages and weights are taken over: the whole group, unless it is cut first."""
        return curriculum_mask(rewards, mask, self.policy_control.top_k) if self.args.curriculum_first else mask

    def group_losses(self, model, inputs, rewards):
        if self.policy_control.stage == "rce":
            return self._rce_losses(model, inputs, rewards)
        return self._grpo_losses(model, inputs, rewards)

    def _rce_losses(self, model, inputs, rewards):
        mask = inputs["sequence_mask"].any(-1)  # (B, G)
        output = self.policy(model, inputs, return_step_log_probs=True)
        weights = compute_softmax_weights(
            rewards, self.policy_control.temperature, mask, normalize=self.args.rce_normalize
        )
        losses = rce_loss(output.log_probs, weights, output.step_mask)  # (B,)
        self._tabulate(model, inputs, rewards, output, mask, weights=weights)
        stats = {
            "policy_loss": losses,
            "effective_beams": effective_beams(weights),
            **_reward_stats(rewards, mask, mask),
        }
        with torch.no_grad():
            stats["entropy"] = _mean_over_steps(
                step_entropy(output.step_log_probs, sequence_mask=output.step_mask), output.step_mask
            )
        return losses, self.live_groups(rewards, inputs), stats

    def _grpo_losses(self, model, inputs, rewards):
        args, control = self.args, self.policy_control
        mask = inputs["sequence_mask"].any(-1)  # (B, G)
        live = self.live_groups(rewards, inputs)  # (B,)
        compared = self._compared_beams(rewards, mask)  # (B, G)
        beam_mask = curriculum_mask(rewards, mask, control.top_k) & live.unsqueeze(-1)  # (B, G)

        temperature = control.policy_temperature
        with self._same_dropout(model):  # (B, G, T)
            old_log_probs = self._old_log_probs(inputs, temperature)
        output = self.policy(model, inputs, temperature=temperature, return_step_log_probs=True)
        step_mask = output.step_mask  # (B, G, T)
        advantages = group_advantages(
            rewards,
            compared,
            scale_rewards=args.scale_rewards,
            clip=args.advantage_clip,
            baseline_shift=args.baseline_shift,
            batch_std=self._batch_std,
        )  # (B, G)
        weights = None  # (B, G)
        if args.loss_type in WEIGHTED_LOSS_TYPES:
            weights = compute_softmax_weights(rewards, args.loss_temperature, compared)
        tensors = (output.log_probs, old_log_probs, advantages, step_mask, beam_mask, weights)
        losses, stats = self._policy_loss(*tensors)  # (B,)
        self._tabulate(model, inputs, rewards, output, beam_mask, advantages=advantages, tensors=tensors)
        stats["policy_loss"] = losses.detach()

        if args.beta > 0 or args.adaptive_temperature:
            if args.kl_estimator == "exact":
                reference = self._reference_output(inputs, temperature, step_log_probs=True).step_log_probs
                kl = exact_kl(output.step_log_probs, reference, args.kl_direction, step_mask)  # (B, G, T)
            else:
                reference = inputs.get(REFERENCE_COLUMN)  # (B, G, T)
                if reference is None:
                    reference = self._reference_output(inputs, temperature).log_probs
                kl = kl_estimate(output.log_probs, reference, args.kl_estimator, args.kl_direction, step_mask)
            stats["kl"] = _mean_over_steps(kl, step_mask)  # (B,)
            losses = losses + control.beta * stats["kl"]
        if args.entropy_coef:
            entropy = step_entropy(output.step_log_probs, normalize=True, sequence_mask=step_mask)
            losses = losses - args.entropy_coef * _mean_over_steps(entropy, step_mask)
        with torch.no_grad():
            entropy = step_entropy(output.step_log_probs, sequence_mask=step_mask)
            stats["entropy"] = _mean_over_steps(entropy, step_mask)
            stats["advantage_mean"], stats["advantage_std"] = masked_moments(advantages, beam_mask)
        stats = {name: torch.where(live, value, torch.nan) for name, value in stats.items()}
        return losses, live, {**stats, **_reward_stats(rewards, mask, compared)}

    def _policy_loss(self, log_probs, old_log_probs, advantages, step_mask, beam_mask, weights):
        args = self.args
        return group_policy_loss(
            log_probs,
            old_log_probs,
            advantages,
            step_mask,
            beam_mask,
            loss_type=args.loss_type,
            importance_sampling_level=args.importance_sampling_level,
            epsilon=args.epsilon,
            epsilon_high=args.epsilon_high,
            delta=args.delta,
            sapo_temperature_pos=args.sapo_temperature_pos,
            sapo_temperature_neg=args.sapo_temperature_neg,
            max_length=self._max_length or None,
            weights=weights,
        )

    @torch.no_grad()
    def _tabulate(self, model, inputs, rewards, output, counts, tensors=None, **columns):
        """Leaves the rows of the batch for the table of groups, when one is due; `tensors` are those of the loss."""
        if self._group_table is None or not self._group_table.due(model):
            return
        if tensors is not None:
            # as a group of its own, a sequence has statistics of its own
            alone = [x if x is None else x.flatten(0, 1).unsqueeze(1) for x in tensors]
            stats = {name: values.view_as(rewards) for name, values in self._policy_loss(*alone)[1].items()}
            columns["ratios"] = stats["ratio_mean"]
            held_back = stats.get("clip_ratio/region_mean", stats.get("cispo_clip_ratio"))
            columns["clipped"] = None if held_back is None else held_back > 0
        self._group_table.rows = group_rows(
            inputs,
            self.args.num_groups_to_log,
            rewards=rewards,
            log_probs=output.log_probs.sum(-1),
            counts=counts,
            texts=self.row_texts,
            **columns,
        )

    @property
    def _on_policy(self) -> bool:
        """Whether π_old is the policy itself at every step: then nothing is copied, and the ratio is 1."""
        return self.args.old_policy_refresh == "steps" and self.args.old_policy_refresh_steps == 1

    @torch.no_grad()
    def _old_log_probs(self, inputs: dict[str, Any], temperature: float) -> Tensor | None:
        """log π_old of the logged steps (B, G, T); `None` where it is the policy itself or the loss has no ratio."""
        if self._on_policy or self.args.loss_type in (*WEIGHTED_LOSS_TYPES, "asymre"):
            return None
        with self.accelerator.autocast():
            return self.policy(self.old_policy, inputs, temperature=temperature).log_probs

    @contextmanager
    def _same_dropout(self, model: nn.Module) -> Iterator[None]:
        """
        Inside, π_old drops the units that the policy will drop in its next forward: with dropout too, the ratio is
        exactly 1 after a refresh, and differs from 1 only by what the policy has learned since.
        """
        if not (model.training and self._has_dropout):
            yield
            return
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self.old_policy.train()
            try:
                yield
            finally:
                self.old_policy.eval()

    @torch.no_grad()
    def _reference_output(self, inputs: dict[str, Any], temperature: float, step_log_probs: bool = False) -> Any:
        with self.accelerator.autocast():
            return self.policy(self.reference, inputs, temperature=temperature, return_step_log_probs=step_log_probs)

    def _reference_log_probs(self, inputs: dict[str, Any]) -> Tensor:
        return self._reference_output(self._prepare_inputs(inputs), temperature=1.0).log_probs  # (B, G, T)

    def selection_metrics(self, inputs, rewards, output, picks):
        metrics = super().selection_metrics(inputs, rewards, output, picks)
        reference = self._reference_output(inputs, 1.0, step_log_probs=True).step_log_probs
        kl = exact_kl(output.step_log_probs, reference, sequence_mask=output.step_mask)
        metrics["kl"] = _mean_over_steps(kl, output.step_mask)
        metrics["greedy_changed"] = (picks != self.greedy_picks(self.reference, inputs)).any(-1).float()
        return metrics

    # ---- stages and frozen policies ----

    @property
    def stage_plan(self) -> StagePlan:
        """Which steps of the running training belong to which stage."""
        return self.args.stage_plan(self.state.max_steps)

    def _get_num_items_in_batch(self, batch_samples, device):
        # the base class counts before it announces the step, and what counts depends on the stage
        self._curriculum.on_step_begin(self.args, self.state, self.control)
        if self.args.scale_rewards == "batch" and batch_samples:
            self._batch_std = self._std_of_step(batch_samples, device)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _std_of_step(self, batch_samples: list, device: torch.device) -> Tensor:
        """Std of all rewards of a step, over micro-batches and processes."""
        moments: Any = self.accelerator.reduce(self._moments(batch_samples).to(device), reduction="sum")
        return _std_of(moments)

    def _std_of_log(self, log: TorchDataset) -> Tensor:
        """Std of all rewards of a held-out log: neither its batches nor a training step have a say in its losses."""
        rows = getattr(log, "dataset", log)  # what a `LazyDataset` is made of
        if id(rows) not in self._held_out_stds:
            own = torch.Generator()  # a loader draws a seed, and that must not move training's random numbers
            size = self.args.per_device_eval_batch_size
            loader = DataLoader(log, size, collate_fn=self.data_collator, generator=own)
            self._held_out_stds[id(rows)] = (rows, _std_of(self._moments(loader)).to(self.args.device))
        return self._held_out_stds[id(rows)][1]

    def _moments(self, batches: Iterable[dict[str, Any]]) -> Tensor:
        """Number, sum and sum of squares of all rewards, (3,)."""
        rewards = torch.cat([self.group_rewards(batch)[batch["sequence_mask"].any(-1)].double() for batch in batches])
        return torch.stack([torch.ones_like(rewards), rewards, rewards.square()]).sum(-1)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        of_training = self._batch_std
        if self.args.scale_rewards == "batch":
            self._batch_std = self._std_of_log(dataloader.dataset)
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._batch_std = of_training

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step != self._begun_step:
            self._begin_step(self.state.global_step)
            self._begun_step = self.state.global_step
        return super().training_step(model, inputs, num_items_in_batch)

    @property
    def _keeps_best(self):
        args = self.args
        restores = args.restore_best and args.rce_epochs > 0 and args.eval_strategy != "no" != args.save_strategy
        return super()._keeps_best or restores

    def _determine_best_metric(self, metrics, trial):
        if self.args.kl_limit is not None:
            best = "eval_" + str(self.args.metric_for_best_model).removeprefix("eval_")
            sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else ()
            name = next((f"eval_{log}_kl" for log in sets if best.startswith(f"eval_{log}_")), "eval_kl")
            if metrics[name] > self.args.kl_limit:
                return False
        return super()._determine_best_metric(metrics, trial)

    def _begin_step(self, step: int) -> None:
        """What happens between two optimisation steps: the change of stage and the refresh of π_old."""
        plan, refresh = self.stage_plan, self.args.old_policy_refresh
        if step < plan.rce:
            return
        if step == plan.rce and step > 0:
            if self.args.restore_best and self.state.best_model_checkpoint is not None:
                self._load_best_model()
                self.optimizer.state.clear()  # its moments belong to the weights that were left
            self.save_model(os.path.join(str(self.args.output_dir), "rce"), _internal_call=True)
        in_stage = step - plan.rce
        due = {
            "never": False,
            "stage": step in (plan.rce, plan.start("grpo_late")),
            "epoch": in_stage == 0 or float(self.state.epoch or 0.0).is_integer(),
            "steps": in_stage % self.args.old_policy_refresh_steps == 0 and not self._on_policy,
        }
        if due[refresh]:
            self.refresh_old_policy()

    @torch.no_grad()
    def refresh_old_policy(self) -> None:
        """Makes π_old the current policy."""
        current = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        names, old = zip(*self.old_policy.named_parameters(), strict=True)
        new = (current[name] for name in names)
        torch._foreach_copy_(old, [value.full_tensor() if isinstance(value, DTensor) else value for value in new])

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            plan = self.args.stage_plan(num_training_steps)
            rce_share = self.args.rce_learning_rate / self.args.learning_rate

            def factor(step: int) -> float:
                in_rce = plan.stage(step) == "rce"
                start, steps = (0, plan.rce) if in_rce else (plan.rce, plan.grpo_early + plan.grpo_late)
                return warmup_cosine(step - start, steps, self.args.warmup_ratio) * (rce_share if in_rce else 1.0)

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def schedule_metrics(self):
        control = self.policy_control
        return {
            "stage": STAGES.index(control.stage),
            "temperature": control.temperature,
            "policy_temperature": control.policy_temperature,
            "beta": control.beta,
        }

    # ---- checkpoints: what resuming needs beside the base class's files ----

    def training_memory(self):
        return {**super().training_memory(), "control": asdict(self.policy_control)}

    def load_training_memory(self, memory):
        super().load_training_memory(memory)
        for field, value in memory["control"].items():
            setattr(self.policy_control, field, value)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            tensors = {
                f"{name}.{key}": value.contiguous()
                for name, policy in self._frozen_policies.items()
                for key, value in policy.state_dict().items()
            }
            save_file(tensors, os.path.join(output_dir, FROZEN_POLICIES_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        tensors = load_file(os.path.join(checkpoint, FROZEN_POLICIES_NAME))
        reference = self.reference.state_dict()
        if self.args.precompute_ref_log_probs and any(
            not torch.equal(value.cpu(), tensors[f"reference.{name}"]) for name, value in reference.items()
        ):
            raise ValueError(
                f"{checkpoint} belongs to a training with another start than the given model, whose log-probabilities "
                "are precomputed: resume with the model that the training started from."
            )
        for name, policy in self._frozen_policies.items():
            prefix = f"{name}."
            policy.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    @property
    def _frozen_policies(self) -> dict[str, nn.Module]:
        return {"reference": self.reference, "old_policy": self.old_policy}


def _control_at_start(args: GroupBeamGRPOConfig) -> PolicyControl:
    stage = "rce" if args.rce_epochs > 0 else "grpo_early" if args.curriculum_epochs > 0 else "grpo_late"
    return PolicyControl(stage=stage, temperature=args.rce_temperature_start, beta=args.beta)


def _std_of(moments: Tensor) -> Tensor:
    """From number, sum and sum of squares; above 0."""
    count, total, squares = moments
    return ((squares - total.square() / count) / (count - 1).clamp(min=1)).clamp(min=0).sqrt().clamp(min=1e-37)


def _mean_over_steps(values: Tensor, step_mask: Tensor) -> Tensor:
    """Mean over a group's real steps, (B, G, S) -> (B,)."""
    total = torch.where(step_mask, values, 0.0).sum((-1, -2))
    return total / step_mask.sum((-1, -2)).clamp(min=1)


def _reward_stats(rewards: Tensor, mask: Tensor, compared: Tensor) -> dict[str, Tensor]:
    mean, std = masked_moments(rewards, mask)
    return {"reward": mean, "reward_std": std, "frac_reward_zero_std": tied_groups(rewards, compared).float()}
