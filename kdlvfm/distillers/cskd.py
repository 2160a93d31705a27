# SPDX-License-Identifier: Apache-2.0
"""CSKD: what channel and position attention make of the maps is alike in both networks, as CKA measures it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, TargetNorm, match_size, normalise_target, promote
from kdlvfm.core.distributed import gather_batch
from kdlvfm.core.similarity import cka as cka
from kdlvfm.distillers.cwd import cwd_loss

Samples = Literal["images", "positions"]


def channel_attention(x: Tensor, gamma: Tensor | float, temperature: float = 2.0) -> Tensor:
    r"""Each channel gains a mixture of the channels that are least like it (the form of DANet).

    .. math::
        E = X X^\top, \quad A_{ij} = \mathrm{softmax}_j\big((\max_k E_{ik} - E_{ij}) / \tau\big), \quad
        \gamma A X + X

    with X the map as C rows of H W values, for each sample.

    Args:
        x: (B, C, H, W); so is the result.
        gamma: share of the mixture; 0 leaves the map as it is.
        temperature: of the softmax; 2 in the authors' scripts.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows = promote(x).flatten(2)
        # A softmax does not see the constant max_k E_ik.
        attention = torch.softmax(rows @ rows.mT / -temperature, dim=2)
        return (gamma * (attention @ rows) + rows).view(x.shape)


def position_attention(
    x: Tensor, query: Tensor, key: Tensor, value: Tensor, gamma: Tensor | float, temperature: float = 2.0
) -> Tensor:
    r"""Each position gains a mixture of the values at the positions whose keys match its query.

    .. math::
        A_{ij} = \mathrm{softmax}_j\big(q_i \cdot k_j / \tau\big), \quad \gamma \sum_j A_{ij} v_j + x_i

    with i, j over positions, for each sample.

    Args:
        x: (B, C, H, W); so is the result.
        query: (B, D, H, W), a projection of `x`.
        key: (B, D, H, W), another one.
        value: (B, C, H, W), another one.
        gamma: share of the mixture; 0 leaves the map as it is.
        temperature: of the softmax; 2 in the authors' scripts.
    """
    with torch.autocast(x.device.type, enabled=False):
        queries, keys, values = (promote(projected).flatten(2) for projected in (query, key, value))
        attention = torch.softmax(queries.mT @ keys / temperature, dim=2)
        return gamma * (values @ attention.mT).view(x.shape) + promote(x)


