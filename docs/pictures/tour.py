"""Runs the commands of docs/tour.md and writes its pictures: a strip of frames of each video.

python docs/pictures/tour.py
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from wanjax import commands

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "tour.md"
SIDE, SHOWN = 128, 7


def draw_shapes() -> None:
    """Two pictures as somebody might draw them for the demo model."""
    for name, x in (("first", 14), ("last", 50)):
        picture = Image.new("RGB", (256, 256), (30, 40, 90))
        draw = ImageDraw.Draw(picture)
        draw.ellipse([4 * x - 40, 88, 4 * x + 40, 168], fill=(220, 60, 50))
        picture.resize((64, 64), Image.Resampling.LANCZOS).save(FOLDER / f"shapes_{name}.png")


def strip(frames: np.ndarray) -> Image.Image:
    """Some of the frames `[f, h, w, 3]`, the first and the last among them, side by side."""
    chosen = frames[np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)]
    picture = Image.new("RGB", (SHOWN * (SIDE + 6) - 6, SIDE), "white")
    for i, frame in enumerate(chosen):
        picture.paste(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.NEAREST), (i * (SIDE + 6), 0))
    return picture


def main() -> None:
    """All of the page's commands that make a video, in its order; their pictures stand below them."""
    draw_shapes()
    text = PAGE.read_text().replace("\\\n", " ")
    for command, picture in re.findall(r"^    wanjax (sample .*)\n\n!\[[^\]]*\]\(pictures/(\w+\.png)\)", text, re.M):
        argv = shlex.split(command)
        commands.main(argv)
        strip(read(argv[argv.index("--output") + 1])).save(FOLDER / picture)


def read(path: str) -> np.ndarray:
    """The frames of a video."""
    import av

    with av.open(path) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


if __name__ == "__main__":
    main()
