# SPDX-License-Identifier: Apache-2.0
"""Methods of distillation: one file each, on plain tensors."""

from kdlvfm.distillers.attention_transfer import AT, attention_transfer_loss
from kdlvfm.distillers.baseline import Baseline
from kdlvfm.distillers.cwd import CWD, cwd_loss
from kdlvfm.distillers.dist import DIST, dist_loss
from kdlvfm.distillers.fitnet import FitNet, fitnet_loss
from kdlvfm.distillers.kd import KD, kd_loss
from kdlvfm.distillers.pkd import PKD, pkd_loss
from kdlvfm.distillers.rsd import RSD, rsd_loss
from kdlvfm.distillers.similarity_preserving import SP, sp_loss
from kdlvfm.distillers.vkd import VkD, vkd_loss

__all__ = [
    "AT",
    "CWD",
    "DIST",
    "KD",
    "PKD",
    "RSD",
    "SP",
    "Baseline",
    "FitNet",
    "VkD",
    "attention_transfer_loss",
    "cwd_loss",
    "dist_loss",
    "fitnet_loss",
    "kd_loss",
    "pkd_loss",
    "rsd_loss",
    "sp_loss",
    "vkd_loss",
]
