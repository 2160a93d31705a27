# SPDX-License-Identifier: Apache-2.0
"""Which maps of two networks belong together, and a method at several pairs of them."""

from dataclasses import replace

import pytest
import torch

from kdlvfm.core import TapError, Teacher
from kdlvfm.core.levels import Levels, build_at_levels, head_pairs, level_pairs, map_pairs, nearest_tap
from kdlvfm.distillers import AT, CWD, FGD, KD, PKD, SP, CustomKD, Pairwise, ReviewKD

SAME = [("fpn.0", "fpn.0"), ("fpn.1", "fpn.1"), ("fpn.2", "fpn.2")]


@pytest.fixture
def encoder(teacher):
    """A ViT of stride 4 without a head."""
    return teacher


@pytest.fixture
def from_encoder(detection_context, encoder):
    return replace(detection_context, teacher=encoder)


def test_the_nearest_stride_is_nearest_by_ratio_and_the_deepest_of_several(detector, toy_model):
    strides = {1: 0, 4: 0, 5: 0, 6: 1, 11: 1, 12: 2, 999: 2}
    assert {stride: int(nearest_tap(detector, "fpn", stride)[-1]) for stride in strides} == strides
    assert nearest_tap(toy_model(strides=(4, 1, 1)), "map", 16) == "map.2"
    with pytest.raises(TapError, match="has no taps 'fpn"):
        nearest_tap(toy_model(), "fpn", 8)


def test_levels_meet_by_stride_not_by_number(detector, toy_detector):
    other = toy_detector(levels=(2, 4, 8))
    assert level_pairs(detector, other, "fpn") == [("fpn.0", "fpn.1"), ("fpn.1", "fpn.2"), ("fpn.2", "fpn.2")]
    assert level_pairs(detector, detector, "cls") == [("cls.0", "cls.0"), ("cls.1", "cls.1"), ("cls.2", "cls.2")]


def test_a_detector_teaches_its_pyramid_and_an_encoder_its_last_map(detection_context, from_encoder, toy_model):
    assert map_pairs(detection_context) == SAME
    assert map_pairs(from_encoder) == [("fpn.0", "map.-1")]
    coarse = replace(detection_context, teacher=Teacher(toy_model(strides=(2, 2, 4))))
    assert map_pairs(coarse) == [("fpn.2", "map.-1")]
    assert head_pairs(detection_context) == SAME
    assert head_pairs(coarse) == [("fpn.0", "map.1"), ("fpn.1", "map.2"), ("fpn.2", "map.2")]


def test_a_teacher_of_other_names_is_left_to_the_method(detection_context, toy_model):
    class Ensemble(toy_model):
        def taps(self):
            return {f"a/{tap}": info for tap, info in super().taps().items()}

    assert map_pairs(replace(detection_context, teacher=Teacher(Ensemble()))) == []


def test_a_method_of_one_tap_is_built_for_each_level(detection_context):
    pkd = build_at_levels(detection_context, PKD, loss_weight=2.0)
    assert isinstance(pkd, Levels)
    assert pkd.student_taps == pkd.teacher_taps == ("fpn.0", "fpn.1", "fpn.2")
    assert all(level.align.projector.weight.shape == (8, 6, 1, 1) for level in pkd.levels)
    assert {level.loss_weight for level in pkd.levels} == {2.0}


def test_terms_of_one_name_are_added(detection_context, detection_batch, detector, detector_teacher):
    pkd = build_at_levels(detection_context, PKD)
    student = detector(detection_batch["image"], pkd.student_taps)
    teacher = detector_teacher(detection_batch["image"], pkd.teacher_taps)
    apart = [level(student, teacher)["pkd"] for level in pkd.levels]
    terms = pkd(student, teacher)
    assert list(terms) == ["pkd"]
    torch.testing.assert_close(terms["pkd"], apart[0] + apart[1] + apart[2])


def test_a_method_of_several_taps_gets_them_all(detection_context):
    for method in (AT, ReviewKD, FGD):
        distiller = build_at_levels(detection_context, method)
        assert type(distiller) is method
        assert distiller.student_taps == distiller.teacher_taps == ("fpn.0", "fpn.1", "fpn.2")


def test_an_encoder_is_met_at_one_level(from_encoder):
    for method in (PKD, SP, AT, FGD):
        distiller = build_at_levels(from_encoder, method)
        assert type(distiller) is method
        assert (distiller.student_taps, distiller.teacher_taps) == (("fpn.0",), ("map.-1",))
    stages = build_at_levels(from_encoder, ReviewKD)
    assert stages.student_taps == stages.teacher_taps == ("map.-3", "map.-2", "map.-1")


def test_maps_are_standardised_for_cwd(detection_context, from_encoder):
    assert build_at_levels(from_encoder, CWD, temperature=2.0).standardize
    levels = build_at_levels(detection_context, CWD).levels
    assert [level.student_taps for level in levels] == [("fpn.0",), ("fpn.1",), ("fpn.2",)]
    assert all(level.standardize for level in levels)


def test_taps_that_are_named_are_taken(detection_context):
    named = build_at_levels(detection_context, PKD, student_tap="fpn.1", teacher_tap="map.0")
    assert (named.student_taps, named.teacher_taps) == (("fpn.1",), ("map.0",))
    chosen = build_at_levels(detection_context, AT, student_taps=["fpn.1"], teacher_taps=["fpn.0"])
    assert (chosen.student_taps, chosen.teacher_taps) == (("fpn.1",), ("fpn.0",))


def test_what_reads_no_maps_chooses_for_itself(detection_context):
    assert build_at_levels(detection_context, KD).student_taps == ("cls.0", "cls.1", "cls.2")
    assert build_at_levels(detection_context, CustomKD).student_taps == ("fpn.0", "fpn.1", "fpn.2")


def test_masks_change_nothing(context):
    assert build_at_levels(context, PKD).student_taps == ("map.-1",)


def test_networks_trained_apart_are_for_one_pair(detection_context):
    arguments = {"adversarial_weight": 0.1, "judged_student_tap": "fpn.0", "judged_teacher_tap": "fpn.0"}
    with pytest.raises(ValueError, match="Pairwise trains its discriminator apart from the student"):
        build_at_levels(detection_context, Pairwise, **arguments)
    one = build_at_levels(detection_context, Pairwise, student_tap="fpn.0", teacher_tap="fpn.0", **arguments)
    assert isinstance(one, Pairwise)


def test_there_must_be_levels():
    with pytest.raises(ValueError, match="there must be levels"):
        Levels([])


def test_a_level_whose_parameters_may_rest_makes_the_whole_say_so():
    resting = PKD(4, 4)
    resting.moves_subsets = True
    assert Levels([PKD(4, 4), resting]).moves_subsets
    assert not Levels([PKD(4, 4)]).moves_subsets
