# SPDX-License-Identifier: Apache-2.0
"""IDD: how far apart the classes are in the student's feature space follows the teacher."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, TargetNorm, class_means, match_size, normalise_target, promote
from kdlvfm.core.distributed import gather_batch

Scope = Literal["batch", "image"]


def idd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    num_classes: int,
    ignore_index: int | None = 255,
    *,
    prototypes: Scope = "batch",
    normalise: bool = False,
) -> Tensor:
    r"""Mean squared difference of the distances between class prototypes, a graph with a node for each class.

    .. math::
        L = \operatorname{mean}_{k \ne j} \big(e^S_{kj} - e^T_{kj}\big)^2, \quad
        e_{kj} = \lVert p_k - p_j \rVert_2

    over the classes that are present, where :math:`p_k` is the mean feature vector of class k. Each network's distances
    are measured in its own space, so the channels of the two need not agree. The paper states the graph and that its
    edges are the distances between classes. Its full text and code were not at hand: the squared difference, its mean
    and the two options are ours.

    Args:
        student: (B, C_S, H, W).
        teacher: (B, C_T, H', W'); receives no gradient.
        target: (B, H'', W'') labels, resized to each map's grid by nearest neighbour; void pixels (`ignore_index`) and
            unlabelled ones (negative) are left out.
        num_classes: K.
        ignore_index: label of void pixels; `None` if there is none.
        prototypes: one of each class in the whole batch, or one in each image, averaged over images with two classes.
        normalise: divide the distances of each network by their mean, so that only their proportions are compared. Two
            classes alone then have nothing to be compared with, and the loss is 0.

    Returns:
        A scalar; 0 where fewer than two classes are present.

    Raises:
        ValueError: the maps or the target differ in batch, or the scope is unknown.

    Source:
        The inter-class term of Zhang et al., "Distilling Inter-Class Distance for Semantic Segmentation", IJCAI 2022.

    Example:
        >>> student = torch.tensor([0.0, 3.0]).view(1, 1, 1, 2)
        >>> teacher = torch.tensor([[0.0, 3.0], [0.0, 4.0]]).view(1, 2, 1, 2)
        >>> idd_loss(student, teacher, torch.tensor([[[0, 1]]]), num_classes=2).item()
        4.0
    """
    if student.dim() != 4 or len(student) != len(teacher) or len(student) != len(target):
        raise ValueError(
            f"maps (B, C, H, W) must agree in B, not {tuple(student.shape)} (student) and {tuple(teacher.shape)} "
            f"(teacher), and with the B of target {tuple(target.shape)}."
        )
    if prototypes not in ("batch", "image"):
        raise ValueError(f"prototypes must be 'batch' or 'image', not {prototypes!r}.")
    own, present = _distances(promote(student), target, num_classes, ignore_index, prototypes)
    goal, seen = _distances(promote(teacher.detach()), target, num_classes, ignore_index, prototypes)
    # Each network on its own grid; a class that only one of them sees there has no edges.
    pairs = present & seen
    counts = pairs.sum(dim=(1, 2)).clamp(min=1)
    if normalise:
        own, goal = (x / ((x * pairs).sum(dim=(1, 2)) / counts).clamp(min=1e-4)[:, None, None] for x in (own, goal))
    losses = ((own - goal).square() * pairs).sum(dim=(1, 2)) / counts
    return losses.sum() / pairs.flatten(1).any(dim=1).sum().clamp(min=1)


def _distances(
    features: Tensor, target: Tensor, num_classes: int, ignore_index: int | None, prototypes: Scope
) -> tuple[Tensor, Tensor]:
    """Distances (G, K, K) between the prototypes of each graph, and which of them join two classes present."""
    means, present = class_means(features, target, num_classes, ignore_index, of_images=prototypes == "image")
    with torch.autocast(features.device.type, enabled=False):
        distances = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    others = ~torch.eye(num_classes, dtype=torch.bool, device=features.device)
    return distances, present.unsqueeze(2) & present.unsqueeze(1) & others


class IDD(Distiller):
    """Distances between classes. There is nothing to project and nothing else to train.

    The paper's second module, which distils what features tell about positions, is not part of this class: its
    definition was not at hand.

    Args:
        num_classes: classes of the task.
        loss_weight: weight of the term; 10 is ours, for distances divided by their mean.
        ignore_index: label of void pixels; `None` if there is none.
        prototypes: see `idd_loss`.
        normalise: see `idd_loss`. On by default, which is ours: a ViT's features and a CNN's differ in scale.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        target: the teacher's features normalised, which keeps the few channels of very large norm in a ViT from
            deciding all distances, or as they are (`"raw"`, the paper); see `kdlvfm.core.align.normalise_target`.
        gather: prototypes over the batches of all processes; by default each process has its own.

    Raises:
        ValueError: normalised distances of fewer than three classes, which say nothing.

    Example:
        >>> idd = IDD(num_classes=3)
        >>> labels = torch.randint(0, 3, (2, 32, 32))
        >>> list(idd({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 192, 8, 8)}, labels))
        ['idd']
    """

    needs_truth = True

    def __init__(
        self,
        num_classes: int,
        *,
        loss_weight: float = 10.0,
        ignore_index: int | None = 255,
        prototypes: Scope = "batch",
        normalise: bool = True,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        resize: Resize = "larger",
        target: TargetNorm = "standardize",
        gather: bool = False,
    ) -> None:
        super().__init__()
        if normalise and num_classes < 3:
            raise ValueError(
                f"with {num_classes} classes there is one distance, and normalised it is always the same: pass "
                "normalise=False."
            )
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.num_classes = num_classes
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index
        self.prototypes: Scope = prototypes
        self.normalise = normalise
        self.resize = resize
        self.target = target
        self.gather = gather

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads the number of classes from the task."""
        return cls(**{"num_classes": context.num_classes, **hparams})

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> dict[str, Tensor]:
        """The term `idd`; `target` (B, H, W) holds the labels."""
        if target is None:
            raise ValueError("IDD measures distances between classes and needs labels: pass target (B, H, W).")
        first, second = promote(student[self.student_taps[0]]), promote(teacher[self.teacher_taps[0]].detach())
        if self.gather:
            first, second, target = gather_batch(first), gather_batch(second), gather_batch(target)
        first, second = match_size(first, normalise_target(second, self.target), self.resize)
        loss = idd_loss(
            first,
            second,
            target,
            self.num_classes,
            self.ignore_index,
            prototypes=self.prototypes,
            normalise=self.normalise,
        )
        return {"idd": self.loss_weight * loss}
