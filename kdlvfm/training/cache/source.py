# SPDX-License-Identifier: Apache-2.0
"""What the features of a cache are made of: training images replayed, and the teacher as training would run it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kdlvfm.core import Task, Teacher
from kdlvfm.training.cache.formats import CacheError
from kdlvfm.training.cache.rows import image_digest

_AUTOCAST = {
    "32-true": None,
    "32": None,
    "bf16-mixed": torch.bfloat16,
    "bf16": torch.bfloat16,
    "16-mixed": torch.float16,
    "16": torch.float16,
}
_REPLAYED = 8  # images

Key = tuple[int, int]
"""View and index of a training sample."""


class ReplayedData(Protocol):
    """Data whose training samples are pure functions of their keys."""

    def loader(self, batches: Any, companion: Any = None) -> Iterable[Any]:
        """Training samples in the batches that their keys make up, each with its companion."""


@dataclass(frozen=True)
class Drawn:
    """A batch of training images: their keys, their digests, and the images themselves.

    Attributes:
        images: (B, 3, H, W); there may be more than keys, of the last image again.
    """

    keys: Sequence[Key]
    digests: Sequence[bytes]
    images: Tensor


@dataclass(frozen=True)
class FeatureSource:
    """Everything that makes features: data to replay, and the teacher as training would run it.

    Attributes:
        data: its training samples are replayed.
        task: unpacks batches.
        teacher: frozen.
        device: where the teacher computes.
        precision: of training, as Lightning names it.
        batch_size: images that the teacher sees at once; a network sums in an order that depends on it, so only with
            the batches of training are features the same to the last bit.
    """

    data: ReplayedData
    task: Task
    teacher: Teacher
    device: torch.device
    precision: str
    batch_size: int

    def draw(self, keys: Sequence[Key], batch_size: int | None = None) -> Iterator[Drawn]:
        """The images of these keys, in batches of one size; the last is filled up with its last image."""
        size = batch_size or self.batch_size
        groups = [keys[first : first + size] for first in range(0, len(keys), size)]
        filled = [[*group, *[group[-1]] * (size - len(group))] for group in groups]
        for group, batch in zip(groups, self.data.loader(filled, _digest_of), strict=True):
            images, _, _ = self.task.unpack(batch)
            digests = [bytes(digest.tolist()) for digest in batch["companion"]["digest"]]
            yield Drawn(group, digests[: len(group)], images)

    def features(self, images: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """The teacher's features of images, on its device."""
        dtype = _AUTOCAST[self.precision]
        self.teacher.to(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            features: dict[str, Tensor] = self.teacher(images.to(self.device), taps)
        return features


def check_precision(precision: str) -> None:
    """Raise `CacheError` for a precision of training in which features are not computed here."""
    if precision not in _AUTOCAST:
        raise CacheError(
            f"a teacher cache is for trainer.precision=32-true, bf16-mixed or 16-mixed, not {precision}: choose one of "
            "these, or teacher_cache=none."
        )


def check_replay(source: FeatureSource, keys: Sequence[Key]) -> tuple[int, int]:
    """Draw a few images twice; their height and width, as a batch has them.

    Raises:
        CacheError: a key does not always give the same image, or images differ in size, so that what is around an image
            in a batch depends on the others.
    """
    chosen = [keys[len(keys) * i // _REPLAYED] for i in range(min(_REPLAYED, len(keys)))]
    # The second time in the opposite order: a generator that goes on from image to image gives other numbers then.
    drawn = list(source.draw([*chosen, *reversed(chosen)], batch_size=1))
    if any(one.digests != other.digests for one, other in zip(drawn, reversed(drawn), strict=True)):
        raise CacheError(
            "the data or its augmentation does not give the same image twice for the same seed, so it cannot be "
            "replayed: draw from torch's global generator, which is seeded for each sample, or set teacher_cache=none."
        )
    sizes = sorted({(int(one.images.shape[-2]), int(one.images.shape[-1])) for one in drawn})
    if len(sizes) > 1:
        raise CacheError(
            f"training images differ in size ({sizes[0]} and {sizes[-1]}, for example), and those of a batch are "
            "padded to the largest: what the teacher sees of one depends on the others. Give "
            "recipe.augmentation.crop a size that every image fills, or set teacher_cache=none."
        )
    return sizes[0]


def weights_hash(teacher: Teacher) -> str:
    """SHA-256, in hexadecimal, over names, shapes and values of all parameters and buffers of a teacher."""
    digest = hashlib.sha256()
    for name, tensor in (*teacher.model.named_parameters(), *teacher.model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of(key: Key, image: Tensor) -> dict[str, Tensor]:
    """The companion of samples whose features are computed: the digest of the image."""
    del key
    return {"digest": torch.frombuffer(bytearray(image_digest(image)), dtype=torch.uint8)}
