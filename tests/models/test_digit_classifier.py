# SPDX-License-Identifier: Apache-2.0
"""The judge of digits: as good as it says, and the same for every size and background of memory."""

import pytest
import torch

from kdlvfm.core import TapError
from kdlvfm.core.align import resize_map
from kdlvfm.data.digits import Digits, digits_of
from kdlvfm.models.digit_classifier import DigitClassifier


@pytest.fixture(scope="module")
def judge():
    return DigitClassifier().eval()


@torch.no_grad()
def test_it_recognises_as_many_digits_as_its_docstring_says(judge):
    images = Digits(batch_size=1, steps=1).images("test").float() / 255
    found = judge(images, ["logits", "pooled"])
    right = int((found["logits"].argmax(1) == torch.from_numpy(digits_of("test")[1])).sum())
    assert right == 391
    assert f"recognises {right}" in DigitClassifier.__doc__
    assert found["pooled"].shape == (400, judge.tap_info("pooled").dim)
    torch.testing.assert_close(judge.net.classifier(found["pooled"]), found["logits"])


@torch.no_grad()
def test_larger_images_are_brought_to_its_size(judge):
    small = torch.rand(2, 3, 8, 8)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(
        judge(large, ["pooled"])["pooled"], judge(resize_map(large, (8, 8)), ["pooled"])["pooled"]
    )


def test_its_card_and_its_taps(judge):
    assert judge.card.weights == "pretrained"
    assert len(judge.card.sha256) == 64
    assert DigitClassifier(pretrained=False).card.weights == "random"
    with pytest.raises(TapError, match=r"no tap 'pool'.* Did you mean pooled"):
        judge(torch.rand(1, 3, 8, 8), ["pool"])
