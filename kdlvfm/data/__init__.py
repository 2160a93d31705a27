# SPDX-License-Identifier: Apache-2.0
"""Data sets as Lightning data modules: one file a family."""
