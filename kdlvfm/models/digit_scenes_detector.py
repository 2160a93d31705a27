# SPDX-License-Identifier: Apache-2.0
"""The small detector on a vision transformer that comes with the package: the teacher of the demo on boxes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kdlvfm.models.digit_scenes_vit import DigitScenesViT
from kdlvfm.models.mmdet import MMDetModel
from kdlvfm.models.weights import read_weights, sha256_of

WEIGHTS = Path(__file__).with_suffix(".safetensors")

_CLASSES = 10
_WIDTH = 64
# Digits are small: the pyramid begins at stride 4, and its anchors have half of the usual size.
_CHANGES = {
    "neck": {"out_channels": _WIDTH, "start_level": 0, "num_outs": 4},
    "bbox_head": {
        "in_channels": _WIDTH,
        "feat_channels": _WIDTH,
        "stacked_convs": 2,
        "anchor_generator": {"octave_base_scale": 4, "strides": [4, 8, 16, 32]},
    },
}


class DigitScenesDetector(MMDetModel):
    """The encoder of `DigitScenesViT` with a simple feature pyramid and a narrow head of GFL, for the ten digits.

    It was trained on a stream of scenes with boxes (`experiments/digit_scenes_teacher`); its run record lies beside its
    weights.

    Args:
        num_classes: 10 with the package's weights; any number without.
        pretrained: the package's weights; otherwise random weights, but for the encoder, which begins with those of
            `DigitScenesViT`.

    Raises:
        ValueError: the weights are for another number of classes.
        ModuleNotFoundError: mmdet is not installed.
    """

    def __init__(self, num_classes: int = _CLASSES, pretrained: bool = True) -> None:
        if pretrained and num_classes != _CLASSES:
            raise ValueError(
                f"the weights of DigitScenesDetector tell the {_CLASSES} classes of DigitScenes boxes apart, not "
                f"{num_classes}: use data=digit_scenes_boxes, or pretrained=false."
            )
        segmenter = DigitScenesViT()
        encoder = segmenter.encoder
        encoder.card = segmenter.card
        super().__init__("gfl_r50_fpn_1x_coco", num_classes, encoder, changes=_CHANGES)
        self.card = replace(self.card, name="digit_scenes_detector")
        if pretrained:
            self.net.load_state_dict(read_weights(WEIGHTS))
            self.card = replace(self.card, sha256=sha256_of(WEIGHTS), source=f"package:{WEIGHTS.name}")
