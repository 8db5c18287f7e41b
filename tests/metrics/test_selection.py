"""Metrics of picks against hand-computed cases and scipy."""

import numpy as np
import pytest
from scipy import stats

from lever_grpo.metrics import (
    changed_share,
    gap_closed,
    lookup_reward,
    oracle_reward,
    random_reward,
    regret,
    score_percentile,
    sequences_of_length,
)


SEQUENCES = [[[0], [1], [0, 1], [1, 0]], [[0], [0, 1], [1, 0], [2, 0]]]
SCORES = [[-9.0, -8.0, -1.0, -2.0], [-9.0, -3.0, -4.0, -5.0]]


def test_sequences_of_one_length():
    sequences, scores = sequences_of_length(SEQUENCES[0], SCORES[0], 2)
    assert sequences.tolist() == [[0, 1], [1, 0]]
    assert scores.tolist() == [-1.0, -2.0]
    assert sequences_of_length(SEQUENCES[0], SCORES[0], 3)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="one score per sequence"):
        sequences_of_length([[0, 1]], [1.0, 2.0], 2)


def test_lookup_respects_order_and_says_what_is_missing():
    values, found = lookup_reward([[1, 0], [2, 1]], SEQUENCES, SCORES)
    assert values[0] == -2.0 and np.isnan(values[1])
    assert found.tolist() == [True, False]


def test_lookup_of_several_seeds_and_arrays():
    picks = np.array([[[0, 1], [2, 0]], [[1, 0], [0, 1]]])  # (R, Q, S)
    values, found = lookup_reward(picks, SEQUENCES, SCORES)
    assert values.tolist() == [[-1.0, -5.0], [-2.0, -3.0]] and found.all()
    arrays = [np.array(query[1:] if len(query[1]) == 2 else query[2:]) for query in SEQUENCES]
    assert lookup_reward(picks, arrays, [SCORES[0][2:], SCORES[1][1:]])[0].tolist() == values.tolist()


def test_lookup_refuses_a_sequence_with_two_scores():
    assert lookup_reward([[0, 1]], [[[0, 1], [0, 1]]], [[1.0, 1.0]])[0].tolist() == [1.0]
    with pytest.raises(ValueError, match=r"query 0: the log scores sequence \[0, 1\] 2 times, as \[1.0, 2.0\]"):
        lookup_reward([[0, 1]], [[[0, 1], [0, 1]]], [[1.0, 2.0]])


def test_lookup_checks_its_input():
    with pytest.raises(ValueError, match="integer pool positions"):
        lookup_reward([[0.0, 1.0]], [[[0, 1]]], [[1.0]])
    with pytest.raises(ValueError, match="scores has 1 entries for 2 queries"):
        lookup_reward([[0, 1], [0, 1]], SEQUENCES, SCORES[:1])


def test_percentile_by_hand():
    scores = [[1.0, 2.0, 2.0, 3.0, 9.0]] * 4
    assert score_percentile([1.0, 2.0, 3.0, 9.0], scores).tolist() == [0.0, 37.5, 75.0, 100.0]
    assert score_percentile([4.0], [[4.0]]).tolist() == [50.0]
    assert score_percentile([4.0], [[4.0, 4.0, 4.0]]).tolist() == [50.0]


def test_percentile_is_the_mid_rank_of_scipy_and_50_on_average():
    scores = np.random.default_rng(0).integers(0, 6, 40).astype(float)
    percentiles = score_percentile(scores[:, None], [scores])[:, 0]
    assert percentiles == pytest.approx(100 * (stats.rankdata(scores) - 1) / 39)
    assert percentiles.mean() == pytest.approx(50.0)


def test_percentile_refuses_a_score_that_is_not_logged():
    with pytest.raises(ValueError, match="query 1: picked score 0.1"):
        score_percentile([0.1, np.float32(0.1)], [[0.1, 0.2], [0.1, 0.2]])
    with pytest.raises(ValueError, match="query 0: scores have shape"):
        score_percentile([0.1], [[0.1, np.nan]])


def test_random_oracle_regret():
    scores = [[1.0, 2.0, 6.0], [0.0, -4.0]]
    assert random_reward(scores).tolist() == [3.0, -2.0]
    assert oracle_reward(scores).tolist() == [6.0, 0.0]
    assert regret([[2.0, 0.0], [6.0, -4.0]], scores).tolist() == [[4.0, 0.0], [0.0, 4.0]]


def test_gap_closed_is_a_ratio_of_means():
    # Per query the ratios are 1 and 0.1 (mean 0.55); the means give 2 / 11.
    assert gap_closed([1.0, 1.0], [0.0, 0.0], [1.0, 10.0]) == pytest.approx(2 / 11)
    assert gap_closed([[-1.0], [-3.0]], [-1.0], [0.0]) == pytest.approx(-1.0)


@pytest.mark.parametrize("oracle", [[0.3, 0.3, 0.3], [0.1, 0.1, 0.1]])
def test_empty_gap_is_an_error(oracle):
    with pytest.raises(ValueError, match="is not above mean random reward"):
        gap_closed([0.3, 0.3, 0.3], [0.1 + 0.2, 0.3, 0.3], oracle)


def test_gap_of_nan_is_an_error():
    with pytest.raises(ValueError, match="pick is empty or holds a NaN"):
        gap_closed([np.nan, 1.0], [0.0, 0.0], [1.0, 1.0])


def test_changed_share_counts_order_and_seeds():
    a = [[3, 5], [1, 2], [4, 0]]
    assert changed_share(a, a) == 0.0
    assert changed_share(a, [[5, 3], [1, 2], [4, 1]]) == pytest.approx(2 / 3)
    assert changed_share([a, a], [[[5, 3], [1, 2], [4, 0]]]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="same queries, shots"):
        changed_share(a, [[3], [1], [4]])
    with pytest.raises(ValueError, match="same queries, shots"):
        changed_share([a, a], [a, a, a])
