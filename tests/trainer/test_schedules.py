import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lever_grpo.trainer.schedules import STAGES, StagePlan, adapt, linear, warmup_cosine


EPOCHS = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 8.0])


@given(st.integers(1, 400), EPOCHS, EPOCHS, EPOCHS)
def test_stages_follow_each_other_and_fill_the_run(max_steps, rce, grpo, curriculum):
    if rce + grpo == 0:
        return
    plan = StagePlan.from_epochs(max_steps, rce, grpo, curriculum)
    assert sum(plan.steps) == max_steps and min(plan.steps) >= 0
    names = [plan.stage(step) for step in range(max_steps)]
    assert names == sorted(names, key=STAGES.index)
    for stage, length in zip(STAGES, plan.steps, strict=True):
        assert names.count(stage) == length
        if length:
            assert names.index(stage) == plan.start(stage)
    if curriculum == 0:
        assert plan.grpo_early == 0  # also where the end of RCE has to be rounded
    if curriculum >= grpo:
        assert plan.grpo_late == 0


def test_stage_with_an_odd_number_of_steps():
    # rounding the lengths instead of the ends gives 2 + 2 of 3 steps, and an early stage of -1
    assert StagePlan.from_epochs(3, 1, 1, 0).steps == (2, 0, 1)


def test_last_stage_goes_on_behind_the_end():
    assert StagePlan(4, 0, 0).stage(4) == "rce"
    assert StagePlan(2, 2, 0).stage(9) == "grpo_early"
    assert StagePlan(2, 2, 2).progress(99) == 1.0


def test_progress_runs_from_zero_to_one_in_each_stage():
    plan = StagePlan(3, 1, 5)
    assert [plan.progress(step) for step in range(9)] == [0, 0.5, 1, 0, 0, 0.25, 0.5, 0.75, 1]


def test_linear_is_bounded_by_its_ends():
    assert [linear(2.0, 0.5, p) for p in (-1, 0, 0.5, 1, 2)] == [2.0, 2.0, 1.25, 0.5, 0.5]


def test_warmup_then_cosine():
    factors = [warmup_cosine(step, 20, 0.1) for step in range(21)]
    assert factors[:3] == [0.5, 1.0, 1.0]  # never 0 at the start
    assert factors[11] == pytest.approx(0.5) and factors[20] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(factors[2:], factors[3:], strict=False))
    assert warmup_cosine(0, 10, 0.0) == 1.0
    assert [warmup_cosine(step, 2, 1.0) for step in range(2)] == [0.5, 1.0]


def test_warmup_is_not_longer_for_a_float_that_rounds_up():
    assert 100 * 0.07 > 7
    assert warmup_cosine(6, 100, 0.07) == 1.0 and warmup_cosine(0, 100, 0.07) == pytest.approx(1 / 7)


def test_adapt_moves_by_the_factor_and_stops_at_the_bounds():
    band = (0.01, 0.1, 1.5, 1e-3, 10.0)
    assert adapt(1.0, 0.2, *band) == 1.5
    assert adapt(1.5, 0.001, *band) == 1.0
    assert adapt(1.0, 0.05, *band) == 1.0
    assert adapt(9.0, 5.0, *band) == 10.0 and adapt(1e-3, 0.0, *band) == 1e-3
    assert math.isclose(adapt(1.0, 0.1, *band), 1.0)  # the band includes its ends
