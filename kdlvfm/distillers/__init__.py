# SPDX-License-Identifier: Apache-2.0
"""Methods of distillation: one file each, on plain tensors."""

from kdlvfm.distillers.baseline import Baseline
from kdlvfm.distillers.cwd import CWD, cwd_loss
from kdlvfm.distillers.fitnet import FitNet, fitnet_loss
from kdlvfm.distillers.kd import KD, kd_loss

__all__ = ["CWD", "KD", "Baseline", "FitNet", "cwd_loss", "fitnet_loss", "kd_loss"]
