import math

import pytest
from planted import make_args
from transformers import HfArgumentParser

from lever_grpo import GroupBeamGRPOConfig, SelectorSFTConfig


@pytest.mark.parametrize(
    "name",
    [
        "loss_type",
        "importance_sampling_level",
        "scale_rewards",
        "old_policy_refresh",
        "kl_estimator",
        "kl_direction",
        "multi_objective_aggregation",
    ],
)
def test_choices_are_checked(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}='typo': must be one of"):
        make_args(tmp_path, **{name: "typo"})


@pytest.mark.parametrize(
    "name, value",
    [
        ("curriculum_epochs", -1),
        ("curriculum_top_k", 0),
        ("learning_rate", 0.0),
        ("rce_learning_rate", -1e-3),
        ("warmup_ratio", 1.5),
        ("rce_temperature_start", 0.0),
        ("rce_temperature_end", -1.0),
        ("loss_temperature", 0.0),
        ("advantage_clip", 0.0),
        ("epsilon", 0.0),
        ("epsilon_high", -0.2),
        ("delta", 1.1),  # below 1 + epsilon
        ("baseline_shift", -0.5),
        ("old_policy_refresh_steps", 0),
        ("entropy_coef", -0.1),
        ("beta", -0.1),
        ("beta_factor", 0.5),
        ("beta_smoothing", 1.5),
        ("kl_low", -0.1),
        ("kl_high", 0.001),  # below kl_low
        ("kl_limit", -1.0),
    ],
)
def test_numbers_are_checked(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}={value}: must be"):
        make_args(tmp_path, **{name: value})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"adaptive_beta": True, "beta": 50.0}, "between 0.001 and 10, and beta=50.0"),
        ({"adaptive_beta": True, "logging_strategy": "no"}, "logging_strategy='no' logs none"),
        ({"adaptive_temperature": True, "logging_strategy": "no"}, "logging_strategy='no' logs none"),
        ({"curriculum_first": True, "curriculum_top_k": 1}, "one beam has no advantage"),
    ],
)
def test_what_would_do_nothing_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **options)


def test_length_is_the_sum_of_the_stages(tmp_path):
    assert make_args(tmp_path, rce_epochs=1, grpo_epochs=2.5).num_train_epochs == 3.5
    assert make_args(tmp_path, rce_epochs=0, grpo_epochs=2).num_train_epochs == 2
    assert make_args(tmp_path, rce_epochs=2, grpo_epochs=0).num_train_epochs == 2
    assert make_args(tmp_path, rce_epochs=1, grpo_epochs=3, num_train_epochs=4).num_train_epochs == 4


@pytest.mark.parametrize("epochs", [3, 3.0, 7])
def test_another_length_is_refused(epochs, tmp_path):
    with pytest.raises(ValueError, match="rce_epochs \\+ grpo_epochs = 4"):
        make_args(tmp_path, rce_epochs=1, grpo_epochs=3, num_train_epochs=epochs)


@pytest.mark.parametrize("rce, grpo", [(0, 0), (-1, 2), (1, -1), (math.nan, 1), (1, math.inf)])
def test_lengths_of_stages_are_checked(rce, grpo, tmp_path):
    with pytest.raises(ValueError, match=f"rce_epochs={rce} and grpo_epochs={grpo}"):
        make_args(tmp_path, rce_epochs=rce, grpo_epochs=grpo)


@pytest.mark.parametrize("options", [{"warmup_steps": 10}, {"lr_scheduler_type": "constant"}])
def test_schedules_that_would_be_ignored_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match="set warmup_ratio"):
        make_args(tmp_path, **options)


@pytest.mark.parametrize("config", [GroupBeamGRPOConfig, SelectorSFTConfig])
def test_reward_weights_come_as_json(config, tmp_path):
    (args,) = HfArgumentParser(config).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "true", "--reward_weights", '{"beam": 1.0, "diversity": 0.5}']
    )
    assert args.reward_weights == {"beam": 1.0, "diversity": 0.5}


@pytest.mark.parametrize(
    "weights, message",
    [
        ("beam", "must be a JSON object"),
        ({"beams": 1.0}, "the levels are beam, coherence, diversity, task"),
        ({"beam": 0.0}, "at least one level"),
        ({}, "at least one level"),
        ({"task": 1.0}, "name its column or preset with task_reward"),
    ],
)
def test_reward_weights_are_checked(weights, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, reward_weights=weights)


def test_precomputed_reference_needs_an_estimator_and_a_fixed_temperature(tmp_path):
    with pytest.raises(ValueError, match="kl_estimator='exact'"):
        make_args(tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="adaptive_temperature"):
        make_args(tmp_path, precompute_ref_log_probs=True, kl_estimator="k3", adaptive_temperature=True)
    assert make_args(tmp_path, precompute_ref_log_probs=True, kl_estimator="k3").precompute_ref_log_probs


def test_a_controller_without_a_term_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adaptive_beta=True with beta=0"):
        make_args(tmp_path, adaptive_beta=True, beta=0.0)


def test_without_evaluation_nothing_is_best(tmp_path):
    args = make_args(tmp_path, eval_strategy="no")
    assert not args.load_best_model_at_end and not args.eval_on_start


def test_columns_must_stay(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns"):
        make_args(tmp_path, remove_unused_columns=True)


def test_sft_needs_a_beam(tmp_path):
    with pytest.raises(ValueError, match="num_beams=0"):
        SelectorSFTConfig(output_dir=str(tmp_path), num_beams=0, use_cpu=True)
