"""What a terminal shows beside plain text: colours and bars, which nothing else is sent."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import IO, Any

COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
SHADES = "█▓▒░"
"""A bar's segments in order, whether colours are seen or not."""


def has_colours(stream: IO[str]) -> bool:
    """Whether a stream is a terminal that shows colours; NO_COLOR (no-color.org) turns them off."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, colour: str, stream: IO[str] | None = None) -> str:
    """Text in a colour of `COLOURS`, as it is where the stream (standard output) shows none."""
    return f"\033[{COLOURS[colour]}m{text}\033[0m" if has_colours(stream or sys.stdout) else text


def bar(parts: Sequence[float], whole: float, width: int = 32) -> str:
    """A bar of `width` cells, `whole` long, of at most four parts; what goes beyond `whole` is not drawn."""
    cells, end = "", 0.0
    for shade, part in zip(SHADES, parts, strict=False):
        end += part
        cells += shade * (min(width, round(width * end / whole)) - len(cells))
    return cells + "·" * (width - len(cells))


def bar_width() -> dict[str, Any]:
    """tqdm's options for a bar as wide as the terminal; some, as containers', say that they have no columns at all, and
    tqdm then shows none.
    """
    try:
        there = os.get_terminal_size(sys.stderr.fileno()).columns
        return {"dynamic_ncols": True} if there else {"ncols": 80, "nrows": 24}
    except (OSError, ValueError):  # no terminal, or no file
        return {"dynamic_ncols": True}
