# SPDX-License-Identifier: Apache-2.0
"""`module:<path>` taps."""

import pytest
import torch

from kdlvfm.core import TapError
from kdlvfm.models.timm import TimmEncoder


@pytest.fixture(scope="module")
def encoder():
    return TimmEncoder("resnet18", pretrained=False).eval()


def test_module_tap_is_the_modules_output_and_leaves_no_hook(encoder):
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        features = encoder(images, ["module:layer2", "map.-3", "module:fc"])
        assert torch.equal(features["module:layer2"], features["map.-3"])
        assert torch.equal(features["module:fc"], encoder(images, ["logits"])["logits"])
    assert list(features) == ["module:layer2", "map.-3", "module:fc"]
    assert not any(module._forward_hooks for module in encoder.modules())


def test_wrong_path_names_near_ones_and_leaves_no_hook(encoder):
    with pytest.raises(TapError, match=r"no sub-module 'layer5'.*layer"):
        encoder(torch.rand(1, 3, 32, 32), ["module:layer1", "module:layer5"])
    assert not any(module._forward_hooks for module in encoder.modules())
    with pytest.raises(TapError, match="no sub-module"):
        encoder.tap_info("module:layer5")


def test_facts_of_a_module_tap_must_be_given(encoder):
    with pytest.raises(TapError, match="explicitly"):
        encoder.tap_info("module:layer2")
