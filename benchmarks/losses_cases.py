# SPDX-License-Identifier: Apache-2.0
"""The cases of `losses.py`: each loss function of the zoo, its plain form, and what both are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import losses_plain as plain
import losses_relations as relations
import torch
from torch import Tensor

from kdlvfm import distillers as zoo
from kdlvfm.core.diffusion import Schedule

TEACHER = 768
STATES = 4
BINS = 17
EMBEDDINGS = 64
QUEUE = 4096

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Shape:
    """What a case is measured at: images, their maps' sides, and the student's channels."""

    batch: int
    size: int
    channels: int
    device: str = "cpu"

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from 0 to 1."""
        return torch.rand(shape, device=self.device)

    def labels(self, size: int) -> Tensor:
        """Labels in blocks of 4 positions, about one in twenty of them void."""
        side = -(-size // 4)
        coarse = torch.randint(0, plain.CLASSES + 1, (self.batch, side, side), device=self.device)
        found = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :size, :size]
        return torch.where(found == plain.CLASSES, plain.VOID, found)


def maps(shape: Shape) -> Inputs:
    """Maps of both networks, the student's with its own channels."""
    grid = (shape.size, shape.size)
    return shape.normal(shape.batch, shape.channels, *grid), shape.normal(shape.batch, TEACHER, *grid)


def projected(shape: Shape) -> Inputs:
    """Maps of both networks with the teacher's channels."""
    return maps(replace(shape, channels=TEACHER))


def logits(shape: Shape) -> Inputs:
    grid = (shape.batch, plain.CLASSES, shape.size, shape.size)
    return shape.normal(*grid), shape.normal(*grid)


def labelled(pair: Callable[[Shape], Inputs], *rest: Any) -> Callable[[Shape], Inputs]:
    """With labels on the grid of the maps, and what else comes last."""
    return lambda shape: (*pair(shape), shape.labels(shape.size), *rest)


def kd_inputs(shape: Shape) -> Inputs:
    return (*logits(shape), 4.0, shape.labels(shape.size))


def edges(shape: Shape) -> Inputs:
    """Distributions of four sides at every position, and a weight for each position."""
    grid = (shape.batch, shape.size**2)
    return shape.normal(*grid, 4, BINS), shape.normal(*grid, 4, BINS), shape.uniform(*grid, 4)


def side_maps(shape: Shape, bins: int = BINS) -> Inputs:
    grid = (shape.size, shape.size)
    pair = [shape.uniform(shape.batch, 4 * bins, *grid) + 0.1 for _ in range(2)]
    return (*pair, shape.uniform(shape.batch, *grid))


def box_maps(shape: Shape) -> Inputs:
    return side_maps(shape, bins=1)


def states(shape: Shape) -> Inputs:
    grid = (shape.batch, STATES, shape.size, shape.size)
    return shape.normal(*grid), shape.normal(*grid)


def variances(shape: Shape) -> Inputs:
    """The student's variance, its noise, the teacher's two, the steps and the schedule."""
    steps = torch.arange(shape.batch, device=shape.device) * 7 + 3
    return (*states(shape), *states(shape), steps, Schedule.named("linear", 100).to(shape.device))


def boxed(shape: Shape) -> Inputs:
    foreground = (shape.uniform(shape.batch, shape.size, shape.size) > 0.8).float()
    both = (foreground, 1 - foreground)
    return (*projected(shape), *(mask / mask.sum((1, 2), keepdim=True) for mask in both))


def masked(shape: Shape) -> Inputs:
    return (*projected(shape), shape.uniform(shape.batch, 6, shape.size, shape.size))


