"""Whether a checkpoint is what was written: a checksum of every file, made before the checkpoint gets its name.

write_checksums(folder)          # when all is written
why = damage(folder)             # before anything is restored; None: it is whole
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wanjax.untrusted import open_file, read_bytes, read_json, reason

CHECKSUMS = "checksums.json"
AFTERWARDS = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""What Orbax writes when the checkpoint gets its name; nothing of the state is in it."""
_THREADS = 8


def write_checksums(folder: Path) -> None:
    """SHA-256 of every file in a folder, beside them."""
    names = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))
    (folder / CHECKSUMS).write_text(json.dumps(digests, indent=1))


def damage(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a folder, in words; None: its files are those of which checksums were written.

    Args:
      folder: with its checksums.
      share: which process this is, and of how many that compare files: each a part of them, and all their names.
    """
    if not folder.is_dir():
        return "it is no folder"
    try:
        written = _read(folder / CHECKSUMS)
        there = set(_files(folder))
        odd = sorted(there ^ written.keys())
        if odd:
            return f"{odd[0]} {'was not written with it' if odd[0] in there else 'is missing'}"
        return _changed(folder, {name: written[name] for name in sorted(written)[share[0] :: share[1]]}) or _odd(folder)
    except FileNotFoundError:
        return "it has no checksums"
    except (OSError, ValueError) as error:
        return reason(error)


def _changed(folder: Path, digests: Mapping[str, str]) -> str | None:
    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(digests.items(), pool.map(lambda name: _digest(folder / name), digests), strict=True)
        return next((f"{name} has changed" for (name, digest), now in found if digest != now), None)


def _odd(folder: Path) -> str | None:
    """What is wrong with the files that are written afterwards."""
    for file in sorted(folder.rglob("*")):
        if file.name == "_CHECKPOINT_METADATA":
            read_json(file)
        elif file.name == "commit_success.txt" and not re.fullmatch(rb"Checkpoint commit [ -~]*\s*", read_bytes(file)):
            return f"{file.relative_to(folder)} has changed"
    return None


def _read(file: Path) -> dict[str, str]:
    digests = read_json(file)
    if not isinstance(digests, dict) or not digests or not all(isinstance(x, str) for x in digests.values()):
        raise ValueError(f"{file.name} holds no checksums")
    return digests


def _files(folder: Path) -> list[str]:
    return sorted(_names(folder, folder.rglob("*")))


def _names(folder: Path, found: Iterable[Path]) -> Iterable[str]:
    for file in found:
        if not file.is_dir() and file.name not in AFTERWARDS and file != folder / CHECKSUMS:
            yield file.relative_to(folder).as_posix()


def _digest(file: Path) -> str:
    with open_file(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
