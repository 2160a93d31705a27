# SPDX-License-Identifier: Apache-2.0
"""What makes a ViT of timm cheaper: the compiler, and fused attention."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from kdlvfm.core import Teacher
from kdlvfm.models.timm import TimmEncoder


@pytest.mark.usefixtures("traced")
def test_compiled_taps_are_eager_taps():
    """Those that are read with a hook too; and each set of taps is one graph."""
    model, images = TimmEncoder("test_vit", pretrained=False), torch.rand(2, 3, 40, 64)
    counters.clear()
    for count, taps in enumerate([("map.-1",), ("map.0", "module:blocks.0.attn", "tokens"), ("pooled",)], start=1):
        expected, found = Teacher(model)(images, taps), Teacher(model, compile=True)(images, taps)
        assert list(found) == list(taps)
        for tap in taps:
            torch.testing.assert_close(found[tap], expected[tap], rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == count


def test_attention_is_fused_whatever_is_tapped(monkeypatch):
    model, calls, fused = TimmEncoder("test_vit", pretrained=False), [], nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: calls.append(0) or fused(*args, **kwargs)
    )
    Teacher(model)(torch.rand(1, 3, 32, 32), ("map.-1", "tokens", "module:blocks.0.attn"))
    assert len(calls) == len(model.net.blocks)
