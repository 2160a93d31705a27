# SPDX-License-Identifier: Apache-2.0
"""Sources of images for runs without data: one file each."""

from kdlvfm.distillers.synthesizers.generator import ImageGenerator
from kdlvfm.distillers.synthesizers.noise import Noise
from kdlvfm.distillers.synthesizers.objective import Objective, relation_gap
from kdlvfm.distillers.synthesizers.pool import ImagePool
from kdlvfm.distillers.synthesizers.priors import patch_entropy, statistics_gap, total_variation
from kdlvfm.distillers.synthesizers.surrogate import Surrogate, joint_confidence

__all__ = [
    "ImageGenerator",
    "ImagePool",
    "Noise",
    "Objective",
    "Surrogate",
    "joint_confidence",
    "patch_entropy",
    "relation_gap",
    "statistics_gap",
    "total_variation",
]
