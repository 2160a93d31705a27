# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from kdlvfm.core.weight import Weight


def curve(weight, *progress):
    return [weight.at(share) for share in progress]


def test_a_constant_weight_is_its_value_throughout():
    assert curve(Weight(), 0.0, 0.5, 0.999) == [1.0, 1.0, 1.0]
    assert curve(Weight(2.5), 0.0, 0.5, 0.999) == [2.5, 2.5, 2.5]
    assert curve(Weight(0.0), 0.0, 0.5) == [0.0, 0.0]


def test_a_warmup_rises_in_a_straight_line_from_zero():
    assert curve(Weight(4.0, warmup=0.4), 0.0, 0.1, 0.2, 0.3, 0.4, 0.9) == pytest.approx([0, 1, 2, 3, 4, 4])


def test_a_part_starts_and_stops():
    weight = Weight(2.0, start=0.25, stop=0.75)
    assert curve(weight, 0.0, 0.24, 0.25, 0.5, 0.749, 0.75, 0.9) == [0, 0, 2, 2, 2, 0, 0]
    assert curve(Weight(2.0, start=0.5, warmup=0.25), 0.5, 0.625, 0.75) == pytest.approx([0, 1, 2])


def test_a_cosine_falls_from_the_end_of_the_warmup_to_the_stop():
    weight = Weight(8.0, warmup=0.2, decay="cosine", stop=0.6)
    by_hand = [0.0, 4.0, 8.0, 4 + 4 * math.cos(math.pi / 4), 4.0, 4 + 4 * math.cos(3 * math.pi / 4), 0.0, 0.0]
    assert curve(weight, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8) == pytest.approx(by_hand)
    assert Weight(decay="cosine").at(1 - 1e-6) == pytest.approx(0, abs=1e-9)


def test_two_weights_can_take_turns():
    first, second = Weight(stop=0.3), Weight(start=0.3)
    assert all(first.at(share) + second.at(share) == 1 for share in (0.0, 0.29, 0.3, 0.31, 0.9))


def test_a_warmup_may_last_to_the_stop():
    assert curve(Weight(warmup=0.5, stop=0.5, decay="cosine"), 0.25, 0.5) == [0.5, 0.0]


def test_a_weight_is_made_of_a_number_or_of_settings():
    assert Weight.of(3) == Weight(3)
    assert Weight.of({"share": 0.1, "warmup": 0.2}) == Weight(share=0.1, warmup=0.2)
    assert Weight.of(Weight(2.0)) == Weight(2.0)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"value": -1.0}, "value must be a number from 0 on"),
        ({"value": math.nan}, "value must be"),
        ({"value": math.inf}, "value must be"),
        ({"start": 0.5, "stop": 0.5}, "0 <= start < stop <= 1"),
        ({"start": -0.1}, "start < stop"),
        ({"stop": 1.5}, "stop <= 1"),
        ({"warmup": 0.6, "stop": 0.5}, "a warmup that ends by stop"),
        ({"warmup": -0.1}, "warmup"),
        ({"decay": "linear"}, "decay must be 'constant' or 'cosine', not 'linear'"),
        ({"share": 0.0}, "share must be positive"),
        ({"share": -1.0}, "share must be positive"),
        ({"share": 0.1, "value": 2.0}, "give share=0.1 or value, not both"),
        ({"wramup": 0.1}, "settings among value, start, warmup, decay, stop, share"),
    ],
)
def test_what_is_no_weight_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Weight.of(settings)


@pytest.mark.parametrize("given", ["1.0", None, [1.0]])
def test_other_things_are_no_weights(given):
    with pytest.raises(ValueError, match="must be a number, or settings"):
        Weight.of(given)
