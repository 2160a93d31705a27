# SPDX-License-Identifier: Apache-2.0
"""How many boxes a head predicts at a position."""

import pytest

from kdlvfm.core import Detector, TapError
from kdlvfm.core.detector import boxes_per_position


@pytest.fixture
def stating(toy_detector):
    """The toy with all that a detector has, for a number of classes of its own."""

    class Stating(toy_detector):
        num_classes, task_taps = 1, ("cls.0",)

        def loss(self, features, target):
            return {}

        def predict(self, features, sizes):
            return []

    return Stating()


def test_scores_over_classes(detector, stating):
    assert boxes_per_position(detector, 5) == 1
    assert isinstance(stating, Detector)
    assert boxes_per_position(stating, 99) == 5


def test_a_head_for_fewer_classes_still_predicts_a_box(detector):
    assert boxes_per_position(detector, 80) == 1


def test_a_network_without_scores_is_refused(student):
    with pytest.raises(TapError, match="which detectors such as GFL have"):
        boxes_per_position(student, 5)
