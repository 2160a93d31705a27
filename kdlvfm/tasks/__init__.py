# SPDX-License-Identifier: Apache-2.0
"""Supervised problems: unpacking, loss and metrics."""
