"""When a video file's pictures are shown: opening it, its length, its frames in the order that a player shows them.

Headers are not believed: they may be longer or shorter than the pictures, or say nothing. Packets and decoded frames
are. A frame's time is the container's presentation time (pts). AVI and ASF store none, and what libav makes of them is
wrong; there, as where pts go back, it is the time (dts) of the packet with which the decoder gave the frame out: late
by as many packets as the decoder holds back, from the first frame to the last.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.container import InputContainer
from av.stream import Disposition

from wanjax.data.shards import open_member
from wanjax.untrusted import check_file, open_file

CONTAINERS = "3g2,3gp,asf,avi,flv,gif,m4a,matroska,mj2,mov,mp4,mpeg,mpegts,mpegvideo,mxf,ogg,webm"
"""libav's names of what the files of `wanjax.data.manifest.VIDEO` are."""
TOLERANCE = 0.001  # seconds; containers that count milliseconds round every time by up to half of one
UNTIMED = ("avi", "asf")
"""libav's names of containers without presentation times."""
UNINDEXED = ("mpeg", "mpegvideo")
"""Those in which libav mistakes the times of packets after it has gone somewhere."""
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
"""The name of the part of an ASF file that holds the packets; its length follows."""
_BACK = (0.0, 2.0, 10.0)
"""Seconds before a time that its decoding is begun at, one after the other, until the frame shown then is among those
that come; then from the beginning."""
# Titles that are no UTF-8 do not matter. PyAV 19 reads them without being told, and knows the option no more.
_TITLES: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


class Damaged(Exception):  # noqa: N818
    """The file holds no video that can be decoded as asked; the message says why."""


class Shown(NamedTuple):
    """A frame and when it is shown: seconds from the first one on, up to the next; `aspect` is of its pixels."""

    frame: av.VideoFrame
    since: float
    until: float
    aspect: float


class OutOfOrderError(Exception):
    """Frames come in the order shown and their times do not."""


def open_video(path: str | Path) -> InputContainer:
    """The container of a plain file.

    Raises:
      Damaged: it is missing or no video.
      OSError: the disk fails or may not be read.
    """
    try:
        member = open_member(Path(path))
        if member is None:
            check_file(path)
        # Some containers are lists of other files, perhaps on other machines: none of them is asked for.
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        return av.open(str(path) if member is None else member, options=options, **_TITLES)
    except FileNotFoundError as error:
        raise Damaged("the file does not exist") from error
    except av.FFmpegError as error:
        raise damaged(error, path) from error
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG):
            raise Damaged(f"cannot be opened ({error.strerror})") from error
        raise


def damaged(error: av.FFmpegError, path: str | Path) -> Exception:
    """A broken file is left out, but a failing disk must stop the run: it would fail otherwise on every host.

    libav has errors of disks, and of too little memory, for what is in a file too; so the disk is asked.
    """
    try:
        if isinstance(error, OSError):
            with open_member(Path(path)) or open_file(path) as file:
                while file.read(2**24):
                    pass
    except FileNotFoundError:
        pass
    except OSError as failure:
        return failure
    return Damaged(f"cannot be decoded ({error.strerror})")


