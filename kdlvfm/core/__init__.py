# SPDX-License-Identifier: Apache-2.0
"""The vocabulary: everything that the other packages share. Imports torch and nothing else."""

from kdlvfm.core.denoiser import Denoiser
from kdlvfm.core.detector import Detector
from kdlvfm.core.distiller import Context, Distiller, Step, Update
from kdlvfm.core.features import FeatureModel, Features, ModelCard, TapError, TapInfo, resolve_tap
from kdlvfm.core.task import Metrics, Task
from kdlvfm.core.teacher import Teacher

__all__ = [
    "Context",
    "Denoiser",
    "Detector",
    "Distiller",
    "FeatureModel",
    "Features",
    "Metrics",
    "ModelCard",
    "Step",
    "TapError",
    "TapInfo",
    "Task",
    "Teacher",
    "Update",
    "resolve_tap",
]
