"""The numbers that files hold, and how two files differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from array_record.python.array_record_module import ArrayRecordReader
from flax import serialization

Values = dict[str, Any]
"""What a file holds, by name: arrays, numbers and texts."""
CLOSE, TOLERANCE = "samples/", 1e-5
"""Figures that may differ, by what their names contain, and by how much relative to their size."""
TIMES = ("seconds", "per_second", "tflops", "data_wait", "utilisation")
"""Endings of the names of what a training measures by the clock."""
PROSE = "about"
"""Name of what files say of themselves to their readers."""
DTYPES = {
    **{"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1"},
    **{"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
}
"""By their names in safetensors."""


def read(path: Path) -> Values:
    """The numbers of a file, by name; of a file of unknown kind its bytes."""
    if path.suffix == ".npy":
        return {"array": np.load(path)}
    if path.suffix == ".json":
        return dict(leaves(json.loads(path.read_text())))
    if path.suffix == ".jsonl":
        return dict(leaves([json.loads(line) for line in path.read_text().splitlines()]))
    if path.suffix == ".safetensors":
        tensors = safetensors.deserialize(path.read_bytes())
        return {name: np.frombuffer(x["data"], DTYPES[x["dtype"]]).reshape(x["shape"]) for name, x in tensors}
    if path.suffix == ".msgpack":
        return dict(leaves(serialization.msgpack_restore(path.read_bytes())))
    if path.suffix == ".arrayrecord":
        records = ArrayRecordReader(str(path)).read_all()
        return dict(leaves([serialization.msgpack_restore(record) for record in records]))
    return {"bytes": np.frombuffer(path.read_bytes(), np.uint8)}


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of nested lists and dictionaries, without times and prose."""
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if not str(key).endswith(TIMES) and key != PROSE:
                yield from leaves(value, f"{name} {key}".lstrip())
    else:
        yield name, tree


class Difference(NamedTuple):
    """Between two files: how many of their numbers differ, by how much at most, and what else does.

    `relative` is to the old number's size.
    """

    changed: int = 0
    total: int = 0
    absolute: float = 0.0
    relative: float = 0.0
    text: str = ""

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.changed or self.text)

    def __str__(self) -> str:
        """In words."""
        numbers = (
            f"{self.changed:,} of {self.total:,} numbers, by up to {self.absolute:.3g}, relative {self.relative:.3g}"
        )
        return "; ".join(filter(None, (numbers if self.changed else "", self.text)))


def difference(old: Values, new: Values) -> Difference:
    """How values differ; numbers to the bit."""
    text = [f"only {side} has {name}" for side, name in only(old, new)]
    numbers = Difference()
    for name in sorted(old.keys() & new.keys()):
        a, b = np.asarray(old[name]), np.asarray(new[name])
        if a.dtype.kind in "OSU" or b.dtype.kind in "OSU":  # texts, and None
            text += [f"{name}: {a} became {b}"] if a.shape != b.shape or np.any(a != b) else []
        elif a.dtype != b.dtype or a.shape != b.shape:
            text.append(f"{name}: {a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}")
        else:
            numbers = together(numbers, of_arrays(a, b))
    more = f" and {len(text) - 3} more" if len(text) > 3 else ""
    return numbers._replace(text="; ".join(text[:3]) + more)


def of_arrays(a: np.ndarray, b: np.ndarray) -> Difference:
    """Of arrays of one shape and dtype."""
    bits = np.frombuffer(a.tobytes(), np.uint8) != np.frombuffer(b.tobytes(), np.uint8)
    differ = bits.reshape(a.size, a.dtype.itemsize).any(axis=1)  # [n]
    x, y = (z.ravel()[differ].astype(np.float64) for z in (a, b))
    absolute = np.nan_to_num(np.abs(x - y), nan=np.inf)
    relative = np.divide(absolute, np.abs(x), out=np.full_like(x, np.inf), where=np.abs(x) > 0)
    relative = np.where(x == y, 0, relative)  # 0 and -0
    return Difference(x.size, a.size, float(absolute.max(initial=0)), float(relative.max(initial=0)))


def together(a: Difference, b: Difference) -> Difference:
    """Of two parts of a file."""
    return Difference(
        a.changed + b.changed, a.total + b.total, max(a.absolute, b.absolute), max(a.relative, b.relative), a.text
    )


def only(old: Iterable[str], new: Iterable[str]) -> list[tuple[str, str]]:
    """Side and name of what one side has and the other has not."""
    return [("old", x) for x in sorted({*old} - {*new})] + [("new", x) for x in sorted({*new} - {*old})]


def compare(old: Path, new: Path) -> tuple[str, str]:
    """Whether two files hold the same: "equal", "close" (within what is allowed) or "DIFFERENT"; and a remark."""
    if old.read_bytes() == new.read_bytes():
        return "equal", f"{old.stat().st_size:,} bytes"
    values = read(old), read(new)
    exact, close = (
        difference(*({name: x for name, x in side.items() if (CLOSE in name) == allowed} for side in values))
        for allowed in (False, True)
    )
    if exact:
        return "DIFFERENT", str(exact)
    if close:
        return "DIFFERENT" if close.text or close.relative > TOLERANCE else "close", str(close)
    if old.suffix in (".json", ".jsonl"):  # times, prose, or the order
        return "equal", f"{exact.total + close.total:,} numbers"
    return "DIFFERENT", "the bytes of the file, but none of its numbers"
