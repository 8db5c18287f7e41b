import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_grpo.objectives import compute_softmax_weights, group_advantages, group_policy_loss, rce_loss


NAN, INF = float("nan"), float("inf")
LOSS_TYPES = ("grpo", "dr_grpo", "cispo", "sapo", "rwr", "listwise_kl", "asymre")
LEVELS = ("token", "sequence", "joint")


def batch(groups=3, beams=4, shots=2, seed=0, dtype=torch.float64):
    """Log-probs close to the old ones, advantages and weights of random rewards, masks of a full batch."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(groups, beams, shots, generator=generator, dtype=dtype) - 0.1
    new = old + 0.3 * torch.randn(groups, beams, shots, generator=generator, dtype=dtype)
    rewards = torch.randn(groups, beams, generator=generator, dtype=dtype)
    mask = torch.ones(groups, beams, shots, dtype=torch.bool)
    return {
        "log_probs": new,
        "old_log_probs": old,
        "advantages": group_advantages(rewards),
        "weights": compute_softmax_weights(rewards),
        "sequence_mask": mask,
        "beam_mask": mask[..., 0].clone(),
    }


def loss_of(inputs, **options):
    return group_policy_loss(**inputs, **{"max_length": 2, **options})


def test_grpo_by_hand_on_a_2x3_batch():
    # Group 0: advantages 1, 0, -1; ratios 1.5 (clipped), 1, 0.5 (clipped). Group 1: unclipped side of both signs.
    ratios = torch.tensor([[1.5, 1.0, 0.5], [0.5, 1.1, 1.5]])
    advantages = torch.tensor([[1.0, 0.0, -1.0], [2.0, 1.0, -3.0]])
    old = torch.full((2, 3, 1), math.log(0.2))
    mask = torch.ones(2, 3, 1, dtype=torch.bool)
    loss, stats = group_policy_loss(old + ratios.log().unsqueeze(-1), old, advantages, mask, mask[..., 0])
    expected = torch.tensor([-(1.2 + 0.0 - 0.8) / 3, -(2 * 0.5 + 1.1 - 3 * 1.5) / 3])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats["ratio_mean"], torch.tensor([1.0, 3.1 / 3]))
    torch.testing.assert_close(stats["clip_ratio/low_mean"], torch.tensor([1 / 3, 0.0]))
    torch.testing.assert_close(stats["clip_ratio/high_mean"], torch.tensor([1 / 3, 0.0]))
    torch.testing.assert_close(stats["clip_ratio/region_mean"], torch.tensor([2 / 3, 0.0]))


def test_the_other_loss_types_by_hand():
    # Two beams of two shots: probabilities 0.5 * 0.4 = 0.2 and 0.25 * 0.2 = 0.05, renormalised 0.8 and 0.2.
    new = torch.tensor([[[0.5, 0.4], [0.25, 0.2]]]).log()
    old = torch.tensor([[[0.25, 0.4], [0.25, 0.4]]]).log()  # ratios 2, 1 and 1, 0.5
    advantages, weights = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.75, 0.25]])
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    ln = math.log

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    sapo = [4 * sigmoid(1.0), 4 * sigmoid(0.0), 4 / 1.05 * sigmoid(0.0), 4 / 1.05 * sigmoid(1.05 * -0.5)]
    expected = {
        "grpo": (-(1.2 + 1) / 2 + (1 + 0.8) / 2) / 2,
        "dr_grpo": (-(1.2 + 1) / 4 + (1 + 0.8) / 4) / 2,
        "cispo": (-(2 * ln(0.5) + ln(0.4)) + (ln(0.25) + 0.5 * ln(0.2))) / 4,
        "sapo": (-(sapo[0] + sapo[1]) / 2 + (sapo[2] + sapo[3]) / 2) / 2,
        "asymre": (-ln(0.2) + ln(0.05)) / 2,
        "rwr": -(0.75 * ln(0.2) + 0.25 * ln(0.05)),
        "listwise_kl": 0.75 * ln(0.75 / 0.8) + 0.25 * ln(0.25 / 0.2),
    }
    for loss_type, value in expected.items():
        loss, _ = group_policy_loss(
            new, old, advantages, mask, mask[..., 0], loss_type=loss_type, weights=weights, max_length=4
        )
        assert loss.item() == pytest.approx(value, rel=1e-5), loss_type


def test_importance_sampling_levels_by_hand():
    new = torch.tensor([[[0.5, 0.4]]]).log()
    old = torch.tensor([[[0.25, 0.5]]]).log()  # ratios 2 and 0.8
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    expected = {"token": (2 + 0.8) / 2, "sequence": math.sqrt(1.6), "joint": 1.6}
    for level, ratio in expected.items():
        options = {"importance_sampling_level": level, "epsilon": 0.99, "epsilon_high": 9.0}
        loss, stats = group_policy_loss(new, old, torch.ones(1, 1), mask, mask[..., 0], **options)
        assert loss.item() == pytest.approx(-ratio) and stats["ratio_mean"].item() == pytest.approx(ratio), level


def test_joint_ratio_is_unbiased_and_the_others_are_not():
    # Importance sampling: the old policy's mean of the joint ratio times f is the new policy's mean of f.
    new = torch.tensor([[[0.7, 0.9], [0.7, 0.1], [0.3, 0.2], [0.3, 0.8]]], dtype=torch.float64).log()
    old = torch.tensor([[[0.4, 0.5], [0.4, 0.5], [0.6, 0.6], [0.6, 0.4]]], dtype=torch.float64).log()
    f = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, 2, dtype=torch.bool)
    wanted = (new.sum(-1).exp() * f).sum()
    values = {}
    for level in LEVELS:
        # The mean over 4 beams with advantage 4 * p_old * f is the expectation under the old policy.
        loss, _ = group_policy_loss(
            new, old, 4 * old.sum(-1).exp() * f, mask, mask[..., 0], importance_sampling_level=level,
            epsilon=1.0, epsilon_high=1e9,
        )  # fmt: skip
        values[level] = -loss.item()
    assert values["joint"] == pytest.approx(wanted.item())
    assert abs(values["token"] - wanted.item()) > 0.05 and abs(values["sequence"] - wanted.item()) > 0.05


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_equal_finite_differences(loss_type, level):
    inputs = batch()
    inputs["sequence_mask"][0, 1, 1] = False
    inputs["beam_mask"][1, 0] = False
    inputs["log_probs"].requires_grad_()
    if loss_type == "cispo":
        # Its ratio is a constant: differentiate with the ratio held where it is.
        held = inputs["log_probs"].detach().clone()

        def function(x):
            ratio = (held - inputs["old_log_probs"]).masked_fill(~inputs["sequence_mask"], 0.0)
            if level != "token":
                ratio = ratio.sum(-1, keepdim=True)
                ratio = ratio / inputs["sequence_mask"].sum(-1, keepdim=True) if level == "sequence" else ratio
            shots = -ratio.exp().clamp(max=5.0) * inputs["advantages"].unsqueeze(-1) * x
            live = inputs["sequence_mask"] & inputs["beam_mask"].unsqueeze(-1)
            return (shots * live).sum((-1, -2)) / live.sum((-1, -2))

        expected = torch.autograd.grad(function(inputs["log_probs"]).sum(), inputs["log_probs"])[0]
        loss, _ = loss_of(inputs, loss_type=loss_type, importance_sampling_level=level)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), inputs["log_probs"])[0], expected)
        return

    def function(x):
        return loss_of({**inputs, "log_probs": x}, loss_type=loss_type, importance_sampling_level=level, delta=1.5)[0]

    assert torch.autograd.gradcheck(function, inputs["log_probs"], eps=1e-7)
    assert torch.autograd.grad(function(inputs["log_probs"]).sum(), inputs["log_probs"])[0].any()


@pytest.mark.parametrize("level", LEVELS)
def test_at_ratio_one_the_ratio_losses_have_the_reinforce_gradient(level):
    inputs = batch()
    inputs["old_log_probs"] = None
    leaf = inputs["log_probs"].requires_grad_()
    per_sequence = 2.0 if level == "joint" else 1.0  # the joint ratio moves with the sum, the others with the mean
    expected = -inputs["advantages"].unsqueeze(-1).expand_as(leaf) / (4 * 2) * per_sequence
    for loss_type in ("grpo", "dr_grpo", "sapo"):
        loss, stats = loss_of(inputs, loss_type=loss_type, importance_sampling_level=level, sapo_temperature_neg=1.0)
        assert (stats["ratio_mean"] == 1).all()
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), leaf)[0], expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_padding_of_beams_shots_and_groups_changes_neither_loss_nor_gradient(loss_type, level):
    inputs = batch()
    inputs["sequence_mask"][0, 1, 1] = False  # ragged lengths
    options = {"loss_type": loss_type, "importance_sampling_level": level}
    leaf = inputs["log_probs"].requires_grad_()
    loss, stats = loss_of(inputs, **options)
    gradient = torch.autograd.grad(loss.sum(), leaf)[0]
    for filler in (NAN, -INF, INF, 0.0, -1e30):
        padded = {}
        for name, value in inputs.items():
            shape = (4, 6, 4) if value.dim() == 3 else (4, 6)
            padded[name] = torch.full(shape, 0.0 if value.dtype == torch.bool else filler, dtype=value.dtype)
            padded[name][tuple(slice(0, n) for n in value.shape)] = value.detach()
        padded["log_probs"][0, 1, 1] = padded["old_log_probs"][0, 1, 1] = filler
        padded["sequence_mask"][:, 4:] = True  # a masked beam whose shots nobody masked
        padded_leaf = padded["log_probs"].requires_grad_()
        with torch.autograd.set_detect_anomaly(True):  # not even an intermediate gradient may be NaN
            padded_loss, padded_stats = loss_of(padded, **options)
            (padded_gradient,) = torch.autograd.grad(padded_loss.sum(), padded_leaf)
        torch.testing.assert_close(padded_loss[:3], loss)
        assert padded_loss[3] == 0  # a group without live beams
        for name, value in stats.items():
            torch.testing.assert_close(padded_stats[name][:3], value)
        torch.testing.assert_close(padded_gradient[:3, :4, :2], gradient)
        padded_gradient[:3, :4, :2] = 0
        assert not padded_gradient.any()  # NaN counts as True
        # The batch is exactly its unpadded groups.
        alone = [loss_of({k: v[g : g + 1] for k, v in inputs.items()}, **options)[0] for g in range(3)]
        torch.testing.assert_close(torch.cat(alone), loss)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_order_of_the_beams_does_not_matter(loss_type):
    inputs = batch()
    order = torch.tensor([2, 0, 3, 1])
    permuted = {name: value[:, order] for name, value in inputs.items()}
    torch.testing.assert_close(loss_of(permuted, loss_type=loss_type)[0], loss_of(inputs, loss_type=loss_type)[0])


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "cispo", "sapo", "asymre"])
def test_a_tied_group_has_no_gradient(loss_type):
    inputs = batch()
    rewards = torch.tensor([[0.3] * 4, [1e-8] * 4, [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    inputs["advantages"] = group_advantages(rewards, baseline_shift=0.5)
    leaf = inputs["log_probs"].requires_grad_()
    loss, _ = loss_of(inputs, loss_type=loss_type)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert not loss[:2].any() and not gradient[:2].any() and gradient[2].any()


def test_outside_the_clip_grpo_stops_and_sapo_and_cispo_go_on():
    old = torch.full((1, 2, 1), -2.0)
    advantages, mask = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, 1, dtype=torch.bool)
    for loss_type, moves in (("grpo", False), ("sapo", True), ("cispo", True)):
        new = (old + torch.tensor([[[0.5], [-0.5]]])).requires_grad_()  # both already moved the right way
        loss, _ = group_policy_loss(new, old, advantages, mask, mask[..., 0], loss_type=loss_type)
        (gradient,) = torch.autograd.grad(loss.sum(), new)
        assert bool(gradient.any()) is moves, loss_type


def test_epsilon_high_and_delta():
    old = torch.zeros(1, 2, 1)
    new = torch.tensor([[[math.log(1.5)], [math.log(10.0)]]])
    advantages, mask = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, 1, dtype=torch.bool)
    for options, expected in (
        ({}, (-1.2 + 10) / 2),
        ({"epsilon_high": 0.3}, (-1.3 + 10) / 2),
        ({"delta": 4.0}, (-1.2 + 4) / 2),
    ):
        loss, _ = group_policy_loss(new, old, advantages, mask, mask[..., 0], **options)
        assert loss.item() == pytest.approx(expected), options


def test_a_bad_beam_that_ran_away_is_still_pushed_back():
    for level in LEVELS:
        new = torch.tensor([[[-1.0, -1.0]]]).requires_grad_()
        mask = torch.ones(1, 1, 2, dtype=torch.bool)
        loss, _ = group_policy_loss(
            new, torch.full((1, 1, 2), -200.0), torch.tensor([[-1.0]]), mask, mask[..., 0],
            importance_sampling_level=level,
        )  # fmt: skip
        loss.sum().backward()
        assert loss.isfinite().all() and new.grad.isfinite().all() and (new.grad > 0).all()


extreme = st.one_of(
    st.floats(min_value=-1e30, max_value=0, allow_subnormal=False),
    st.integers(min_value=-30, max_value=30).map(lambda e: -(10.0**e)),
)


@given(
    st.lists(extreme, min_size=12, max_size=12),
    st.lists(st.floats(min_value=-1, max_value=1, width=32), min_size=3, max_size=3),
    st.integers(min_value=-30, max_value=30),
    st.sampled_from(LOSS_TYPES),
    st.sampled_from(LEVELS),
)
@settings(deadline=None, max_examples=150)
def test_losses_and_gradients_are_finite_for_extreme_finite_inputs(log_probs, rewards, exponent, loss_type, level):
    new = torch.tensor(log_probs[:6]).view(1, 3, 2).requires_grad_()
    old = torch.tensor(log_probs[6:]).view(1, 3, 2)
    scores = torch.tensor([rewards]) * 10.0**exponent
    mask = torch.ones(1, 3, 2, dtype=torch.bool)
    loss, stats = group_policy_loss(
        new, old, group_advantages(scores), mask, mask[..., 0], loss_type=loss_type, importance_sampling_level=level,
        weights=compute_softmax_weights(scores), max_length=2,
    )  # fmt: skip
    assert loss.isfinite().all() and all(value.isfinite().all() for value in stats.values())
    assert torch.autograd.grad(loss.sum(), new)[0].isfinite().all()


def test_listwise_kl_is_zero_exactly_at_the_target_and_ignores_mass_outside_the_group():
    target = torch.tensor([[0.5, 0.3, 0.2]])
    mask = torch.ones(1, 3, 1, dtype=torch.bool)
    for share in (1.0, 0.01):  # of all probability, the logged beams may hold little
        leaf = (target * share).log().unsqueeze(-1).requires_grad_()
        loss, _ = group_policy_loss(leaf, None, None, mask, mask[..., 0], loss_type="listwise_kl", weights=target)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        torch.testing.assert_close(loss, torch.zeros(1), atol=1e-6, rtol=0)
        torch.testing.assert_close(gradient, torch.zeros_like(leaf), atol=1e-6, rtol=0)


def test_rwr_is_rce_and_weights_are_renormalised_over_the_curriculum():
    inputs = batch()
    loss, _ = loss_of(inputs, loss_type="rwr")
    torch.testing.assert_close(loss, rce_loss(inputs["log_probs"], inputs["weights"], inputs["sequence_mask"]))
    inputs["beam_mask"][:, 2:] = False
    subset = {name: value[:, :2] for name, value in inputs.items()}
    subset["weights"] = subset["weights"] / subset["weights"].sum(-1, keepdim=True)
    for loss_type in ("rwr", "listwise_kl"):
        expected, _ = loss_of(subset, loss_type=loss_type)
        torch.testing.assert_close(loss_of(inputs, loss_type=loss_type)[0], expected)


def test_rce_by_hand_and_with_padding():
    log_probs = torch.tensor([[[0.5, 0.4], [0.1, NAN]], [[NAN, -INF], [-INF, NAN]]]).log().requires_grad_()
    mask = torch.tensor([[[True, True], [True, False]], [[True, True], [False, False]]])
    weights = torch.tensor([[0.75, 0.25], [0.0, 0.0]])
    loss = rce_loss(log_probs, weights, mask)
    expected = torch.tensor([-0.75 * math.log(0.2) - 0.25 * math.log(0.1), 0.0])
    torch.testing.assert_close(loss, expected)
    # Through the log above, NaN would come back; the objective's own gradient is what counts.
    leaf = log_probs.detach().requires_grad_()
    rce_loss(leaf, weights, mask).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([[[-0.75, -0.75], [-0.25, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]))
    normalized = rce_loss(log_probs, weights, mask, length_normalize=True)
    assert normalized[0].item() == pytest.approx(-0.75 * math.log(0.2) / 2 - 0.25 * math.log(0.1))


def test_rce_with_raw_scores_is_sft_and_with_standardised_ones_prefers_the_best_beam():
    leaf = torch.full((1, 5, 2), -1.0, requires_grad=True)
    mask = torch.ones(1, 5, 2, dtype=torch.bool)
    scores = torch.tensor([[0.030, 0.035, 0.040, 0.045, 0.050]])
    gradients = {}
    for name, weights in (
        ("sft", torch.full((1, 5), 0.2)),
        ("raw", compute_softmax_weights(scores, 2.0, normalize=False)),
        ("standardised", compute_softmax_weights(scores, 2.0)),
    ):
        gradients[name] = torch.autograd.grad(rce_loss(leaf, weights, mask).sum(), leaf)[0]
    torch.testing.assert_close(gradients["raw"], gradients["sft"], atol=2e-3, rtol=0)
    assert (gradients["standardised"] - gradients["sft"]).abs().max() > 0.1


def test_half_inputs_are_computed_in_float32_even_under_autocast():
    inputs = batch(dtype=torch.float32)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    upcast = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    for loss_type in LOSS_TYPES:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = loss_of(half, loss_type=loss_type)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, loss_of(upcast, loss_type=loss_type)[0])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"loss_type": "ppo"}, "loss_type='ppo'"),
        ({}, {"importance_sampling_level": "beam"}, "importance_sampling_level='beam'"),
        ({}, {"loss_type": "dr_grpo", "max_length": None}, "max_length=None"),
        ({"advantages": None}, {}, "needs advantages"),
        ({"weights": None}, {"loss_type": "rwr"}, "needs weights"),
        ({"weights": torch.full((3, 4), -1.0)}, {"loss_type": "listwise_kl"}, "negative"),
        ({"advantages": torch.zeros(3, 5)}, {}, r"advantages has shape \(3, 5\), expected \(3, 4\)"),
        ({"log_probs": torch.full((3, 4, 2), -INF)}, {}, r"log_probs\[0, 0, 0\] is -inf"),
        ({"old_log_probs": torch.full((3, 4, 2), NAN)}, {}, r"old_log_probs\[0, 0, 0\] is nan"),
    ],
)
def test_errors_name_the_value_and_the_rule(changes, options, message):
    with pytest.raises(ValueError, match=message):
        loss_of({**batch(), **changes}, **options)
