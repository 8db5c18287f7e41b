"""What the post-training trainer does with stages, frozen policies, ties, rewards and the best checkpoint."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from planted import (
    FEATURES,
    assert_same_weights,
    make_args,
    make_selector,
    make_trainer,
    planted_rows,
    to_dataset,
    weights_of,
)
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback

from lever_grpo import GroupBeamGRPOTrainer, PointerSelector
from lever_grpo.objectives import sequence_coherence, sequence_diversity


QUIET = {"eval_strategy": "no", "save_strategy": "no"}


def train_logs(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "learning_rate" in log]


def eval_logs(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "eval_loss" in log]


def negated(rows: list[dict]) -> Dataset:
    return to_dataset([{**row, "scores": [-score for score in row["scores"]]} for row in rows])


def batch_of(planted, rows: list[dict]) -> dict:
    return planted.collator(list(to_dataset(rows)))


def in_stage(trainer, stage: str, top_k: int | None = None):
    trainer.policy_control.stage, trainer.policy_control.top_k = stage, top_k
    return trainer


# ---- training moves what it should ----


def test_every_parameter_moves(planted, tmp_path):
    model = make_selector(similarity_prior=True, num_set_layers=1, prior_rank=2)
    before = weights_of(model)
    trainer = make_trainer(tmp_path, planted, model, weight_decay=0.0, **QUIET)
    trainer.train()
    still = [name for name, value in trainer.model.named_parameters() if torch.equal(value, before[name])]
    assert not still


def test_frozen_policies_do_not_move(planted, tmp_path):
    model = make_selector()
    before = weights_of(model)
    trainer = make_trainer(tmp_path, planted, model, old_policy_refresh="never", **QUIET)
    trainer.train()
    assert_same_weights(weights_of(trainer.reference), before)
    assert_same_weights(weights_of(trainer.old_policy), before)
    assert not any(parameter.requires_grad for parameter in trainer.reference.parameters())


# ---- the importance ratio ----


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "refresh, fresh",
    [("epoch", {4, 7, 10}), ("stage", {4, 7}), ("steps", {4, 6, 8, 10, 12}), ("never", set())],
)
def test_ratio_is_one_just_after_a_refresh(planted, tmp_path, refresh, fresh, dropout):
    # dropout too: π_old drops what the policy drops, so that the ratio shows learning and not noise
    model = make_selector(dropout=dropout, prior_dropout=dropout, similarity_prior=True)
    options = {
        "old_policy_refresh": refresh,
        "old_policy_refresh_steps": 2,
        "grpo_epochs": 3,
        "rce_learning_rate": 0.01,
    }
    trainer = make_trainer(tmp_path, planted, model, **options, **QUIET)
    trainer.train()
    ratios = {log["step"]: log["ratio_mean"] for log in train_logs(trainer) if "ratio_mean" in log}
    assert ratios.keys() == set(range(4, 13))
    assert {step for step, ratio in ratios.items() if ratio == 1.0} == fresh


def test_ratio_is_always_one_when_refreshed_each_step(planted, tmp_path):
    trainer = make_trainer(tmp_path, planted, old_policy_refresh="steps", old_policy_refresh_steps=1, **QUIET)
    trainer.train()
    assert {log["ratio_mean"] for log in train_logs(trainer) if "ratio_mean" in log} == {1.0}


def test_without_dropout_losses_repeat(planted, tmp_path):
    noisy = make_selector(dropout=0.5)
    batch = batch_of(planted, planted.rows[:4])
    for disable in (True, False):
        trainer = in_stage(make_trainer(tmp_path, planted, noisy, disable_dropout=disable, beta=0.0), "grpo_late")
        trainer.model.train()
        losses = {trainer.compute_loss(trainer.model, batch).item() for _ in range(4)}
        assert len(losses) == 1 or not disable
        noisy = make_selector(dropout=0.5)


def test_dropout_is_shared_with_the_old_policy_only_while_training(planted, tmp_path):
    trainer = in_stage(
        make_trainer(tmp_path, planted, make_selector(dropout=0.5), beta=0.0, disable_dropout=False), "grpo_late"
    )
    batch = batch_of(planted, planted.rows[:4])
    rewards = trainer.group_rewards(batch)
    for training in (True, False):
        trainer.model.train(training)
        state = torch.get_rng_state()
        _, _, stats = trainer.group_losses(trainer.model, batch, rewards)
        assert (stats["ratio_mean"] == 1).all() and not trainer.old_policy.training
        assert torch.equal(state, torch.get_rng_state()) is not training


def test_a_fixed_old_policy_cannot_move_beyond_the_clip(planted, tmp_path):
    """Failure mode 2: with π_old fixed, no logged sequence moves by much more than ε; with a refresh it does."""
    moved = {}
    options = {"beta": 0.0, "epsilon": 0.1, "optim": "sgd", "learning_rate": 0.02, "weight_decay": 0.0, **QUIET}
    for refresh in ("never", "epoch"):
        trainer = make_trainer(
            tmp_path, planted, rce_epochs=0, grpo_epochs=30, curriculum_epochs=0, old_policy_refresh=refresh, **options
        )
        trainer.train()
        batch = batch_of(planted, planted.rows)
        with torch.no_grad():
            new = trainer.policy(trainer.model, batch).log_probs.sum(-1)
            old = trainer.policy(trainer.reference, batch).log_probs.sum(-1)
        moved[refresh] = (new - old)[batch["sequence_mask"].any(-1)].abs().quantile(0.9).exp().item()
        last = train_logs(trainer)[-1]
        if refresh == "never":
            assert last["clip_ratio/region_mean"] > 0.3  # where the gradient is zero
    assert moved["never"] < 1.5 and moved["epoch"] > 2.5


# ---- groups that carry nothing ----


def tie(row: dict) -> dict:
    return {**row, "scores": [0.3] * len(row["scores"])}


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "cispo", "sapo", "rwr", "listwise_kl", "asymre"])
def test_tied_groups_have_no_loss_no_gradient_and_no_share(planted, tmp_path, loss_type):
    torch.manual_seed(0)
    trainer = in_stage(make_trainer(tmp_path, planted, loss_type=loss_type, entropy_coef=0.1, beta=1.0), "grpo_late")
    with torch.no_grad():  # so that the KL of the tied groups is not 0 by itself
        for parameter in trainer.model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    live, tied = planted.rows[:2], [tie(row) for row in planted.rows[2:5]]

    def loss_and_gradient(rows):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch_of(planted, rows))
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    loss, gradient = loss_and_gradient(tied)
    assert loss == 0.0 and not gradient.any()
    loss, gradient = loss_and_gradient(live)
    loss_of_both, gradient_of_both = loss_and_gradient(live + tied)
    assert gradient.any() and loss_of_both == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(gradient_of_both, gradient, rtol=1e-4, atol=1e-7)
    trainer.state.max_steps, trainer.state.global_step = 9, 8  # late GRPO
    assert trainer._get_num_items_in_batch([batch_of(planted, live + tied)], torch.device("cpu")) == 2


def test_share_of_tied_groups_is_logged(planted, tmp_path):
    rows = [tie(row) if i % 2 else row for i, row in enumerate(planted.rows)]
    trainer = make_trainer(tmp_path, planted, train=to_dataset(rows), logging_steps=3, **QUIET)
    trainer.train()
    assert [log["frac_reward_zero_std"] for log in train_logs(trainer)] == [0.5, 0.5, 0.5]


def test_step_of_tied_groups_alone_leaves_the_weights(planted, tmp_path):
    rows = [tie(row) for row in planted.rows]
    trainer = make_trainer(tmp_path, planted, train=to_dataset(rows), rce_epochs=0, weight_decay=0.0, **QUIET)
    before = weights_of(trainer.model)
    trainer.train()
    assert_same_weights(weights_of(trainer.model), before)


# ---- the curriculum ----


def advantages_of(trainer, planted, rows) -> dict:
    batch = batch_of(planted, rows)
    _, live, stats = trainer.group_losses(trainer.model, batch, trainer.group_rewards(batch))
    return {"live": live.tolist(), "mean": stats["advantage_mean"].tolist(), "std": stats["advantage_std"].tolist()}


def test_curriculum_takes_advantages_of_the_whole_group(planted, tmp_path):
    row = {**planted.rows[0], "scores": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}
    found = advantages_of(in_stage(make_trainer(tmp_path, planted), "grpo_early", 3), planted, [row])
    z = (np.arange(6) - 2.5) / np.std(np.arange(6), ddof=1)
    assert found["mean"] == pytest.approx([z[3:].mean()]) and found["std"] == pytest.approx([z[3:].std()])


def test_literal_curriculum_makes_the_third_best_a_negative(planted, tmp_path):
    row = {**planted.rows[0], "scores": [0.0, 0.1, 0.2, 3.0, 4.0, 4.1]}
    trainer = in_stage(make_trainer(tmp_path, planted, curriculum_first=True), "grpo_early", 3)
    found = advantages_of(trainer, planted, [row])
    z = np.array([3.0, 4.0, 4.1])
    z = (z - z.mean()) / z.std(ddof=1)
    assert z[0] == pytest.approx(-1.15, abs=0.01)
    assert found["mean"] == pytest.approx([0.0], abs=1e-6) and found["std"] == pytest.approx([z.std()])
    # the best three tie: nothing to learn from what is left
    row["scores"] = [0.0, 0.1, 0.2, 4.0, 4.0, 4.0]
    assert advantages_of(trainer, planted, [row])["live"] == [False]


@pytest.mark.parametrize("loss_type", ["rwr", "listwise_kl"])
def test_weights_of_the_early_stage_are_those_of_the_whole_group(planted, tmp_path, loss_type):
    row = {**planted.rows[0], "scores": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}
    options = {"loss_type": loss_type, "beta": 0.0, "loss_temperature": 1.0}
    trainer = in_stage(make_trainer(tmp_path, planted, **options), "grpo_early", 3)
    batch = batch_of(planted, [row])
    loss = trainer.compute_loss(trainer.model, batch).item()
    z = torch.tensor((np.arange(6) - 2.5) / np.std(np.arange(6), ddof=1))[3:]
    weights = z.softmax(-1)
    log_probs = trainer.policy(trainer.model, batch).log_probs.sum(-1)[0, 3:].double()
    expected = {
        "rwr": -(weights * log_probs).sum(),
        "listwise_kl": (weights * (weights.log() - log_probs.log_softmax(-1))).sum(),
    }
    assert loss == pytest.approx(expected[loss_type].item(), rel=1e-5)


# ---- stages in one run ----


def test_learning_rates_of_the_stages(planted, tmp_path):
    trainer = make_trainer(tmp_path, planted, learning_rate=1e-2, rce_learning_rate=1e-3, warmup_ratio=0.3, **QUIET)
    trainer.train()
    cosine = [0.5 * (1 + math.cos(math.pi * x)) for x in (0.0, 0.25, 0.5, 0.75)]
    rce = [1e-3 * x for x in (1.0, 1.0, 0.5)]  # one step of warm-up
    grpo = [1e-2 * x for x in (0.5, 1.0, *cosine)]  # two, and no new start between early and late
    assert [log["learning_rate"] for log in train_logs(trainer)] == pytest.approx(rce + grpo)
    assert [log["stage"] for log in train_logs(trainer)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [log["temperature"] for log in train_logs(trainer)][:4] == [2.0, 1.25, 0.5, 0.5]


@pytest.mark.parametrize(
    "options, stages",
    [
        ({"rce_epochs": 0}, [1, 1, 1, 2, 2, 2]),
        ({"grpo_epochs": 0}, [0, 0, 0]),
        ({"curriculum_epochs": 0}, [0] * 3 + [2] * 6),
    ],
)
def test_stages_can_be_left_out(planted, tmp_path, options, stages):
    trainer = make_trainer(tmp_path, planted, **options)
    trainer.train()
    assert [log["stage"] for log in train_logs(trainer)] == stages
    assert eval_logs(trainer)[0]["step"] == 0


def test_evaluation_without_training_knows_its_stage(planted, tmp_path):
    assert "eval_effective_beams" in make_trainer(tmp_path, planted).evaluate()
    assert "eval_ratio_mean" in make_trainer(tmp_path, planted, rce_epochs=0).evaluate()


# ---- the best checkpoint ----


def test_training_that_only_hurts_ends_with_the_start(planted, tmp_path):
    model = make_selector()
    before = weights_of(model)
    # the opposite of what validation rewards, and hard
    options = {"train": negated(planted.rows), "learning_rate": 0.05, "rce_learning_rate": 0.05}
    trainer = make_trainer(tmp_path, planted, model, **options)
    trainer.train()
    rewards = [log["eval_greedy_reward"] for log in eval_logs(trainer)]
    assert rewards[-1] < rewards[0] and trainer.state.best_metric == rewards[0]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-0")
    assert_same_weights(weights_of(trainer.model), before)


def test_the_start_stays_when_old_checkpoints_go(planted, tmp_path):
    trainer = make_trainer(tmp_path, planted, train=negated(planted.rows), rce_learning_rate=0.05, save_total_limit=1)
    before = weights_of(trainer.model)
    trainer.train()
    assert_same_weights(weights_of(trainer.model), before)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-0"]


def test_training_that_helps_is_kept_unless_it_moves_too_far(planted, tmp_path):
    for limit in (None, 1e-6):
        folder = tmp_path / str(limit)
        trainer = make_trainer(folder, planted, grpo_epochs=6, learning_rate=0.03, kl_limit=limit)
        before = weights_of(trainer.model)
        trainer.train()
        rewards = {log["step"]: log["eval_greedy_reward"] for log in eval_logs(trainer)}
        if limit is None:
            best = max(rewards, key=lambda step: (rewards[step], -step))
            assert best > 0 and trainer.state.best_global_step == best
            saved = load_file(folder / f"checkpoint-{best}" / "model.safetensors")
            assert_same_weights(weights_of(trainer.model), saved)
        else:
            assert_same_weights(weights_of(trainer.model), before)


@pytest.mark.parametrize("options", [{"rce_epochs": 0.5}, {"eval_strategy": "steps", "eval_steps": 2}])
def test_the_end_of_rce_is_a_candidate_wherever_it_falls(planted, tmp_path, options):
    if "eval_steps" in options:
        options = {**options, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, planted, rce_learning_rate=0.05, **options)
    trainer.train()
    border = trainer.stage_plan.rce
    rewards = {log["step"]: log["eval_greedy_reward"] for log in eval_logs(trainer)}
    assert border in rewards and [log["step"] for log in eval_logs(trainer)].count(border) == 1
    best = max((step for step in rewards if step <= border), key=lambda step: (rewards[step], -step))
    start = weights_of(PointerSelector.from_pretrained(tmp_path / "rce"))
    assert_same_weights(start, load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))


def test_the_start_is_a_candidate_also_where_the_last_checkpoint_is_the_result(planted, tmp_path):
    options = {"rce_learning_rate": 0.05, "load_best_model_at_end": False}
    trainer = make_trainer(tmp_path, planted, train=negated(planted.rows), **options)
    before = weights_of(trainer.model)
    trainer.train()
    assert_same_weights(weights_of(PointerSelector.from_pretrained(tmp_path / "rce")), before)


def test_several_held_out_logs(planted, tmp_path):
    """The first one chooses, unless another is named; the KL that is limited is that of the same one."""
    logs = {"a": planted.validation, "b": planted.validation}
    trainer = make_trainer(tmp_path, planted, validation=logs, learning_rate=0.03, kl_limit=1e-9)
    assert trainer.args.metric_for_best_model == "eval_a_expected_reward"
    before = weights_of(trainer.model)
    trainer.train()
    assert_same_weights(weights_of(trainer.model), before)


def test_a_second_training_starts_anew(planted, tmp_path):
    trainer = make_trainer(tmp_path, planted, adaptive_beta=True, kl_low=0.0, kl_high=1e-9, rce_epochs=0, **QUIET)
    trainer.train()
    trainer.train()
    betas = [log["beta"] for log in train_logs(trainer)]
    assert max(betas) > betas[0] == trainer.args.beta


def test_streams_are_refused(planted, tmp_path):
    with pytest.raises(ValueError, match="streamed"):
        make_trainer(tmp_path, planted, train=planted.train.to_iterable_dataset())
    with pytest.raises(ValueError, match="dispatch_batches=True"):
        make_trainer(tmp_path, planted, accelerator_config={"dispatch_batches": True})


def test_evaluation_alone_knows_the_longest_sequence(planted, tmp_path):
    args = make_args(tmp_path, loss_type="dr_grpo", rce_epochs=0)
    trainer = GroupBeamGRPOTrainer(make_selector(), args, planted.collator, eval_dataset=planted.validation)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_a_reward_that_is_not_known_is_named(planted, tmp_path):
    rows = [{**row, "columns": {"correct": [1.0] * 6}} for row in planted.rows]
    rows[5]["columns"] = {"correct": [1.0, 1.0, None, 0.0, 0.0, 0.0]}
    trainer = make_trainer(tmp_path, planted, train=to_dataset(rows), reward="correct", **QUIET)
    message = rf"query {rows[5]['query_id']}, sequence 2: the 'beam' level of the reward \(correct\) is nan"
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_held_out_advantages_depend_on_no_batch_and_no_step(planted, tmp_path):
    """With advantages in units of the batch's std, too; a group has another std in each stage, and only that."""
    model, found = make_selector(), []
    options = {"scale_rewards": "batch", "rce_epochs": 0, "learning_rate": 1e-12, "weight_decay": 0.0}
    for size in (1, 3, 8):
        trainer = make_trainer(tmp_path / str(size), planted, model, per_device_eval_batch_size=size, **options)
        alone = trainer.evaluate()["eval_advantage_std"]
        trainer.train()
        found.append([alone, *(log["eval_advantage_std"] for log in eval_logs(trainer))])
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)
    fresh = make_trainer(tmp_path, planted, model, **options)
    before = torch.get_rng_state()
    fresh._std_of_log(planted.validation)
    assert torch.equal(torch.get_rng_state(), before)  # else a resumed run would go another way
    rewards = torch.tensor([score for row in planted.validation for score in row["scores"]])
    spread = torch.stack([torch.tensor(row["scores"]).std(correction=0) for row in planted.validation]).mean()
    assert found[0][-1] == pytest.approx((spread / rewards.std()).item(), rel=1e-4)


