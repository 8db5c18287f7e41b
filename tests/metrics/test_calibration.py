"""A policy's certainty against rewards: by hand, against scipy, and on policies whose calibration is known."""

import numpy as np
import pytest
from scipy import optimize, special

from lever_grpo.metrics import calibration_curve, calibration_error, gap_closed, matched_temperature


RNG = np.random.default_rng(0)
REWARDS = RNG.normal(size=(30, 8))
MASK = np.arange(8) < RNG.integers(2, 9, size=(30, 1))


def kl(log_probs, rewards, temperature):
    """Mean over groups of KL(policy ‖ softmax(R / τ)), from lists of one length each."""
    parts = []
    for logits, values in zip(log_probs, rewards, strict=True):
        p, q = special.softmax(logits), special.softmax(np.divide(values, temperature))
        parts.append(special.rel_entr(p, q).sum())
    return np.mean(parts)


# ---- curve ----


def test_curve_by_hand():
    log_probs = np.log([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.9, 0.9]])
    rewards = [[0.0, 1.0, 2.0, 5.0], [4.0, 0.0, 9.0, np.nan]]
    mask = [[True] * 4, [True, True, False, False]]
    low, middle, high = calibration_curve(log_probs, rewards, mask, bins=3)
    # group 0: random 2, best 5; group 1: random 2, best 4
    assert low == (2, pytest.approx(0.15), pytest.approx((-2 - 1) / (3 + 3)))
    assert middle == (2, pytest.approx(0.35), pytest.approx((0 + 3) / (3 + 3)))
    assert high == (2, pytest.approx(0.5), pytest.approx((2 - 2) / (2 + 2)))


def test_bins_hold_everything_once_and_gaps_are_those_of_gap_closed():
    log_probs = RNG.normal(size=REWARDS.shape)
    curve = calibration_curve(log_probs, REWARDS, MASK, bins=7)
    counts = [row.sequences for row in curve]
    assert sum(counts) == MASK.sum() and max(counts) - min(counts) <= 1
    assert [row.probability for row in curve] == sorted(row.probability for row in curve)
    (everything,) = calibration_curve(log_probs, REWARDS, MASK, bins=1)
    means = [np.full(n, r[:n].mean()) for r, n in zip(REWARDS, MASK.sum(axis=1), strict=True)]
    bests = [np.full(n, r[:n].max()) for r, n in zip(REWARDS, MASK.sum(axis=1), strict=True)]
    share = gap_closed(REWARDS[MASK], np.concatenate(means), np.concatenate(bests))
    assert everything.gap_closed == pytest.approx(share, abs=1e-12) == pytest.approx(0.0, abs=1e-12)


def test_curve_rises_for_a_policy_that_knows_and_falls_for_its_opposite():
    rewards = RNG.normal(size=(200, 8))
    knows = [row.gap_closed for row in calibration_curve(rewards, rewards, bins=5)]
    wrong = [row.gap_closed for row in calibration_curve(-rewards, rewards, bins=5)]
    assert knows == sorted(knows) and wrong == sorted(wrong, reverse=True)
    assert knows[-1] > 0.5 > -0.5 > knows[0]


def test_equal_probabilities_share_a_bin_and_order_does_not_matter():
    (row,) = calibration_curve(np.zeros((4, 5)), RNG.normal(size=(4, 5)), bins=10)
    assert row == (20, pytest.approx(0.2), pytest.approx(0.0, abs=1e-12))
    log_probs, order = RNG.normal(size=REWARDS.shape).round(), RNG.permutation(8)
    curve = calibration_curve(log_probs, REWARDS, MASK)
    permuted = calibration_curve(log_probs[:, order], REWARDS[:, order], MASK[:, order])
    assert np.asarray(permuted) == pytest.approx(np.asarray(curve))


def test_tied_groups_are_left_out():
    tied = [[0.1] * 3, [1e-9, 1e-9, 1e-9], [0.0] * 3]
    assert calibration_curve(RNG.normal(size=(3, 3)), tied) == []
    assert sum(row.sequences for row in calibration_curve(np.zeros((4, 3)), [*tied, [0.0, 0.0, 1e-9]])) == 3


# ---- error ----


