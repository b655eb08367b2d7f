"""What clips there are in a place: a folder, a manifest, `.tar` shards; and what there is left out, by name.

found = list_clips("clips")            # a folder, and all folders in it, linked ones too
found.rows, found.left_out
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from wanjax.data import shards
from wanjax.data.captions import check_encoding, read_caption
from wanjax.data.manifest import ACCEPTED, Row, read_table, refuse_doubles
from wanjax.data.pictures import STILL, is_picture
from wanjax.errors import InputError

VIDEO = frozenset(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .webm .wmv".split()  # noqa: SIM905
)
METADATA = ("metadata.csv", "metadata.json", "metadata.jsonl", "metadata.parquet")
"""Manifests that other programs put into the folder that they are of."""


class Listing(NamedTuple):
    """The clips of a place, and the files there that are none of them: name -> reason."""

    rows: list[Row]
    left_out: dict[str, str]


def list_clips(path: str | Path, encoding: str = "", caption_suffix: str = ".txt") -> Listing:
    """The clips of a folder and all folders in it, by name; of a manifest, in its order; of shards. None is opened.

    Args:
      path: of the folder, manifest or `.tar` file, or several `.tar` files with a `*` or braces in the name.
      encoding: of captions, as `wanjax.data.captions.decode_caption`.
      caption_suffix: of captions beside clips.

    Raises:
      InputError: it is missing, cannot be read or lists no clips; as `read_table`; a video has no caption, and others
        have.
    """
    place = Path(path)
    check_encoding(encoding)
    if shards.are_shards(place):
        found = _read_shards(place, encoding)
    elif not place.is_dir():
        return Listing(read_table(place), {})
    else:
        found = _read_folder(place, encoding, caption_suffix)
    if not found.rows:
        left_out = f"; {len(found.left_out)} left out, {_example(found.left_out)}" if found.left_out else ""
        raise InputError(f"{place} lists no clips{left_out}; {ACCEPTED}; put some there")
    refuse_doubles(place, found.rows)
    return found


def read_manifest(path: str | Path) -> list[Row]:
    """The clips of `list_clips` alone.

    Raises:
      InputError: as there.
    """
    return list_clips(path).rows


def _example(left_out: dict[str, str]) -> str:
    name, reason = next(iter(left_out.items()))
    return f"such as {name}: {reason}"


# ----------------------------------------------------------------------------------------------------------- folders


def _read_folder(folder: Path, encoding: str, caption_suffix: str) -> Listing:
    found = sorted(_walk(folder))
    clips = [path for path in found if path.suffix.lower() in VIDEO | STILL]
    named = {path: path.with_suffix(caption_suffix) for path in clips}
    captions = {path: named[path] for path in clips if named[path].is_file()}
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    if clips and metadata and not captions:
        return Listing(read_table(metadata[0]), {})
    videos = {path.with_suffix("") for path in clips if not is_picture(path)}
    left_out: dict[str, str] = {}
    rows, without = [], []
    for path in clips:
        name = path.relative_to(folder).as_posix()
        reason = _reason_against(path, folder, videos, captions)
        if reason:
            left_out[name] = reason
            continue
        if path not in captions:
            without.append(name)
        rows.append(Row(Path(os.path.abspath(path)), name, None))
    if without and len(without) < len(rows):
        raise InputError(
            f"{folder}: {len(without)} of {len(rows)} videos have no caption, the first {Path(without[0]).name}; "
            f"accepted: a caption beside each (NAME{caption_suffix}), or none at all; write it, or leave that file "
            "empty"
        )
    if not without:
        texts = (read_caption(captions[folder / row.name], encoding) for row in rows)
        rows = [Row(row.path, row.name, text) for row, text in zip(rows, texts, strict=True)]
    return Listing(rows, left_out)


def _reason_against(path: Path, folder: Path, videos: set[Path], captions: dict[Path, Path]) -> str | None:
    if any(part.startswith(".") for part in path.relative_to(folder).parts):
        return "hidden"
    if not path.is_file():
        return "a link to nothing" if path.is_symlink() else "no file"
    if is_picture(path):
        if path.with_suffix("") in videos:
            return "a picture beside the video of that name"
        if path not in captions:
            return "a picture without a caption"
    return None


def _walk(folder: Path) -> Iterator[Path]:
    """All files in a folder and those in it; links to folders are followed, into each folder once."""
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(place) / name for name in files)


# ------------------------------------------------------------------------------------------------------------ shards


def _read_shards(place: Path, encoding: str) -> Listing:
    rows, left_out = [], {}
    for shard in shards.expand(place):
        for member in shards.samples(shard, VIDEO | STILL, encoding):
            name = f"{shard.name}/{member.name}"
            if member.reason:
                left_out[name] = member.reason
            else:
                rows.append(Row(shard / member.name, name, member.caption))
    without = [row.name for row in rows if row.caption is None]
    if without and len(without) < len(rows):
        raise InputError(
            f"{place}: {len(without)} of {len(rows)} clips have no caption, the first {without[0]}; accepted: KEY.txt "
            "or KEY.json with a caption beside each KEY.mp4, or none at all; write them"
        )
    return Listing(rows, left_out)
