# SPDX-License-Identifier: Apache-2.0
"""Surrogate: real images of something else, of which those are used that teacher and student make most of."""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from kdlvfm.core import Context, Step, Update
from kdlvfm.core.align import match_size, promote, resize_map
from kdlvfm.core.distiller import Seen
from kdlvfm.core.frozen import frozen
from kdlvfm.core.synthesizer import Synthesizer


def joint_confidence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""How much of the classes that teacher and student together are sure of lies in each image of a batch.

    .. math:: p = \tfrac12 (\sigma(z_S) + \sigma(z_T)), \quad
        s_i = \sum_{v \in i} \frac{\max_c p_{v,c}}{N_{\arg\max_c p_{v,c}}}

    where :math:`N_c` counts the positions of the batch whose likeliest class is c. So every class that occurs is shared
    out among the images by how surely it occurs there, and a background that is everywhere does not decide.

    KD³ (Tang et al., "Distribution Shift Matters for Knowledge Distillation with Webly Collected Images", ICCV 2023)
    selects web images by the joint prediction of teacher and student; this form, for dense predictions, is ours.

    Args:
        student_logits: (B, K) or (B, K, H, W).
        teacher_logits: the same.

    Returns:
        (B,), one score for each image; they sum to at most the number of classes that occur.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [1.0, 0.0]])
        >>> joint_confidence(logits, logits).argmax().item()  # the only one of its class
        1
    """
    if student_logits.dim() == 4:
        student_logits, teacher_logits = match_size(student_logits, teacher_logits, "teacher")
    joint = (promote(student_logits).softmax(dim=1) + promote(teacher_logits).softmax(dim=1)) / 2
    sure, classes = joint.flatten(2).max(dim=1) if joint.dim() == 4 else joint.unsqueeze(2).max(dim=1)
    counts = torch.bincount(classes.flatten(), minlength=joint.shape[1])
    return (sure / counts[classes]).sum(dim=1)


class Surrogate(Synthesizer):
    """Real images that have nothing to do with the task, such as a folder of photographs.

    Each step reads some of them at random, cuts out a random part of each and resizes it. With `candidates` above 1 it
    reads that many times as many as a batch has, and the student is trained on those with the highest
    `joint_confidence`; the teacher's pass that this takes is the only one.

    Args:
        images: uint8 (3, H, W) each, of any size; read when they are needed.
        candidates: images read for each image used.
        smallest: smallest share of the image's side that is cut out.

    Raises:
        ValueError: no images, or a number out of its range.

    Example:
        >>> photographs = [torch.zeros(3, 40, 60, dtype=torch.uint8)]
        >>> Surrogate(photographs, candidates=1).read(2, (16, 16)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(self, images: Sequence[Tensor], *, candidates: int = 2, smallest: float = 0.5) -> None:
        super().__init__()
        if not len(images):
            raise ValueError("there are no surrogate images.")
        if candidates < 1 or not 0 < smallest <= 1:
            raise ValueError("candidates must be at least 1, and smallest above 0 and at most 1.")
        self._images = images
        self.candidates, self.smallest = candidates, smallest

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Without logits of both networks for the same classes nothing can be selected: one candidate for each image.

        Raises:
            TapError, ValueError: more are asked for all the same.
        """
        teacher, student = context.require_teacher(), context.student
        if "logits" in teacher.taps() and student.taps().get("logits") == teacher.tap_info("logits"):
            return cls(**hparams)
        method = cls(**{"candidates": 1, **hparams})
        if method.candidates > 1:
            teacher.check_tap("logits")
            raise ValueError(
                "surrogate images are selected by the logits of teacher and student, and theirs are not of the same "
                "classes: set candidates to 1."
            )
        return method

    def synthesize(self, step: Step, taps: Collection[str]) -> Generator[Update, None, Step]:
        """See `Synthesizer.synthesize`."""
        yield from ()
        count = len(step.images)
        images = self.read(count * self.candidates, step.images.shape[-2:]).to(step.images)
        if self.candidates == 1:
            return replace(step, images=images)
        with torch.no_grad(), frozen(step.student):
            teacher = replace(step, images=images).teacher_features((*taps, "logits"))
            student = step.student(images, ("logits",))
            best = joint_confidence(student["logits"], teacher["logits"]).topk(count).indices
        return replace(step, images=images[best], seen=Seen(teacher={tap: teacher[tap][best] for tap in taps}))

    def read(self, count: int, size: Sequence[int]) -> Tensor:
        """Random parts of random images, float (count, 3, height, width) in [0, 1]."""
        chosen = torch.randint(len(self._images), (count,)).tolist()
        # Decoding releases the interpreter lock, so threads do share the work.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(self._images.__getitem__, chosen))
        return torch.stack([self._part(image, size) for image in found])

    def _part(self, image: Tensor, size: Sequence[int]) -> Tensor:
        """A random rectangle of the shape of `size`, resized to it and perhaps mirrored."""
        height, width = image.shape[-2:]
        share, top, left, flip = torch.rand(4).tolist()
        largest = min(height / size[0], width / size[1])
        factor = largest * (self.smallest + (1 - self.smallest) * share)
        rows, columns = (max(1, round(side * factor)) for side in size)
        top, left = int(top * (height - rows + 1)), int(left * (width - columns + 1))
        part = resize_map(image[None, :, top : top + rows, left : left + columns].float() / 255, size)[0]
        return part.flip(2) if flip < 0.5 else part
