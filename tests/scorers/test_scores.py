import math

import numpy as np
import pytest

from lever_grpo.scorers.scores import SCORES, mean_log_prob


def test_by_hand():
    assert mean_log_prob([-1.0, -2.0, -6.0]) == -3.0
    assert mean_log_prob(np.array([-0.25])) == -0.25
    assert SCORES["infoscore"](math.log(0.75), math.log(0.5)) == pytest.approx(0.25)
    assert SCORES["logprob_gain"](-0.5, -3.0) == 2.5
    assert set(SCORES) == {"infoscore", "logprob_gain"}


@pytest.mark.parametrize("name", SCORES)
def test_steps_add_up_to_the_sequence(name):
    means = -np.random.default_rng(0).exponential(2.0, size=9)  # zero-shot, then after each of 8 shots
    gains = [SCORES[name](new, parent) for parent, new in zip(means, means[1:], strict=False)]
    assert sum(gains) == pytest.approx(SCORES[name](means[-1], means[0]))
    assert all((gain > 0) == (new > parent) for gain, parent, new in zip(gains, means, means[1:], strict=False))


def test_what_is_not_finite_is_passed_on():
    """The search looks for it; a mean that hid it would put a made-up number into the log."""
    assert math.isnan(mean_log_prob([-1.0, math.nan]))
    assert mean_log_prob([-1.0, -math.inf]) == -math.inf


@pytest.mark.parametrize("values", [[], [[-1.0, -2.0]], -1.0])
def test_wrong_shape(values):
    with pytest.raises(ValueError, match=r"expected \(T,\)"):
        mean_log_prob(values)
