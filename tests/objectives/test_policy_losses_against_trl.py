"""Our losses against TRL's own arithmetic: its `_compute_loss` on the same tensors, a stand-in for the trainer."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from lever_grpo.objectives import group_policy_loss, kl_estimate


NAN = float("nan")


def trl_loss(log_probs, old_log_probs, advantages, mask, *, ref_log_probs=None, **options):
    """TRL's loss of flat `(N, T)` log-probabilities and the metrics that it logs."""
    epsilon = options.get("epsilon", 0.2)
    epsilon_high = options.get("epsilon_high")
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=options.get("importance_sampling_level", "token"),
        loss_type=options.get("loss_type", "grpo"),
        beta=0.0 if ref_log_probs is None else 1.0,
        epsilon_low=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        max_completion_length=options.get("max_length"),
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(
            delta=options.get("delta"),
            sapo_temperature_pos=options.get("sapo_temperature_pos", 1.0),
            sapo_temperature_neg=options.get("sapo_temperature_neg", 1.05),
            use_bias_correction_kl=False,
        ),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None),
    )
    ids = torch.zeros(log_probs.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old_log_probs,
        "ref_per_token_logps": ref_log_probs,
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["eval"].items()}


def random_batch(groups, beams, shots, ragged):
    generator = torch.Generator().manual_seed(groups + shots)
    old = -3 * torch.rand(groups, beams, shots, generator=generator) - 0.1
    new = old + 0.4 * torch.randn(groups, beams, shots, generator=generator)
    advantages = torch.randn(groups, beams, generator=generator)
    advantages[0, 0] = 0.0  # the sign that decides SAPO's temperature
    mask = torch.ones(groups, beams, shots, dtype=torch.bool)
    if ragged:
        lengths = torch.randint(1, shots + 1, (groups, beams, 1), generator=generator)
        mask = torch.arange(shots) < lengths
        assert not mask.all()
    return new, old, advantages, mask


OPTIONS = [
    {"loss_type": "grpo"},
    {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.28},
    {"loss_type": "grpo", "delta": 1.4},
    {"loss_type": "dr_grpo", "max_length": 5},
    {"loss_type": "dr_grpo", "max_length": 5, "delta": 1.3, "epsilon": 0.3},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "sapo"},
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
]


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(value) for value in o.values()))
def test_loss_gradient_and_metrics_equal_trl(options, level, ragged):
    # TRL divides CISPO by the tokens of the whole batch, which is one group only when the batch is that group.
    groups = 1 if options["loss_type"] == "cispo" else 3
    new, old, advantages, mask = random_batch(groups, 6, 3, ragged)
    options = {**options, "importance_sampling_level": level}

    theirs_leaf = new.flatten(0, 1).requires_grad_()
    theirs, metrics = trl_loss(theirs_leaf, old.flatten(0, 1), advantages.flatten(), mask.flatten(0, 1), **options)
    # Our padding holds NaN, which TRL's product with the mask could not bear.
    ours_leaf = new.masked_fill(~mask, NAN).requires_grad_()
    beam_mask = torch.ones_like(advantages, dtype=torch.bool)
    per_group, stats = group_policy_loss(
        ours_leaf, old.masked_fill(~mask, NAN), advantages, mask, beam_mask, **options
    )

    ours = per_group.sum() / groups
    assert per_group.shape == (groups,) and ours.abs() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(ours, ours_leaf)[0], torch.autograd.grad(theirs, theirs_leaf)[0]
    torch.testing.assert_close(gradients[0].flatten(0, 1), gradients[1], rtol=1e-5, atol=1e-6)
    # Ours are shares per group; TRL weighs by tokens, which differs between groups of different length.
    compared = 0
    if groups == 1 or not ragged or level == "sequence":
        for name in set(stats) & set(metrics):
            assert stats[name].mean().item() == pytest.approx(metrics[name], abs=1e-6), name
            compared += 1
        assert compared == {"grpo": 3, "dr_grpo": 3, "cispo": 1, "sapo": 0}[options["loss_type"]]


def test_the_comparison_reaches_the_clips():
    new, old, advantages, mask = random_batch(1, 6, 3, ragged=False)
    _, metrics = trl_loss(new[0], old[0], advantages[0], mask[0])
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0
    _, metrics = trl_loss(new[0], old[0], advantages[0], mask[0], loss_type="cispo", epsilon_high=1.1)
    assert metrics["cispo_clip_ratio"] > 0


def test_no_old_log_probs_means_what_it_means_in_trl():
    new, _, advantages, mask = random_batch(3, 6, 3, ragged=True)
    theirs_leaf, ours_leaf = new.flatten(0, 1).requires_grad_(), new.clone().requires_grad_()
    theirs, _ = trl_loss(theirs_leaf, None, advantages.flatten(), mask.flatten(0, 1))
    ours = group_policy_loss(ours_leaf, None, advantages, mask, mask[..., 0])[0].mean()
    torch.testing.assert_close(ours, theirs)
    ours_gradient, theirs_gradient = (
        torch.autograd.grad(ours, ours_leaf)[0],
        torch.autograd.grad(theirs, theirs_leaf)[0],
    )
    torch.testing.assert_close(ours_gradient.flatten(0, 1), theirs_gradient)


def test_reverse_k3_is_the_kl_of_trl():
    new, reference, advantages, mask = random_batch(3, 6, 3, ragged=True)
    theirs, metrics = trl_loss(
        new.flatten(0, 1), None, torch.zeros(18), mask.flatten(0, 1), ref_log_probs=reference.flatten(0, 1)
    )
    kl = kl_estimate(new, reference, "k3", "reverse", sequence_mask=mask)  # (3, 6, 3)
    torch.testing.assert_close((kl.sum(-1) / mask.sum(-1)).mean(), theirs)
    assert (kl.sum() / mask.sum()).item() == pytest.approx(metrics["kl"], rel=1e-5)