def test_checkpoints_of_weights_alone_are_named(planted, tmp_path):
    make_trainer(tmp_path, planted, save_only_model=True).train()
    with pytest.raises(FileNotFoundError, match="save_only_model=True"):
        make_trainer(tmp_path, planted).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_groups_that_the_curriculum_leaves_without_contrast_are_counted(planted, tmp_path):
    rows = [{**row, "scores": [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]} for row in planted.rows]  # tied in the top 3
    options = {"rce_epochs": 0, "curriculum_first": True, **QUIET}
    trainer = make_trainer(tmp_path, planted, train=to_dataset(rows), **options)
    trainer.train()
    logs = train_logs(trainer)
    assert [log["frac_reward_zero_std"] for log in logs] == [1.0] * 3 + [0.0] * 3


@pytest.mark.parametrize("restore", [True, False])
def test_grpo_starts_from_the_best_so_far(planted, tmp_path, restore):
    trainer = make_trainer(
        tmp_path, planted, train=negated(planted.rows), rce_learning_rate=0.05, restore_best=restore, rce_epochs=2
    )
    before = weights_of(trainer.model)
    optimizer_steps = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            optimizer_steps.append(next(iter(optimizer.state.values()))["step"].item())

    trainer.add_callback(Watch())
    trainer.train()
    warm = weights_of(PointerSelector.from_pretrained(tmp_path / "rce"))
    end_of_rce = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert_same_weights(warm, before if restore else end_of_rce)
    # the moments of the weights that were left are not used
    assert optimizer_steps == ([*range(1, 7), *range(1, 7)] if restore else list(range(1, 13)))


