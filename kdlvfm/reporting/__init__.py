# SPDX-License-Identifier: Apache-2.0
"""From run records to statistics, tables and figures."""
