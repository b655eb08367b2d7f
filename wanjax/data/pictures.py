"""Picture files as videos: a still is one frame of no length, an animated WebP what its frames' durations say."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import av
import PIL.Image

from wanjax.conditioning.images import MOST_PIXELS, read_image
from wanjax.data.shards import open_member
from wanjax.data.timing import Damaged, Shown
from wanjax.errors import InputError
from wanjax.untrusted import check_file, open_file, reason

STILL = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"))
"""Suffixes of pictures; GIF counts among the videos."""
_FOREVER = 1e9
_MOST_FRAMES = 100_000


def is_picture(path: str | Path) -> bool:
    """Whether a file is a picture, by its name."""
    return Path(path).suffix.lower() in STILL


def picture_frames(path: str | Path) -> Iterator[Shown]:
    """The frames of a picture file, all from the first on. libav reads no animated WebP, Pillow does.

    Raises:
      Damaged: it is missing, or no picture of `wanjax.conditioning.images.FORMATS`.
      OSError: it may not be read.
    """
    try:
        member = open_member(Path(path))
        if member is None:
            check_file(path)
        else:
            member.close()
        if Path(path).suffix.lower() == ".webp":
            yield from _animation(path)
        else:
            yield Shown(_still(path), 0.0, _FOREVER, 1.0)
    except FileNotFoundError as error:
        raise Damaged("the file does not exist") from error
    except InputError as error:
        raise Damaged(str(error).removeprefix(f"{path}: ").partition(";")[0]) from error


def _still(path: str | Path) -> av.VideoFrame:
    with open_member(Path(path)) or contextlib.nullcontext(path) as place:
        return av.VideoFrame.from_image(read_image(place))


def _animation(path: str | Path) -> Iterator[Shown]:
    with open_member(Path(path)) or open_file(path) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sizes, which have a limit here
                picture = PIL.Image.open(file, formats=["WEBP"])
            count = getattr(picture, "n_frames", 1)
        except Exception as error:  # what readers make of damage has no common base
            raise Damaged(f"no WebP picture ({reason(error)})") from error
        if picture.width * picture.height > MOST_PIXELS:
            raise Damaged(f"{picture.width}x{picture.height} pixels, {MOST_PIXELS:,} are read")
        if count == 1:
            yield Shown(_still(path), 0.0, _FOREVER, 1.0)
            return
        since = 0.0
        for number in range(min(count, _MOST_FRAMES)):
            try:
                picture.seek(number)
                frame = read_image(picture.copy())
            except Exception as error:
                raise Damaged(f"damaged at {since:.2f} s") from error
            until = since + max(0, picture.info.get("duration", 0)) / 1000
            yield Shown(av.VideoFrame.from_image(frame), since, until, 1.0)
            since = until


def picture_seconds(path: str | Path) -> tuple[av.VideoFrame, float]:
    """The first frame and the length of an animation; 0 of a still."""
    first, until = None, 0.0
    for shown in picture_frames(path):
        first, until = first or shown.frame, shown.until
    assert first is not None
    return first, 0.0 if until == _FOREVER else until
