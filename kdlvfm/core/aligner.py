# SPDX-License-Identifier: Apache-2.0
"""The aligner: one feature of the student and one of the teacher, brought to one shape and scale."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kdlvfm.core.align import Resize, check_resize, match_size, normalise_target, promote
from kdlvfm.core.phi_s import PHISTransform
from kdlvfm.core.projectors import Projector, build_projector
from kdlvfm.core.running_norm import RunningNorm

Target = Literal["raw", "standardize", "layernorm", "ema", "phi_s"]


class Targets(nn.Module):
    """The teacher's features as what a student regresses.

    Args:
        dim: the teacher's channels.
        target: `"raw"`, `"standardize"` or `"layernorm"`, see `kdlvfm.core.align.normalise_target`; `"ema"`, as
            `"standardize"` but by running statistics, see `kdlvfm.core.running_norm.RunningNorm`; or `"phi_s"`, which
            is fitted to the features of the first training steps, see `kdlvfm.core.phi_s.PHISTransform`.
        fit_steps: how many steps PHI-S is fitted to; it is renewed after 1, 2, 4, 8 ... of them. The paper fits it
            before training, on a sample of the data.

    Raises:
        ValueError: there is no such target.
    """

    seen: Tensor

    def __init__(self, dim: int, target: Target, *, fit_steps: int = 64) -> None:
        super().__init__()
        if target not in ("raw", "standardize", "layernorm", "ema", "phi_s"):
            raise ValueError(f"target must be 'raw', 'standardize', 'layernorm', 'ema' or 'phi_s', not {target!r}.")
        self.target: Target = target
        self.fit_steps = fit_steps
        self.ema = RunningNorm(dim) if target == "ema" else None
        self.phi_s: PHISTransform | None = None
        if target == "phi_s":
            self.phi_s = PHISTransform(dim)
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, teacher: Tensor) -> Tensor:
        """Features (B, C, ...) to the same shape, in single precision at least and without gradient."""
        features = promote(teacher.detach())
        if self.target == "ema":
            assert self.ema is not None
            if self.training:
                self.ema.observe(features)
            standardised: Tensor = self.ema(features)
            return standardised
        if self.target != "phi_s":
            return normalise_target(features, self.target)
        assert self.phi_s is not None
        if self.training and self.seen < self.fit_steps:
            self.phi_s.observe(features)
            self.seen += 1
            steps = int(self.seen)
            if steps & (steps - 1) == 0 or steps == self.fit_steps:
                self.phi_s.refit()
        transformed: Tensor = self.phi_s(features)
        return transformed


class Aligner(nn.Module):
    """Where a feature distiller begins: the student's feature projected, the teacher's normalised, both on one grid.

    The defaults were chosen by measurement, see `experiments/alignment`.

    Args:
        student_dim: the student's channels.
        teacher_dim: the teacher's channels.
        projector: what brings the student's channels to the teacher's, see `kdlvfm.core.projectors.build_projector`.
        resize: who is resized where maps differ in size, see `kdlvfm.core.align.match_size`.
        target: how the teacher's features are normalised, see `Targets`.
        bias: `False` for methods to which an offset of a channel means nothing.

    Raises:
        ValueError: an option is none of those there are.

    Example:
        >>> align = Aligner(64, 96, projector="mlp", resize="student", target="layernorm")
        >>> student, teacher = align(torch.rand(2, 64, 4, 4), torch.rand(2, 96, 8, 8))
        >>> student.shape == teacher.shape == (2, 96, 8, 8)
        True
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        projector: Projector | None = "linear",
        resize: Resize = "larger",
        target: Target = "standardize",
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_resize(resize)
        self.resize = resize
        self.projector = build_projector(projector, student_dim, teacher_dim, bias=bias)
        self.targets = Targets(teacher_dim, target)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Two features of one shape, in single precision at least; the teacher's without gradient.

        Args:
            student: (B, C_S, H, W), or (B, C_S) for a vector of each image.
            teacher: (B, C_T, H', W') or (B, C_T).
        """
        if student.dim() == 2:
            return promote(self.projector(student[:, :, None, None])).flatten(1), self.targets(teacher)
        return match_size(promote(self.projector(student)), self.targets(teacher), self.resize)
