"""From what a run is told of its data to one set of clips: several places, each with its own settings and its share.

sources = read_sources(data, defaults)       # every list is read, no clip is opened
clips = Together(sources)                    # `Clips` of all of them, and how often each comes in a pass
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wanjax.config import MixedData, VideoData
from wanjax.data import shards
from wanjax.data.clip import Clip
from wanjax.data.datasets import Described, read_datasets
from wanjax.data.listing import list_clips
from wanjax.data.manifest import READABLE, Row
from wanjax.data.parts import take_parts
from wanjax.data.pictures import is_picture
from wanjax.data.videos import RATIOS, Videos
from wanjax.errors import InputError
from wanjax.remote import fetch, is_address

_MOST_PASSES = 32
"""Passes that count as one where some clips come less often than once in each."""


@dataclass(frozen=True)
class Geometry:
    """Lengths, sizes and rate of clips, as `Videos` takes them."""

    frames: int
    area: int
    fps: float = 16.0
    lengths: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    temporal_factor: int = 4
    size_multiple: int = 16


class Source(NamedTuple):
    """A place's clips, ready to be asked for, and how often they come.

    repeats: of each clip in a pass over the data.
    share: of all samples, relative to other sources', in place of `repeats`; None: `repeats` counts.
    """

    clips: Videos
    repeats: float
    share: float | None = None


def read_sources(
    data: VideoData | MixedData, geometry: Geometry, encoding: str = "", stills: bool = True
) -> tuple[list[Source], list[str]]:
    """The sources of a run, and lines to print about how they were understood.

    Args:
      data: where they are.
      geometry: of the clips, where a source does not say another.
      encoding: of captions.
      stills: whether pictures count, as clips of one frame.

    Raises:
      InputError: as `list_clips`, `read_datasets` and `Videos`; some sources have a share and others none.
    """
    listed = data.of if isinstance(data, MixedData) else (data,)
    sources: list[Source] = []
    lines: list[str] = []
    for one in listed:
        one = replace(one, path=str(_here(one.path)))
        described, idle = _described(one)
        lines += [f"{one.path}: {', '.join(idle)} do nothing here"] * bool(idle)
        for place in described:
            repeats = place.repeats * one.repeats
            sources.append(Source(_videos(place, one, geometry, encoding, stills), repeats, one.share))
    _tell_apart(sources)
    shares = [source.share for source in sources]
    if None in shares and any(share is not None for share in shares):
        raise InputError("some sources have a share and others none; a share for all, or repeats, is needed; set share")
    return sources, lines


def _here(path: str) -> Path:
    """A place on this disk; of a list in a bucket, with the folder that it is of."""
    folder, _, name = path.rpartition("/")
    if is_address(path) and Path(name).suffix in (*READABLE, ".toml"):
        return fetch(folder) / name
    return fetch(path)


def _tell_apart(sources: Sequence[Source]) -> None:
    """Names of clips are unique: where sources share some, each is named after its source's number."""
    names = [name for source in sources for name in (*(row.name for row in source.clips.rows), *source.clips.left_out)]
    if len(set(names)) == len(names):
        return
    for number, source in enumerate(sources, 1):
        clips = source.clips
        clips.rows = [replace(row, name=f"{number}: {row.name}") for row in clips.rows]
        clips.left_out = {f"{number}: {name}": reason for name, reason in clips.left_out.items()}


def captions_digest(data: VideoData | MixedData, encoding: str = "") -> str | None:
    """A hash of the names and captions of a run's clips, as they are listed now; None: a place is not here.

    Raises:
      InputError: as `list_clips`.
    """
    digest = hashlib.sha256()
    for one in data.of if isinstance(data, MixedData) else (data,):
        if is_address(one.path):
            return None  # what would be looked at is a copy of it
        if not Path(one.path).exists() and not shards.are_shards(Path(one.path)):
            return None
        for place in _described(one)[0]:
            if not place.path.exists() and not shards.are_shards(place.path):
                return None
            for row in list_clips(place.path, encoding, place.caption_suffix).rows:
                digest.update(json.dumps([row.name, row.caption]).encode())
    return digest.hexdigest()[:16]


