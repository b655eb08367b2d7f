"""Clips from video files: decoded, brought to one frame rate, and cut to a few sizes and lengths.

    clips = Videos("clips/manifest.jsonl", frames=81, area=480 * 832)
    clips.shape(7)        # (81, 480, 832), from the file's header
    clips[7].video        # uint8 [81, 480, 832, 3]

Frames, height and width of a clip are one of the set's buckets, since every shape costs a compilation. A bucket's
aspect ratio is the one that cuts least off the clip, its length the longest that the clip fills.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from wanjax.config import WAN_VAE, DiTConfig
from wanjax.data.clip import Clip, UnusableClip
from wanjax.data.decode import TOLERANCE, Damaged, Facts, decode, probe
from wanjax.data.listing import Listing, list_clips
from wanjax.data.manifest import CAPTIONS, MOST_SECONDS, Row
from wanjax.data.pictures import is_picture
from wanjax.errors import InputError

RATIOS = (Fraction(16, 9), Fraction(4, 3), Fraction(1), Fraction(3, 4), Fraction(9, 16))  # width / height
LARGEST_SIDE = 2**16  # of a video that a manifest tells of
LARGEST = 4096  # root of the largest area: all sizes up to it are compared


class Videos:
    """`Clips` of a manifest's videos. Clip `index` is row `index`, usable or not, so that numbers never shift.

    Frame k of a clip is the picture that is shown `k / fps` seconds behind its start. Nothing is opened before it is
    asked for; what a header says is asked once and kept. A manifest that `wanjax.selection.select` wrote says it itself
    (columns `height`, `width`, `seconds`), then files are opened only to be decoded.

    Attributes:
      rows: of the manifest.
      left_out: files of the folder that are no clips: name -> reason.
      lengths: frames of the buckets, longest first.
      sizes: (height, width) of the buckets.

    Args:
      source: a manifest or a folder (`wanjax.data.manifest`), or its rows.
      frames: of the longest bucket, 4n + 1 (with the published VAE). A picture is one frame, in buckets of its own.
      area: pixels of a frame, about.
      fps: frames a second; 16 is the model's.
      lengths: frames of the buckets, each 4n + 1; None: `frames` and about three, two and one quarters of it.
      ratios: width / height of the buckets, about.
      temporal_factor: pixel frames in a latent frame of the VAE.
      size_multiple: what height and width are multiples of, see `VAEConfig.size_multiple`.

    Raises:
      InputError: an argument is none of these, the manifest cannot be read, or it has clips without captions.
    """

    def __init__(
        self,
        source: str | Path | Sequence[Row],
        frames: int = 81,
        area: int = 480 * 832,
        fps: float = 16.0,
        lengths: Sequence[int] | None = None,
        ratios: Sequence[float | Fraction] = RATIOS,
        temporal_factor: int = WAN_VAE.temporal_factor,
        size_multiple: int = WAN_VAE.size_multiple(DiTConfig().patch_size),
    ):
        self.lengths = _check_lengths(frames, lengths, temporal_factor)
        self.sizes = choose_sizes(area, size_multiple, ratios)
        if not 0 < fps <= 240:
            raise InputError(f"{fps} frames a second; accepted: above 0, up to 240; the model was trained with 16")
        self.fps = float(fps)
        found = list_clips(source) if isinstance(source, (str, Path)) else Listing(list(source), {})
        self.rows, self.left_out = found
        without = [row for row in self.rows if row.caption is None]
        if without:
            raise InputError(
                f"{len(without)} of {len(self.rows)} clips have no caption, the first {without[0].name}"
                f"{_columns(without[0])}; accepted: one, perhaps empty, in a column {', '.join(CAPTIONS[:-1])} or "
                f"{CAPTIONS[-1]}; rename that column or fill it in, or write NAME.txt beside each video of a folder"
            )
        self._facts: dict[int, Facts | UnusableClip] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Clip:
        """Clip `index`, from 0.

        Raises:
          UnusableClip: it cannot be decoded, or is shorter than the shortest bucket.
          OSError: the disk fails or may not be read.
        """
        frames, height, width = self.shape(index)
        row = self.rows[index]
        last = row.start + self.facts(index).seconds - 2 * TOLERANCE
        times = [max(row.start, min(row.start + k / self.fps, last)) for k in range(frames)]
        try:
            video = decode(row.path, times, height, width)
        except Damaged as error:
            raise UnusableClip(row.name, str(error)) from error
        return Clip(video, row.caption or "", row.name)

    def shape(self, index: int) -> tuple[int, int, int]:
        """Frames, height and width of clip `index`, from the file's header.

        Raises:
          UnusableClip: the header or the first frame says that it cannot be used.
          OSError: the disk fails or may not be read.
        """
        height, width, seconds = self.facts(index)
        row = self.rows[index]
        if seconds == 0 and is_picture(row.path):
            return 1, *choose_size(height, width, self.sizes)
        # Frame k is there if k / fps < seconds. At k / fps = seconds the last picture stands once more: people cut
        # clips to whole seconds, which makes 4n frames.
        shown = math.floor((seconds + TOLERANCE) * self.fps) + 1
        fitting = [length for length in self.lengths if length <= shown]
        if not fitting:
            there = max(0, math.ceil((seconds - TOLERANCE) * self.fps))
            part = f" behind {row.start:g} s" if row.start else ""
            raise UnusableClip(
                row.name,
                f"{there} frames{part} at {self.fps:g} fps, the shortest bucket takes {self.lengths[-1]}",
            )
        return fitting[0], *choose_size(height, width, self.sizes)

    def facts(self, index: int) -> Facts:
        """Height and width as shown, and seconds of clip `index` (not of its file).

        Raises:
          UnusableClip, OSError: as `shape`.
        """
        if not 0 <= index < len(self.rows):
            raise IndexError(f"clip {index} of {len(self.rows)}")
        if index not in self._facts:
            self._facts[index] = read_facts(self.rows[index])
        known = self._facts[index]
        if isinstance(known, UnusableClip):
            raise UnusableClip(known.name, known.reason)
        return known


def read_facts(row: Row) -> Facts | UnusableClip:
    """Size as shown and seconds of a row's clip: from its columns, else from the file."""
    stated = [row.columns.get(name) for name in Facts._fields]
    if all(isinstance(value, (int, float)) and value > 0 for value in stated):
        facts = Facts(*stated)  # pyright: ignore[reportArgumentType]  # just checked
        if max(facts.height, facts.width) <= LARGEST_SIDE and facts.seconds <= MOST_SECONDS:
            return facts
        return UnusableClip(row.name, f"columns of {facts.width:g}x{facts.height:g} pixels and {facts.seconds:g} s")
    try:
        height, width, seconds = probe(row.path)
    except Damaged as error:
        return UnusableClip(row.name, str(error))
    end = seconds if row.end is None else min(row.end, seconds)
    return Facts(height, width, max(0.0, end - row.start))