def video_stream(container: InputContainer) -> av.VideoStream:
    """The first video stream that is no cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:  # PyAV 18.0 ends the process where it is asked to decode
                raise Damaged("is encoded in a way that no decoder here reads")
            return stream
    raise Damaged("holds no video" if not container.streams.audio else "holds sound alone")


# ------------------------------------------------------------------------------------------------------------- length


def seconds(path: str | Path, first: av.VideoFrame) -> float:
    """From the first frame shown to the end of the last, as the packets say.

    Args:
      path: of the file.
      first: its first frame, decoded without threads.
    """
    packets: list[tuple[int, int]] = []
    with open_video(path) as container:
        stream = video_stream(container)
        name, base, rate = container.format.name, float(stream.time_base or 1), _rate(stream)  # while it is open
        by_dts = name in UNTIMED or first.pts is None
        if not by_dts and name not in UNINDEXED and _seek_end(container, stream):
            packets = _packets(path, container, stream, by_dts)
    if len(packets) < 2:  # nothing is behind where the header puts the end, or too little to tell a last frame's length
        with open_video(path) as container:
            stream = video_stream(container)
            packets = _packets(path, container, stream, by_dts)
    if packets and _is_cut_off(path, name):  # libav shows what there is of the last picture
        packets.pop()
    if not packets:
        return 0.0
    step = 1 / (rate * base)
    if not by_dts:
        return max(0.0, (_end(packets, step) - (first.pts or 0)) * base)
    begin = packets[0][0] if first.dts is None else first.dts
    held_back = sum(time < begin for time, _ in packets)
    return max(0.0, (_end(packets, step) + held_back * step - begin) * base)


def _is_cut_off(path: str | Path, name: str) -> bool:
    """Whether a file ends too early, in containers of which libav does not mark a packet that is not whole."""
    if name not in ("asf", "gif"):
        return False
    with open_member(Path(path)) or open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 1 if name == "gif" else 0)
        head = file.read(2**20)
    if name == "gif":
        return head != b";"
    place = head.find(_ASF_DATA)
    return place >= 0 and place + int.from_bytes(head[place + 16 : place + 24], "little") > size


def _packets(
    path: str | Path, container: InputContainer, stream: av.VideoStream, by_dts: bool
) -> list[tuple[int, int]]:
    """Time and length of each packet from here on that is shown and whole, in the stream's units, by time."""
    found, step = [], 1 / (_rate(stream) * float(stream.time_base or 1))
    try:
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:  # the last is an empty one; edit lists discard
                continue
            if packet.is_corrupt:  # the file is cut off inside it
                break
            time = packet.dts if by_dts or packet.pts is None else packet.pts
            found.append((round(len(found) * step) if time is None else time, packet.duration or 0))
    except av.FFmpegError as error:
        failure = damaged(error, path)
        if isinstance(failure, OSError):
            raise failure from error
    return sorted(found)


def _end(packets: list[tuple[int, int]], step: float) -> float:
    """The end of the last packet; one without a length has that of the one before, or of a frame."""
    time, duration = packets[-1]
    gaps = [b - a for (a, _), (b, _) in pairwise(packets) if b > a]
    return time + (duration or (gaps[-1] if gaps else step))


def _seek_end(container: InputContainer, stream: av.VideoStream) -> bool:
    """To the last keyframe that the header knows of, or before it; False: nothing is known."""
    try:
        if stream.duration:
            container.seek((stream.start_time or 0) + stream.duration, stream=stream)
        elif container.duration:
            container.seek((container.start_time or 0) + container.duration)
        else:
            return False
    except av.FFmpegError:
        return False
    return True


def _rate(stream: av.VideoStream) -> float:
    return float(stream.average_rate or 25)


# ------------------------------------------------------------------------------------------------------------- frames


def shown_frames(path: str | Path, start: float, by_dts: bool = False) -> Iterator[Shown]:
    """The frames from the one shown at `start` on.

    Args:
      path: of the file.
      start: seconds from the first frame.
      by_dts: whether presentation times are wrong, as an attempt before found out.

    Raises:
      OutOfOrderError: presentation times go back, those before are wrong too.
      Damaged: a frame on the way is damaged, decoding times go back too, or the file is no video.
      OSError: the disk fails or may not be read.
    """
    frames = _timed(path, start, by_dts)
    first = next(frames, None)
    if first is None:
        return
    held, since, stream = first
    aspect, last = pixel_aspect(stream), 0.0
    base, rate = stream.time_base or 0, _rate(stream)  # while the file is open

    def shown_last() -> Shown:
        duration = float((held.duration or 0) * base) or last or 1 / rate
        return Shown(_whole(held, since), since, since + duration + 2 * TOLERANCE, aspect)

    while True:
        try:
            frame, time, _ = next(frames)
        except StopIteration:
            break
        except (av.FFmpegError, Damaged):  # what comes before the damage is whole
            yield shown_last()
            raise
        if time < since - TOLERANCE:
            if by_dts:  # neither times can be believed
                raise Damaged(f"goes back in time at {since:.2f} s")
            raise OutOfOrderError
        shown = Shown(_whole(held, since), since, time, aspect)  # also of those before: later ones are made of them
        if time > start:
            yield shown
        held, last, since = frame, time - since, time
    yield shown_last()


