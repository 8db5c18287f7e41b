import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from lever_grpo.objectives import (
    clip_advantages,
    compute_softmax_weights,
    curriculum_mask,
    effective_beams,
    group_advantages,
    normalize_rewards_zscore,
    rewards_std,
    tied_groups,
)


NAN = float("nan")
SCALES = ("group", "batch", "none", "rank")

scores = st.lists(st.floats(min_value=-1, max_value=1, width=32), min_size=2, max_size=8)
exponents = st.integers(min_value=-30, max_value=30)


def test_zscore_by_hand_on_a_2x3_batch():
    # (1, 2, 3): mean 2, std 1.  (0, 0, 3): mean 1, std sqrt(3).
    z = normalize_rewards_zscore(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]))
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-1 / math.sqrt(3), -1 / math.sqrt(3), 2 / math.sqrt(3)]])
    torch.testing.assert_close(z, expected)


def test_zscore_uses_the_std_that_trl_uses():
    rewards = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[0, 3:], mask[4, 0] = False, False
    with_nan = rewards.masked_fill(~mask, NAN)
    expected = (with_nan - with_nan.nanmean(1, keepdim=True)) / nanstd(with_nan, dim=1, keepdim=True)
    torch.testing.assert_close(normalize_rewards_zscore(with_nan, mask), expected.nan_to_num(0.0))


def test_one_group_equals_a_batch_of_one():
    rewards, mask = torch.tensor([0.3, 0.1, 0.7, 9.0]), torch.tensor([True, True, True, False])
    for function in (
        normalize_rewards_zscore,
        group_advantages,
        lambda r, m: compute_softmax_weights(r, 1.0, m),
        lambda r, m: curriculum_mask(r, m, 2),
        tied_groups,
    ):
        assert torch.equal(function(rewards, mask), function(rewards[None], mask[None])[0])


@pytest.mark.parametrize("size", [2, 3, 5, 16])
def test_zscore_bound_is_reached_by_one_outlier_and_a_clip_of_5_never_fires(size):
    z = normalize_rewards_zscore(torch.eye(size)[0])
    bound = (size - 1) / math.sqrt(size)
    assert z.abs().max().item() == pytest.approx(bound, rel=1e-5)
    assert torch.equal(clip_advantages(z), z)
    assert clip_advantages(z, clip=0.5).abs().max() == 0.5


@given(scores, exponents)
@settings(deadline=None, max_examples=100)
def test_zscore_is_scale_free_and_bounded(values, exponent):
    rewards = torch.tensor(values, dtype=torch.float64)
    z = normalize_rewards_zscore(rewards)
    scaled = normalize_rewards_zscore(rewards * 10.0**exponent)
    torch.testing.assert_close(scaled, z, rtol=1e-6, atol=1e-6)
    assert z.abs().max() <= (len(values) - 1) / math.sqrt(len(values)) + 1e-6


@given(scores, exponents, st.sampled_from(SCALES))
@settings(deadline=None, max_examples=100)
def test_float32_values_and_gradients_are_finite_at_every_scale(values, exponent, scale_rewards):
    rewards = (torch.tensor(values) * 10.0**exponent).requires_grad_()
    advantages = group_advantages(rewards, scale_rewards=scale_rewards, baseline_shift=0.3)
    weights = compute_softmax_weights(rewards)
    assert advantages.isfinite().all() and weights.isfinite().all()
    (gradient,) = torch.autograd.grad(advantages.sum() + weights.square().sum(), rewards)
    # The derivative of a z-score is of the order of 1 / spread, which float32 can hold only above 1e-38.
    if (rewards.max() - rewards.min()) > 1e-35:
        assert gradient.isfinite().all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1.0, 1e30])
def test_a_tie_is_relative_to_the_magnitude_of_the_scores(magnitude):
    contrast = torch.tensor([1.0, 1.001, 0.999]) * magnitude
    noise = torch.tensor([1.0, 1.0 + 2e-7, 1.0]) * magnitude
    assert not tied_groups(contrast) and tied_groups(noise)
    torch.testing.assert_close(normalize_rewards_zscore(contrast), torch.tensor([0.0, 1.0, -1.0]), atol=1e-3, rtol=0)
    assert not normalize_rewards_zscore(noise).any()
    for scale_rewards in SCALES:
        assert not group_advantages(noise, scale_rewards=scale_rewards, baseline_shift=0.5).any()


def test_a_large_common_offset_does_not_blur_the_contrast():
    rewards = torch.tensor([-1000.0, -1000.0625, -999.9375])  # exact in float32
    torch.testing.assert_close(normalize_rewards_zscore(rewards), torch.tensor([0.0, -1.0, 1.0]), atol=1e-6, rtol=0)


