"""Archives of clips as webdataset writes them: `.tar` files of `KEY.mp4` and `KEY.txt` or `KEY.json`, neighbours.

A clip in an archive has a path as if the archive were a folder: `shard-000.tar/00012.mp4`. Nothing is unpacked to disk:
a clip is read where it lies in the archive.
"""

from __future__ import annotations

import functools
import glob
import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from wanjax.data.captions import MOST_CAPTION, decode_caption
from wanjax.data.manifest import CAPTIONS
from wanjax.errors import InputError
from wanjax.untrusted import open_file, parse_json, reason

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 100_000


class Sample(NamedTuple):
    """A clip of an archive: its file's name in it, its caption if there is one, and why it cannot be used, if so."""

    name: str
    caption: str | None
    reason: str | None


class Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, path: Path, offset: int, size: int):
        self._file, self._offset, self._size, self._place = open_file(path), offset, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fill the buffer, as far as there is something."""
        self._file.seek(self._offset + self._place)
        data = self._file.read(max(0, min(len(buffer), self._size - self._place)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the part."""
        self._place = max(0, offset + (0, self._place, self._size)[whence])
        return self._place

    def tell(self) -> int:
        """The place in the part."""
        return self._place

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def are_shards(path: Path) -> bool:
    """Whether a path names `.tar` files, or a folder of nothing else."""
    if path.is_dir():
        names = [name for name in os.listdir(path) if not name.startswith(".")]
        return any(name.endswith(".tar") for name in names) and all(
            name.endswith((".tar", ".json", ".txt", ".md")) for name in names
        )
    return path.suffix == ".tar"


def expand(path: Path) -> list[Path]:
    """The `.tar` files of a folder, or of a name with `*` or `{000..012}`, by name.

    Raises:
      InputError: there are none.
    """
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif match := _RANGE.search(str(path)):
        first, last = (int(x) for x in match.groups())
        if last - first >= _MOST_SHARDS:
            raise InputError(f"{path}: {last - first + 1} shards; up to {_MOST_SHARDS:,} are accepted; give fewer")
        width = len(match.group(1))
        texts = (f"{number:0{width}}" for number in range(first, last + 1))
        found = [Path(_RANGE.sub(text, str(path), count=1)) for text in texts]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path))) if "*" in str(path) else [path]
    missing = [shard for shard in found if not shard.is_file()]
    if missing or not found:
        raise InputError(f"{missing[0] if missing else path} does not exist; .tar files are accepted; check the name")
    return [Path(os.path.abspath(shard)) for shard in found]


def samples(shard: Path, suffixes: frozenset[str], encoding: str) -> Iterator[Sample]:
    """The clips of an archive, in its order.

    Raises:
      InputError: it is no archive, or is damaged; a caption cannot be read.
    """
    members = _members(str(shard))
    for name in members:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in suffixes:
            continue
        if os.path.basename(name).startswith("."):
            yield Sample(name, None, "hidden")
            continue
        yield Sample(name, _caption(shard, members, stem, encoding), None)


def open_member(path: Path) -> io.BufferedReader | None:
    """A file in an archive, to read; None: the path is none of those.

    Raises:
      FileNotFoundError: the archive has none of that name.
    """
    for parent in path.parents:
        if parent.suffix == ".tar":
            if not parent.is_file():
                return None
            name = path.relative_to(parent).as_posix()
            place = _members(str(parent)).get(name)
            if place is None:
                raise FileNotFoundError(name)
            return io.BufferedReader(Part(parent, *place))
    return None


@functools.lru_cache(maxsize=4096)
def _members(shard: str) -> dict[str, tuple[int, int]]:
    """Where the plain files of an archive begin, and how long they are, by name."""
    try:
        with open_file(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            found = {member.name: (member.offset_data, member.size) for member in archive if member.isreg()}
            size = os.fstat(file.fileno()).st_size
    except (OSError, tarfile.TarError, ValueError) as error:
        raise InputError(
            f"{shard} is no .tar file ({reason(error)}); one not compressed is needed; repair it"
        ) from error
    cut = [name for name, (offset, length) in found.items() if offset + length > size]
    if cut:
        raise InputError(f"{shard} is cut off inside {cut[0]}; a whole .tar file is needed; download it again")
    return {name.removeprefix("./"): place for name, place in found.items()}


def _caption(shard: Path, members: dict[str, tuple[int, int]], stem: str, encoding: str) -> str | None:
    for suffix in (".txt", ".caption", ".json"):
        place = members.get(stem + suffix)
        if place is None:
            continue
        name = f"{shard}/{stem}{suffix}"
        if place[1] > MOST_CAPTION:
            raise InputError(f"caption {name} has {place[1]:,} bytes; up to {MOST_CAPTION:,} are accepted; shorten it")
        with open_file(shard) as file:
            file.seek(place[0])
            data = file.read(place[1])
        if suffix != ".json":
            return decode_caption(data, name, encoding)
        try:
            values = parse_json(data)
            texts = [values[key] for key in CAPTIONS if isinstance(values.get(key), str)]
        except (ValueError, AttributeError) as error:
            raise InputError(f"{name} is no JSON object ({reason(error)}); one is needed; repair it") from error
        if texts:
            return texts[0]
    return None
