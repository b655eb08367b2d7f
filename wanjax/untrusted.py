"""The one way to open a file that somebody else may have made: a plain file, no larger than it may be, never executed.

    values = read_json(path)                  # OSError: there is no such file; ValueError: it is not what it should be
    with open_file(path) as file: ..          # neither waits for a pipe nor reads a device

What is wrong is an `OSError` whose `strerror` says it, or a `ValueError`; the caller knows what the file was for, and
makes an `InputError` of it.
"""

from __future__ import annotations

import collections
import errno
import io
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 64 * 2**20
"""Of a file that is read as a whole, where nothing else is said: settings, tokenizers, indices."""
MOST_IN_A_LINE = 16 * 2**20
"""Bytes of a line of a file that is read by lines."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: str | Path, most: int | None = None) -> io.BufferedReader:
    """A plain file, open for reading; links are followed.

    Args:
      path: of the file.
      most: bytes that it may have.

    Raises:
      OSError: it is missing, is a folder, pipe, socket or device, may not be read, is larger, or has no possible name.
    """
    try:
        # A pipe without a writer would be waited for without O_NONBLOCK; to plain files it means nothing.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, f"a path cannot be so ({error})", str(path)) from error
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes; at most {most:,} are read", str(path))
        return open(number, "rb")
    except BaseException:
        os.close(number)
        raise


def reason(error: BaseException) -> str:
    """What went wrong, without the path, which the caller names."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def check_file(path: str | Path) -> Path:
    """The path, of a plain file that can be read; for libraries that open files themselves.

    Raises:
      OSError: as `open_file`.
    """
    open_file(path).close()
    return Path(path)


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The whole of a file.

    Raises:
      OSError: as `open_file`.
    """
    with open_file(path, most) as file:
        return file.read(most)


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The whole of a file of UTF-8, perhaps with a byte order mark; lines end in `\\n`.

    Raises:
      OSError: as `open_file`.
      ValueError: it is not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a file of UTF-8, perhaps with a byte order mark, one in memory at a time.

    Raises:
      OSError: as `open_file`.
      ValueError: it is not UTF-8, or has a line of more than `MOST_IN_A_LINE` bytes.
    """
    with open_file(path) as file:
        first = True
        while line := file.readline(MOST_IN_A_LINE + 1):
            if len(line) > MOST_IN_A_LINE:
                raise ValueError(f"a line of more than {MOST_IN_A_LINE:,} bytes")
            yield line.decode("utf-8-sig" if first else "utf-8")
            first = False


def read_json(path: str | Path, most: int = MOST_BYTES) -> Any:
    """What a file of JSON holds; as `parse_json`.

    Raises:
      OSError: as `open_file`.
      ValueError: as `parse_json`.
    """
    return parse_json(read_bytes(path, most))


def parse_json(text: str | bytes) -> Any:
    """What JSON says, as the standard has it: names once in an object, numbers finite.

    Raises:
      ValueError: it is not JSON, or is nested more deeply than Python follows.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        return json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_doubles
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def others_may_write(path: str | Path) -> str | None:
    """Why a file or folder may be somebody else's work; None: it is this user's, and nobody else may write to it.

    For what is executed. A link is followed: its owner put it there.

    Raises:
      OSError: there is none.
    """
    status = os.stat(path)
    if not hasattr(os, "geteuid"):  # Windows, where the user's own folder is closed to others
        return None
    if status.st_uid != os.geteuid():
        return f"user {status.st_uid} owns it"
    return "others may write to it" if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0][:80]!r} is there twice")
    return values