def test_groups_with_less_than_two_live_beams_are_tied():
    rewards = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert tied_groups(rewards, mask).tolist() == [False, True, True]
    assert not group_advantages(rewards, mask)[1:].any()


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_padding_with_nan_changes_nothing(scale_rewards):
    rewards = torch.tensor([[0.1, 0.4, 0.2], [3.0, 1.0, 2.0]])
    padded = torch.cat([rewards, torch.tensor([[NAN, torch.inf], [-torch.inf, 1e30]])], 1)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    for function in (
        lambda r, m: group_advantages(r, m, scale_rewards=scale_rewards, baseline_shift=0.2),
        lambda r, m: compute_softmax_weights(r, 0.7, m),
        lambda r, m: compute_softmax_weights(r, 0.7, m, normalize=False),
        lambda r, m: curriculum_mask(r, m, 2),
    ):
        result = function(padded, mask)
        torch.testing.assert_close(result[:, :3], function(rewards, None))
        assert not result[:, 3:].any()
    live = padded.clone().requires_grad_()
    weights = torch.arange(5.0)
    group_advantages(live, mask, scale_rewards=scale_rewards).mul(weights).sum().backward()
    assert live.grad.isfinite().all() and not live.grad[:, 3:].any()


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_permuting_the_beams_permutes_the_result(scale_rewards):
    rewards = torch.tensor([[0.1, 0.4, 0.2, 0.2, 0.9]])
    order = torch.tensor([4, 2, 0, 3, 1])
    advantages = group_advantages(rewards, scale_rewards=scale_rewards)
    torch.testing.assert_close(group_advantages(rewards[:, order], scale_rewards=scale_rewards), advantages[:, order])
    torch.testing.assert_close(compute_softmax_weights(rewards[:, order]), compute_softmax_weights(rewards)[:, order])


def test_scales_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]])
    none = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, -2.0, 4.0]])
    torch.testing.assert_close(group_advantages(rewards, scale_rewards="none"), none)
    batch = none / rewards.flatten().std()
    torch.testing.assert_close(group_advantages(rewards, scale_rewards="batch"), batch)
    torch.testing.assert_close(group_advantages(rewards, scale_rewards="batch", batch_std=2.0), none / 2)
    # Two zeros share the mean of the ranks -1 and 0.
    rank = torch.tensor([[-1.0, 0.0, 1.0], [-0.5, -0.5, 1.0]])
    torch.testing.assert_close(group_advantages(rewards, scale_rewards="rank"), rank)
    clipped = group_advantages(rewards, scale_rewards="none", clip=1.5)
    torch.testing.assert_close(clipped, none.clamp(-1.5, 1.5))


def test_batch_std_of_the_whole_log_makes_batching_irrelevant():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0], [5.0, 5.0, 5.0]])
    std = rewards_std(rewards)
    assert std.item() == pytest.approx(rewards.flatten().std().item())
    together = group_advantages(rewards, scale_rewards="batch")
    alone = [group_advantages(row[None], scale_rewards="batch", batch_std=std) for row in rewards]
    torch.testing.assert_close(torch.cat(alone), together)
    # A log in which every reward is the same has no std at all.
    assert not group_advantages(torch.ones(2, 3), scale_rewards="batch").any()


def test_baseline_shift_lowers_the_baseline_by_standard_deviations():
    rewards = torch.tensor([[1.0, 2.0, 3.0]])  # std 1
    for scale_rewards in ("group", "none", "rank"):
        plain = group_advantages(rewards, scale_rewards=scale_rewards)
        shifted = group_advantages(rewards, scale_rewards=scale_rewards, baseline_shift=0.5)
        torch.testing.assert_close(shifted, plain + 0.5)
    batch = group_advantages(rewards, scale_rewards="batch", batch_std=2.0, baseline_shift=0.5)
    torch.testing.assert_close(batch, torch.tensor([[-0.25, 0.25, 0.75]]))
    assert (group_advantages(rewards, baseline_shift=1.0) >= 0).all()


def test_raw_scores_make_rce_plain_sft_and_standardised_ones_do_not():
    beams = torch.tensor([0.030, 0.035, 0.040, 0.045, 0.050])  # a log's usual range
    raw = compute_softmax_weights(beams, temperature=2.0, normalize=False)
    assert raw.min() > 0.199 and raw.max() < 0.2011
    assert effective_beams(raw).item() == pytest.approx(5.0, abs=1e-3)
    weights = compute_softmax_weights(beams, temperature=2.0)
    assert weights[-1] > 0.33 and weights[0] < 0.11
    assert effective_beams(weights) < 4.3
    sharp = compute_softmax_weights(beams, temperature=0.5)
    assert effective_beams(sharp) < 1.8


