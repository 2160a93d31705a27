# SPDX-License-Identifier: Apache-2.0
"""Where commands print their tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 140


def table_console() -> Console:
    """A console as wide as the terminal; a log has no width of its own, and rich would fold tables to 80 columns."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)
