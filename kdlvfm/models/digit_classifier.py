# SPDX-License-Identifier: Apache-2.0
"""The small classifier of handwritten digits that comes with the package: the judge of digits that a network made."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

from torch import Tensor, nn

from kdlvfm.core.align import resize_map
from kdlvfm.core.features import FeatureModel, ModelCard, TapInfo, resolve_tap
from kdlvfm.models.weights import read_weights, sha256_of

WEIGHTS = Path(__file__).with_suffix(".safetensors")
_SIDE, _DIM, _CLASSES = 8, 32, 10


class DigitClassifier(FeatureModel):
    """Two convolutions and two linear layers that tell digits of 8x8 grey pixels apart; others are brought to that.

    With the package's weights, trained on the training digits (`experiments/dkdm/judge.py`), it recognises 391 of
    the 400 test digits. Taps: `pooled`, (B, 32), and `logits`, (B, 10).

    Args:
        pretrained: the package's weights; otherwise random weights.
    """

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(
            OrderedDict(
                body=nn.Sequential(
                    *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                    *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                    *(nn.Flatten(), nn.Linear(128, _DIM), nn.ReLU()),
                ),
                classifier=nn.Linear(_DIM, _CLASSES),
            )
        )
        self.card = ModelCard("digit_classifier", "random")
        if pretrained:
            self.net.load_state_dict(read_weights(WEIGHTS))
            source = f"package:{WEIGHTS.name}"
            self.card = ModelCard("digit_classifier", "pretrained", "apache-2.0", sha256_of(WEIGHTS), source)

    def taps(self) -> dict[str, TapInfo]:
        """`pooled` and `logits`."""
        return {"pooled": TapInfo(_DIM, None), "logits": TapInfo(_CLASSES, None)}

    def forward(self, images: Tensor, taps: Collection[str]) -> dict[str, Tensor]:
        """Features of images (B, 3, H, W) in [0, 1]; see `FeatureModel.forward`."""
        for tap in taps:
            resolve_tap(tap, self.taps(), self.card.name)
        grey = resize_map(images, (_SIDE, _SIDE)).mean(1, keepdim=True)
        pooled = self.net.get_submodule("body")(grey)
        found = {"pooled": pooled, "logits": self.net.get_submodule("classifier")(pooled)}
        return {tap: found[tap] for tap in taps}
