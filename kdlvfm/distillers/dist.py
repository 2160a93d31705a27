# SPDX-License-Identifier: Apache-2.0
"""DIST: class probabilities correlate with the teacher's, within a sample and within a class."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdlvfm.core import Distiller, Features
from kdlvfm.core.align import Resize, match_size, promote
from kdlvfm.core.distributed import gather_batch


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    r"""One minus Pearson's correlation of class probabilities, over classes and over samples.

    .. math::
        L = \tau^2 \Big( \frac{\beta}{M} \sum_m \big(1 - \rho(P_S^{m,:}, P_T^{m,:})\big)
            + \frac{\gamma}{K} \sum_k \big(1 - \rho(P_S^{:,k}, P_T^{:,k})\big) \Big), \quad
        P = \sigma(z / \tau)

    with m over the M samples, or over all positions of all samples, and k over the K classes. The student need not
    reach the teacher's confidence: any positive affine change of its probabilities is as good.

    Args:
        student_logits: (B, K) or (B, K, H, W).
        teacher_logits: same shape; receives no gradient.
        beta: weight of the relation between the classes of one sample or position (inter).
        gamma: weight of the relation between the samples or positions for one class (intra).
        temperature: tau; 1 is the default of the authors' code.

    Returns:
        A scalar from 0 to 2 (beta + gamma) tau^2. Probabilities that do not vary, such as those of a class that both
        networks rule out everywhere, have correlation 0; a norm below 1e-4 counts as 1e-4 (the authors' code adds the
        square of that to the product of both norms, which lets the gradient of equal probabilities grow by 10^8).

    Raises:
        ValueError: the logits differ in shape.

    Source:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([[0.0, 9.0], [9.0, 0.0]])
        >>> round(dist_loss(student, teacher).item(), 6)
        4.0
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits must have one shape, not {tuple(student_logits.shape)} (student) and "
            f"{tuple(teacher_logits.shape)} (teacher); resize the maps and check the number of classes."
        )
    student = (promote(student_logits) / temperature).softmax(1).movedim(1, 0).flatten(1)
    teacher = (promote(teacher_logits.detach()) / temperature).softmax(1).movedim(1, 0).flatten(1)
    mean = 1 / len(student)  # of the K probabilities of a sample, whatever they are
    inter = 1 - _cosine(student - mean, teacher - mean, dim=0).mean()
    own, goal = (x - x.mean(1, keepdim=True) for x in (student, teacher))
    intra = 1 - _cosine(own, goal, dim=1).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _cosine(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Cosine along `dim`, of what is centred Pearson's correlation; towards 0 where one of both hardly varies."""
    # Sums of squares, since torch's norm along the outer dimension of maps takes longer, and sums less exactly.
    squares = x.square().sum(dim).clamp(min=1e-8), y.square().sum(dim).clamp(min=1e-8)
    return (x * y).sum(dim) / (squares[0].sqrt() * squares[1].sqrt())


class DIST(Distiller):
    """Correlation of class probabilities; for segmentation every pixel is a sample, void ones too.

    Args:
        loss_weight: weight of the term; 1 is the authors' for segmentation.
        beta: weight of the relation between classes.
        gamma: weight of the relation between samples or positions.
        temperature: softmax temperature.
        student_tap: tap of the student's logits.
        teacher_tap: tap of the teacher's logits.
        resize: who is resized where dense logits differ in size, see `kdlvfm.core.align.match_size`.
        gather: relate the samples of all processes, whose batches must be of one size. The authors' code relates those
            of one GPU (`False`).

    Example:
        >>> import torch
        >>> terms = DIST()({"logits": torch.rand(2, 3, 4, 4)}, {"logits": torch.rand(2, 3, 8, 8)})
        >>> list(terms)
        ['dist']
    """

    def __init__(
        self,
        *,
        loss_weight: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        student_tap: str = "logits",
        teacher_tap: str = "logits",
        resize: Resize = "larger",
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature
        self.resize = resize
        self.gather = gather

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `dist`."""
        del target
        pair = student[self.student_taps[0]], teacher[self.teacher_taps[0]].detach()
        if pair[0].dim() == 4:
            pair = match_size(*pair, self.resize)
        if self.gather:
            pair = gather_batch(pair[0]), gather_batch(pair[1])
        return {"dist": self.loss_weight * dist_loss(*pair, self.beta, self.gamma, self.temperature)}
