"""The list of a set's clips: a manifest (JSON lines, JSON, CSV or Parquet), one row a clip.

    rows = read_table("clips/manifest.jsonl")
    write_manifest("kept.jsonl", rows[:100])

A manifest's columns: `path` (of the video or picture, from the manifest's folder), `caption`, `start` and `end`
(seconds of the video, both optional). Other programs' names of the first two are read too. Any others, such as scores,
are kept as they are. Folders and archives are lists of clips too: `wanjax.data.listing`.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from wanjax.errors import InputError
from wanjax.files import check_output, replacing
from wanjax.untrusted import check_file, parse_json, read_bytes, read_lines

MANIFEST = (".jsonl", ".csv", ".parquet")
"""Suffixes of manifests that are written."""
READABLE = (*MANIFEST, ".json")
VIDEO = frozenset(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .webm .wmv".split()  # noqa: SIM905
)
_OWN = ("path", "caption", "start", "end")
PATHS = ("path", "video", "video_path", "file_path", "file_name", "image_path", "image")
"""Columns that name a clip's file, of several the first: ours, DiffSynth's, musubi-tuner's, VideoX-Fun's, the hub's."""
CAPTIONS = ("caption", "prompt", "text")
"""Columns that describe it; of several, the first."""
ACCEPTED = (
    "accepted: a .jsonl, .json, .csv or .parquet file, a .toml of data sets, .tar shards, or a folder of videos and "
    "pictures with captions beside them (NAME.txt)"
)

MOST_SECONDS = 10**7
"""Of a video: beyond what any container counts to."""
MOST_JSON = 2**30
"""Bytes of a manifest that is one piece of JSON."""

