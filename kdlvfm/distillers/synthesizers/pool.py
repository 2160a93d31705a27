# SPDX-License-Identifier: Apache-2.0
"""Pool: images that are optimised a step at a time while the student already learns from them."""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from kdlvfm.core import Context, Step, Update
from kdlvfm.core.distiller import Seen
from kdlvfm.core.distributed import gather_batch, world_size
from kdlvfm.core.gradients import gradients
from kdlvfm.core.synthesizer import Synthesizer
from kdlvfm.distillers.synthesizers.objective import Objective

_BETAS = (0.5, 0.9)
_EPSILON = 1e-12
_SHARE = 0.4
_MAX_AGE = 50


class ImagePool(Synthesizer):
    r"""A pool of partially synthesised images, each with an age in steps.

    Every training step draws a batch of them without replacement, shows it to the teacher once, takes one step of Adam
    on its pixels down the objective's gradient, trains the student on the images as they were before, with the
    teacher's features of that one pass, and writes the changed ones back a step older. An entry of age `max_age` is
    replaced by fresh noise of age 0 when it is drawn. So the teacher's cost is that of an ordinary step and its
    backward pass, whatever an image takes to make, and a large pool decorrelates the batches.

    Ages start anywhere between 0 and `max_age`, so that entries are not all replaced at once, though their images all
    start as noise: the first life of most is shorter (ours; DKDM does synthesise that far before training starts).

    The pool is held in the memory of the host and is a part of checkpoints: three times its images, for Adam's
    moments. In a distributed run all processes have the same pool, and each works on its share of the batch.

    Source: the pool is the dynamic iterative distillation of Xiang et al., "DKDM: Data-Free Knowledge Distillation for
    Diffusion Models with Any Architecture", CVPR 2025, with a step of image optimisation in the place of a denoising
    step, which is ours; the moments' decay, the flips and the shifts are those of Yin et al., "Dreaming to Distill:
    Data-free Knowledge Transfer via DeepInversion", CVPR 2020.

    Args:
        size: images in the pool.
        image_size: their height and width.
        objective: what they are optimised for.
        max_age: steps of synthesis of an image.
        lr: Adam's learning rate, for pixels in [0, 1]. 0.05 is the 0.2 of DeepInversion and PSAQ-ViT, whose pixels are
            normalised, times the standard deviation of pixels.
        shift: largest shift, as a share of the side, of the images that the networks see; a shifted image comes in
            again at the other side. Half of the batches are mirrored.

    Raises:
        ValueError: a number out of its range, or a pool that does not fit into memory.

    Example:
        >>> pool = ImagePool(8, (16, 16), max_age=5)
        >>> bool((pool.ages >= 0).all() and (pool.ages <= 5).all()), pool.images.shape
        (True, torch.Size([8, 3, 16, 16]))
    """

    def __init__(
        self,
        size: int,
        image_size: Sequence[int],
        objective: Objective | None = None,
        *,
        max_age: int = _MAX_AGE,
        lr: float = 0.05,
        shift: float = 0.1,
    ) -> None:
        super().__init__()
        if size < 1 or min(image_size) < 1 or max_age < 1 or not lr > 0 or not 0 <= shift <= 1:
            raise ValueError("size, image_size, max_age and lr must be positive, and shift from 0 to 1.")
        height, width = image_size
        _check_memory(size, height, width)
        self.objective = Objective() if objective is None else objective
        self.max_age, self.lr, self.shift = max_age, lr, shift
        # Draws are the same in all processes and known again after a resumption: functions of this and of the step.
        self._seed = int(torch.randint(2**62, ()))
        # Not buffers: DDP would send those of the first process to all others at every step.
        self.images = _noise(size, height, width, torch.Generator().manual_seed(self._seed))
        self.ages = torch.randint(0, max_age + 1, (size,))
        self._moments = torch.zeros(2, size, 3, height, width)

    @classmethod
    def from_context(
        cls,
        context: Context,
        *,
        size: int | None = None,
        image_size: Sequence[int] | None = None,
        max_age: int = _MAX_AGE,
        **hparams: Any,
    ) -> Self:
        """Images of the size of the run's, as many as DKDM would keep, and the objective that the networks allow.

        Args:
            context: of the run.
            size: images in the pool; `None`: 0.4 `max_age` batches.
            image_size: their height and width; `None`: those of the training images.
            max_age: steps of synthesis of an image.
            **hparams: the other arguments of the class, and weights of the `Objective`.

        Raises:
            ValueError: the pool is smaller than a batch, or the size of images is neither given nor known.
        """
        weights, own = Objective.split(hparams)
        if size is None or image_size is None:
            batch, *side = context.require_batch_shape()
            image_size = side if image_size is None else image_size
            size = max(1, round(_SHARE * max_age)) * batch if size is None else size
        if context.batch_shape is not None and size < context.batch_shape[0]:
            raise ValueError(
                f"a pool of {size} images cannot fill a batch of {context.batch_shape[0]}: choose a larger size."
            )
        return cls(size, image_size, Objective.fitting(context, **weights), max_age=max_age, **own)

    def synthesize(self, step: Step, taps: Collection[str]) -> Generator[Update, None, Step]:
        """See `Synthesizer.synthesize`; the images are changed here and now, with no optimizer of the run's."""
        yield from ()
        device, dtype = step.images.device, step.images.dtype
        chosen = self._draw(len(step.images) * world_size(), step.number)
        own = chosen.chunk(world_size())[dist.get_rank() if world_size() > 1 else 0]
        images = self.images[own].to(device).requires_grad_()
        view = self._view(images)
        terms, seen = self.objective(step, view, taps)
        (gradient,) = gradients(torch.stack(list(terms.values())).sum(), [images])
        assert gradient is not None
        self._write(own, chosen, images.detach(), gradient)
        return replace(step, images=view.detach().to(dtype), seen=Seen(teacher=seen))

    def _draw(self, count: int, number: int) -> Tensor:
        """Entries for a step, those that are through replaced."""
        if count > len(self.images):
            raise ValueError(f"a pool of {len(self.images)} images cannot fill a batch of {count}.")
        generator = torch.Generator().manual_seed((self._seed + number) % 2**63)
        chosen = torch.randperm(len(self.images), generator=generator)[:count]
        through = chosen[self.ages[chosen] >= self.max_age]
        height, width = self.images.shape[2:]
        self.images[through] = _noise(len(through), height, width, generator)
        self._moments[:, through] = 0
        self.ages[through] = 0
        return chosen

    def _view(self, images: Tensor) -> Tensor:
        """The images shifted and perhaps mirrored, all alike."""
        reach = [int(self.shift * side) for side in images.shape[2:]]
        offset = [int(torch.randint(-far, far + 1, ())) for far in reach]
        shifted = images.roll(offset, (2, 3))
        return shifted.flip(3) if torch.rand(()) < 0.5 else shifted

    @torch.no_grad()
    def _write(self, own: Tensor, chosen: Tensor, images: Tensor, gradient: Tensor) -> None:
        """One step of Adam for the entries of this process, and the results of all processes into the pool."""
        taken = (self.ages[own] + 1).to(gradient).view(-1, 1, 1, 1)
        before = self._moments[:, own].to(gradient)
        moments = torch.stack(
            [torch.lerp(x, old, beta) for x, old, beta in zip((gradient, gradient**2), before, _BETAS, strict=True)]
        )
        first, second = (moment / (1 - beta**taken) for moment, beta in zip(moments, _BETAS, strict=True))
        changed = (images - self.lr * first / (second.sqrt() + _EPSILON)).clamp(0, 1)
        self.images[chosen] = gather_batch(changed).cpu()
        self._moments[:, chosen] = gather_batch(moments.transpose(0, 1)).transpose(0, 1).cpu()
        self.ages[chosen] += 1

    def get_extra_state(self) -> dict[str, Tensor]:
        """The pool, for checkpoints."""
        return {
            "images": self.images,
            "ages": self.ages,
            "moments": self._moments,
            "seed": torch.tensor(self._seed),
        }

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        self.images, self.ages, self._moments = (state[name].clone() for name in ("images", "ages", "moments"))
        self._seed = int(state["seed"])


def _noise(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, 3, height, width, generator=generator)


def _check_memory(size: int, height: int, width: int) -> None:
    needed = 3 * size * 3 * height * width * 4
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"a pool of {size} images of {height}x{width} takes {needed / 2**30:.0f} GiB of memory with the moments of "
            f"its optimiser, and this machine has {there / 2**30:.0f} GiB: choose a smaller size or image_size."
        )
