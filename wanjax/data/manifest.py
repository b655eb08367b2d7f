"""The list of a set's clips: a manifest (JSON lines, CSV or Parquet), or a folder of videos with captions beside them.

    rows = read_manifest("clips/manifest.jsonl")      # or .csv, .parquet, or the folder "clips"
    write_manifest("kept.jsonl", rows[:100])

A manifest's columns: `path` (of the video, from the manifest's folder), `caption`, `start` and `end` (seconds of the
video, both optional). Any others, such as scores, are kept as they are.
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

MANIFEST = (".jsonl", ".csv", ".parquet")
VIDEO = frozenset(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .webm .wmv".split()  # noqa: SIM905
)
_OWN = ("path", "caption", "start", "end")
_ACCEPTED = "accepted: a .jsonl, .csv or .parquet file, or a folder of videos with captions beside them (NAME.txt)"

Value = str | int | float | bool | None


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


def read_manifest(path: str | Path) -> list[Row]:
    """The clips of a manifest, in its order, or of a folder and all folders in it, by name. No video is opened.

    Raises:
      InputError: it is missing, cannot be read or lists no clips; a row lacks its path, has times that are none, or
        lists a clip a second time; a video in a folder has no caption.
    """
    place = Path(path)
    if place.is_dir():
        rows = list(_read_folder(place))
    else:
        reader = _READERS.get(place.suffix.lower())
        if reader is None or not place.exists():
            what = "does not exist" if reader or not place.exists() else "is not a manifest"
            raise InputError(f"{place} {what}; {_ACCEPTED}; check the path")
        rows = [_make_row(place, number, values) for number, values in _read_file(place, reader)]
    if not rows:
        raise InputError(f"{place} lists no clips; {_ACCEPTED}; put some there")
    _refuse_doubles(place, rows)
    return rows


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
    given = values.get("path")
    if not isinstance(given, str) or not given.strip():
        raise InputError(f"{where}: path {given!r}; accepted: the path of a video; fill in that column")
    caption = values.get("caption")
    if caption is not None and not isinstance(caption, str):
        raise InputError(f"{where}: caption {caption!r}; accepted: text; put it in quotes")
    start, end = (_seconds(where, name, values.get(name)) for name in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise InputError(f"{where}: start {start or 0:g}, end {end:g}; accepted: an end behind the start; change one")
    columns = {name: value for name, value in values.items() if name not in _OWN}
    for name, value in columns.items():
        if not isinstance(value, (str, int, float, type(None))):
            raise InputError(f"{where}: {name} is a {type(value).__name__}; accepted: text and numbers; drop it")
    path = Path(os.path.abspath(manifest.parent / given))
    return Row(path, _name(given, start, end), caption, start or 0.0, end, columns)


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
    if not 0 <= seconds < math.inf:
        raise InputError(f"{where}: {name} {value!r}; accepted: seconds from the video's first frame; change it")
    return seconds


def _as_columns(row: Row, folder: Path) -> dict[str, Value]:
    try:
        path = Path(os.path.relpath(row.path, folder)).as_posix()
    except ValueError:  # another drive
        path = row.path.as_posix()
    own = {"path": path, "caption": row.caption, "start": row.start or None, "end": row.end}
    return {name: value for name, value in own.items() if value is not None} | dict(row.columns)


def _refuse_doubles(place: Path, rows: Iterable[Row]) -> None:
    seen: dict[tuple[Path, float, float | None], int] = {}
    for number, row in enumerate(rows, 1):
        first = seen.setdefault((row.path, row.start, row.end), number)
        if first != number:
            raise InputError(f"{place}: rows {first} and {number} are both {row.name}; accepted: it once; remove one")


# ------------------------------------------------------------------------------------------------- folders and files


def _read_folder(folder: Path) -> Iterator[Row]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO)
    videos = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    without = [path for path in videos if not path.with_suffix(".txt").is_file()]
    if without and len(without) < len(videos):
        raise InputError(
            f"{folder}: {len(without)} of {len(videos)} videos have no caption, the first {without[0].name}; accepted: "
            "a caption beside each (NAME.txt), or none at all; write it, or leave that file empty"
        )
    for path in videos:
        caption = None if without else _read_caption(path.with_suffix(".txt"))
        yield Row(Path(os.path.abspath(path)), path.relative_to(folder).as_posix(), caption)


def _read_caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"caption {path} is not UTF-8 ({error.reason}); accepted: UTF-8 text; convert it") from error


Numbered = Iterator[tuple[int, Mapping[str, Any]]]


def _read_file(path: Path, reader: Callable[[Path], Numbered]) -> Numbered:
    try:
        yield from reader(path)
    except InputError:
        raise
    # pyarrow's errors are ValueErrors and OSErrors.
    except (OSError, ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}); {_ACCEPTED}; repair it") from error


def _read_jsonl(path: Path) -> Numbered:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}, row {number}: no JSON ({error.msg}); accepted: one object a line; repair it"
                ) from error
            if not isinstance(values, dict):
                raise InputError(f"{path}, row {number}: {line.strip()[:40]}; accepted: one object a line; repair it")
            yield number, values


def _read_csv(path: Path) -> Numbered:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, values in enumerate(csv.DictReader(file), 1):
            if None in values or None in values.values():
                raise InputError(
                    f"{path}, row {number}: more or fewer cells than the first line; accepted: as many; repair it"
                )
            yield number, {name: value if name in _OWN else _number(value) for name, value in values.items()}


def _number(cell: str) -> Value:
    """CSV has no types: what reads as a number is one."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell or None


def _read_parquet(path: Path) -> Numbered:
    yield from enumerate(_import_parquet(path).read_table(path).to_pylist(), 1)


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
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_WRITERS: Mapping[str, Callable[[Path, Sequence[Mapping[str, Value]]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