def cka_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""The negative logarithm of CKA.

    .. math:: L = -\ln\big(\mathrm{CKA}(F_S, F_T) + 10^{-8}\big), \quad \text{at least } 0

    Args:
        student: (B, ...): features of B samples, as a rule the images of a batch; all but the first is flattened.
        teacher: (B, ...): those of the same samples, of any dimension; receives no gradient.

    Returns:
        A scalar from 0 to 18.4. It is 0 for two samples, of which CKA is always 1, and says nothing about one.

    Raises:
        ValueError: the numbers of samples differ.

    Source:
        Karine, Napoléon, Jridi, "Channel-spatial knowledge distillation for efficient semantic segmentation", Pattern
        Recognition Letters 180, 2024.

    Example:
        >>> first, second = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[-1.0], [1.0], [0.0]])
        >>> round(cka_loss(first, second).item(), 6)
        1.386294
    """
    return -torch.log(cka(student, teacher) + 1e-8).clamp(max=0)


class PositionAttention(nn.Module):
    """Queries and keys of C / 8 channels (at least one), and values, all by 1x1 convolutions; then the attention.

    Args:
        dim: channels C of the map.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(dim, max(dim // 8, 1), kernel_size=1)
        self.key = nn.Conv2d(dim, max(dim // 8, 1), kernel_size=1)
        self.value = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, x: Tensor, gamma: Tensor | float, temperature: float) -> Tensor:
        """`position_attention` of (B, C, H, W)."""
        return position_attention(x, self.query(x), self.key(x), self.value(x), gamma, temperature)


class CSKD(Distiller):
    """CKA between attended maps, of channels on the whole map and of positions on a grid of patches; CWD on logits.

    What of the attention is trained is ours. In the released code gamma starts at 0, so that no map is attended, and
    the convolutions are drawn anew at every step. Here gamma starts above 0, the student's attention is trained, and
    the teacher's is drawn once and stays, so that the loss cannot be lowered by changing the teacher.

    Args:
        student_dim: channels of the student's map.
        teacher_dim: channels of the teacher's map.
        channel_weight: weight of the term of channel attention; 0.3 in the authors' scripts.
        position_weight: weight of the term of position attention, the mean over patches; 0.8 there.
        logit_weight: weight of CWD between the logits; 3 there. 0 for a teacher without dense logits.
        logit_temperature: temperature of CWD; 2 there.
        temperature: temperature of both attentions; 2 there.
        gamma: initial share of what is attended in both networks; the student's two shares are trained. 1 is ours, the
            paper starts from 0.
        grid: patches along each side, as `torch.chunk` cuts them: fewer where the map does not divide. 5 there.
        samples: what CKA compares. `"images"` of the batch (the paper), or `"positions"` of all images, each with its
            channels (ours). Of fewer than three images it is always the positions, as CKA of two images is always 1.
        student_tap: the student's map; the paper takes the input of the classifier, `decoder`.
        teacher_tap: the teacher's map.
        resize: who is resized where the maps, or the logits, differ in size, see `kdlvfm.core.align.match_size`. The
            authors' maps are of one size.
        target: the teacher's features as they are (`"raw"`, the paper) or normalised. The default is ours: both CKA and
            attention would otherwise see a ViT's few channels of very large norm alone.
        gather: compare the batches of all processes, which must be of one size. Off in the authors' code.

    Source:
        Karine, Napoléon, Jridi, Pattern Recognition Letters 180, 2024; see `cka_loss`.

    Example:
        >>> cskd = CSKD(student_dim=16, teacher_dim=24, logit_weight=0)
        >>> list(cskd({"map.-1": torch.rand(3, 16, 10, 10)}, {"map.-1": torch.rand(3, 24, 5, 5)}))
        ['cskd_channel', 'cskd_position']
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        channel_weight: float = 0.3,
        position_weight: float = 0.8,
        logit_weight: float = 3.0,
        logit_temperature: float = 2.0,
        temperature: float = 2.0,
        gamma: float = 1.0,
        grid: int = 5,
        samples: Samples = "images",
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        resize: Resize = "larger",
        target: TargetNorm = "standardize",
        gather: bool = False,
    ) -> None:
        super().__init__()
        if samples not in ("images", "positions"):
            raise ValueError(f"samples must be 'images' or 'positions', not {samples!r}.")
        if grid < 1:
            raise ValueError(f"grid must be at least 1, not {grid}: it is the number of patches along each side.")
        logits = ("logits",) if logit_weight else ()
        self.student_taps, self.teacher_taps = (student_tap, *logits), (teacher_tap, *logits)
        self.channel_weight, self.position_weight, self.logit_weight = channel_weight, position_weight, logit_weight
        self.logit_temperature = logit_temperature
        self.temperature = temperature
        self.gamma = gamma
        self.grid = grid
        self.samples: Samples = samples
        self.resize = resize
        self.target = target
        self.gather = gather
        self.student_attention = PositionAttention(student_dim)
        self.teacher_attention = PositionAttention(teacher_dim).requires_grad_(False)
        self.channel_gamma = nn.Parameter(torch.tensor(float(gamma)))
        self.position_gamma = nn.Parameter(torch.tensor(float(gamma)))

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads both channel counts from the taps; without dense logits of the teacher there is no term on logits."""
        logits = context.require_teacher().taps().get("logits")
        if logits is None or logits.stride is None:
            hparams = {"logit_weight": 0.0, **hparams}
        return cls(**context.tap_dims(cls, hparams), **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The terms `cskd_channel` and `cskd_position`, and `cskd_logits` if it has a weight."""
        del target
        own, goal = promote(student[self.student_taps[0]]), promote(teacher[self.teacher_taps[0]].detach())
        if self.gather:
            own, goal = gather_batch(own), gather_batch(goal)
        own, goal = match_size(own, normalise_target(goal, self.target), self.resize)
        channel = self._compare(
            channel_attention(own, self.channel_gamma, self.temperature),
            channel_attention(goal, self.gamma, self.temperature),
        )
        patches = [
            self._compare(
                self.student_attention(first, self.position_gamma, self.temperature),
                self.teacher_attention(second, self.gamma, self.temperature),
            )
            for first, second in zip(self._patches(own), self._patches(goal), strict=True)
        ]
        terms = {
            "cskd_channel": self.channel_weight * channel,
            "cskd_position": self.position_weight * torch.stack(patches).mean(),
        }
        if self.logit_weight:
            logits = match_size(promote(student["logits"]), promote(teacher["logits"]), self.resize)
            terms["cskd_logits"] = self.logit_weight * cwd_loss(*logits, self.logit_temperature)
        return terms

    def _patches(self, x: Tensor) -> list[Tensor]:
        return [patch for rows in x.chunk(self.grid, dim=2) for patch in rows.chunk(self.grid, dim=3)]

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.samples == "positions" or student.shape[0] < 3:
            student, teacher = (x.movedim(1, -1).flatten(0, 2) for x in (student, teacher))
        return cka_loss(student, teacher)
