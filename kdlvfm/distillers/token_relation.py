# SPDX-License-Identifier: Apache-2.0
"""TokenRelation: similarities of images to a queue, and of tokens inside an image, follow the teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, TargetNorm, match_size, normalise_target, promote, unit_vectors
from kdlvfm.core.relation import BLOCK, relation_divergence

_BLOCK = BLOCK


def image_relation_loss(student: Tensor, teacher: Tensor, queue: Tensor, temperature: float = 0.07) -> Tensor:
    r"""Kullback-Leibler divergence between the similarities of each image to the embeddings of a queue.

    .. math::
        L = \frac{1}{B} \sum_b \mathrm{KL}\big(\sigma(\cos(h^T_b, q) / \tau) \,\|\, \sigma(\cos(h^S_b, q) / \tau)\big)

    with the softmax over the Q entries q of the queue.

    Args:
        student: (B, D), already projected to the teacher's dimension.
        teacher: (B, D); receives no gradient.
        queue: (Q, D) embeddings of the teacher, of these images and earlier ones; receives no gradient. A row of zeros
            is as similar to everything as an orthogonal one.
        temperature: τ; 0.07 in the authors' code.

    Returns:
        A scalar: the mean over samples.

    Raises:
        ValueError: the shapes differ, or the queue is of another dimension.

    Source:
        LightlyTrain, "distillation" v1 and v3, Lightly AG, 2025 (software; there is no paper).

    Example:
        >>> student, teacher = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> round(image_relation_loss(student, teacher, torch.eye(2), temperature=1.0).item(), 6)
        0.110944
    """
    if student.shape != teacher.shape or student.shape[1:] != queue.shape[1:]:
        raise ValueError(
            f"embeddings must have one shape (B, D) and the queue (Q, D), not {tuple(student.shape)} (student), "
            f"{tuple(teacher.shape)} (teacher) and {tuple(queue.shape)} (queue)."
        )
    own, goal, entries = (unit_vectors(promote(x)) for x in (student, teacher.detach(), queue.detach()))
    with torch.autocast(student.device.type, enabled=False):
        first, second = (F.log_softmax(x @ entries.mT / temperature, dim=1) for x in (own, goal))
    return F.kl_div(first, second, log_target=True, reduction="batchmean")


def token_relation_loss(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    r"""Kullback-Leibler divergence between the similarities of each token to all tokens of its image.

    .. math::
        L = \frac{1}{B N} \sum_{b,i} \mathrm{KL}\big(\sigma(s^T_{bi} / \tau) \,\|\, \sigma(s^S_{bi} / \tau)\big), \quad
        s_{bi} = \big(\cos(f_{bi}, f_{bj})\big)_{j = 1 \dots N}

    over the N positions of the maps, a token and itself among the pairs. The channels of the two networks need not
    agree. Of the B N² similarities a block is held at a time, see `kdlvfm.core.relation`.

    Args:
        student: (B, C_S, H, W).
        teacher: (B, C_T, H, W); receives no gradient.
        temperature: τ; 0.07 in the authors' code.

    Returns:
        A scalar: the mean over samples and tokens.

    Raises:
        ValueError: the maps differ in batch or size.

    Source:
        LightlyTrain, "distillation" v3, Lightly AG, 2025 (software; there is no paper).

    Example:
        >>> student, teacher = torch.ones(1, 3, 1, 2), torch.eye(2).view(1, 2, 1, 2)
        >>> round(token_relation_loss(student, teacher, temperature=1.0).item(), 6)
        0.110944
    """
    if student.dim() != 4 or (student.shape[0], *student.shape[2:]) != (teacher.shape[0], *teacher.shape[2:]):
        raise ValueError(
            f"maps (B, C, H, W) must agree in B, H and W, not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher)."
        )
    own, goal = (unit_vectors(promote(x)).flatten(2).mT for x in (student, teacher.detach()))
    total = relation_divergence(own, goal, own.unsqueeze(1), goal.unsqueeze(1), temperature, _BLOCK)
    return total / own.shape[:2].numel()


class TokenRelation(Distiller):
    """Relations of images to a queue of the teacher's embeddings, and of tokens inside each image.

    The student's embedding is the mean of its map. Both heads are linear and separate. In training mode a forward pass
    puts the teacher's embeddings of the batch at the front of the queue first, and the oldest fall out; each process
    has a queue of its own. The authors' training also mixes images up, which is the recipe's affair.

    Args:
        student_dim: channels of the student's map.
        teacher_dim: channels of the teacher's map.
        pooled_dim: dimension of the teacher's embedding.
        queue_size: embeddings kept; the authors take a quarter to a half of the data set and at most 8192.
        image_weight: weight of the term `image_relation`; 1 in the authors' code.
        token_weight: weight of the term `token_relation`; 1 in the authors' code.
        temperature: softmax temperature of both terms.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        pooled_tap: the teacher's embedding; a map is averaged over positions.
        resize: who is resized, after projection, where the maps differ in size: the student's map, as in the authors'
            code. See `kdlvfm.core.align.match_size`.
        target: the teacher's map as it is (`"raw"`, the authors' code) or normalised, which keeps the few channels of
            very large norm in a ViT from deciding all cosines; see `kdlvfm.core.align.normalise_target`.

    Example:
        >>> relation = TokenRelation(student_dim=64, teacher_dim=192, pooled_dim=192, queue_size=16)
        >>> student = {"map.-1": torch.rand(2, 64, 4, 4)}
        >>> list(relation(student, {"map.-1": torch.rand(2, 192, 8, 8), "pooled": torch.rand(2, 192)}))
        ['image_relation', 'token_relation']
    """

    queue: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        pooled_dim: int,
        queue_size: int,
        *,
        image_weight: float = 1.0,
        token_weight: float = 1.0,
        temperature: float = 0.07,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        pooled_tap: str = "pooled",
        resize: Resize = "student",
        target: TargetNorm = "raw",
    ) -> None:
        super().__init__()
        if queue_size < 2:
            raise ValueError(f"queue_size must be at least 2, not {queue_size}: one entry makes all images alike.")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap, pooled_tap)
        self.image_weight = image_weight
        self.token_weight = token_weight
        self.temperature = temperature
        self.resize = resize
        self.target = target
        self.image_projector = nn.Linear(student_dim, pooled_dim)
        self.token_projector = nn.Conv2d(student_dim, teacher_dim, kernel_size=1)
        for layer in (self.image_projector, self.token_projector):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        self.register_buffer("queue", torch.zeros(queue_size, pooled_dim))

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads the dimensions from the taps; the queue holds a quarter of the data set, 2 to 8192 embeddings."""
        found = context.tap_dims(cls, hparams)
        if "pooled_dim" not in hparams:
            found["pooled_dim"] = context.require_teacher().tap_info(hparams.get("pooled_tap", "pooled")).dim
        return cls(**{"queue_size": min(max(context.num_samples // 4, 2), 8192), **found, **hparams})

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The terms `image_relation` and `token_relation`."""
        del target
        features = student[self.student_taps[0]]
        tokens, pooled = (promote(teacher[tap].detach()) for tap in self.teacher_taps)
        pooled = pooled.mean(dim=(2, 3)) if pooled.dim() == 4 else pooled
        entries = torch.cat([unit_vectors(pooled).to(self.queue.dtype), self.queue])[: len(self.queue)]
        if self.training:
            self.queue.copy_(entries)
        embedding = self.image_projector(features.mean(dim=(2, 3)))
        own, goal = match_size(
            promote(self.token_projector(features)), normalise_target(tokens, self.target), self.resize
        )
        return {
            "image_relation": self.image_weight * image_relation_loss(embedding, pooled, entries, self.temperature),
            "token_relation": self.token_weight * token_relation_loss(own, goal, self.temperature),
        }
