"""Places in buckets (gs://, s3://, hf://) by fsspec: read through a copy on this disk, written from one.

    folder = fetch("s3://bucket/clips")           # what is not here yet is downloaded; a path is itself
    with sent("s3://bucket/v.mp4", "--output") as path: ..   # what is written to the path goes there
    with mirrored("gs://bucket/run") as folder:   # what is there comes first, what appears here goes there

A copy lies in `WANJAX_REMOTE_CACHE`, or `~/.cache/wanjax/remote`. It is compared with the bucket at every start, by
size and what the storage says of a file's version. Needs `pip install "wanjax[cloud]"`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from wanjax.errors import InputError, one_line
from wanjax.files import replacing
from wanjax.settings import ADDRESS, SCHEMES
from wanjax.untrusted import read_json

_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "blob_id", "checksum", "mtime", "LastModified", "created")
"""What storages call a file's version, the surest first."""
_LAST = ("checksums.json", "index.json")
"""Files that say that what is beside them is whole: they go there last, and leave first."""
_SECONDS = 5.0
"""Between looks at a folder whose changes go to a bucket."""
_THREADS = 8


def is_address(place: str | Path) -> bool:
    """Whether a place is in a bucket, not a path."""
    return isinstance(place, str) and ADDRESS.match(place) is not None


def fetch(place: str | Path) -> Path:
    """A place's files on this disk: a path as it is, of an address the copy, brought up to date once a process.

    Raises:
      InputError: there is nothing there, it cannot be read, the disk has no room for it, or a package is not installed.
    """
    return _fetched(str(place)) if is_address(place) else Path(place)


@functools.cache
def _fetched(address: str) -> Path:
    fs, root = _open(address)
    with _in_one_line(address, "read"):
        if fs.isfile(root):
            local = _copy_of(address).with_name(f"{_copy_of(address).name}-{PurePosixPath(root).name}")
            info = fs.info(root)
            if _version(info) != _noted(local).get(""):
                _download(fs, root, local)
                _note(local, {"": _version(info)})
            return local
        if not _update(fs, root, _copy_of(address), address):
            raise InputError(f"{address} holds nothing; a file or a folder in a bucket is accepted; check the address")
    return _copy_of(address)


@contextlib.contextmanager
def place_for(place: str, flag: str, processes: int = 1) -> Iterator[Path]:
    """A folder to write: a path as it is, of an address the copy that is `mirrored`.

    Raises:
      InputError: an address, and several processes; or as `mirrored`.
    """
    if not is_address(place):
        yield Path(place)
        return
    if processes > 1:
        raise InputError(
            f"{flag} {place} with {processes} processes; they need a folder that all of them see; mount the bucket, "
            "and give its path"
        )
    with mirrored(place, flag) as local:
        yield local
    print(f"{local} is in {place}")


@contextlib.contextmanager
def sent(place: str, flag: str) -> Iterator[str]:
    """A path to write something to: one as it is, or one here of which what was written goes to the address.

    Raises:
      InputError: the address cannot be written; what was to go there is named.
    """
    if not is_address(place):
        yield place
        return
    fs, root = _open(place)
    local = _copy_of(place)
    with _in_one_line(place, "written"):
        _Mirror(fs, root.rpartition("/")[0], local).try_out()
    local.parent.mkdir(parents=True, exist_ok=True)
    yield str(local)
    if not local.exists():
        return
    mirror = _Mirror(fs, root, local)
    try:
        mirror.send_all()
    except Exception as error:
        raise InputError(
            f"{flag} {place} cannot be written ({one_line(error)[-300:]}); it is in {local}; see to the bucket, and "
            "copy it there"
        ) from error


@contextlib.contextmanager
def mirrored(address: str, flag: str) -> Iterator[Path]:
    """A folder on this disk with what the address holds; what changes in it goes there, in the background and at last.

    A checkpoint goes there whole or not at all: one without its checksums counts as not there.

    Args:
      address: of a folder, which need not be there.
      flag: that it was given by.

    Raises:
      InputError: it cannot be read or written; what was to go there is in the folder, which is named.
    """
    fs, root = _open(address)
    local = _copy_of(address)
    with _in_one_line(address, "read"):
        _update(fs, root, local, address)
    mirror = _Mirror(fs, root, local)
    with _in_one_line(address, "written"):
        mirror.try_out()
    stop, problems = threading.Event(), []

    def watch() -> None:
        while not stop.wait(_SECONDS):
            try:
                mirror.push()
                problems.clear()
            except Exception as error:  # the next time it may work
                problems[:] = [error]

    thread = threading.Thread(target=watch, daemon=True, name=f"to {address}")
    thread.start()
    try:
        yield local
    finally:
        stop.set()
        thread.join()
        try:
            mirror.push()
        except Exception as error:
            raise InputError(
                f"{flag} {address} cannot be written ({one_line(error)[-300:]}); what was to go there is in {local}; "
                "see to the bucket, and copy it there"
            ) from error


