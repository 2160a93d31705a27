# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from kdlvfm.training.dead_terms import DeadTermError, DeadTerms

ALIVE = [(1.0, 0.5), (0.9, 0.4), (0.8, 0.3), (0.7, 0.2), (0.6, 0.1), (0.5, 0.1), (0.4, 0.1), (0.3, 0.1)]


def first_error(looks, steps, every=1, watch=None):
    """The step at which a term is given up that is seen at every `every`-th of its steps; `None` if never."""
    watch = watch or DeadTerms(steps)
    for number, (value, norm) in enumerate(looks):
        for step in range(number * every + 1, (number + 1) * every + 1):
            watch.present(["student/kd"])
            if step == number * every + 1:
                watch.observe("student/kd", value, norm)
                error = watch.error(step)
                if error is not None:
                    return error
    return None


@pytest.mark.parametrize(
    ("looks", "state"),
    [
        ([(0.0, 0.0)] * 9, "zero and without a gradient"),
        ([(0.0, 0.5)] * 9, "zero"),
        ([(2.0, 0.5)] * 9, "constant"),
        ([(2.0, 0.0)] * 9, "without a gradient and constant"),
        ([(value, 0.0) for value, _ in ALIVE], "without a gradient"),
    ],
)
def test_what_is_dead_all_the_time_is_an_error_that_says_how(looks, state):
    error = first_error(looks, steps=5)
    assert isinstance(error, DeadTermError)
    assert (error.term, error.step) == ("student/kd", 5)
    assert f"student/kd was {state} at all 5 observations in the last 5 steps" in str(error)
    assert "run.dead_term_steps=null" in str(error)
    assert "hinge" in str(error)


def test_steps_count_from_the_first_observation_and_three_are_the_least():
    dead = [(0.0, 0.0)] * 20
    assert first_error(dead, steps=1).step == 3
    assert first_error(dead, steps=10, every=3).step == 10
    assert first_error(dead, steps=11, every=3).step == 13
    assert first_error(dead, steps=2, every=50).step == 101


def test_one_sign_of_life_starts_the_count_anew():
    assert first_error(ALIVE, steps=2) is None
    assert first_error([(0.0, 0.0), (0.0, 0.0), (0.1, 0.1)] * 5, steps=3) is None
    assert first_error([(0.0, 0.0), (0.1, 0.1), *[(0.0, 0.0)] * 5], steps=4).step == 6
    assert first_error([(2.0, 0.1), (2.0, 0.1), (2.0000000000000004, 0.1)] * 5, steps=3) is None


def test_no_number_is_no_death():
    assert first_error([(None, None)] * 9, steps=3) is None


def test_never_without_a_limit():
    assert first_error([(0.0, 0.0)] * 50, steps=None) is None
    with pytest.raises(ValueError, match=r"run\.dead_term_steps must be at least 1, not 0"):
        DeadTerms(0)


def test_steps_without_the_term_do_not_count():
    watch = DeadTerms(5)
    for step in range(1, 10):
        watch.present(["student/other"] if step in (3, 4, 6) else ["student/kd", "student/other"])
        if step in (1, 2, 5):
            watch.observe("student/kd", 0.0, 0.0)
        assert (watch.error(step) is not None) == (step == 9 or step == 8)


def test_its_state_is_plain_and_goes_on():
    watch = DeadTerms(6)
    assert first_error([(0.0, 0.0)] * 4, 6, watch=watch) is None
    again = DeadTerms(6)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert first_error([(0.0, 0.0)] * 9, 6, watch=again).step == 2
