"""Reading video files: how large and long a video is, and its pictures at given times.

    facts = probe(path)                             # size as shown, seconds; only the first frame is decoded
    decode(path, times, height, width)              # uint8 [F, H, W, 3]

A picture is what a player shows: upright, pixels square, colours as the file's tags say (where there are none: BT.709
for HD, BT.601 below), interlacing left in, high dynamic range not mapped down. Times are seconds from the first frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from wanjax.data.pictures import is_picture, picture_frames, picture_seconds
from wanjax.data.timing import (
    TOLERANCE,
    Damaged,
    OutOfOrderError,
    damaged,
    open_video,
    pixel_aspect,
    seconds,
    shown_frames,
    video_stream,
)

_UNSPECIFIED = 2  # how H.273 codes colours that nothing is said about
# Bicubic that widens with the reduction, so antialiased; every colour sample used; the same bits on every processor.
_RESIZE = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)


class Facts(NamedTuple):
    """What a file says about its video.

    height, width: as shown, of the first frame: upright, in square pixels.
    seconds: from the first frame up to the end of the last; 0 of a still picture.
    """

    height: int
    width: int
    seconds: float


class Orientation(NamedTuple):
    """How stored pictures become upright: first axes swapped, then rows and columns reversed."""

    swap: bool
    reverse_rows: bool
    reverse_columns: bool


def probe(path: str | Path) -> Facts:
    """What the file says about its video.

    Raises:
      Damaged: it is missing, is no video, has no pictures, or its first frame cannot be decoded.
      OSError: the disk fails or may not be read.
    """
    if is_picture(path):
        first, length = picture_seconds(path)
        return Facts(first.height, first.width, length)
    with open_video(path) as container:
        try:
            stream = video_stream(container)
            stream.thread_count = 1  # frame threads would first take in several frames
            first = next(container.decode(stream), None)
            if first is None:
                raise Damaged("no frame can be decoded")
            height, width = _shown_size(first, pixel_aspect(stream))
        except av.FFmpegError as error:
            raise damaged(error, path) from error
    return Facts(round(height), round(width), seconds(path, first))


def decode(path: str | Path, times: Sequence[float], height: int, width: int) -> np.ndarray:
    """The pictures shown at some times, scaled to cover the size and cut in the middle.

    Args:
      path: of the file.
      times: seconds from the first frame, ascending; within `TOLERANCE` a coming frame counts as shown.
      height, width: of the result.

    Returns:
      Video, uint8 `[F, H, W, 3]`, RGB.

    Raises:
      Damaged: as `probe`; also if the video ends before the last time, or a frame up to there is damaged.
      OSError: the disk fails or may not be read.
    """
    try:
        found = list(pictures_at(path, times, height, width))
    except OutOfOrderError:
        found = list(pictures_at(path, times, height, width, by_dts=True))
    return np.stack(found)


def pictures_at(
    path: str | Path, times: Iterable[float], height: int, width: int, by_dts: bool = False
) -> Iterator[np.ndarray]:
    """The pictures of `decode`, one after the other, uint8 `[H, W, 3]`; one shown at several times is one array.

    Raises:
      OutOfOrderError: what came is wrong: ask for them `by_dts`.
      Damaged, OSError: as `decode`.
    """
    painter, coming = Painter(height, width), iter(times)
    time = next(coming)
    try:
        frames = picture_frames(path) if is_picture(path) else shown_frames(path, time, by_dts)
        for frame, _, until, aspect in frames:
            picture = None
            while time < until - TOLERANCE:
                picture = painter(frame, aspect) if picture is None else picture
                yield picture
                time = next(coming, None)
                if time is None:
                    return
    except av.FFmpegError as error:
        raise damaged(error, path) from error
    raise Damaged(f"ends before {time:.2f} s")


class Painter:
    """Turns frames into upright RGB pictures uint8 `[H, W, 3]` of one size."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self.reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame, aspect: float) -> np.ndarray:
        """The picture of a frame whose pixels are so many times as wide as high."""
        shown_h, shown_w = _shown_size(frame, aspect)
        scale = max(self.height / shown_h, self.width / shown_w)
        h, w = max(self.height, round(shown_h * scale)), max(self.width, round(shown_w * scale))
        turn = _orientation(frame)
        picture = self.reformatter.reformat(
            frame, *((h, w) if turn.swap else (w, h)), "rgb24",
            src_colorspace=_colorspace(frame), src_color_range=_color_range(frame),
            dst_color_range=ColorRange.JPEG, interpolation=_RESIZE, threads=1,
        )  # fmt: skip
        pixels = picture.to_ndarray()
        pixels = pixels.swapaxes(0, 1) if turn.swap else pixels  # [h, w, 3]
        pixels = pixels[:: -1 if turn.reverse_rows else 1, :: -1 if turn.reverse_columns else 1]
        top, left = (h - self.height) // 2, (w - self.width) // 2
        return pixels[top : top + self.height, left : left + self.width]  # [H, W, 3]


# ----------------------------------------------------------------------------------------------- geometry and colour


def _shown_size(frame: av.VideoFrame, aspect: float) -> tuple[float, float]:
    """Height and width when upright in square pixels; the shorter way of a pixel keeps its resolution."""
    height, width = frame.height * max(1.0, 1 / aspect), frame.width * max(1.0, aspect)
    return (width, height) if _orientation(frame).swap else (height, width)


def _orientation(frame: av.VideoFrame) -> Orientation:
    """From the display matrix: a stored point (x, y) is shown at (a x + c y, b x + d y)."""
    data = frame.side_data.get(SideData.DISPLAYMATRIX)  # pyright: ignore[reportCallIssue, reportArgumentType]
    if data is None:
        return Orientation(False, False, False)
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, d < 0, a < 0)
    return Orientation(True, b < 0, c < 0)


def _colorspace(frame: av.VideoFrame) -> int | None:
    if frame.format.is_rgb or frame.colorspace != _UNSPECIFIED:
        return None  # reformat reads the frame's tag
    return Colorspace.ITU709 if frame.height > 576 or frame.width > 1024 else Colorspace.ITU601


def _color_range(frame: av.VideoFrame) -> int | None:
    if frame.format.is_rgb or frame.color_range != ColorRange.UNSPECIFIED:
        return frame.color_range or None
    return ColorRange.JPEG if frame.format.name.startswith("yuvj") else ColorRange.MPEG
