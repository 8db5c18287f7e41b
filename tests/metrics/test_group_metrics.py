"""Metrics of logged groups under a policy, against hand-computed cases and scipy."""

import numpy as np
import pytest
from scipy import stats

from lever_grpo.metrics import expected_reward, mid_ranks, rank_correlation, rank_correlations


def test_expected_reward_renormalises_over_the_live_group():
    log_probs = np.log([[0.2, 0.1, 0.1, 0.6], [0.5, 0.25, 0.25, 1e-9]])
    rewards = [[1.0, 2.0, 4.0, 1e9], [1.0, 2.0, 4.0, 0.0]]
    mask = [[True, True, True, False], [True, True, True, True]]
    assert expected_reward(log_probs, rewards, mask) == pytest.approx([2.0, 2.0], abs=1e-7)


def test_expected_reward_is_stable_and_ignores_padding():
    assert expected_reward([[-5000.0, -5000.0]], [[1.0, 3.0]]) == pytest.approx([2.0])
    assert expected_reward([[-np.inf, -1.0]], [[1.0, 3.0]]) == pytest.approx([3.0])
    padded = expected_reward([[-1.0, np.nan]], [[1.0, np.nan]], [[True, False]])
    assert padded == pytest.approx([1.0])


def test_expected_reward_errors():
    with pytest.raises(ValueError, match="group 1 has no sequence"):
        expected_reward([[-1.0], [-np.inf]], [[1.0], [1.0]])
    with pytest.raises(ValueError, match="group 0, sequence 1"):
        expected_reward([[-1.0, -1.0]], [[1.0, np.nan]])
    with pytest.raises(ValueError, match="expected one"):
        expected_reward([[-1.0, -1.0]], [[1.0]])


def test_mid_ranks_are_scipys():
    values = np.random.default_rng(0).integers(0, 8, 50)
    assert mid_ranks(values).tolist() == stats.rankdata(values).tolist()


def test_rank_correlations_are_scipys_with_ties_and_padding():
    rng = np.random.default_rng(1)
    log_probs, rewards = rng.normal(size=(6, 12)).round(1), rng.integers(0, 5, (6, 12)).astype(float)
    lengths = [12, 9, 5, 12, 7, 3]
    mask = np.arange(12) < np.array(lengths)[:, None]
    reference = [stats.spearmanr(log_probs[i, :n], rewards[i, :n]).statistic for i, n in enumerate(lengths)]
    assert rank_correlations(log_probs, rewards, mask) == pytest.approx(reference)
    assert rank_correlation(log_probs, rewards, mask) == pytest.approx(np.mean(reference))


def test_undefined_groups_are_left_out_of_the_mean():
    log_probs, rewards = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0], [7.0, 7.0, 7.0]]
    assert np.isnan(rank_correlations(log_probs, rewards)[1])
    assert rank_correlation(log_probs, rewards) == pytest.approx(-1.0)
    assert np.isnan(rank_correlation(log_probs[1:], rewards[1:]))
