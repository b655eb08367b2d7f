"""Reading video files: what a file's header says, and pictures at given times.

    facts = probe(path)                             # size as shown, seconds; only the first frame is decoded
    decode(path, times, height, width)              # uint8 [F, H, W, 3]

A picture is what a player shows: upright, pixels square, colours as the file's tags say (where there are none: BT.709
for HD, BT.601 below), interlacing left in, high dynamic range not mapped down. Times are seconds from the first frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

TOLERANCE = 0.001  # seconds; containers that count milliseconds round every time by up to half of one
_UNSPECIFIED = 2  # how H.273 codes colours that nothing is said about
# Bicubic that widens with the reduction, so antialiased; every colour sample used; the same bits on every processor.
_RESIZE = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)
# Titles that are no UTF-8 do not matter. PyAV 19 reads them without being told, and knows the option no more.
_TITLES: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


class Damaged(Exception):  # noqa: N818
    """The file holds no video that can be decoded as asked; the message says why."""


class Facts(NamedTuple):
    """What a file says about its video.

    height, width: as shown, of the first frame: upright, in square pixels.
    seconds: from the first frame up to the end of the last.
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
    with _open(path) as container:
        try:
            stream = _stream(container)
            stream.thread_count = 1  # frame threads would first take in several frames
            first = next(container.decode(stream), None)
            if first is None:
                raise Damaged("no frame can be decoded")
            height, width = _shown_size(first, stream)
            return Facts(round(height), round(width), _seconds(container, stream))
        except av.FFmpegError as error:
            raise _damaged(error) from error


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
    video = np.empty((len(times), height, width, 3), np.uint8)
    with _open(path) as container:
        try:
            stream = _stream(container)
            stream.thread_type, stream.thread_count = "AUTO", 0
            painter = Painter(stream, height, width)
            filled = 0
            for frame, until in _shown(container, stream, times[0]):
                picture = None
                while filled < len(times) and times[filled] < until - TOLERANCE:
                    picture = painter(frame) if picture is None else picture
                    video[filled] = picture
                    filled += 1
                if filled == len(times):
                    return video
        except av.FFmpegError as error:
            raise _damaged(error) from error
    raise Damaged(f"ends before {times[filled]:.2f} s")


class Painter:
    """Turns frames of a stream into upright RGB pictures uint8 `[H, W, 3]` of one size."""

    def __init__(self, stream: av.VideoStream, height: int, width: int):
        self.stream, self.height, self.width = stream, height, width
        self.reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """The picture of a frame."""
        shown_h, shown_w = _shown_size(frame, self.stream)
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


# ------------------------------------------------------------------------------------------------ container and time


def _open(path: str | Path) -> InputContainer:
    try:
        return av.open(str(path), **_TITLES)
    except FileNotFoundError as error:
        raise Damaged("the file does not exist") from error
    except av.FFmpegError as error:
        raise _damaged(error) from error


def _damaged(error: av.FFmpegError) -> Exception:
    """A broken file is left out, but a failing disk must stop the run: it would fail otherwise on every host."""
    if isinstance(error, (OSError, MemoryError)) and not isinstance(error, FileNotFoundError):
        return error
    return Damaged(f"cannot be decoded ({error.strerror})")


def _stream(container: InputContainer) -> av.VideoStream:
    """The first video stream that is no cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    raise Damaged("holds no video" if not container.streams.audio else "holds sound alone")


def _start(stream: av.VideoStream) -> float:
    return float((stream.start_time or 0) * (stream.time_base or 0))


def _seconds(container: InputContainer, stream: av.VideoStream) -> float:
    """Length of the video. Where the header has none (Matroska), that of the packets behind its last keyframe."""
    if stream.duration:
        return float(stream.duration * (stream.time_base or 0))
    if container.duration:
        container.seek(container.start_time + container.duration if container.start_time else container.duration)
    else:
        container.seek(0)
    ends = [((packet.pts or 0) + (packet.duration or 0)) * packet.time_base for packet in container.demux(stream)]
    return float(max(ends, default=0)) - _start(stream)


def _shown(container: InputContainer, stream: av.VideoStream, start: float) -> Iterator[tuple[av.VideoFrame, float]]:
    """Each frame from the one shown at `start` on, and when it is shown until."""
    frames = _timed(container, stream, start)
    held, since = next(frames, (None, 0.0))
    if held is not None and since > start + TOLERANCE and start > 0:  # the seek went too far
        container.seek(0, stream=stream)
        frames = _timed(container, stream, 0)
        held, since = next(frames, (None, 0.0))
    if held is None:
        return
    last = 0.0
    for frame, time in frames:
        yield held, time
        held, last, since = frame, time - since, time
    duration = float((held.duration or 0) * (stream.time_base or 0)) or last
    yield held, since + duration + 2 * TOLERANCE


def _timed(container: InputContainer, stream: av.VideoStream, start: float) -> Iterator[tuple[av.VideoFrame, float]]:
    """Frames from a keyframe at or before `start` on, with their times."""
    base = float(stream.time_base or 0)
    if start > 0:
        container.seek(int((start + _start(stream)) / base), stream=stream)
    step = float(1 / (stream.average_rate or 25))
    time = -step
    for frame in container.decode(stream):
        # Some old containers time no frames; then they follow each other at the average rate.
        time = time + step if frame.pts is None else frame.pts * base - _start(stream)
        if frame.is_corrupt:  # parts of it are invented, and frames predicted from it take them over unmarked
            raise Damaged(f"damaged at {time:.2f} s")
        yield frame, time


# ----------------------------------------------------------------------------------------------- geometry and colour


def _shown_size(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[float, float]:
    """Height and width when upright in square pixels; the shorter way of a pixel keeps its resolution."""
    aspect = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1) or 1.0
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
