# SPDX-License-Identifier: Apache-2.0
"""The Lightning trainer: one module for every method."""
