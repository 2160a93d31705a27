# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation from vision foundation models into small CNNs, for segmentation and detection."""

__version__ = "0.1.0"
