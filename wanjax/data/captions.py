"""Text files beside clips: UTF-8, or UTF-16 with its mark; other encodings only where they are named."""

from __future__ import annotations

import codecs
from pathlib import Path

from wanjax.errors import InputError
from wanjax.untrusted import read_bytes, reason

MOST_CAPTION = 2**20
"""Bytes of a caption's file."""
GUESS = "guess"
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_caption(path: str | Path, encoding: str = "") -> str:
    """The text of a caption's file, without the space around it.

    Args:
      path: of the file.
      encoding: as `decode_caption`.

    Raises:
      InputError: it cannot be read, or is of another encoding.
    """
    try:
        data = read_bytes(path, MOST_CAPTION)
    except OSError as error:
        raise InputError(f"caption {path} cannot be read ({reason(error)}); accepted: UTF-8 text; check it") from error
    return decode_caption(data, str(path), encoding)


def decode_caption(data: bytes, name: str, encoding: str = "") -> str:
    """A caption's text. A mark at its beginning says the encoding, whatever else is said.

    Args:
      data: the file's bytes.
      name: of the file, for messages.
      encoding: Python's name of one; "guess": whatever fits best; empty: UTF-8.

    Raises:
      InputError: it is of another encoding.
    """
    marked = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "")
    if encoding == GUESS and not marked:
        return _guess(data, name)
    chosen = marked or encoding or "utf-8"
    try:
        text = data.decode(chosen)
        if "\0" in text:
            raise UnicodeError("it holds NULs, as UTF-16 without its mark does")
    except UnicodeError as error:
        said = "is not UTF-8" if chosen.startswith("utf-8") else f"is not {chosen}"
        raise InputError(
            f"caption {name} {said} ({getattr(error, 'reason', error)}); accepted: UTF-8, UTF-16 with its mark, or "
            "what --caption-encoding names (cp1252, gb18030, guess, ..); convert it, or name its encoding"
        ) from error
    return _lines(text)


def check_encoding(encoding: str) -> str:
    """The encoding, if there is one of that name.

    Raises:
      InputError: there is none.
    """
    try:
        if encoding not in ("", GUESS):
            "".encode(codecs.lookup(encoding).name)
    except (LookupError, ValueError, TypeError) as error:
        raise InputError(
            f"--caption-encoding {encoding!r}; an encoding's name (utf-8, cp1252, gb18030, shift_jis, ..) or guess is "
            "accepted; change it"
        ) from error
    return encoding


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _guess(data: bytes, name: str) -> str:
    try:
        return _lines(data.decode("utf-8"))
    except UnicodeDecodeError:
        pass
    try:
        from charset_normalizer import from_bytes
    except ImportError as error:
        raise InputError(
            'guessing encodings needs charset-normalizer; an encoding\'s name is accepted; pip install "wanjax[data]"'
        ) from error
    best = from_bytes(data).best()
    if best is None:
        raise InputError(f"caption {name} is in no encoding that can be told; accepted: UTF-8 text; convert it")
    return _lines(str(best))
