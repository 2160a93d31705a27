# SPDX-License-Identifier: Apache-2.0
"""timm's DeiTs with a distillation token."""

import torch

from kdlvfm.core import TapInfo
from kdlvfm.models.timm import TimmEncoder


def test_a_distillation_token_has_its_own_logits_at_any_size():
    """timm's class hands its arguments on, so that the option for images of any size must be looked for in its base."""
    name = "deit_tiny_distilled_patch16_224"
    model = TimmEncoder(name, pretrained=False, model_kwargs={"depth": 2, "num_classes": 7})
    assert model.tap_info("logits_distilled") == TapInfo(7, None)
    torch.nn.init.normal_(model.net.head_dist.weight)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        features = model.eval()(images, ["logits", "logits_distilled", "map.-1", "tokens"])
        end = model.net.forward_features(model.normalise(images))
        model.net.set_distilled_training(True)
        from_class, from_token = model.net.train().forward_head(end)
    assert features["map.-1"].shape == (2, 192, 4, 6)
    torch.testing.assert_close(features["tokens"], end[:, 2:])
    torch.testing.assert_close(features["logits_distilled"], from_token)
    torch.testing.assert_close(features["logits"], (from_class + from_token) / 2)
    assert "logits_distilled" not in TimmEncoder("deit_tiny_patch16_224", pretrained=False).taps()
    headless = TimmEncoder(name, pretrained=False, model_kwargs={"num_classes": 0})
    assert "logits_distilled" not in headless.taps()