def test_softmax_weights_by_hand():
    expected = torch.tensor([math.exp(-2), math.exp(-1), 1.0]) / (math.exp(-2) + math.exp(-1) + 1)
    torch.testing.assert_close(compute_softmax_weights(torch.tensor([1.0, 2.0, 3.0])), expected)  # z = -1, 0, 1
    raw = compute_softmax_weights(torch.tensor([10.0, 20.0, 30.0]), temperature=10.0, normalize=False)
    torch.testing.assert_close(raw, expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_weights_of_ties_and_dead_groups(normalize):
    rewards = torch.tensor([[1e-8, 1e-8, 1e-8], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    weights = compute_softmax_weights(rewards, 1e-12, mask, normalize=normalize)
    assert torch.equal(weights, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]))
    assert effective_beams(weights).tolist() == [2.0, 0.0]


@given(scores, exponents, st.floats(min_value=1e-3, max_value=1e3), st.booleans())
@settings(deadline=None, max_examples=100)
def test_softmax_weights_are_a_distribution_that_follows_the_scores(values, exponent, temperature, normalize):
    rewards = torch.tensor(values) * 10.0**exponent
    weights = compute_softmax_weights(rewards, temperature, normalize=normalize)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert (weights >= 0).all()
    assert weights[rewards.argmax()] == weights.max()


def test_top_3_first_loses_the_negatives_and_whole_group_first_keeps_them():
    rewards = torch.tensor([[0.9, 0.8, 0.7, 0.2, 0.1]])
    top_3 = curriculum_mask(rewards, top_k=3)
    literal = group_advantages(rewards, top_3)
    torch.testing.assert_close(literal, torch.tensor([[1.0, 0.0, -1.0, 0.0, 0.0]]))  # the good third beam is punished
    ours = group_advantages(rewards)
    assert (ours[top_3] > 0).all() and (ours[~top_3] < 0).all()
    # The example of the design notes: two equal leaders and a good third.
    two_leaders = torch.tensor([0.90, 0.90, 0.85, 0.2, 0.1])
    third = group_advantages(two_leaders, curriculum_mask(two_leaders, top_k=3))[2]
    assert third.item() == pytest.approx(-1.1547, abs=1e-3)
    assert group_advantages(two_leaders)[2] > 0


def test_curriculum_mask_takes_the_best_live_beams_and_the_first_of_ties():
    rewards = torch.tensor([[0.5, 0.9, 0.9, 0.9], [NAN, 1.0, 2.0, 3.0], [NAN, NAN, NAN, -5.0]])
    mask = torch.tensor([[True] * 4, [False, True, True, True], [False, False, False, True]])
    expected = [[False, True, True, False], [False, False, True, True], [False, False, False, True]]
    assert curriculum_mask(rewards, mask, top_k=2).tolist() == expected
    assert torch.equal(curriculum_mask(rewards, mask), mask)
    assert torch.equal(curriculum_mask(rewards, mask, top_k=99), mask)
    many = torch.tensor([0.0, 1.0] * 100)  # long enough for sorts that are not stable to show it
    assert torch.equal(curriculum_mask(many, top_k=10).nonzero().squeeze(-1), torch.arange(1, 20, 2))


def test_half_and_integer_scores_are_computed_in_float32_and_float64_stays():
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        assert normalize_rewards_zscore(torch.tensor([1, 2, 3], dtype=dtype)).dtype == torch.float32
    assert group_advantages(torch.tensor([1.0, 2.0], dtype=torch.float64)).dtype == torch.float64
    rewards = torch.tensor([[0.1, 0.4, 0.2], [3.0, 1.0, 2.5]], dtype=torch.float64, requires_grad=True)
    for scale_rewards in ("group", "batch", "none"):
        assert torch.autograd.gradcheck(lambda r, s=scale_rewards: group_advantages(r, scale_rewards=s), rewards)
    assert torch.autograd.gradcheck(compute_softmax_weights, rewards)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_advantages(torch.tensor([[1.0, NAN]])), r"rewards\[0, 1\] is nan"),
        (lambda: group_advantages(torch.ones(2, 3), torch.ones(2, 2)), "shape"),
        (lambda: group_advantages(torch.ones(2), scale_rewards="groups"), "scale_rewards='groups'"),
        (lambda: group_advantages(torch.ones(2), baseline_shift=-1), "baseline_shift=-1"),
        (lambda: group_advantages(torch.ones(2), scale_rewards="batch", batch_std=0.0), "batch_std=0.0"),
        (lambda: clip_advantages(torch.ones(2), 0.0), "clip=0.0"),
        (lambda: compute_softmax_weights(torch.ones(2), 0.0), "temperature=0.0"),
        (lambda: curriculum_mask(torch.ones(2), top_k=0), "top_k=0"),
    ],
)
def test_errors_name_the_value_and_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()
