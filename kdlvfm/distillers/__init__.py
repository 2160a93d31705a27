# SPDX-License-Identifier: Apache-2.0
"""Methods of distillation: one file each, on plain tensors."""
