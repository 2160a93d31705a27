# SPDX-License-Identifier: Apache-2.0
"""What a comparison of `peers.py` is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import losses_cases as cases
import torch
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """One implementation of a loss.

    `factor` is what theirs is multiplied by to be ours, of the shape of the student's input, `None` where no factor
    makes it so; `apart` says it in words.
    """

    package: str
    loss: Callable[..., Tensor]
    factor: Callable[[torch.Size], float] | None = lambda _: 1.0
    apart: str = ""


@dataclass(frozen=True)
class Compared:
    """A loss of ours, the peers that have it, and what all are given; `pairs` and `copies` as a `Case` has them."""

    name: str
    ours: Callable[..., Tensor]
    inputs: Callable[[cases.Shape], cases.Inputs]
    peers: tuple[Peer, ...]
    own_channels: bool = False
    of_maps: bool = True
    pairs: Literal["none", "image", "batch", "memory"] = "none"
    copies: int = 10


def case(compared: Compared, peer: Peer) -> cases.Case:
    """The pair as `losses.py` measures one."""
    loss: Callable[..., Any] = peer.loss
    facts = {"own_channels": compared.own_channels, "of_maps": compared.of_maps, "copies": compared.copies}
    return cases.Case(compared.name, compared.ours, loss, compared.inputs, compared.pairs, **facts)
