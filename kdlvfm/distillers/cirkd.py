# SPDX-License-Identifier: Apache-2.0
"""CIRKD: how a pixel relates to those of other images, in the batch and in memories, follows the teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import (
    Resize,
    TargetNorm,
    class_masks,
    match_size,
    normalise_target,
    promote,
    unit_vectors,
)
from kdlvfm.core.distributed import gather_batch
from kdlvfm.core.relation import BLOCK, relation_divergence

_BLOCK = BLOCK


def cirkd_pixel_loss(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Kullback-Leibler divergence between the similarities of a pixel to the pixels of another image.

    .. math::
        L = \frac{1}{B^2 M} \sum_{a, b} \sum_i \mathrm{KL}\big(\sigma(s^T_{a i b} / \tau) \,\|\,
            \sigma(s^S_{a i b} / \tau)\big), \quad s_{aib} = \big(\cos(f_{a i}, f_{b j})\big)_{j = 1 \dots M}

    over all ordered pairs of images a, b, an image and itself among them, and the M positions i of the first. There is
    no factor of the squared temperature. The channels of the two networks need not agree. Of the (B M)² similarities a
    block is held at a time, see `kdlvfm.core.relation`.

    Args:
        student: (B, C_S, H, W).
        teacher: (B, C_T, H, W); receives no gradient.
        temperature: τ; 0.1 in the paper.

    Returns:
        A scalar: the mean over pairs of images and positions.

    Raises:
        ValueError: the maps differ in batch or size.

    Source:
        The mini-batch term of Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation",
        CVPR 2022.

    Example:
        >>> student, teacher = torch.ones(1, 3, 1, 2), torch.eye(2).view(1, 2, 1, 2)
        >>> round(cirkd_pixel_loss(student, teacher, temperature=1.0).item(), 6)
        0.110944
    """
    if student.dim() != 4 or (student.shape[0], *student.shape[2:]) != (teacher.shape[0], *teacher.shape[2:]):
        raise ValueError(
            f"maps (B, C, H, W) must agree in B, H and W, not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher)."
        )
    own, goal = (unit_vectors(promote(x)).flatten(2).transpose(1, 2) for x in (student, teacher.detach()))
    batch, positions = own.shape[:2]
    rows, goal_rows = (x.flatten(0, 1).unsqueeze(0) for x in (own, goal))
    total = relation_divergence(rows, goal_rows, own.unsqueeze(0), goal.unsqueeze(0), temperature, _BLOCK)
    return total / (batch**2 * positions)


