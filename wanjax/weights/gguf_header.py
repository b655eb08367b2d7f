"""What the beginning of a GGUF file says: names, shapes and places of its tensors, and a few settings.

Read here and not by the `gguf` package because that follows whatever lengths a file claims, for hours if it lies, and
takes ten seconds for the vocabulary of an honest umT5. Format: ggml-org/ggml `docs/gguf.md`, versions 2 and 3.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from typing import NamedTuple

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kinds of values that are one number, and how `struct` spells them."""
TEXT, ARRAY = 8, 9
MOST_AXES = 4
MOST_NAME = 1000
"""Bytes of a name; the format has up to 64 for tensors."""
MOST_KEPT = 16
"""Numbers of an array that are read with the header; longer ones are vocabularies."""
ALIGNMENT = 32


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that was passed over: kind of its values, how many there are, where they begin."""

    kind: int
    count: int
    start: int


Value = str | int | float | bool | tuple[int | float | bool, ...] | Array


class Tensor(NamedTuple):
    """shape: with the slowest axis first. kind: number of a quantisation. start: in the file, in bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int


class Header(NamedTuple):
    """settings: by name; of long arrays, and those of texts, their places. tensors: by name."""

    settings: dict[str, Value]
    tensors: dict[str, Tensor]


def read_header(data: bytes | mmap.mmap) -> Header:
    """The header of a whole file.

    Raises:
      ValueError: it is none, or says what cannot be.
    """
    cursor = _Cursor(data)
    magic, version = cursor.take("4s"), cursor.take("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("it does not begin as one of version 2 or 3 does")
    count, settings_count = cursor.take("Q"), cursor.take("Q")
    cursor.check_room(settings_count, 12)
    settings = dict(_setting(cursor) for _ in range(settings_count))
    cursor.check_room(count, 24)
    tensors = dict(_tensor(cursor) for _ in range(count))
    if len(tensors) < count or len(settings) < settings_count:
        raise ValueError("a name is there twice")
    step = settings.get("general.alignment", ALIGNMENT)
    if not isinstance(step, int) or not 1 <= step <= 2**20:
        raise ValueError(f"an alignment of {step}")
    base = -(-cursor.place // step) * step
    return Header(settings, {name: x._replace(start=base + x.start) for name, x in tensors.items()})


class _Cursor:
    """Takes values from the front of a file, and never more than there is."""

    def __init__(self, data: bytes | mmap.mmap):
        self.data, self.place = data, 0

    def take(self, code: str):
        """A number."""
        try:
            (value,) = struct.unpack_from(f"<{code}", self.data, self.place)
        except struct.error as error:
            raise ValueError("it ends within its header") from error
        self.place += struct.calcsize(f"<{code}")
        return value

    def check_room(self, count: int, size: int) -> None:
        """Whether so many things of at least so many bytes can follow."""
        if count * size > len(self.data) - self.place:
            raise ValueError(f"{count:,} entries in {len(self.data):,} bytes")

    def skip(self, size: int) -> int:
        """Pass over bytes; where they begin."""
        self.check_room(size, 1)
        start, self.place = self.place, self.place + size
        return start

    def text(self, most: int | None = None) -> str:
        """Text with its length before it."""
        size = self.take("Q")
        if most is not None and size > most:
            raise ValueError(f"a name of {size:,} bytes")
        start = self.skip(size)
        return bytes(self.data[start : start + size]).decode("utf-8", "replace")


def _setting(cursor: _Cursor) -> tuple[str, Value]:
    name, kind = cursor.text(MOST_NAME), cursor.take("I")
    return name, _value(cursor, kind)


def _value(cursor: _Cursor, kind: int) -> Value:
    if kind == TEXT:
        return cursor.text()
    if kind == ARRAY:
        return _array(cursor, cursor.take("I"), cursor.take("Q"))
    return cursor.take(_code(kind))


def _array(cursor: _Cursor, kind: int, count: int) -> Value:
    array = Array(kind, count, cursor.place)
    if kind == TEXT:
        cursor.check_room(count, 8)
        for _ in range(count):
            cursor.skip(cursor.take("Q"))
        return array
    code = _code(kind)
    if count > MOST_KEPT:
        cursor.skip(count * struct.calcsize(f"<{code}"))
        return array
    return tuple(cursor.take(code) for _ in range(count))


def read_array(data: bytes | mmap.mmap, array: Array) -> list[str] | np.ndarray:
    """What a header passed over: texts, or numbers.

    Raises:
      ValueError: a text is longer than names are.
    """
    if array.kind != TEXT:
        return np.frombuffer(data, f"<{_code(array.kind)}", array.count, array.start).copy()
    cursor = _Cursor(data)
    cursor.place = array.start
    return [cursor.text(MOST_NAME) for _ in range(array.count)]


def _code(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a value of kind {kind}")
    return SCALARS[kind]


def _tensor(cursor: _Cursor) -> tuple[str, Tensor]:
    name, axes = cursor.text(MOST_NAME), cursor.take("I")
    if axes > MOST_AXES:
        raise ValueError(f"a tensor of {axes} axes")
    sizes = [cursor.take("Q") for _ in range(axes)]
    return name, Tensor(tuple(reversed(sizes)), cursor.take("I"), cursor.take("Q"))
