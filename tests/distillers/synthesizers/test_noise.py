# SPDX-License-Identifier: Apache-2.0
"""Noise is noise, and takes nothing to make."""

import pytest
import torch

from kdlvfm.distillers.synthesizers import Noise


def test_it_is_uniform_and_new_in_each_step(make_step):
    blank = make_step(images=torch.zeros(()).expand(8, 3, 30, 30), target=None)
    made = []
    for _ in range(2):
        with pytest.raises(StopIteration) as end:
            next(Noise().synthesize(blank, ("logits",)))
        made.append(end.value.value)
    images = made[0].images
    assert images.shape == (8, 3, 30, 30)
    assert images.mean().item() == pytest.approx(0.5, abs=0.01)
    assert images.var().item() == pytest.approx(1 / 12, abs=0.005)
    assert not torch.equal(images, made[1].images)
    assert not made[0].seen.teacher
    assert not list(Noise().parameters())