class _Mirror:
    """Sends what changes in a folder to a bucket."""

    def __init__(self, fs: Any, root: str, local: Path):
        self.fs, self.root, self.local = fs, root, local
        self.there = dict(self._files())  # as the copy was brought up to date just now

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names, sizes and times of the files that are whole."""
        for folder, folders, names in os.walk(self.local):
            folders[:] = [name for name in folders if not _is_unfinished(name)]
            for name in names:
                path = Path(folder) / name
                if not _is_unfinished(name):
                    with contextlib.suppress(FileNotFoundError):
                        status = path.stat()
                        yield path.relative_to(self.local).as_posix(), (status.st_size, status.st_mtime_ns)

    def try_out(self) -> None:
        """Whether the bucket can be written to, before hours of work."""
        self._make_folder(self.root)
        self.fs.pipe_file(f"{self.root}/.wanjax", b"")
        self.fs.rm_file(f"{self.root}/.wanjax")

    def push(self) -> None:
        """Send what is new or changed, then remove what is gone; what says that others are whole goes at last."""
        now = dict(self._files())
        changed = [name for name, state in now.items() if self.there.get(name) != state]
        # Of what a run writes, its numbers before its checkpoints: a resumed run finds those up to the checkpoint.
        for names in _stages(changed):
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(self._send, names))
            self.there |= {name: now[name] for name in names}
        gone = [name for name in self.there if name not in now]
        if any(PurePosixPath(name).name in _LAST for name in now) or not any(_is_step(name) for name in gone):
            for name in sorted(gone, key=lambda name: PurePosixPath(name).name not in _LAST):
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm_file(f"{self.root}/{name}")
                del self.there[name]

    def send_all(self) -> None:
        """Send the folder, or the file that it is."""
        if self.local.is_file():
            self._make_folder(self.root.rpartition("/")[0])
            self.fs.put_file(str(self.local), self.root)
        self.there = {}
        self.push()

    def _send(self, name: str) -> None:
        target = f"{self.root}/{name}"
        self._make_folder(target.rpartition("/")[0])
        self.fs.put_file(str(self.local / name), target)

    def _make_folder(self, path: str) -> None:
        if "file" in self.fs.protocol:  # buckets have none, and would be made where one is misspelt
            self.fs.makedirs(path, exist_ok=True)


def _stages(names: Iterable[str]) -> list[list[str]]:
    """Loose files, those of checkpoints, and at last what says that they are whole."""
    stages: list[list[str]] = [[], [], []]
    for name in names:
        last = PurePosixPath(name).name in _LAST
        stages[2 if last else 1 if _is_step(name) else 0].append(name)
    return stages


def _is_step(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) > 2 and parts[0] == "checkpoints" and parts[1].isdecimal()


def _is_unfinished(name: str) -> bool:
    return name.startswith(".") or ".orbax-checkpoint-tmp" in name or name.endswith(".new")


# ------------------------------------------------------------------------------------------------------------- copies


def _open(address: str) -> tuple[Any, str]:
    """The storage of an address, and the path in it."""
    scheme = address.partition("://")[0].lower()
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InputError(f"{address}: {scheme}:// is not read; accepted: a path, or {known}; copy it to one of these")
    try:
        import fsspec

        with _in_one_line(address, "opened"):
            fs, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise InputError(
            f'{address} needs {SCHEMES[scheme] or "fsspec"}, which is not installed; pip install "wanjax[cloud]"'
        ) from error
    return fs, str(root).rstrip("/")


@contextlib.contextmanager
def _in_one_line(address: str, done: str) -> Iterator[None]:
    """What storages raise has no common base."""
    try:
        yield
    except (InputError, ImportError):
        raise
    except Exception as error:
        raise InputError(
            f"{address} cannot be {done} ({one_line(error)[:300] or type(error).__name__}); a place in a bucket that "
            "this machine may use is accepted; check the address, the rights and the network"
        ) from error


def _copy_of(address: str) -> Path:
    root = os.environ.get("WANJAX_REMOTE_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wanjax" / "remote"
    name = PurePosixPath(address.rstrip("/")).name or "bucket"
    digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:12]
    return (Path(root) if root else cache) / f"{digest}-{name}"


def _update(fs: Any, root: str, local: Path, address: str) -> bool:
    """Bring a folder's copy up to date; whether there is anything."""
    fs.invalidate_cache()
    listed = fs.find(root, detail=True) if fs.exists(root) else {}
    versions = {_relative(name, root, address): _version(info) for name, info in listed.items()}
    versions = {name: version for name, version in versions.items() if _is_whole(name, versions)}
    noted = _noted(local)
    wanted = [
        name
        for name, version in versions.items()
        if noted.get(name) != version or not _has_size(local / name, version[0])
    ]
    need = sum(versions[name][0] for name in wanted)
    local.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(local).free
    if need > free:
        raise InputError(
            f"{address} has {need / 2**30:.1f} GiB to copy, {local} has room for {free / 2**30:.1f}; as much is "
            "needed; set WANJAX_REMOTE_CACHE to a larger disk"
        )
    for path in [path for path in local.rglob("*") if path.is_file()]:
        if path.relative_to(local).as_posix() not in versions:
            path.unlink()
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: _download(fs, f"{root}/{name}", local / name), wanted))
    for path in sorted((path for path in local.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()  # those that are empty
    _note(local, versions)
    return bool(versions)


def _relative(name: str, root: str, address: str) -> str:
    relative = PurePosixPath(str(name)).relative_to(root)
    if ".." in relative.parts:
        raise InputError(f"{address} holds {name!r}; names within it are accepted; rename it")
    return relative.as_posix()


def _is_whole(name: str, names: Iterable[str]) -> bool:
    """Whether a file is no part of a checkpoint whose sending was cut off."""
    return not _is_step(name) or "/".join([*PurePosixPath(name).parts[:2], _LAST[0]]) in names


def _version(info: dict[str, Any]) -> list[Any]:
    version = next((str(info[key]) for key in _VERSIONS if info.get(key) is not None), "")
    return [int(info.get("size") or 0), version]


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _download(fs: Any, name: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        fs.get_file(name, str(unfinished))


def _notes(local: Path) -> Path:
    return local.with_name(f".{local.name}.json")


def _noted(local: Path) -> dict[str, Any]:
    """Versions of the files of a copy, as they were when it was made."""
    try:
        noted = read_json(_notes(local))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _note(local: Path, versions: dict[str, Any]) -> None:
    with replacing(_notes(local)) as unfinished:
        unfinished.write_text(json.dumps(versions))