def _described(one: VideoData) -> tuple[list[Described], list[str]]:
    """The places of a source, and what was said of them that does nothing."""
    if Path(one.path).suffix == ".toml":
        return read_datasets(one.path)
    return [Described(Path(one.path), take=one.take, count=one.count)], []


def _videos(place: Described, one: VideoData, geometry: Geometry, encoding: str, stills: bool) -> Videos:
    found = list_clips(place.path, encoding, place.caption_suffix)
    left_out = dict(found.left_out)
    rows = []
    for row in found.rows:
        picture = is_picture(row.path)
        why = "a picture" if place.kind == "videos" else "pictures are not learned from here"
        if picture and (place.kind == "videos" or not stills):
            left_out[row.name] = why
        elif not picture and place.kind == "pictures":
            left_out[row.name] = "a video"
        else:
            rows.append(row)
    frames = place.lengths or geometry.lengths
    own = replace(
        geometry,
        lengths=frames,
        frames=max(frames) if frames else geometry.frames,
        area=place.area or geometry.area,
        ratios=place.ratios or geometry.ratios,
    )
    fps = own.fps
    stride = place.stride_frames / fps if one.path.endswith(".toml") else one.stride
    clips = make_videos(_parts(rows, place, own, stride), own)
    clips.left_out.update(left_out)
    return clips


def _parts(rows: Sequence[Row], place: Described, geometry: Geometry, stride: float) -> list[Row]:
    lengths = make_videos([], geometry).lengths
    return take_parts(rows, place.take, lengths, geometry.fps, stride=stride, count=place.count)


def make_videos(rows: Sequence[Row], geometry: Geometry) -> Videos:
    """`Videos` of rows.

    Raises:
      InputError: as there.
    """
    return Videos(
        rows,
        geometry.frames,
        geometry.area,
        geometry.fps,
        geometry.lengths,
        geometry.ratios or RATIOS,
        geometry.temporal_factor,
        geometry.size_multiple,
    )


class Together:
    """`Clips` of several sources, one behind the other.

    Attributes:
      left_out: files that are no clips: name -> reason.
      repeats: times that each clip comes in a pass, whole numbers: `[n]`.

    Args:
      sources: of which the clips are.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = list(sources)
        self._ends = np.cumsum([len(source.clips) for source in sources])
        self.left_out: dict[str, str] = {}
        for source in sources:
            self.left_out.update(source.clips.left_out)
        self.repeats = np.concatenate(
            [np.full(len(source.clips), n, int) for source, n in zip(sources, whole_repeats(sources), strict=True)]
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Clip:
        """Clip `index`, from 0; raises as `Videos`."""
        source, own = self._find(index)
        return self.sources[source].clips[own]

    def shape(self, index: int) -> tuple[int, int, int]:
        """Frames, height and width of clip `index`; raises as `Videos`."""
        source, own = self._find(index)
        return self.sources[source].clips.shape(own)

    def row(self, index: int) -> Row:
        """Where clip `index` comes from."""
        source, own = self._find(index)
        return self.sources[source].clips.rows[own]

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        source = int(np.searchsorted(self._ends, index, side="right"))
        return source, index - int(self._ends[source - 1] if source else 0)


def whole_repeats(sources: Sequence[Source]) -> list[int]:
    """How often each source's clips come in a pass, so that every clip comes at least once: a pass grows for that."""
    counts = [len(source.clips) for source in sources]
    repeats = [source.repeats for source in sources]
    if sources and sources[0].share is not None:
        repeats = [(source.share or 0) / max(1, count) for source, count in zip(sources, counts, strict=True)]
        repeats = [x / min(repeats) for x in repeats]
    least = min(repeats, default=1.0)
    scale = min(_MOST_PASSES, math.ceil(1 / least - 1e-9)) if least < 1 else 1
    # Of fractions such as 1.5 the scale that comes nearest, of equals the smallest.
    scales = range(scale, max(scale, 8) + 1)
    errors = {k: max(abs(round(x * k) / (x * k) - 1) for x in repeats) for k in scales} if repeats else {1: 0.0}
    best = min(errors, key=lambda k: (round(errors[k], 2), k))
    return [max(1, round(x * best)) for x in repeats]