def banded(shape: Shape) -> Inputs:
    sides = [shape.size // 8, shape.size // 8, shape.size // 4, shape.size // 2]
    return (*projected(shape), [shape.uniform(shape.batch, 4, side, side) for side in sides])


def embeddings(shape: Shape) -> Inputs:
    return shape.normal(EMBEDDINGS, shape.channels), shape.normal(EMBEDDINGS, TEACHER)


def class_logits(shape: Shape) -> Inputs:
    return shape.normal(EMBEDDINGS, 1000), shape.normal(EMBEDDINGS, 1000)


def samples(shape: Shape) -> Inputs:
    """Positions as samples, as many of each image as RSD's dense form takes."""
    rows = 256 * shape.batch
    return shape.normal(rows, TEACHER), shape.normal(rows, TEACHER)


def queued(shape: Shape) -> Inputs:
    return shape.normal(EMBEDDINGS, TEACHER), shape.normal(EMBEDDINGS, TEACHER), shape.normal(QUEUE, TEACHER), 0.07


def remembered(shape: Shape) -> Inputs:
    rows = shape.batch * shape.size**2
    return shape.normal(rows, TEACHER), shape.normal(rows, TEACHER), shape.normal(QUEUE, TEACHER), 0.1


def attended(shape: Shape) -> Inputs:
    return maps(shape)[0], shape.uniform(1)


def patch(shape: Shape) -> Inputs:
    """A patch of CSKD's grid of 5 x 5, its queries, keys, values and gamma."""
    side = -(-shape.size // 5)
    grid = (side, side)
    widths = (shape.channels, shape.channels // 8, shape.channels // 8, shape.channels)
    return *(shape.normal(shape.batch, width, *grid) for width in widths), shape.uniform(1)


def mean_square(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar of a function whose value is a map."""
    return lambda *inputs: function(*inputs).square().mean()


@dataclass(frozen=True)
class Case:
    """A loss function, its plain form, and its inputs, of which the first is the student's.

    `pairs` says which matrix of similarities the plain form holds: of the positions of each image, of each image and
    each other, or of a whole memory. `own_channels`: the student has its own number of channels. `of_maps`: the inputs
    depend on the size of the maps. `copies`: how many of the teacher's maps the plain form may hold at once.
    """

    name: str
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: Callable[[Shape], Inputs]
    pairs: Literal["none", "image", "batch", "memory"] = "none"
    own_channels: bool = False
    of_maps: bool = True
    copies: int = 10


def cka_of_positions(student: Tensor, teacher: Tensor) -> Tensor:
    return zoo.cka_loss(*(x.movedim(1, -1).flatten(0, 2) for x in (student, teacher)))


def gram_of_batch(student: Tensor, teacher: Tensor) -> Tensor:
    return zoo.gram_loss(student, teacher, scope="batch")


def own_variance(variance: Tensor, noise: Tensor, goal: Tensor, goal_noise: Tensor, *rest: Any) -> Inputs:
    return ({"noise": noise, "variance": variance}, {"noise": goal_noise, "variance": goal}, *rest)


CASES = (
    Case("kd", zoo.kd_loss, plain.kd, kd_inputs),
    Case("dkd", zoo.dkd_loss, plain.dkd, labelled(logits)),
    Case("dist", zoo.dist_loss, plain.dist, logits),
    Case("ofa", zoo.ofa_loss, plain.ofa, labelled(logits, 1.5)),
    Case("deit", zoo.deit_loss, plain.deit, class_logits, of_maps=False),
    Case("crosskd_cls", zoo.crosskd_cls_loss, plain.score_kd, logits),
    Case("score_kd", zoo.score_kd_loss, plain.score_kd, logits),
    Case("localization", zoo.localization_loss, plain.localization, edges),
    Case("crosskd_kl", zoo.crosskd_kl_loss, plain.crosskd_kl, side_maps),
    Case("crosskd_giou", zoo.crosskd_giou_loss, plain.crosskd_giou, box_maps),
    Case("fitnet", zoo.fitnet_loss, plain.mse, projected),
    Case("mgd", zoo.mgd_loss, plain.mgd, projected),
    Case("dkdm", zoo.dkdm_loss, plain.mse, states),
    Case(
        "dkdm_variance",
        lambda *inputs: zoo.dkdm_variance_loss(*own_variance(*inputs)),
        lambda *inputs: plain.dkdm_variance(*own_variance(*inputs)),
        variances,
    ),
    Case("attention_transfer", zoo.attention_transfer_loss, plain.attention_transfer, maps, own_channels=True),
    Case("hcl", zoo.hcl_loss, plain.hcl, projected),
    Case("attnfd", zoo.attnfd_loss, plain.attnfd, projected),
    Case("cwd", zoo.cwd_loss, plain.cwd, projected),
    Case("pkd", zoo.pkd_loss, plain.pkd, projected),
    Case("vkd", zoo.vkd_loss, plain.vkd, projected),
    Case("scale_kd", zoo.scale_kd_loss, plain.scale_kd, projected),
    Case("cosine_smooth_l1", zoo.cosine_smooth_l1_loss, plain.cosine_smooth_l1, projected),
    Case("maskd", zoo.maskd_loss, plain.maskd, masked, copies=24),
    Case("fgd", zoo.fgd_loss, plain.fgd, boxed),
    Case("freekd", zoo.freekd_loss, plain.freekd, banded),
    Case("i2ckd", zoo.i2ckd_loss, relations.i2ckd, labelled(projected, plain.CLASSES)),
    Case("idd", zoo.idd_loss, relations.idd, labelled(maps, plain.CLASSES), own_channels=True),
    Case("ifvd", zoo.ifvd_loss, relations.ifvd, labelled(maps, plain.CLASSES), own_channels=True),
    Case(
        "channel_attention",
        mean_square(zoo.channel_attention),
        mean_square(relations.channel_attention),
        attended,
        own_channels=True,
    ),
    Case(
        "position_attention",
        mean_square(zoo.position_attention),
        mean_square(relations.position_attention),
        patch,
        own_channels=True,
    ),
    Case("rkd_distance", zoo.rkd_distance_loss, relations.rkd_distance, embeddings, own_channels=True, of_maps=False),
    Case("rkd_angle", zoo.rkd_angle_loss, relations.rkd_angle, embeddings, own_channels=True, of_maps=False),
    Case("rsd", zoo.rsd_loss, relations.rsd, samples, of_maps=False),
    Case("image_relation", zoo.image_relation_loss, relations.memory_relation, queued, of_maps=False),
    Case("similarity_preserving", zoo.sp_loss, relations.similarity_preserving, maps, own_channels=True),
    Case("cka", zoo.cka_loss, relations.cka, maps, own_channels=True),
    Case("cka_positions", cka_of_positions, relations.cka_positions, maps, "batch", own_channels=True),
    Case("pairwise", zoo.pairwise_loss, relations.pairwise, maps, "image", own_channels=True),
    Case("gram", zoo.gram_loss, relations.pairwise, maps, "image", own_channels=True),
    Case("gram_batch", gram_of_batch, relations.gram_batch, maps, "batch", own_channels=True),
    Case("cirkd_pixel", zoo.cirkd_pixel_loss, relations.cirkd_pixel, maps, "batch", own_channels=True),
    Case("cirkd_memory", zoo.cirkd_memory_loss, relations.memory_relation, remembered, "memory"),
    Case("token_relation", zoo.token_relation_loss, relations.token_relation, maps, "image", own_channels=True),
    Case("afdcd", zoo.afdcd_loss, relations.afdcd, projected, copies=30),
)
