"""It learns: a planted signal is found, and not when the loss is taken away."""

import numpy as np
import pytest
from planted import Planted, make_selector, make_trainer, planted_rows, to_dataset

from lever_grpo import GroupBeamGRPOTrainer, SelectorSFTConfig, SelectorSFTTrainer
from lever_grpo.inference import evaluate_selectors


class WithoutLoss(GroupBeamGRPOTrainer):
    """The same training, but the loss is zero (and still a function of the weights)."""

    def group_losses(self, model, inputs, rewards):
        losses, live, stats = super().group_losses(model, inputs, rewards)
        return 0.0 * losses, live, stats


def gain(folder, seed: int, monkeypatch, trainer_class=GroupBeamGRPOTrainer, epochs=8) -> tuple[float, float]:
    """Greedy reward of the SFT start and of the post-trained policy, on pools that neither has seen."""
    data = Planted(seed)
    sft = SelectorSFTTrainer(
        make_selector(seed),
        SelectorSFTConfig(
            output_dir=str(folder / "sft"), num_train_epochs=1, learning_rate=1e-3, report_to="none", use_cpu=True,
            num_beams=5, per_device_train_batch_size=8, dataloader_pin_memory=False,
        ),
        data.collator, data.train, data.validation,
    )  # fmt: skip
    sft.train()
    monkeypatch.setattr("planted.GroupBeamGRPOTrainer", trainer_class)
    # the last checkpoint, not the best: keeping the best of any walk is no sign of learning
    trainer = make_trainer(
        folder / "grpo", data, sft.model, grpo_epochs=epochs, learning_rate=0.02, weight_decay=0.0, restore_best=False,
        load_best_model_at_end=False,
    )  # fmt: skip
    trainer.train()
    unseen = to_dataset(planted_rows(data.embeddings, list(range(32)), seed=seed + 100))  # pools of its own
    results = evaluate_selectors({"sft": trainer.reference, "grpo": trainer.model}, unseen, data.collator)
    by_name = {result.name: result.rewards.mean() for result in results}
    return by_name["sft"], by_name["grpo"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grpo_raises_the_greedy_reward(seed, tmp_path, monkeypatch):
    sft, grpo = gain(tmp_path, seed, monkeypatch)
    assert grpo > sft + 0.15


def test_without_the_loss_nothing_is_learned(tmp_path, monkeypatch):
    for seed in range(3):
        sft, grpo = gain(tmp_path / str(seed), seed, monkeypatch, WithoutLoss, epochs=2)
        assert grpo == sft


@pytest.mark.parametrize("loss_type", ["dr_grpo", "cispo", "sapo", "rwr", "listwise_kl", "asymre"])
def test_every_loss_type_learns(loss_type, planted, tmp_path):
    options = {"loss_type": loss_type, "grpo_epochs": 6, "learning_rate": 0.02, "load_best_model_at_end": False}
    trainer = make_trainer(tmp_path, planted, restore_best=False, baseline_shift=0.2, save_strategy="no", **options)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert logs[-1]["eval_rank_correlation"] > logs[0]["eval_rank_correlation"] + 0.3
    assert logs[-1]["eval_expected_reward"] > logs[0]["eval_expected_reward"] + 0.1


def test_rce_learns(planted, tmp_path):
    options = {"grpo_epochs": 0, "rce_epochs": 8, "rce_learning_rate": 0.02, "load_best_model_at_end": False}
    trainer = make_trainer(tmp_path, planted, save_strategy="no", **options)
    trainer.train()
    expected = [log["eval_expected_reward"] for log in trainer.state.log_history if "eval_loss" in log]
    assert expected[-1] > expected[0] + 0.3
    assert np.argmax(expected) > 4