def choose_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of some sizes (height, width), the one that shows most of a picture when it covers it; the first of equals."""

    def kept(size: tuple[int, int]) -> float:
        relative = (width * size[0]) / (height * size[1])
        return min(relative, 1 / relative)

    return max(sizes, key=kept)


def choose_sizes(area: int, step: int, ratios: Sequence[float | Fraction] = RATIOS) -> tuple[tuple[int, int], ...]:
    """For each ratio width / height the size (height, width) in multiples of `step` nearest to it and to the area.

    None is larger than the area: what fits into memory at one ratio does so at all.

    Raises:
      InputError: no ratios or impossible ones, or an area of less than one step square or more than 4096 x 4096.
    """
    if not step**2 <= area <= LARGEST**2 or not ratios or not all(0.01 <= ratio <= 100 for ratio in ratios):
        raise InputError(
            f"an area of {area} pixels, ratios {', '.join(map(str, ratios)) or 'none'}; accepted: an area of "
            f"{step}x{step} to {LARGEST}x{LARGEST}, ratios from 0.01 to 100; change them"
        )
    sides = range(step, area // step + 1, step)
    sizes = np.array([(height, width) for height in sides for width in sides[: area // height // step]])
    missing = np.log(area / sizes.prod(axis=1))
    aspect = np.log(sizes[:, 1] / sizes[:, 0])
    # Of equals, the one with the better ratio, so that 1 gives a square.
    nearest = [np.argmin(missing + 1.001 * abs(aspect - math.log(ratio))) for ratio in ratios]
    return tuple(dict.fromkeys((int(sizes[i, 0]), int(sizes[i, 1])) for i in nearest))


def _columns(row: Row) -> str:
    """Which columns a manifest's row has, in which a caption may be under another name."""
    return f" (there are the columns {', '.join(row.columns)})" if row.columns else ""


def _check_lengths(frames: int, lengths: Sequence[int] | None, n: int) -> tuple[int, ...]:
    if lengths is None:
        quarters = (n * round((frames - 1) / n * part / 4) + 1 for part in (4, 3, 2, 1))
        chosen = {frames, *(length for length in quarters if length > n)}
    else:
        chosen = set(lengths)
    wrong = [length for length in chosen if length < 1 or (length - 1) % n]
    if wrong or not chosen:
        raise InputError(
            f"clips of {wrong[0] if wrong else 'no'} frames; accepted: {n}n + 1, as the VAE takes them; change the "
            "number of frames or the lengths"
        )
    return tuple(sorted(chosen, reverse=True))
