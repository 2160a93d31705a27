# SPDX-License-Identifier: Apache-2.0
import itertools
import math
from functools import partial

import pytest
import torch
from torch.nn import Parameter

from kdlvfm.training.optimizers import Plan, Plans, constant, cosine, poly

SGD = partial(torch.optim.SGD, lr=0.1)


def parameters():
    return [Parameter(torch.zeros(2))]


@pytest.mark.parametrize("power", [0.5, 0.9, 2.0])
def test_poly_is_its_closed_form(power):
    for progress in (0.0, 0.25, 0.5, 0.99):
        assert poly(progress, power) == pytest.approx((1 - progress) ** power, abs=0)
    assert poly(1.0, power) == 0.0


def test_cosine_starts_at_one_halves_in_the_middle_and_ends_at_its_floor():
    assert cosine(0.0) == 1.0
    assert cosine(0.5) == pytest.approx(0.5)
    assert cosine(1.0) == pytest.approx(0.0)
    assert cosine(1.0, floor=0.2) == pytest.approx(0.2)
    assert cosine(1 / 3, floor=0.2) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 3)) / 2)


def test_constant_is_one():
    assert [constant(x) for x in (0.0, 0.3, 1.0)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", [constant, poly, cosine])
def test_the_warm_up_rises_in_equal_steps_and_the_schedule_starts_where_it_ends(schedule):
    plan = Plan(SGD, schedule=schedule, warmup_steps=4)
    factors = [plan.factor(step, 20) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))
    assert factors[10] == pytest.approx(schedule(6 / 16))


def test_the_last_step_of_poly_still_moves():
    plan = Plan(SGD, schedule=poly)
    assert plan.factor(99, 100) == pytest.approx(0.01**0.9)


def test_a_warm_up_longer_than_the_run_never_reaches_one():
    plan = Plan(SGD, warmup_steps=10)
    assert max(plan.factor(step, 6) for step in range(6)) == pytest.approx(6 / 11)


def test_a_group_without_a_plan_of_its_own_has_the_default():
    default, other = Plan(SGD), Plan(SGD, clip_norm=1.0)
    plans = Plans(default, {"generator": other})
    assert plans["student"] is default
    assert plans["generator"] is other


def test_a_plan_for_no_group_is_an_error_that_names_the_groups():
    plans = Plans(Plan(SGD), {"generatr": Plan(SGD)})
    with pytest.raises(ValueError, match=r"'generatr', but the groups are student, generator"):
        plans.check({"student": parameters(), "generator": parameters()})


def test_a_group_with_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match=r"nothing to train in the group 'student'"):
        Plans(Plan(SGD)).check({"student": []})


@pytest.mark.parametrize(
    "plan",
    [Plan(partial(torch.optim.SGD, lr=0.1, momentun=0.9)), Plan(SGD, schedule=partial(poly, pwer=2))],
    ids=["optimizer", "schedule"],
)
def test_a_misspelt_argument_is_found_before_the_first_step(plan):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Plans(plan).check({"student": parameters()})


def test_an_impossible_learning_rate_is_found_before_the_first_step():
    with pytest.raises(ValueError, match="learning rate"):
        Plans(Plan(partial(torch.optim.SGD, lr=-1.0))).check({"student": parameters()})
