"""Lists of clips that others made: captions, archives, TOML of data sets, and pictures that move."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import PIL.Image

from wanjax.data.decode import decode
from wanjax.data.listing import list_clips
from wanjax.data.videos import read_facts

TOML = """[general]
resolution = [96, 64]
num_repeats = 2
[[datasets]]
video_directory = "a"
target_frames = [1, 9]
frame_extraction = "slide"
"""


def captions(folder: Path) -> Path:
    """A video's caption."""
    (folder / "a.mp4").touch()
    (folder / "a.txt").write_text("a café at night")
    return folder / "a.txt"


def shard(folder: Path) -> Path:
    """An archive of a picture with its caption."""
    with tarfile.open(folder / "s.tar", "w") as archive:
        for name, data in (("0.png", b"no picture"), ("0.json", b'{"caption": "x"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return folder / "s.tar"


def read_shard(folder: Path) -> None:
    """Its clips, opened."""
    for row in list_clips(folder / "s.tar").rows:
        read_facts(row)


def animation(folder: Path) -> Path:
    """A WebP of four frames."""
    frames = [PIL.Image.new("RGB", (24, 16), (40 * k, 0, 0)) for k in range(4)]
    frames[0].save(folder / "a.webp", save_all=True, append_images=frames[1:], duration=62)
    return folder / "a.webp"


def read_animation(folder: Path) -> None:
    """Its first pictures."""
    decode(folder / "a.webp", [0.0, 0.1], 16, 16)
