"""Intervals and p-values against hand counts, scipy and simulation."""

import time

import numpy as np
import pytest
from scipy import stats

from lever_grpo.metrics import mean_interval, paired_interval, pooled_interval, sign_flip_p_value


def crossed_table(rng, seeds, queries, seed_sd, query_sd, noise_sd):
    """A table of true mean 0 with luck of the rows, of the columns and of the cells."""
    rows, columns = rng.normal(0, seed_sd, (seeds, 1)), rng.normal(0, query_sd, (1, queries))
    return rows + columns + rng.normal(0, noise_sd, (seeds, queries))  # (R, Q)


def test_one_seed_agrees_with_scipy():
    values = np.random.default_rng(0).gamma(1.5, 2.0, 80)
    ours = mean_interval(values)
    reference = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert ours.mean == pytest.approx(values.mean(), abs=1e-12)
    width = reference.high - reference.low
    assert ours.ci_low == pytest.approx(reference.low, abs=0.03 * width)
    assert ours.ci_high == pytest.approx(reference.high, abs=0.03 * width)


def test_confidence_sets_the_quantiles():
    # Two queries, 0 and 1: the resampled mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    assert mean_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5, 0.5)
    assert mean_interval([0.0, 1.0], confidence=0.6) == (0.5, 0.0, 1.0)


def test_seeds_are_resampled_too():
    # All luck is in the rows, -1 and +1: the resampled mean is -1, 0, 1 with probability 1/4, 1/2, 1/4.
    table = np.repeat([[-1.0], [1.0]], 50, axis=1)
    assert mean_interval(table) == (0.0, -1.0, 1.0)
    assert mean_interval(table.mean(axis=0)) == (0.0, 0.0, 0.0)


def test_two_level_variance_is_owens():
    # Exact bootstrap variance of the mean of a crossed table under independent row and column resampling.
    table = crossed_table(np.random.default_rng(3), 4, 30, 0.5, 1.0, 0.3)
    cells = table - table.mean()
    rows, columns = cells.mean(axis=1), cells.mean(axis=0)
    inner = cells - rows[:, None] - columns[None, :]
    row_draws, column_draws = (rows**2).mean() / 4, (columns**2).mean() / 30
    expected = row_draws + column_draws + (inner**2).mean() / (4 * 30)
    low, high = mean_interval(table, confidence=0.6826894921370859, resamples=40_000)[1:]
    assert (high - low) / 2 == pytest.approx(np.sqrt(expected), rel=0.04)


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (6, 0.25)])
def test_coverage(seeds, seed_sd):
    rng = np.random.default_rng(5)
    trials = 300
    hits = 0
    for trial in range(trials):
        _, low, high = mean_interval(crossed_table(rng, seeds, 50, seed_sd, 1.0, 0.5), resamples=400, seed=trial)
        hits += low <= 0.0 <= high
    assert 0.90 <= hits / trials <= 0.985


def test_pairing_removes_the_queries_own_difficulty():
    rng = np.random.default_rng(7)
    difficulty = rng.normal(0, 5.0, 100)
    b = difficulty[None]
    a = difficulty + 0.3 + rng.normal(0, 0.2, (5, 100))
    mean, low, high = paired_interval(a, b)
    assert mean == pytest.approx((a - b).mean(), abs=1e-12)
    assert 0.2 < low < mean < high < 0.4
    _, alone_low, alone_high = mean_interval(a)
    assert high - low < 0.1 * (alone_high - alone_low)
    assert paired_interval(b, a) == pytest.approx((-mean, -high, -low), abs=0.02)


def test_pooled_is_weighted_by_queries_and_resampled_inside_tasks():
    # Between the tasks lies a large difference, inside them none: nothing may vary.
    mean, low, high = pooled_interval([np.zeros((3, 10)), np.full(30, 4.0)])
    assert (mean, low, high) == pytest.approx((3.0, 3.0, 3.0), abs=1e-12)
    values = np.random.default_rng(0).normal(size=60)
    _, one_low, one_high = mean_interval(values)
    _, two_low, two_high = pooled_interval([values[:30], values[30:]])
    assert two_high - two_low == pytest.approx(one_high - one_low, rel=0.1)


def test_same_input_same_interval():
    values = np.random.default_rng(0).normal(size=(3, 40))
    assert mean_interval(values, seed=4) == mean_interval(values, seed=4)
    assert mean_interval(values, seed=4) != mean_interval(values, seed=5)


def test_fast_enough_and_blocks_join():
    values = np.random.default_rng(0).normal(size=(10, 500))
    start = time.process_time()
    mean_interval(values)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_an_error(bad):
    with pytest.raises(ValueError, match=r"seed 1, query 2 \((nan|inf)\)"):
        mean_interval([[0.0, 1.0, 2.0], [0.0, 1.0, bad]])
    with pytest.raises(ValueError, match="b holds 1 value"):
        paired_interval([0.0, 1.0], [bad, 1.0])
    with pytest.raises(ValueError, match="differences holds 1 value"):
        sign_flip_p_value([bad, 1.0])


def test_shapes_and_options_are_checked():
    with pytest.raises(ValueError, match="a has 2 queries and b has 3"):
        paired_interval([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="a has 2 seeds and b has 3"):
        paired_interval(np.zeros((2, 4)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="confidence is 95"):
        mean_interval([1.0, 2.0], confidence=95)
    with pytest.raises(ValueError, match="resamples is 0"):
        mean_interval([1.0, 2.0], resamples=0)
    with pytest.raises(ValueError, match="at least one of each"):
        mean_interval([])


def test_sign_flip_exact():
    # |sum| of 1, 2, -4 is 1; of the 8 patterns all have |sum| in {1, 3, 5, 7}.
    assert sign_flip_p_value([1.0, 2.0, -4.0]) == 1.0
    assert sign_flip_p_value([4.0, 2.0, -1.0]) == 0.5  # 5 or 7: four of eight
    assert sign_flip_p_value([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]) == 0.25  # the seeds' mean is 1, 2, 3


def test_sign_flip_random_agrees_with_scipy():
    differences = np.random.default_rng(1).normal(0.25, 1.0, 60)
    ours = sign_flip_p_value(differences)
    reference = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=10_000, vectorized=True, rng=2
    )
    assert ours == pytest.approx(reference.pvalue, abs=0.012)
    assert sign_flip_p_value([differences[None, :25], differences[None, 25:]]) == ours
    assert sign_flip_p_value(np.full(60, 1.0)) == 1 / 10_001


def test_no_difference_has_p_one():
    assert sign_flip_p_value(np.zeros(40)) == 1.0