def pixel_aspect(stream: av.VideoStream) -> float:
    """Width of a stored pixel over its height."""
    return float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1) or 1.0


def _timed(path: str | Path, start: float, by_dts: bool) -> Iterator[tuple[av.VideoFrame, float, av.VideoStream]]:
    """Frames from a keyframe at or before `start` on, their times, and their stream."""
    there = False
    if start > 0:
        with open_video(path) as container:
            stream, clock = _clocked(container, by_dts)
            for frame, time in _seek(container, stream, clock, start):
                there = True
                yield frame, time, stream
    if there:
        return
    with open_video(path) as container:  # or from the beginning
        stream, clock = _clocked(container, by_dts)
        for frame in _frames(container, stream):
            yield frame, clock(frame), stream


def _frames(container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """All frames from here on, up to a packet that is not whole."""
    for packet in container.demux(stream):
        if packet.is_corrupt and packet.size:
            yield from stream.codec_context.decode(None)  # those held back
            raise Damaged("is cut off or damaged")
        yield from packet.decode()  # pyright: ignore[reportReturnType]  # of a video stream


def _clocked(container: InputContainer, by_dts: bool) -> tuple[av.VideoStream, Clock]:
    """The stream, ready for decoding, and what tells its frames' times."""
    stream = video_stream(container)
    by_dts = by_dts or container.format.name in UNTIMED
    # Frame threads would blur with which packet a frame came.
    stream.thread_type, stream.thread_count = "SLICE" if by_dts else "AUTO", 0
    return stream, Clock(stream, by_dts)


class Clock:
    """Tells when frames are shown: seconds from the first frame it is asked about."""

    def __init__(self, stream: av.VideoStream, by_dts: bool):
        self.by_dts, self.base, self.step = by_dts, float(stream.time_base or 0), 1 / _rate(stream)
        self.begin, self.time = None, -self.step

    def __call__(self, frame: av.VideoFrame) -> float:
        """The time of a frame. Without one of its own, as the last of a file that decoders hold back, the next."""
        stamp = frame.dts if self.by_dts else frame.pts
        if stamp is None:
            self.time += self.step
        else:
            self.begin = stamp if self.begin is None else self.begin
            self.time = (stamp - self.begin) * self.base
        return self.time


def _whole(frame: av.VideoFrame, time: float) -> av.VideoFrame:
    if frame.is_corrupt:  # parts of it are invented, and frames predicted from it take them over unmarked
        raise Damaged(f"damaged at {time:.2f} s")
    return frame


def _seek(
    container: InputContainer, stream: av.VideoStream, clock: Clock, start: float
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Frames from a keyframe on, with their times, the first no later than `start`; none if that cannot be had."""
    first = next(container.decode(stream), None)
    if first is None:
        return
    clock(first)
    if clock.begin is None or container.format.name in UNINDEXED:
        return
    for back in _BACK:
        if start <= back:
            return
        try:
            container.seek(clock.begin + int((start - back) / clock.base), stream=stream)
            frames = dropwhile(lambda frame: not frame.key_frame, _frames(container, stream))
            found = next(frames, None)
        except (av.FFmpegError, Damaged):  # there is no way but from the beginning on
            return
        if found is not None and clock(found) <= start + TOLERANCE:
            yield found, clock.time
            for frame in frames:
                yield frame, clock(frame)
            return