@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1e-6, 0.0), (1.0, 1e4)])
def test_softmax_of_the_rewards_has_no_error(temperature, scale, offset):
    rewards = REWARDS * scale + offset
    log_probs = REWARDS / temperature - RNG.normal(size=(30, 1))  # any mass outside the log
    assert matched_temperature(log_probs, rewards, MASK) == pytest.approx(temperature * scale, rel=1e-5)
    assert calibration_error(log_probs, rewards, MASK) == pytest.approx(0.0, abs=1e-9)


def test_error_is_the_smallest_kl_and_a_difference_of_entropies():
    log_probs = REWARDS + RNG.normal(size=REWARDS.shape)
    found = optimize.minimize_scalar(lambda x: kl(log_probs, REWARDS, np.exp(x)), bounds=(-5, 5), method="bounded")
    assert matched_temperature(log_probs, REWARDS) == pytest.approx(np.exp(found.x), rel=1e-3)
    error = calibration_error(log_probs, REWARDS)
    assert error == pytest.approx(found.fun, abs=1e-6) and error > 0.1
    policy = special.softmax(log_probs, axis=1)
    target = special.softmax(REWARDS / matched_temperature(log_probs, REWARDS), axis=1)
    assert (policy * REWARDS).sum(axis=1).mean() == pytest.approx((target * REWARDS).sum(axis=1).mean())
    entropies = [special.entr(p).sum(axis=1).mean() for p in (target, policy)]
    assert error == pytest.approx(entropies[0] - entropies[1])


def test_padding_is_ignored():
    log_probs = RNG.normal(size=REWARDS.shape)
    rows = [(p[:n], r[:n]) for p, r, n in zip(log_probs, REWARDS, MASK.sum(axis=1), strict=True)]
    temperature = matched_temperature(log_probs, REWARDS, MASK)
    expected = kl(*zip(*rows, strict=True), temperature)
    padded = np.where(MASK, log_probs, np.nan), np.where(MASK, REWARDS, np.inf)
    assert calibration_error(*padded, MASK) == pytest.approx(expected)
    assert matched_temperature(*padded, MASK) == temperature


def test_the_ends():
    rewards = [[0.0, 1.0, 2.0], [5.0, 1.0, 0.0]]
    always_best = [[-np.inf, -np.inf, 0.0], [0.0, -900.0, -np.inf]]
    assert matched_temperature(always_best, rewards) < 0.01
    assert calibration_error(always_best, rewards) == pytest.approx(0.0, abs=1e-6)
    uniform = np.zeros((2, 3))
    assert matched_temperature(uniform, rewards) == np.inf and calibration_error(uniform, rewards) == 0.0
    always_worst = [[0.0, -np.inf, -np.inf], [-np.inf, -np.inf, 0.0]]
    assert matched_temperature(always_worst, rewards) == np.inf
    assert calibration_error(always_worst, rewards) == pytest.approx(np.log(3))
    # rewards that all tie warrant no certainty at all
    assert calibration_error([[0.0, -np.inf]], [[4.0, 4.0]]) == pytest.approx(np.log(2))


def test_more_noise_more_error_and_one_temperature_for_all_groups():
    noise = RNG.normal(size=REWARDS.shape)
    errors = [calibration_error(REWARDS + size * noise, REWARDS) for size in (0.0, 0.3, 1.0, 3.0)]
    assert errors == sorted(errors) and errors[0] == pytest.approx(0.0, abs=1e-9) and errors[1] > 1e-3
    assert calibration_error(REWARDS * RNG.uniform(0.2, 5.0, size=(30, 1)), REWARDS) > 0.01


@pytest.mark.parametrize("metric", [calibration_curve, calibration_error, matched_temperature])
def test_wrong_groups(metric):
    with pytest.raises(ValueError, match="group 1 has no sequence with a finite log-probability"):
        metric([[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [1.0, 2.0]], [[True, True], [False, False]])
    with pytest.raises(ValueError, match="group 0, sequence 1"):
        metric([[0.0, 0.0]], [[1.0, np.nan]])
    with pytest.raises(ValueError, match=r"bins is 0; it must be at least 1"):
        calibration_curve([[0.0, 0.0]], [[1.0, 2.0]], bins=0)
