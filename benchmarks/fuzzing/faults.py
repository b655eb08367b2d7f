"""Faults: a good input with one that a seed draws, in its bytes, in its values or in its place on the disk."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STUMBLES = (
    *(b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400, b"null", b"true", b'""', b"[]", b"{}", b"\0", b"\xff\xfe"),
    *(b"\n", b"[" * 5000, b'{"a":' * 5000, b"\xf0\x9f\x98\x80", b"../../x", b"a" * 5000, b"%s%n", b"\x1b[31m"),
)
VALUES: tuple[Any, ...] = (
    *(float("nan"), float("inf"), -1, 0, 2**63, 10**30, 1e308, -0.5, None, True, "", "x", "\0", [], {}, [[]], [1, 2]),
    *({"a": 1}, "9" * 100, [None], 10**9),
)


PLACES = ("missing", "folder", "pipe", "loop", "device", "empty", "link to itself above")


def misplace(file: Path, rng: random.Random) -> None:
    """Something else than a plain file in the file's place, or nothing."""
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    kind = rng.choice(PLACES)
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "empty":
        file.touch()
    elif kind == "link to itself above":
        file.symlink_to("..")


def spoiled(data: bytes, rng: random.Random, suffix: str) -> bytes:
    """The data with a fault or a few."""
    if suffix in (".json", ".jsonl") and rng.random() < 0.6:
        return _spoiled_json(data, rng)
    if suffix == ".safetensors" and rng.random() < 0.6:
        return _spoiled_header(data, rng)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data = rng.choice((_turned, _cut, _doubled, _zeroed, _inserted, _replaced, _enlarged))(data, rng)
    return data


def _turned(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def _doubled(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted((_place(data, rng), _place(data, rng)))
    return data[:b] + data[a:b] + data[b:]


def _zeroed(data: bytes, rng: random.Random) -> bytes:
    a = _place(data, rng)
    size = min(rng.choice((1, 4, 8, 512)), len(data) - a)
    return data[:a] + bytes(size) + data[a + size :]


def _inserted(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    return data[:place] + rng.choice(STUMBLES) + data[place:]


def _replaced(data: bytes, rng: random.Random) -> bytes:
    a = _place(data, rng)
    return data[:a] + rng.choice(STUMBLES) + data[a + rng.randrange(64) :]


def _enlarged(data: bytes, rng: random.Random) -> bytes:
    """A number of the header, if it is one, at the edge of what its bytes can hold."""
    size, place = rng.choice((1, 2, 4, 8)), _place(data, rng)
    number = rng.choice((2 ** (8 * size) - 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 0, 1, 2 ** (4 * size)))
    return data[:place] + number.to_bytes(size, rng.choice(("little", "big"))) + data[place + size :]


def _place(data: bytes, rng: random.Random) -> int:
    """Somewhere; half of the time at the beginning, where headers are."""
    return rng.randrange(max(1, min(len(data), 400) if rng.random() < 0.5 else len(data)))


def _spoiled_json(data: bytes, rng: random.Random) -> bytes:
    lines = [line for line in data.split(b"\n") if line.strip()]
    try:
        values, whole = json.loads(data), True
    except ValueError:
        values, whole = json.loads(lines[0]), False
    values = _with_fault(values, rng)
    text = json.dumps(values).encode()
    return text if whole else b"\n".join([text, *lines[1:]])


def _spoiled_header(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(_with_fault(json.loads(data[8 : 8 + length]), rng)).encode()
    length = rng.choice((len(text), len(text), len(text), 2**63, 0, len(text) - 1))
    return length.to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]


def _with_fault(values: Any, rng: random.Random) -> Any:
    """The values with one of them, anywhere inside, replaced, removed or under another name."""
    places = list(_places(values))
    if not places:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.7:
        holder[key] = rng.choice(VALUES)
    elif kind < 0.85:
        del holder[key]
    elif isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder.append(rng.choice(VALUES))
    return values


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(values.items()) if isinstance(values, dict) else enumerate(values):
        yield values, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
