"""The callbacks alone: a control to drive, and a state that says where the training is."""

import pytest
from planted import make_trainer
from transformers import TrainerControl, TrainerState

from lever_grpo import CurriculumCallback, KLBetaCallback, PolicyControl, TemperatureCallback


def at(step: int, max_steps: int = 40) -> TrainerState:
    return TrainerState(global_step=step, max_steps=max_steps)


def begin(callback, step: int) -> None:
    callback.on_step_begin(None, at(step), TrainerControl())


def test_curriculum_sets_stage_and_beams():
    control = PolicyControl()
    callback = CurriculumCallback(control, rce_epochs=1, grpo_epochs=3, curriculum_epochs=1, top_k=2)
    seen = {}
    for step in (0, 9, 10, 19, 20, 39):
        begin(callback, step)
        seen[step] = (control.stage, control.top_k)
    rce, early, late = ("rce", None), ("grpo_early", 2), ("grpo_late", None)
    assert seen == {0: rce, 9: rce, 10: early, 19: early, 20: late, 39: late}


def test_curriculum_is_set_before_the_first_step():
    control = PolicyControl()
    CurriculumCallback(control, 0, 2, 0).on_train_begin(None, at(0), TrainerControl())
    assert control.stage == "grpo_late"


def test_temperature_falls_over_rce_and_stays():
    control = PolicyControl()
    callback = TemperatureCallback(control, rce_epochs=1, grpo_epochs=1, start=2.0, end=0.5)
    values = []
    for step in (0, 19, 20, 39):
        begin(callback, step)
        values.append(control.temperature)
    assert values == [2.0, 0.5, 0.5, 0.5]
    begin(callback, 10)
    assert control.temperature == pytest.approx(2.0 - 1.5 * 10 / 19)


@pytest.mark.parametrize("adaptive, expected", [(True, 1.1), (False, 1.0)])
def test_policy_temperature_rises_with_the_kl_when_asked(adaptive, expected):
    control = PolicyControl()
    callback = TemperatureCallback(control, 1, 1, adaptive=adaptive, factor=1.1)
    callback.on_log(None, None, None, logs={"kl": 0.5})
    callback.on_log(None, None, None, logs={"kl": 0.05})
    callback.on_log(None, None, None, logs={"eval_kl": 9.0})
    assert control.policy_temperature == pytest.approx(expected)


def test_policy_temperature_falls_to_its_bound():
    control = PolicyControl()
    callback = TemperatureCallback(control, 1, 1, adaptive=True)
    for _ in range(100):
        callback.on_log(None, None, None, logs={"kl": 0.0})
    assert control.policy_temperature == 0.5


def test_beta_follows_a_moving_average():
    control = PolicyControl(beta=1.0)
    callback = KLBetaCallback(control, smoothing=0.5)
    callback.on_log(None, None, None, logs={"kl": 0.05})
    assert control.beta == 1.0
    callback.on_log(None, None, None, logs={"kl": 0.12})  # the average is 0.085: one noisy log does not move it
    assert control.beta == 1.0 and control.kl_average == pytest.approx(0.085)
    callback.on_log(None, None, None, logs={"kl": 0.2})
    assert control.beta == 1.5
    callback.on_log(None, None, None, logs={"loss": 1.0})
    callback.on_log(None, None, None, logs={"eval_kl": 0.0})
    assert control.beta == 1.5 and control.kl_average == pytest.approx(0.1425)


def test_literal_rule_per_epoch(planted, tmp_path):
    # KL outside the band at every log: x 1.5 at each of the two GRPO epochs, and never inside one
    options = {"logging_strategy": "epoch", "beta_smoothing": 0.0, "adaptive_beta": True, "kl_high": 1e-9, "kl_low": 0}
    trainer = make_trainer(tmp_path, planted, eval_strategy="no", save_strategy="no", beta=0.1, **options)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "learning_rate" in log]
    assert [log["epoch"] for log in logs] == [1.0, 2.0, 3.0]
    assert [log["beta"] for log in logs] == pytest.approx([0.1, 0.1, 0.15])
    assert trainer.policy_control.beta == pytest.approx(0.225)
    assert trainer.policy_control.kl_average == logs[-1]["kl"]  # the last log alone