def test_metric_follows_what_can_be_judged(planted, tmp_path):
    assert make_trainer(tmp_path, planted).args.metric_for_best_model == "eval_greedy_reward"
    partial = to_dataset(planted.rows[:8])
    assert make_trainer(tmp_path, planted, validation=partial).args.metric_for_best_model == "eval_expected_reward"
    trainer = make_trainer(tmp_path, planted, metric_for_best_model="eval_loss", greater_is_better=False)
    assert trainer.args.metric_for_best_model == "eval_loss"


# ---- what the logs show ----


def test_logs_show_everything(planted, tmp_path):
    trainer = make_trainer(tmp_path, planted, adaptive_beta=True)
    trainer.train()
    shared = {"loss", "policy_loss", "frac_reward_zero_std", "reward", "reward_std", "entropy"}
    ratios = {"ratio_mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
    grpo = ratios | {"kl", "advantage_mean", "advantage_std"}
    schedules = {"stage", "temperature", "policy_temperature", "beta", "learning_rate", "grad_norm", "epoch"}
    selection = {"greedy_reward", "greedy_found", "greedy_changed", "expected_reward", "rank_correlation"}
    for log in train_logs(trainer):
        assert log.keys() >= shared | schedules | (grpo if log["stage"] else {"effective_beams"})
        assert all(math.isfinite(value) for value in log.values())
        assert not any(name.startswith("rewards/") for name in log)  # one level: the reward itself
    for log in eval_logs(trainer):
        wanted = shared | selection | {"kl"} | (grpo if log["step"] > 3 else {"effective_beams"})
        assert log.keys() >= {f"eval_{name}" for name in wanted}
    logs = train_logs(trainer)[3:]
    for log in logs:
        # β is adapted after a log, so the log holds the value that the loss was computed with
        assert log["loss"] == pytest.approx(log["policy_loss"] + log["beta"] * log["kl"], abs=1e-6)
    assert len({log["beta"] for log in logs}) > 1


def test_means_are_over_the_steps_since_the_last_log(planted, tmp_path):
    each = make_trainer(tmp_path / "a", planted, **QUIET)
    each.train()
    all_nine = make_trainer(tmp_path / "b", planted, logging_steps=9, **QUIET)
    all_nine.train()
    for name in ("reward", "kl", "loss", "effective_beams"):
        values = [log[name] for log in train_logs(each) if name in log]
        (log,) = train_logs(all_nine)
        assert log[name] == pytest.approx(np.mean(values), rel=1e-6)


def test_entropy_bonus_and_kl_make_up_the_loss(planted, tmp_path):
    trainer = in_stage(make_trainer(tmp_path, planted, entropy_coef=0.5, beta=2.0), "grpo_late")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = batch_of(planted, planted.rows[:3])
    losses, _, stats = trainer.group_losses(trainer.model, batch, trainer.group_rewards(batch))
    steps = trainer.policy(trainer.model, batch, return_step_log_probs=True).step_log_probs
    p = steps.exp()
    entropy = -(p * steps.clamp(min=-1e9)).sum(-1)  # (B, G, S)
    share = torch.stack([entropy[..., 0] / math.log(5), entropy[..., 1] / math.log(4)], -1).mean((-1, -2))
    expected = stats["policy_loss"] + 2.0 * stats["kl"] - 0.5 * share
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(stats["entropy"], entropy.mean((-1, -2)))


def brute_force_metrics(planted, policy, reference, rows) -> dict[str, float]:
    """The metrics of held-out groups, one query and one sequence at a time."""
    from scipy.stats import spearmanr

    found = {"expected_reward": [], "greedy_reward": [], "rank_correlation": [], "kl": [], "greedy_changed": []}
    for row in rows:
        sides = {
            "query_embeds": torch.from_numpy(planted.embeddings[[row["query_id"]]]),
            "candidate_embeds": torch.from_numpy(planted.embeddings[row["candidate_ids"]])[None],
        }

        def steps(model, sequence, sides=sides):
            inputs = {**sides, "sequences": torch.tensor([[sequence]]), "return_step_log_probs": True}
            return model(**inputs).step_log_probs[0, 0].double()  # (S, K)

        def greedy(model, steps=steps):
            first = steps(model, [0, 1])[0].argmax().item()
            other = 0 if first else 1
            return [first, steps(model, [first, other])[1].argmax().item()]

        log_probs, kls = [], []
        for sequence in row["sequences"]:
            new, old = steps(policy, sequence), steps(reference, sequence)
            log_probs.append(sum(new[t, pick].item() for t, pick in enumerate(sequence)))
            terms = torch.where(new > -math.inf, new.exp() * (new - old), 0.0)
            kls.append(terms.sum().item() / len(sequence))
        weights = np.exp(log_probs) / np.exp(log_probs).sum()
        found["expected_reward"].append(weights @ np.array(row["scores"]))
        found["greedy_reward"].append(row["scores"][row["sequences"].index(greedy(policy))])
        found["greedy_changed"].append(float(greedy(policy) != greedy(reference)))
        found["rank_correlation"].append(spearmanr(log_probs, row["scores"]).statistic)
        found["kl"].append(np.mean(kls))
    return {name: float(np.mean(values)) for name, values in found.items()}


@torch.no_grad()
def test_metrics_equal_brute_force(planted, tmp_path):
    trainer = make_trainer(tmp_path, planted, per_device_eval_batch_size=3)
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    metrics = trainer.evaluate()
    expected = brute_force_metrics(planted, trainer.model.eval(), trainer.reference, list(planted.validation))
    assert 0 < expected["greedy_changed"] < 1 and metrics["eval_greedy_found"] == 1.0
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name
    scores = np.array(planted.validation["scores"][:])
    assert metrics["eval_reward"] == pytest.approx(scores.mean())
    assert metrics["eval_reward_std"] == pytest.approx(scores.std(axis=1).mean())


def test_greedy_picks_of_pools_and_lengths_of_any_size(planted, tmp_path):
    rows = [
        *planted_rows(planted.embeddings, [0], shots=1, pool=1),  # one candidate must not shorten the others' picks
        *planted_rows(planted.embeddings, [1], shots=2, pool=4),
        *planted_rows(planted.embeddings, [2], shots=3, pool=5),
    ]
    trainer = make_trainer(tmp_path, planted, validation=to_dataset(rows))
    picks = trainer.greedy_picks(trainer.model.eval(), batch_of(planted, rows))
    alone = [trainer.greedy_picks(trainer.model, batch_of(planted, [row]))[0].tolist() for row in rows]
    assert picks.tolist() == [[0, -1, -1], [*alone[1], -1], alone[2]]
    assert trainer.evaluate()["eval_greedy_found"] == 1.0


# ---- rewards ----


def test_levels_of_the_reward_reach_the_loss(planted, tmp_path):
    rows = planted.rows[:3]
    batch = batch_of(planted, rows)
    query, pool = batch["query_embeds"], batch["candidate_embeds"][batch["candidate_indices"]]
    levels = {
        "beam": batch["rewards"]["score"],
        "task": batch["rewards"]["correct"],
        "coherence": sequence_coherence(query, pool, batch["sequences"], batch["sequence_mask"]),
        "diversity": sequence_diversity(pool, batch["sequences"], batch["sequence_mask"]),
    }
    weights = {"beam": 1.0, "task": 2.0, "coherence": 0.5, "diversity": 0.25}
    trainer = make_trainer(tmp_path, planted, reward_weights=weights, task_reward="correct")
    expected = sum(weight * levels[name] for name, weight in weights.items())
    torch.testing.assert_close(trainer.group_rewards(batch), expected)
    losses = set()
    for name in levels:
        trainer = make_trainer(tmp_path, planted, reward_weights={name: 1.0}, task_reward="correct")
        torch.testing.assert_close(trainer.group_rewards(batch), levels[name])
        losses.add(round(trainer.compute_loss(trainer.model, batch).item(), 6))
    assert len(losses) == 4


def test_levels_of_the_reward_are_logged_under_their_names(planted, tmp_path):
    levels = {"reward_weights": {"beam": 1.0, "task": 2.0, "coherence": 0.0}, "task_reward": "correct"}
    trainer = make_trainer(tmp_path, planted, grpo_epochs=0, curriculum_epochs=0, logging_steps=3, **levels)
    trainer.train()
    parts = {"": (train_logs(trainer)[0], planted.train), "eval_": (eval_logs(trainer)[0], planted.validation)}
    for prefix, (log, dataset) in parts.items():  # 3 steps of 8 groups are all groups once
        columns = {"beam": dataset["scores"][:], "task": [columns["correct"] for columns in dataset["columns"]]}
        for name, values in columns.items():
            groups = np.array(values)
            assert log[f"{prefix}rewards/{name}/mean"] == pytest.approx(groups.mean(), rel=1e-5)
            assert log[f"{prefix}rewards/{name}/std"] == pytest.approx(groups.std(axis=1).mean(), rel=1e-5)
        assert f"{prefix}rewards/coherence/mean" not in log  # without a weight
        expected = log[f"{prefix}rewards/beam/mean"] + 2 * log[f"{prefix}rewards/task/mean"]
        assert log[f"{prefix}reward"] == pytest.approx(expected, rel=1e-5)


def test_entropy_of_the_first_stage(planted, tmp_path):
    trainer = in_stage(make_trainer(tmp_path, planted), "rce")
    batch = batch_of(planted, planted.rows[:3])
    losses, _, stats = trainer.group_losses(trainer.model, batch, trainer.group_rewards(batch))
    steps = trainer.policy(trainer.model, batch, return_step_log_probs=True).step_log_probs
    by_step = torch.distributions.Categorical(logits=steps.clamp(min=-1e9)).entropy()  # (B, G, S)
    torch.testing.assert_close(stats["entropy"], by_step.mean((-1, -2)))
    assert not stats["entropy"].requires_grad and losses.requires_grad


def test_levels_can_be_normalised_first(planted, tmp_path):
    batch = batch_of(planted, planted.rows[:3])
    options = {"reward_weights": {"beam": 1.0, "task": 1.0}, "task_reward": "correct"}
    trainer = make_trainer(tmp_path, planted, multi_objective_aggregation="normalize_then_sum", **options)
    rewards = trainer.group_rewards(batch)
    score = batch["rewards"]["score"]
    z = (score - score.mean(-1, keepdim=True)) / score.std(-1, keepdim=True)
    correct = batch["rewards"]["correct"]
    spread = correct.std(-1, keepdim=True)
    z_correct = torch.where(spread > 0, (correct - correct.mean(-1, keepdim=True)) / spread.clamp(min=1e-6), 0.0)
    torch.testing.assert_close(rewards, z + z_correct)


def test_features_that_cannot_be_compared_are_refused(planted, tmp_path):
    model = make_selector(candidate_features={"other": 8})
    trainer = make_trainer(tmp_path, planted, model, reward_weights={"coherence": 1.0})
    with pytest.raises(ValueError, match="share no name"):
        trainer.group_rewards(batch_of(planted, planted.rows[:2]))


def test_batch_scale_is_that_of_the_whole_step(planted, tmp_path):
    trainer = make_trainer(tmp_path, planted, scale_rewards="batch", rce_epochs=0, curriculum_epochs=0, **QUIET)
    trainer.train()
    trainer._get_num_items_in_batch([batch_of(planted, planted.rows[:2]), batch_of(planted, planted.rows[2:5])], "cpu")
    scores = np.concatenate([row["scores"] for row in planted.rows[:5]])
    assert trainer._batch_std.item() == pytest.approx(scores.std(ddof=1), rel=1e-6)
    batch = batch_of(planted, planted.rows[:1])  # a smaller batch is measured with the same unit
    found = advantages_of(in_stage(trainer, "grpo_late"), planted, planted.rows[:1])
    own = batch["rewards"]["score"][0].double()
    assert found["std"] == pytest.approx([(own.std(correction=0) / scores.std(ddof=1)).item()], rel=1e-5)


# ---- models ----


def test_adapters_only(planted, tmp_path):
    from peft import LoraConfig, PeftModel

    lora = LoraConfig(
        r=4, target_modules=["candidate_proj", "state_proj", "from_pick"], task_type="FEATURE_EXTRACTION"
    )
    model = make_selector()
    before = weights_of(model)
    trainer = make_trainer(tmp_path / "run", planted, model, peft_config=lora, learning_rate=0.05, grpo_epochs=10)
    trainer.train()
    adapters = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert adapters and all("lora_" in name for name in adapters)
    frozen = {
        name.replace(".base_layer", ""): value for name, value in trainer.model.base_model.model.state_dict().items()
    }
    assert_same_weights({name: frozen[name] for name in before}, before)
    assert trainer.state.best_global_step > 0 and eval_logs(trainer)[-1]["eval_kl"] > 0

    trainer.save_model(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    batch = batch_of(planted, planted.rows[:4])
    inputs = {
        name: batch[name] for name in ("query_embeds", "candidate_embeds", "candidate_indices", "candidate_mask")
    }
    picks = trainer.model.eval().select(**inputs)
    merged = PeftModel.from_pretrained(make_selector(), tmp_path / "adapter").merge_and_unload()
    assert torch.equal(merged.eval().select(**inputs).sequences, picks.sequences)
    torch.testing.assert_close(merged.select(**inputs).scores, picks.scores, atol=1e-5, rtol=1e-5)


def test_saved_selector_comes_back(planted, tmp_path):
    trainer = make_trainer(tmp_path / "run", planted)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    model = AutoModel.from_pretrained(tmp_path / "saved")
    assert isinstance(model, PointerSelector)
    assert_same_weights(weights_of(model), weights_of(trainer.model))
    # a folder is accepted where a model is
    again = GroupBeamGRPOTrainer(
        str(tmp_path / "saved"), make_args(tmp_path), planted.collator, planted.train, planted.validation
    )
    assert_same_weights(weights_of(again.reference), weights_of(model))


def test_half_precision_steps_are_finite(planted, tmp_path):
    trainer = make_trainer(tmp_path, planted, make_selector(similarity_prior=True, dropout=0.1), bf16=True, **QUIET)
    before = weights_of(trainer.model)
    trainer.train()
    logs = train_logs(trainer)
    assert len(logs) == 9 and all(math.isfinite(value) for log in logs for value in log.values())
    after = weights_of(trainer.model)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in after)
    # π_old and π_ref run in the same precision as the policy
    first = logs[3]
    assert first["ratio_mean"] == 1.0


def test_compiled(planted, tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4, **QUIET}
    compiled = make_trainer(tmp_path, planted, **options)
    compiled.train()
    plain = make_trainer(tmp_path, planted, max_steps=4, **QUIET)
    plain.train()
    for a, b in zip(train_logs(compiled), train_logs(plain), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_several_gpus_in_one_process_are_refused(planted, tmp_path):
    args = make_args(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="one process sees 2 GPUs"):
        GroupBeamGRPOTrainer(make_selector(), args, planted.collator, planted.train, planted.validation)


def test_dataset_features_are_as_assumed(planted):
    assert planted.train.features == FEATURES
