# SPDX-License-Identifier: Apache-2.0
"""Heads that can be entered half-way: who has one, and that the toy's tails are its own head."""

import pytest
import torch

from kdlvfm.core import TapError
from kdlvfm.core.split_head import split_head


def test_a_detector_whose_head_can_be_split_is_found(detector):
    assert split_head(detector) is detector


def test_any_other_network_is_refused(student):
    with pytest.raises(TapError, match="the head of toy cannot be entered half-way"):
        split_head(student)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_tails_lead_from_the_middle_to_the_end(detector, index, detection_batch):
    taps = [f"{kind}.{index}" for kind in ("cls_mid", "reg_mid", "cls", "reg")]
    cls_mid, reg_mid, cls, reg = detector(detection_batch["image"], taps).values()
    tails = split_head(detector).head_tails(index)
    assert torch.equal(tails.cls(cls_mid), cls)
    assert torch.equal(tails.reg(reg_mid), reg)
