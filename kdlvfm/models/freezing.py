# SPDX-License-Identifier: Apache-2.0
"""Encoders that stay as they are, as a whole or up to an entry of their pyramid, under a head that is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdlvfm.core.features import FeatureModel
from kdlvfm.models.timm import TimmEncoder


def freeze_encoder(encoder: FeatureModel, freeze: bool | int, norm_eval: bool) -> tuple[nn.Module, ...]:
    """Take the gradient from the frozen part of an encoder; its modules that stay in eval mode.

    Raises:
        ValueError: a number of entries that the encoder does not have, or whose modules are not known.
    """
    if freeze is True:
        encoder.requires_grad_(False)
        return (encoder,)
    still: list[nn.Module] = list(_until(encoder, freeze)) if freeze else []
    for module in still:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    return tuple(x for x in encoder.modules() if isinstance(x, _BatchNorm) and (norm_eval or x in still))


def _until(encoder: FeatureModel, count: int) -> Iterator[nn.Module]:
    """The modules of an encoder, in the order they run, up to the one that yields the last frozen entry."""
    pyramid = [tap for tap in encoder.taps() if tap.startswith("map.")]
    if not isinstance(encoder, TimmEncoder) or not 0 < count <= len(pyramid):
        raise ValueError(
            f"freeze={count} keeps the first entries of the pyramid of a timm encoder; {encoder.card.name} has "
            f"{len(pyramid)}. Pass true or false instead."
        )
    net: Any = encoder.net
    end, reached = net.feature_info[count - 1]["module"], False
    for name, module in net.named_modules():
        within = name == end or name.startswith(f"{end}.")
        if reached and not within:
            return
        reached = within
        yield module
