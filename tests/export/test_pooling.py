# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlvfm.export.pooling import ExportablePooling, pool


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (12, 6), (5, 50)])
@pytest.mark.parametrize("output", [1, 2, 3, (6, 6), (4, 1), (None, 2), (5, None)])
def test_pooling_gives_what_torch_gives(size, output):
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(pool(x, output), F.adaptive_avg_pool2d(x, output))


def test_only_within_the_context_are_modules_pooled_by_products():
    x, layer = torch.rand(1, 2, 9, 9, requires_grad=True), nn.AdaptiveAvgPool2d((2, 2))
    with ExportablePooling():
        inside = layer(x)
    assert type(inside.grad_fn).__name__ != type(layer(x).grad_fn).__name__ == "AdaptiveAvgPool2DBackward0"
    torch.testing.assert_close(inside, layer(x))


def test_everything_else_is_left_alone():
    x = torch.rand(1, 2, 8, 8)
    with ExportablePooling():
        pooled = F.adaptive_max_pool2d(x, 2) + F.avg_pool2d(x, 4)
    assert torch.equal(pooled, F.adaptive_max_pool2d(x, 2) + F.avg_pool2d(x, 4))
