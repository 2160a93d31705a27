# SPDX-License-Identifier: Apache-2.0
"""The grammar of taps."""

import pytest

from kdlvfm.core import FeatureModel, TapError, TapInfo, resolve_tap
from kdlvfm.core.features import level_taps

TAPS = {
    "map.0": TapInfo(64, 2),
    "map.1": TapInfo(128, 4),
    "map.2": TapInfo(256, 8),
    "tokens": TapInfo(256, 8),
    "pooled": TapInfo(256, None),
}


@pytest.mark.parametrize("tap", list(TAPS))
def test_a_positive_name_is_itself(tap):
    assert resolve_tap(tap, TAPS, "net") == (tap, TAPS[tap])


@pytest.mark.parametrize(("tap", "name"), [("map.-1", "map.2"), ("map.-2", "map.1"), ("map.-3", "map.0")])
def test_a_negative_index_counts_from_the_last_map(tap, name):
    assert resolve_tap(tap, TAPS, "net") == (name, TAPS[name])


@pytest.mark.parametrize("tap", ["map.3", "map.-4", "map.-0", "map.-", "map.", "map.--1", "map.-x", "", "Tokens"])
def test_a_wrong_name_lists_what_there_is(tap):
    with pytest.raises(TapError, match=r"net has no tap '.*It has: map\.0, map\.1, map\.2, tokens, pooled\.$"):
        resolve_tap(tap, TAPS, "net")


@pytest.mark.parametrize(("tap", "near"), [("token", "tokens"), ("pool", "pooled"), ("maps.1", r"map\.1")])
def test_a_wrong_name_offers_near_ones(tap, near):
    with pytest.raises(TapError, match=f"Did you mean .*{near}"):
        resolve_tap(tap, TAPS, "net")


def test_nothing_near_offers_nothing():
    with pytest.raises(TapError) as error:
        resolve_tap("zzzzzzzz", TAPS, "net")
    assert "Did you mean" not in str(error.value)


def test_a_model_without_classes_says_how_to_get_logits():
    with pytest.raises(TapError, match=r"net has no classes.*teacher=from_run.*clip_zeroshot"):
        resolve_tap("logits", TAPS, "net")


def test_tap_info_needs_no_forward_pass(toy_model):
    model = toy_model(num_classes=0)
    assert model.tap_info("map.-1") == TapInfo(8, 8)
    assert model.calls == []
    with pytest.raises(TapError, match="toy has no classes"):
        model.tap_info("logits")
    with pytest.raises(ValueError, match=r"toy has no tap 'map\.7'"):
        model.tap_info("map.7")


def test_a_model_without_a_head_says_so(toy_model):
    model = toy_model(num_classes=0)
    assert FeatureModel.head_taps == model.head_taps == ()
    with pytest.raises(TapError, match="toy has no head"):
        FeatureModel.apply_head(model, {}, (8, 8))


def test_levels_of_a_detector_in_order(detector):
    assert level_taps(detector, "fpn") == ("fpn.0", "fpn.1", "fpn.2")
    assert level_taps(detector, "cls") == ("cls.0", "cls.1", "cls.2")
    assert level_taps(detector, "cls_mid") == ("cls_mid.0", "cls_mid.1", "cls_mid.2")


def test_a_network_without_levels_says_what_it_has(student):
    with pytest.raises(TapError, match=r"no taps 'fpn\.<i>', which detectors such as GFL have\. It has: map\.0, "):
        level_taps(student, "fpn")
