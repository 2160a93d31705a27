# SPDX-License-Identifier: Apache-2.0
"""Colours for classes that have none of their own."""

from __future__ import annotations

import colorsys


def distinct_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """Distinct colours (red, green, blue), each 0..255: hues a golden section of the circle apart."""
    hues = (i * 0.618034 % 1 for i in range(count))
    colours = (colorsys.hsv_to_rgb(hue, 0.65, 0.9) for hue in hues)
    return tuple((round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colours)
