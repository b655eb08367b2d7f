"""Scores on disk, a line of JSON for each clip as soon as it is scored: what an interruption leaves is used again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wanjax.data.manifest import Row
from wanjax.errors import InputError
from wanjax.files import check_output, replacing
from wanjax.untrusted import parse_json, read_lines

Record = dict[str, Any]
_OWN = ("name", "way", "file")


class ScoreLog:
    """Records by clip, for one way of scoring; a changed file is another clip.

    Args:
      path: of the `.jsonl` file, which may hold records of other ways too; made if missing.
      way: says what the scores depend on besides the file.

    Raises:
      InputError: the place cannot be written to, or the file there is no such log.
    """

    def __init__(self, path: str | Path, way: str):
        self.path, self.way = check_output(path, (".jsonl",)), way
        self._records: dict[tuple[Any, ...], Record] = {}
        whole = self._read()
        if not whole:
            with replacing(self.path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in self._records.values()))

    def _read(self) -> bool:
        if not self.path.exists():
            return True
        number = 1
        try:
            for line in read_lines(self.path):
                if not line.endswith("\n"):  # the line that an interruption cut off
                    return False
                record = parse_json(line)
                self._records[record["name"], record["way"], *record["file"]] = record
                number += 1
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self.path}, line {number} is no record of scores; accepted: a file that this program made, or "
                "none; name another, or remove it"
            ) from error
        return True

    def get(self, row: Row) -> Record | None:
        """What is known of a clip: its scores, or `unusable`: why it has none."""
        record = self._records.get(self._key(row))
        return record and {name: value for name, value in record.items() if name not in _OWN}

    def add(self, row: Row, scores: Record) -> None:
        """Keep a clip's record."""
        name, way, *file = key = self._key(row)
        record = {"name": name, "way": way, "file": file, **scores}
        self._records[key] = record
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")

    def _key(self, row: Row) -> tuple[Any, ...]:
        try:
            stat = row.path.stat()
        except OSError:
            return row.name, self.way, 0, 0
        return row.name, self.way, stat.st_size, stat.st_mtime_ns