Value = str | int | float | bool | None
Numbered = Iterator[tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class Row:
    """One clip of a manifest.

    path: of the video, absolute.
    name: says which clip it is: the path as the manifest has it, then the part taken, if it is one.
    caption: in words, perhaps empty; None where the manifest has no captions.
    start, end: seconds from the video's first frame; no end: up to the video's.
    columns: the other columns.
    """

    path: Path
    name: str
    caption: str | None = None
    start: float = 0.0
    end: float | None = None
    columns: Mapping[str, Value] = field(default_factory=dict)


def read_table(path: str | Path) -> list[Row]:
    """The clips of a manifest, in its order. No video is opened.

    Raises:
      InputError: it is missing, cannot be read or lists no clips; a row lacks its path, has times that are none, or
        lists a clip a second time.
    """
    place = Path(path)
    reader = _READERS.get(place.suffix.lower())
    if reader is None or not place.exists():
        what = "does not exist" if reader or not place.exists() else "is not a manifest"
        raise InputError(f"{place} {what}; {ACCEPTED}; check the path")
    rows = [_make_row(place, number, values) for number, values in read_values(place)]
    if not rows:
        raise InputError(f"{place} lists no clips; {ACCEPTED}; put some there")
    refuse_doubles(place, rows)
    return rows


def read_values(path: Path) -> Numbered:
    """The rows of a file of `READABLE`, by column, with their numbers.

    Raises:
      InputError: it cannot be read.
    """
    yield from _read_file(path, _READERS[path.suffix.lower()])


def write_manifest(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes a manifest, whole or not at all; paths are written as seen from its folder.

    Raises:
      InputError: the name ends otherwise than in `MANIFEST`, or the place cannot be written to.
      OSError: the disk is full or fails.
    """
    target = check_output(path, MANIFEST)
    if not rows:
        raise InputError(f"no clips are left for {path}; accepted: one or more; choose lower thresholds")
    table = [_as_columns(row, target.parent) for row in rows]
    with replacing(target) as temporary:
        _WRITERS[target.suffix.lower()](temporary, table)


# ----------------------------------------------------------------------------------------------------------- one row


def _make_row(manifest: Path, number: int, values: Mapping[str, Any]) -> Row:
    where = f"{manifest}, row {number}"
    path_name, given = _first(values, PATHS)
    if path_name is None:
        raise InputError(
            f"{where}: no column names the clip's file, there are {', '.join(map(str, values)) or 'none'}; accepted: "
            f"{', '.join(PATHS)}; rename one"
        )
    if not isinstance(given, str) or not given.strip():
        raise InputError(f"{where}: {path_name} {given!r}; accepted: the path of a video; fill in that column")
    caption_name, caption = _first(values, CAPTIONS)
    if caption is not None and not isinstance(caption, str):
        raise InputError(f"{where}: {caption_name} {caption!r}; accepted: text; put it in quotes")
    start, end = (_seconds(where, name, values.get(name)) for name in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise InputError(f"{where}: start {start or 0:g}, end {end:g}; accepted: an end behind the start; change one")
    columns = {name: value for name, value in values.items() if name not in (*_OWN, path_name, caption_name)}
    for name, value in columns.items():
        if not isinstance(value, (str, int, float, type(None))):
            raise InputError(f"{where}: {name} is a {type(value).__name__}; accepted: text and numbers; drop it")
    path = Path(os.path.abspath(manifest.parent / given))
    return Row(path, _name(given, start, end), caption, start or 0.0, end, columns)


def _first(values: Mapping[str, Any], names: Sequence[str]) -> tuple[str | None, Any]:
    """The first of some columns that is there, preferably with something in it."""
    there = [name for name in names if name in values]
    name = next((name for name in there if values[name] not in (None, "")), next(iter(there), None))
    return name, None if name is None else values[name]


def _name(given: str, start: float | None, end: float | None) -> str:
    part = "" if not start and end is None else f"@{start or 0:.6g}-{'' if end is None else f'{end:.6g}'}"
    return Path(given).as_posix() + part


def _seconds(where: str, name: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if math.isnan(seconds) and isinstance(value, float):  # how Parquet written by pandas says that there is none
        return None
    if not 0 <= seconds <= MOST_SECONDS:
        raise InputError(f"{where}: {name} {value!r}; accepted: seconds from the video's first frame; change it")
    return seconds


def _as_columns(row: Row, folder: Path) -> dict[str, Value]:
    try:
        path = Path(os.path.relpath(row.path, folder)).as_posix()
    except ValueError:  # another drive
        path = row.path.as_posix()
    own = {"path": path, "caption": row.caption, "start": row.start or None, "end": row.end}
    return {name: value for name, value in own.items() if value is not None} | dict(row.columns)


def refuse_doubles(place: Path, rows: Iterable[Row]) -> None:
    """Raises InputError where a clip is listed a second time."""
    seen: dict[tuple[Path, float, float | None], int] = {}
    for number, row in enumerate(rows, 1):
        first = seen.setdefault((row.path, row.start, row.end), number)
        if first != number:
            raise InputError(f"{place}: rows {first} and {number} are both {row.name}; accepted: it once; remove one")


# ------------------------------------------------------------------------------------------------------------- files


def _read_file(path: Path, reader: Callable[[Path], Numbered]) -> Numbered:
    try:
        yield from reader(path)
    except InputError:
        raise
    # pyarrow's errors are ValueErrors and OSErrors.
    except (OSError, ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}); {ACCEPTED}; repair it") from error


def _read_jsonl(path: Path) -> Numbered:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            reason = getattr(error, "msg", error)
            raise InputError(
                f"{path}, row {number}: no JSON ({reason}); accepted: one object a line; repair it"
            ) from error
        if not isinstance(values, dict):
            raise InputError(f"{path}, row {number}: {line.strip()[:40]}; accepted: one object a line; repair it")
        yield number, values


def _read_json(path: Path) -> Numbered:
    values = parse_json(read_bytes(path, MOST_JSON))
    if not isinstance(values, list) or not all(isinstance(row, dict) for row in values):
        raise ValueError("no list of objects, one a clip")
    yield from enumerate(values, 1)


def _read_csv(path: Path) -> Numbered:
    reader = csv.DictReader(read_lines(path))
    if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
        raise InputError(f"{path}: two columns of one name; accepted: different names; rename one")
    for number, values in enumerate(reader, 1):
        if None in values or None in values.values():
            raise InputError(
                f"{path}, row {number}: more or fewer cells than the first line; accepted: as many; repair it"
            )
        texts = (*_OWN, *PATHS, *CAPTIONS)
        yield number, {name: value if name in texts else _number(value) for name, value in values.items()}


def _number(cell: str) -> Value:
    """CSV has no types: what reads as a number is one."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell or None


def _read_parquet(path: Path) -> Numbered:
    yield from enumerate(_import_parquet(path).read_table(check_file(path)).to_pylist(), 1)


def _write_jsonl(path: Path, table: Sequence[Mapping[str, Value]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(values, ensure_ascii=False) + "\n" for values in table)


def _write_csv(path: Path, table: Sequence[Mapping[str, Value]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for values in table for name in values)))
        writer.writeheader()
        writer.writerows(table)


def _write_parquet(path: Path, table: Sequence[Mapping[str, Value]]) -> None:
    parquet = _import_parquet(path)
    from pyarrow import Table

    names = list(dict.fromkeys(name for values in table for name in values))
    parquet.write_table(Table.from_pydict({name: [values.get(name) for values in table] for name in names}), path)


def _import_parquet(path: Path) -> ModuleType:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f'{path}: Parquet needs pyarrow; accepted without it: .jsonl and .csv; pip install "wanjax[data]"'
        ) from error
    return parquet


_READERS: Mapping[str, Callable[[Path], Numbered]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_WRITERS: Mapping[str, Callable[[Path, Sequence[Mapping[str, Value]]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
