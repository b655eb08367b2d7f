"""Several clips out of one video: from its head, side by side, sliding, spread, or one for each scene.

rows, left_out = take_parts(rows, "slide", lengths=(81,), fps=16, stride=1.0)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from wanjax.data.clip import UnusableClip
from wanjax.data.decode import Damaged, Facts, pictures_at
from wanjax.data.manifest import Row
from wanjax.data.pictures import is_picture
from wanjax.data.timing import TOLERANCE, OutOfOrderError
from wanjax.data.videos import read_facts
from wanjax.errors import InputError

_SMALL = 96  # pixels of the shorter side: enough to see a cut


def take_parts(
    rows: Sequence[Row],
    take: str,
    lengths: Sequence[int],
    fps: float,
    *,
    stride: float = 1.0,
    count: int = 4,
    threads: int = 8,
) -> list[Row]:
    """Rows of parts in place of rows of videos. Pictures, and videos that cannot be used or are too short, stay.

    Args:
      rows: of videos, perhaps of parts of them already.
      take: "longest": one clip, as it is; "head": one of each length, from the beginning; "chunk": of each length, one
        behind the other; "slide": of each length, one every `stride` seconds; "uniform": of each length, `count`,
        spread from beginning to end; "cuts": one for each scene.
      lengths: in frames.
      fps: frames a second.
      stride: seconds, of "slide".
      count: of "uniform".
      threads: that open files side by side.

    Raises:
      InputError: "cuts" without the packages for it.
    """
    if take == "longest":
        return list(rows)

    def parts(row: Row) -> list[Row]:
        if is_picture(row.path):
            return [row]
        facts = read_facts(row)
        if isinstance(facts, UnusableClip):
            return [row]
        if take == "cuts":
            return [_part(row, facts, a, b) for a, b in _scenes(row, facts, fps)] or [row]
        frames = math.ceil((facts.seconds - TOLERANCE) * fps)
        held = math.floor((facts.seconds + TOLERANCE) * fps) + 1  # the last picture once more, as `Videos` has it
        step = max(1, round(stride * fps))
        found = [
            _part(row, facts, start / fps, min(facts.seconds, (start + length) / fps))
            for length in lengths
            for start in _starts(take, 0 if frames < length <= held else frames - length, length, step, count)
        ]
        return found or [row]

    with ThreadPoolExecutor(threads) as pool:
        return [part for found in pool.map(parts, rows) for part in found]


def _starts(take: str, last: int, length: int, step: int, count: int) -> list[int]:
    """First frames of the parts of a length, none later than `last`."""
    if last < 0:
        return []
    return {
        "head": [0],
        "chunk": list(range(0, last + 1, length)),
        "slide": list(range(0, last + 1, step)),
        "uniform": sorted(set(np.linspace(0, last, count).round().astype(int).tolist())),
    }[take]


def _part(row: Row, facts: Facts, start: float, end: float) -> Row:
    columns = {**row.columns, **Facts(facts.height, facts.width, end - start)._asdict()}
    a, b = row.start + start, row.start + end
    name = row.name.rpartition("@")[0] if row.start or row.end is not None else row.name
    return dataclasses.replace(row, name=f"{name}@{a:.6g}-{b:.6g}", start=a, end=b, columns=columns)


# ------------------------------------------------------------------------------------------------------------ scenes


def _scenes(row: Row, facts: Facts, fps: float) -> list[tuple[float, float]]:
    """Beginning and end of each scene of a video, in seconds from the row's start; none: it cannot be decoded."""
    scale = _SMALL / min(facts.height, facts.width)
    size = tuple(max(1, round(side * scale)) for side in (facts.height, facts.width))
    count = max(1, math.ceil((facts.seconds - TOLERANCE) * fps))
    times = [row.start + k / fps for k in range(count)]
    try:
        try:
            cuts = find_cuts(pictures_at(row.path, times, size[0], size[1]), fps)
        except OutOfOrderError:
            cuts = find_cuts(pictures_at(row.path, times, size[0], size[1], by_dts=True), fps)
    except Damaged:
        return []
    places = [0.0, *(cut / fps for cut in cuts), facts.seconds]
    return [(a, b) for a, b in itertools.pairwise(places) if b > a]


def find_cuts(video: Iterable[np.ndarray], fps: float) -> list[int]:
    """Frames that begin a new scene, by PySceneDetect's adaptive detector. `[F, H, W, 3]`, uint8; small will do.

    Raises:
      InputError: the package for it is not installed.
    """
    try:
        from scenedetect import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector
    except ImportError as error:
        raise InputError('scene cuts need PySceneDetect, which is not installed; pip install "wanjax[data]"') from error
    detector = AdaptiveDetector(min_scene_len=1)
    # It compares a frame with its neighbours on both sides; repeated ends let it see cuts close to them too.
    margin = detector.window_width + 1
    found: list[FrameTimecode] = []
    for number, frame in enumerate(_with_margins(video, margin)):
        bgr = np.ascontiguousarray(frame[..., ::-1])
        found += detector.process_frame(FrameTimecode(number, float(fps)), bgr)
    return [cut.frame_num - margin for cut in found]


def _with_margins(video: Iterable[np.ndarray], margin: int) -> Iterator[np.ndarray]:
    last = None
    for frame in video:
        if last is None:
            yield from [frame] * margin
        yield frame
        last = frame
    if last is not None:
        yield from [last] * margin