def cirkd_memory_loss(student: Tensor, teacher: Tensor, memory: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Kullback-Leibler divergence between the similarities of a pixel to what a memory holds.

    .. math::
        L = \frac{1}{P} \sum_i \mathrm{KL}\big(\sigma(\cos(f^T_i, q) / \tau) \,\|\, \sigma(\cos(f^S_i, q) / \tau)\big)

    with the softmax over the Q entries q of the memory.

    Args:
        student: (P, C) pixels, as many of the (B, H, W) as are labelled, already projected to the teacher's channels.
        teacher: (P, C); receives no gradient.
        memory: (Q, C) pixels or regions as the teacher sees them; receives no gradient.
        temperature: τ; 0.1 in the authors' code.

    Returns:
        A scalar: the mean over pixels, 0 if there are none.

    Raises:
        ValueError: the shapes differ, or the memory is of other channels.

    Source:
        The memory terms of Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation",
        CVPR 2022.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> round(cirkd_memory_loss(student, teacher, torch.eye(2), temperature=1.0).item(), 6)
        0.110944
    """
    if student.shape != teacher.shape or student.shape[1:] != memory.shape[1:]:
        raise ValueError(
            f"pixels must have one shape (P, C) and the memory (Q, C), not {tuple(student.shape)} (student), "
            f"{tuple(teacher.shape)} (teacher) and {tuple(memory.shape)} (memory)."
        )
    own, goal, entries = (unit_vectors(promote(x)).unsqueeze(0) for x in (student, teacher.detach(), memory.detach()))
    keys = entries.unsqueeze(0)
    return relation_divergence(own, goal, keys, keys, temperature, _BLOCK) / max(len(student), 1)


class ClassMemory(nn.Module):
    """A ring of unit vectors for each class; random ones until it has been filled.

    Args:
        num_classes: K.
        size: vectors of each class.
        dim: C.
    """

    entries: Tensor
    position: Tensor

    def __init__(self, num_classes: int, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("entries", F.normalize(torch.randn(num_classes, size, dim), dim=2))
        self.register_buffer("position", torch.zeros(num_classes, dtype=torch.long))

    def push(self, vectors: Tensor, valid: Tensor) -> None:
        """Put the valid ones of (K, U, C) vectors in the place of the oldest of their class; `valid` is (K, U)."""
        size = self.entries.shape[1]
        slots = (self.position.unsqueeze(1) + valid.cumsum(dim=1) - 1) % size
        self.entries[valid.nonzero()[:, 0], slots[valid]] = vectors[valid].to(self.entries.dtype)
        self.position.copy_((self.position + valid.sum(dim=1)) % size)

    def draw(self, count: int) -> Tensor:
        """At least `count` vectors (Q, C), equally many of each class, where the memory holds so many."""
        num_classes, size, _ = self.entries.shape
        chosen = torch.randperm(size, device=self.entries.device)[: -(-count // num_classes)]
        return self.entries[:, chosen].flatten(0, 1)


class CIRKD(Distiller):
    """Cross-image relations of pixels: inside the batch, and to memories of what the teacher saw of each class.

    The paper's pixel-wise term is `KD` at temperature 1. In training mode a forward pass first puts the teacher's
    pixels and regions (the mean of a class in an image) into the memories, those of all processes.

    Args:
        student_dim: channels of the student's map; with `teacher_dim` and `num_classes`, builds the memories and the
            projector that their terms need. Without them there is the mini-batch term alone, which needs no labels.
        teacher_dim: channels of the teacher's map.
        num_classes: classes of the task.
        pixel_weight: weight of the mini-batch term; 1 in the authors' code.
        memory_pixel_weight: weight of the term against the memory of pixels; 0.1 in the authors' code.
        memory_region_weight: weight of the term against the memory of regions; 0.1 in the authors' code.
        temperature: softmax temperature of all terms.
        pool: side of average-pooling windows put over both maps before the mini-batch term, for large maps, as in the
            authors' code; the work grows with the square of the number of positions. `None` compares single positions.
        pixel_memory: pixels of each class that are held; 20000 in the authors' code, where features have fewer
            channels than a ViT's.
        region_memory: regions of each class that are held; 2000 in the authors' code.
        pixel_contrast: pixels drawn from the memory at each step; 4096 in the authors' code.
        region_contrast: regions drawn at each step; 1024 in the authors' code.
        new_pixels: at most so many pixels of a class in an image enter the memory; 16 in the authors' code.
        ignore_index: label of void pixels; `None` if there is none. The memory terms leave them and unlabelled pixels
            out; the mini-batch term relates all pixels.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        target: the teacher's features as they are (`"raw"`, the paper) or normalised, which keeps the few channels of
            very large norm in a ViT from deciding all cosines; see `kdlvfm.core.align.normalise_target`.
        gather: relate the images of all processes in the mini-batch term. The authors relate those of each process.

    Example:
        >>> terms = CIRKD()({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 192, 8, 8)})
        >>> list(terms)
        ['cirkd_pixel']
    """

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        num_classes: int | None = None,
        *,
        pixel_weight: float = 1.0,
        memory_pixel_weight: float = 0.1,
        memory_region_weight: float = 0.1,
        temperature: float = 0.1,
        pool: int | None = None,
        pixel_memory: int = 2000,
        region_memory: int = 2000,
        pixel_contrast: int = 4096,
        region_contrast: int = 1024,
        new_pixels: int = 16,
        ignore_index: int | None = 255,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        resize: Resize = "larger",
        target: TargetNorm = "raw",
        gather: bool = False,
    ) -> None:
        super().__init__()
        if new_pixels > pixel_memory:
            raise ValueError(f"new_pixels={new_pixels} do not fit into a pixel_memory of {pixel_memory}.")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.weights = {
            "cirkd_pixel": pixel_weight,
            "cirkd_memory_pixel": memory_pixel_weight,
            "cirkd_memory_region": memory_region_weight,
        }
        self.temperature = temperature
        self.pool = pool
        self.contrast = {"pixel": pixel_contrast, "region": region_contrast}
        self.new_pixels = new_pixels
        self.ignore_index = ignore_index
        self.resize = resize
        self.target = target
        self.gather = gather
        self.projector: nn.Module | None = None
        if student_dim is not None and teacher_dim is not None and num_classes is not None:
            self.projector = nn.Sequential(
                nn.Conv2d(student_dim, teacher_dim, kernel_size=1, bias=False),
                nn.BatchNorm2d(teacher_dim),
                nn.ReLU(),
                nn.Conv2d(teacher_dim, teacher_dim, kernel_size=1, bias=False),
            )
            self.needs_truth = True
            self.pixels = ClassMemory(num_classes, pixel_memory, teacher_dim)
            self.regions = ClassMemory(num_classes, region_memory, teacher_dim)
        elif (student_dim, teacher_dim, num_classes) != (None, None, None):
            raise ValueError("the memories need student_dim, teacher_dim and num_classes: pass all three, or none.")

    @classmethod
    def from_context(cls, context: Context, *, memory: bool = True, **hparams: Any) -> Self:
        """Reads dimensions and classes for the memories; `memory=False` leaves these, and labels, out."""
        if memory:
            hparams = {"num_classes": context.num_classes, **context.tap_dims(cls, hparams), **hparams}
        return cls(**hparams)

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> dict[str, Tensor]:
        """The terms `cirkd_pixel` and, with memories, `cirkd_memory_pixel` and `cirkd_memory_region`."""
        features, goal = promote(student[self.student_taps[0]]), promote(teacher[self.teacher_taps[0]].detach())
        pair = (gather_batch(features), gather_batch(goal)) if self.gather else (features, goal)
        pair = match_size(pair[0], normalise_target(pair[1], self.target), self.resize)
        if self.pool is not None:
            pair = F.avg_pool2d(pair[0], self.pool, ceil_mode=True), F.avg_pool2d(pair[1], self.pool, ceil_mode=True)
        losses = {"cirkd_pixel": cirkd_pixel_loss(*pair, self.temperature)}
        if self.projector is not None:
            if target is None:
                raise ValueError("CIRKD's memories are of classes and need labels: pass target, or memory=False.")
            goal = normalise_target(goal, self.target)
            projected, goal = match_size(promote(self.projector(features)), goal, self.resize)
            if self.training:
                self._remember(gather_batch(goal), gather_batch(target))
            labelled = self._masks(goal, target).any(dim=1)
            own, seen = (x.movedim(1, -1)[labelled] for x in (projected, goal))
            for name, memory in (("pixel", self.pixels), ("region", self.regions)):
                entries = memory.draw(self.contrast[name])
                losses[f"cirkd_memory_{name}"] = cirkd_memory_loss(own, seen, entries, self.temperature)
        return {name: self.weights[name] * loss for name, loss in losses.items()}

    def _masks(self, features: Tensor, target: Tensor) -> Tensor:
        return class_masks(target, len(self.pixels.entries), features.shape[2:], self.ignore_index)

    @torch.no_grad()
    def _remember(self, features: Tensor, target: Tensor) -> None:
        """Put the regions and some pixels of each image into the memories."""
        vectors, masks = unit_vectors(features).flatten(2).mT, self._masks(features, target).flatten(2)
        for image, inside in zip(vectors, masks, strict=True):
            with torch.autocast(image.device.type, enabled=False):
                regions = unit_vectors(inside.to(image.dtype) @ image)
            self.regions.push(regions.unsqueeze(1), inside.any(dim=1, keepdim=True))
            score = torch.rand(inside.shape, device=inside.device) * inside
            chosen = score.topk(min(self.new_pixels, len(image)), dim=1).indices
            self.pixels.push(image[chosen], inside.gather(1, chosen))
