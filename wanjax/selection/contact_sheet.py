"""One picture of many clips: first and last frame of each, side by side, with a line or two below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from wanjax.files import check_output, replacing

Font = PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont

SHEET = (".png",)
COLUMNS = 5
FRAME_H, FRAME_W = 96, 136  # a frame fits into this
_GAP, _LINE, _TITLE = 12, 15, 34
_PAPER, _INK, _FAINT, _EMPTY = "white", "black", (90, 90, 90), (215, 215, 215)


class Cell(NamedTuple):
    """A clip on the sheet.

    frames: its first and last, uint8 `[h, w, 3]`; None: it has none.
    lines: to stand below it.
    """

    frames: tuple[np.ndarray, np.ndarray] | None
    lines: tuple[str, ...]


class Section(NamedTuple):
    """Clips under a title."""

    title: str
    cells: Sequence[Cell]


def fit(height: int, width: int) -> tuple[int, int]:
    """Height and width of the largest picture of that shape in a frame's place."""
    scale = min(FRAME_H / height, FRAME_W / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def write_sheet(path: str | Path, sections: Sequence[Section]) -> None:
    """Draws the sections below each other and writes a PNG, whole or not at all.

    Raises:
      InputError: the name ends otherwise than in .png, or the place cannot be written to.
    """
    target = check_output(path, SHEET)
    cell_w = 2 * FRAME_W + _GAP
    heights = [_section_height(section) for section in sections]
    sheet = PIL.Image.new("RGB", (COLUMNS * cell_w + _GAP, sum(heights) + _GAP), _PAPER)
    draw = PIL.ImageDraw.Draw(sheet)
    top = _GAP
    for section, height in zip(sections, heights, strict=True):
        draw.text((_GAP, top), section.title, _INK, PIL.ImageFont.load_default(18))
        for number, cell in enumerate(section.cells):
            row, column = divmod(number, COLUMNS)
            place = (_GAP + column * cell_w, top + _TITLE + row * _cell_height(section))
            _draw_cell(sheet, draw, place, cell)
        top += height
    with replacing(target) as temporary:
        sheet.save(temporary)


def _cell_height(section: Section) -> int:
    return FRAME_H + _GAP + _LINE * max((len(cell.lines) for cell in section.cells), default=0)


def _section_height(section: Section) -> int:
    return _TITLE + -(-len(section.cells) // COLUMNS) * _cell_height(section)


def _draw_cell(sheet: PIL.Image.Image, draw: PIL.ImageDraw.ImageDraw, place: tuple[int, int], cell: Cell) -> None:
    left, top = place
    for side in range(2):
        x = left + side * FRAME_W
        if cell.frames is None:
            draw.rectangle((x, top, x + FRAME_W - 3, top + FRAME_H), _EMPTY)
            continue
        picture = PIL.Image.fromarray(cell.frames[side])
        picture.thumbnail((FRAME_W - 2, FRAME_H))
        sheet.paste(picture, (x + (FRAME_W - 2 - picture.width) // 2, top + (FRAME_H - picture.height) // 2))
    font = PIL.ImageFont.load_default(11)
    for number, line in enumerate(cell.lines):
        spot = (left, top + FRAME_H + 2 + number * _LINE)
        draw.text(spot, _shorten(draw, line, font, 2 * FRAME_W), _FAINT if number else _INK, font)


def _shorten(draw: PIL.ImageDraw.ImageDraw, line: str, font: Font, width: int) -> str:
    """The line, its middle left out if it is too long: names differ at their ends."""
    keep, shown = len(line), line
    while draw.textlength(shown, font) > width and keep > 2:
        keep -= 1
        shown = f"{line[: keep - keep // 2]}..{line[-(keep // 2) :]}"
    return shown
