# SPDX-License-Identifier: Apache-2.0
"""A data set that the teacher makes first: what a diffusion model learns from without data and without this library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features, Step, Teacher, Update
from kdlvfm.core.denoiser import as_denoiser
from kdlvfm.core.diffusion import sample
from kdlvfm.core.distributed import gather_batch, rank, world_size


class SyntheticSet(Distiller):
    """Ordinary training on images that the teacher makes in the first step: the baseline of DKDM.

    The terms are the task's own, on batches of those images in place of the data's, of which nothing but the number of
    images in a batch counts. Making them takes one pass of the teacher for each image and step. They are held in the
    memory of the host and are a part of checkpoints.

    Source: the baseline of Xiang et al., "DKDM: Data-Free Knowledge Distillation for Diffusion Models with Any
    Architecture", CVPR 2025.

    Args:
        size: images in the set.
        state_shape: (C, H, W) of what the teacher denoises.
        step_taps: what a step back reads of the teacher.
        sampling_steps: steps in which an image is made; `None`: all that the teacher was made for.

    Raises:
        ValueError: no images.

    Example:
        >>> SyntheticSet(100, (1, 8, 8))({}, {})
        {}
    """

    calls_teacher = True

    def __init__(
        self,
        size: int,
        state_shape: Sequence[int],
        step_taps: Sequence[str] = ("noise",),
        *,
        sampling_steps: int | None = None,
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a synthetic set needs images: distiller.size must be 1 or more, not {size}.")
        self.teacher_taps = tuple(step_taps)
        self.size = size
        self.sampling_steps = sampling_steps
        # The same in all processes: draws are functions of this and of the step.
        self._seed = int(torch.randint(2**62, ()))
        # Not a buffer: DDP would send that of the first process to all others at every step.
        self.images = torch.zeros(0, 3, *state_shape[1:])

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """For the teacher's images, as many as the data has unless told otherwise.

        Raises:
            ValueError: the teacher is no diffusion model, or samples in fewer steps than it is asked to.
        """
        teacher = as_denoiser(context.require_teacher().model)
        if hparams.get("sampling_steps") is not None:
            teacher.schedule.respaced(hparams["sampling_steps"])
        hparams.setdefault("size", context.num_samples)
        return cls(state_shape=teacher.state_shape, step_taps=teacher.step_taps, **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """No terms of its own."""
        del student, teacher, target
        return {}

    def updates(self, step: Step) -> Iterator[Update]:
        """One update by the task's terms on images of the set."""
        count, device = len(step.images), step.images.device
        assert step.teacher is not None
        if not len(self.images):
            self._make(step.teacher, count, device)
        generator = torch.Generator().manual_seed((self._seed + step.number) % 2**63)
        drawn = torch.randint(self.size, (count * world_size(),), generator=generator)
        images = self.images[drawn.chunk(world_size())[rank()]].to(device)
        terms = step.task.loss(step.student, {}, {"image": images})
        yield Update(terms, task_terms=tuple(terms))

    def _make(self, teacher: Teacher, count: int, device: torch.device) -> None:
        """The images, `count` at a time; each process makes as many, and what is too much at the end is left out."""
        model = as_denoiser(teacher.model)
        schedule = model.schedule
        if self.sampling_steps is not None:
            schedule = schedule.respaced(self.sampling_steps)
        made = []
        share = -(-self.size // world_size())
        for first in range(0, share, count):
            draw = partial(torch.randn, min(count, share - first), *model.state_shape, device=device)
            made.append(model.decode(sample(teacher, model.step_taps, schedule, draw)))
        self.images = gather_batch(torch.cat(made)).cpu()[: self.size]

    def get_extra_state(self) -> dict[str, Tensor]:
        """The set, for checkpoints."""
        return {"images": self.images, "seed": torch.tensor(self._seed)}

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        self.images, self._seed = state["images"].clone(), int(state["seed"])
