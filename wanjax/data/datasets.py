"""Data sets described in TOML, as musubi-tuner (`[[datasets]]`) and diffusion-pipe (`[[directory]]`) write it.

A subset of both: what is not read is refused by its name, so that nothing of a description is left undone in silence.
Keys that say how those programs run, not what they learn from (`batch_size`, `cache_directory`), are taken and named.
docs/data.md has the table.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanjax.errors import InputError
from wanjax.untrusted import read_bytes, reason

MOST_BYTES = 2**24
_NOT_OURS = ("batch_size", "cache_directory", "skip_empty_caption", "debug_dataset")
"""Keys that are taken and do nothing here."""
_MUSUBI = {
    "video_directory", "image_directory", "video_jsonl_file", "image_jsonl_file", "caption_extension", "resolution",
    "enable_bucket", "bucket_no_upscale", "num_repeats", "target_frames", "frame_extraction", "frame_stride",
    "frame_sample", "max_frames", "source_fps", *_NOT_OURS,
}  # fmt: skip
_PIPE = {
    "path", "resolutions", "enable_ar_bucket", "min_ar", "max_ar", "num_ar_buckets", "ar_buckets", "frame_buckets",
    "num_repeats", *_NOT_OURS,
}  # fmt: skip
_EXTRACTIONS = {"head": "head", "chunk": "chunk", "slide": "slide", "uniform": "uniform", "full": "longest"}


@dataclass(frozen=True)
class Described:
    """A data set as a file describes it; None: the run says.

    path: of its folder or list.
    repeats: how often each clip comes in a pass.
    take: which parts of a video, as `wanjax.config.VideoData`.
    stride_frames: between the parts of "slide".
    count: parts of "uniform".
    lengths, area, ratios: of its clips.
    caption_suffix: of its captions' files.
    kind: "videos" or "pictures" alone; None: both.
    """

    path: Path
    repeats: float = 1.0
    take: str = "longest"
    stride_frames: int = 1
    count: int = 1
    lengths: tuple[int, ...] | None = None
    area: int | None = None
    ratios: tuple[float, ...] | None = None
    caption_suffix: str = ".txt"
    kind: str | None = None


def read_datasets(path: str | Path) -> tuple[list[Described], list[str]]:
    """The data sets of a TOML file, and which of its keys were taken but do nothing here.

    Raises:
      InputError: it cannot be read, describes none, or has a key or a value that is not read.
    """
    place = Path(path)
    accepted = "accepted: TOML with [[datasets]] (musubi-tuner) or [[directory]] (diffusion-pipe)"
    try:
        values = tomllib.loads(read_bytes(place, MOST_BYTES).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{place} cannot be read ({reason(error)}); {accepted}; repair it") from error
    kind = next((name for name in ("datasets", "directory") if name in values), None)
    listed = values.pop(kind) if kind else None
    general = values.pop("general", {}) if kind == "datasets" else values
    if kind == "datasets" and values:
        raise InputError(f"{place}: {min(values)!r} is not read beside [general] and [[datasets]]; remove it")
    if not isinstance(listed, list) or not listed or not all(isinstance(x, dict) for x in (*listed, general)):
        raise InputError(f"{place} describes no data set; {accepted}; write one")
    make, known = (_musubi, _MUSUBI) if kind == "datasets" else (_pipe, _PIPE)
    found = []
    for number, own in enumerate(listed, 1):
        where = f"{place}, {kind} {number}"
        unknown = [name for name in (*general, *own) if name not in known]
        if unknown:
            raise InputError(
                f"{where}: {unknown[0]!r} is not read; accepted: {', '.join(sorted(known))}; remove it, or see "
                "docs/data.md"
            )
        found.append(make(_Reader(where, place.parent, {**general, **own})))
    idle = [name for name in _NOT_OURS if name in general or any(name in own for own in listed)]
    return found, idle


class _Reader:
    """Takes checked values out of a table."""

    def __init__(self, where: str, folder: Path, values: Mapping[str, Any]):
        self.where, self.folder, self.values = where, folder, values

    def refuse(self, name: str, accepted: str) -> InputError:
        """The error of a value."""
        return InputError(f"{self.where}: {name} = {str(self.values.get(name))[:80]}; accepted: {accepted}; change it")

    def number(self, name: str, default: Any, least: float, most: float = 1e6, whole: bool = True) -> Any:
        """A number in a range."""
        value = self.values.get(name, default)
        kinds = (int,) if whole else (int, float)
        if name in self.values and (
            not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most
        ):
            raise self.refuse(name, f"{'whole numbers' if whole else 'numbers'} from {least:g} to {most:g}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def text(self, name: str, default: str = "") -> str:
        """A text."""
        value = self.values.get(name, default)
        if not isinstance(value, str) or "\0" in value:
            raise self.refuse(name, "text")
        return value

    def numbers(self, name: str, least: float, most: float = 1e6) -> list[Any] | None:
        """A list of numbers, or of one."""
        if name not in self.values:
            return None
        value = self.values[name]
        items = value if isinstance(value, list) else [value]
        right = [isinstance(x, (int, float)) and not isinstance(x, bool) and least <= x <= most for x in items]
        if not items or not all(right):
            raise self.refuse(name, f"numbers from {least:g} to {most:g}")
        return items

    def lengths(self, name: str) -> tuple[int, ...] | None:
        """Frames, each taken down to 4n + 1 as the VAE needs them; musubi-tuner does so too."""
        found = self.numbers(name, 1, 2**16)
        return None if found is None else tuple(sorted({(int(x) - 1) // 4 * 4 + 1 for x in found}, reverse=True))

    def area_and_ratio(self, name: str) -> tuple[int | None, float | None]:
        """Of [width, height], or of the side of a square."""
        found = self.numbers(name, 16, 2**14)
        if found is None:
            return None, None
        if len(found) > 2:
            raise self.refuse(name, "one number or [width, height]")
        return int(found[0] * found[-1]), found[0] / found[-1]


def _musubi(read: _Reader) -> Described:
    names = ("video_directory", "image_directory", "video_jsonl_file", "image_jsonl_file")
    given = [name for name in names if name in read.values]
    if len(given) != 1:
        raise InputError(f"{read.where}: {' and '.join(given) or 'no place'}; accepted: one of {', '.join(names)}")
    if read.flag("bucket_no_upscale", False):
        raise read.refuse("bucket_no_upscale", "false: clips are scaled to cover their size")
    area, ratio = read.area_and_ratio("resolution")
    extraction = read.text("frame_extraction", "head")
    if extraction not in _EXTRACTIONS:
        raise read.refuse("frame_extraction", ", ".join(_EXTRACTIONS))
    most = read.number("max_frames", 129, 1, 2**16)
    read.number("source_fps", 16.0, 0.01, 1000, whole=False)  # of the file, which says it itself
    whole = tuple(4 * round((most - 1) // 4 * part / 4) + 1 for part in (4, 3, 2, 1))
    return Described(
        read.folder / read.text(given[0]),
        repeats=read.number("num_repeats", 1, 1),
        take=_EXTRACTIONS[extraction],
        stride_frames=read.number("frame_stride", 10, 1),
        count=read.number("frame_sample", 1, 1),
        lengths=tuple(dict.fromkeys(whole)) if extraction == "full" else read.lengths("target_frames") or (1,),
        area=area,
        ratios=None if ratio is None or read.flag("enable_bucket", False) else (ratio,),
        caption_suffix=read.text("caption_extension", ".txt"),
        kind="videos" if given[0].startswith("video") else "pictures",
    )


def _pipe(read: _Reader) -> Described:
    area, ratio = _one_resolution(read)
    ratios = None
    if read.flag("enable_ar_bucket", False) or "ar_buckets" in read.values:
        ratios = tuple(read.numbers("ar_buckets", 0.01, 100) or ()) or _spread_ratios(read)
    elif ratio is not None:
        ratios = (ratio,)
    lengths = read.lengths("frame_buckets")
    if "path" not in read.values:
        raise InputError(f"{read.where}: no path; accepted: path = 'FOLDER'; write it")
    return Described(
        read.folder / read.text("path"),
        repeats=read.number("num_repeats", 1, 0.01, whole=False),
        lengths=lengths,
        area=area,
        ratios=ratios,
    )


def _one_resolution(read: _Reader) -> tuple[int | None, float | None]:
    found = read.values.get("resolutions")
    if found is None:
        return None, None
    if not isinstance(found, list) or len(found) != 1:
        raise read.refuse("resolutions", "a list of one side of a square, or of one [width, height]")
    return _Reader(read.where, read.folder, {"resolutions": found[0]}).area_and_ratio("resolutions")


def _spread_ratios(read: _Reader) -> tuple[float, ...] | None:
    """As many ratios as asked for, evenly spaced in their logarithms."""
    if not {"min_ar", "max_ar", "num_ar_buckets"} & read.values.keys():
        return None
    least, most = (read.number(name, x, 0.01, 100, whole=False) for name, x in (("min_ar", 0.5), ("max_ar", 2.0)))
    count = read.number("num_ar_buckets", 7, 1, 100)
    if least > most:
        raise read.refuse("min_ar", f"up to max_ar, {most:g}")
    step = (math.log(most) - math.log(least)) / max(1, count - 1)
    return tuple(math.exp(math.log(least) + step * i) for i in range(count))
