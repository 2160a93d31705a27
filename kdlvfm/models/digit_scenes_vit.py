# SPDX-License-Identifier: Apache-2.0
"""The small vision transformer that comes with the package: the demo's teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kdlvfm.models.head import EncoderHead
from kdlvfm.models.timm import TimmEncoder
from kdlvfm.models.weights import read_weights, sha256_of

WEIGHTS = Path(__file__).with_suffix(".safetensors")

_CLASSES = 11
# A plain ViT on 8x8 patches that a small convolutional stem prepares: without the stem it learns far too slowly.
_ENCODER = "vit_tiny_r_s16_p8_224"
_ENCODER_ARGUMENTS = {
    "img_size": 64,
    "patch_size": 2,
    "embed_dim": 144,
    "depth": 4,
    "num_heads": 4,
    "class_token": False,
    "global_pool": "avg",
    "num_classes": 0,
}


class DigitScenesViT(EncoderHead):
    """A ViT of four blocks with a pyramid head for the eleven classes of DigitScenes, for images of any size.

    It was trained from scratch on a stream of scenes (`experiments/digit_scenes_teacher`); its run record lies beside
    its weights.

    Args:
        num_classes: 11 with the package's weights; any number without.
        pretrained: the package's weights; otherwise random weights.

    Raises:
        ValueError: the weights are for another number of classes.
    """

    def __init__(self, num_classes: int = _CLASSES, pretrained: bool = True) -> None:
        if pretrained and num_classes != _CLASSES:
            raise ValueError(
                f"the weights of DigitScenesViT tell the {_CLASSES} classes of DigitScenes apart, not {num_classes}: "
                "use data=digit_scenes, or pretrained=false."
            )
        encoder = TimmEncoder(_ENCODER, pretrained=False, model_kwargs=_ENCODER_ARGUMENTS)
        super().__init__(encoder, num_classes, head="pyramid", freeze=False, channels=64)
        self.card = replace(self.card, name="digit_scenes_vit")
        if pretrained:
            self.net.load_state_dict(read_weights(WEIGHTS))
            self.card = replace(
                self.card,
                weights="pretrained",
                licence="apache-2.0",
                sha256=sha256_of(WEIGHTS),
                source=f"package:{WEIGHTS.name}",
            )
