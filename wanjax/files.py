"""Files and folders that appear whole or not at all, and are not lost where their place has gone.

target = check_output("out/video.mp4")      # before hours of work
with replacing(target) as path:             # a hidden name beside it, which becomes `target` at the end
    write(path)
put(finished, target)                       # the same for what was written elsewhere on the disk
write_all(Output("video", target, write))   # there, or whatever goes wrong in another place
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from wanjax.errors import InputError
from wanjax.settings import ADDRESS
from wanjax.untrusted import reason

VIDEO = (".mp4", ".gif", ".npy", "")
ARRAY = (".npy",)
_HOST = f"{zlib.crc32(socket.gethostname().encode()) & 0xFFFF:04x}"
_HIDDEN = re.compile(r"\.(.*)\.([0-9a-f]{4})-([0-9a-f]+)-([0-9a-f]{8})(\.[^.]*)?", re.DOTALL)
"""The hidden name of what is being written: stem, host, process, and what tells it from others; suffix."""
_LEFT_SECONDS = 24 * 3600
"""After so long without a change, what a process of another host was writing is left behind."""
_writing: set[str] = set()
"""Names that this process is writing under."""
_NAMES = {"": "a folder (a name without a dot) for .png pictures"}


def check_output(path: str | Path, accepted: tuple[str, ...] = VIDEO) -> Path:
    """The absolute path, after making sure that something can be written there.

    Args:
      path: a file, replaced if it exists, or a folder for pictures: new, empty or holding an earlier output.
      accepted: file name extensions; `""` stands for a folder.

    Raises:
      InputError: the extension is not accepted, a folder lies where the file should or the reverse, the folder holds
        something else than an earlier output, or its place cannot be written to; or as `check_name`.
    """
    check_name(path, "output")
    name, kind = Path(path).name, Path(path).suffix.lower()
    is_odd = kind == "" and "." in name and name != ".."  # .mp4, or v.mp4. with a dot too many
    if kind not in accepted or is_odd:
        names = ", ".join(_NAMES.get(suffix, suffix) for suffix in accepted)
        what = kind or (f"a file or folder named {name}" if is_odd else "a folder")
        raise InputError(f"output {path}: cannot write {what}; accepted: {names}; change the name")
    try:
        target = Path(path).resolve()
        _check_existing(target, folder=kind == "")
        remove_leftovers(target)
        try_place(target)
    except (OSError, RuntimeError) as error:  # before Python 3.13 `resolve` makes a loop of links a RuntimeError
        raise InputError(
            f"output {path} cannot be written ({reason(error)}); accepted: a place you may write to; choose another"
        ) from error
    return target


def try_place(target: Path) -> None:
    """Writes a file of a like name into the folder where `target` will be, or that its folder will be in.

    Raises:
      OSError: it cannot be.
    """
    place = next(parent for parent in target.parents if os.path.lexists(parent))  # a link to itself is none to write to
    probe = place / _hidden(target).name
    probe.touch(exist_ok=False)  # the only test of permissions, read-only disks and name lengths that holds
    probe.unlink()


def check_name(path: str | Path, what: str) -> None:
    """Whether a path can be one of a file or folder here.

    Raises:
      InputError: it is empty, has control characters, or is an address of another machine's file.
    """
    text = str(path)
    if ADDRESS.match(text) or not text or not text.isprintable():
        raise InputError(
            f"{what} {text!r}; a path on this machine's disks is accepted, without control characters; where it is to "
            "go elsewhere, copy it there afterwards"
        )


def _check_existing(target: Path, folder: bool) -> None:
    if folder and target.exists() and not target.is_dir():
        raise InputError(
            f"output {target} is a file; accepted: {', '.join(VIDEO[:-1])} or a folder; choose another name"
        )
    if not folder and target.exists() and not target.is_dir() and not target.is_file():
        raise InputError(f"output {target} is a pipe or a device; accepted: a file or none; choose another name")
    if not folder and target.is_dir():
        raise InputError(f"output {target} is a folder; accepted: a file of that name or none; choose another name")
    if folder and target.is_dir():
        foreign = [entry for entry in os.listdir(target) if not re.fullmatch(r"\d{5,}\.png", entry)]
        if foreign:
            raise InputError(
                f"output folder {target} holds {foreign[0]!r}; accepted: a new or empty folder, or an earlier output: "
                "numbered .png files, which are replaced; choose another name"
            )


def check_apart(outputs: Mapping[str, str | Path | None], inputs: Mapping[str, str | Path | None]) -> None:
    """Whether no output is to be written where another output or an input is, nor a folder around it.

    Args:
      outputs, inputs: paths by the flags that they are of; None: not asked for.

    Raises:
      InputError: one is.
    """
    written = {flag: path for flag, path in outputs.items() if path is not None}
    for flag, path in written.items():
        for other, taken in (*inputs.items(), *written.items()):
            if taken is not None and other != flag and _holds(path, taken):
                how = "holds" if _holds(path, taken) == "around" else "is"
                raise InputError(f"{flag} {path} {how} {other} {taken}; one place each is accepted; change one")


def _holds(output: str | Path, other: str | Path) -> str:
    """Whether an output is what another path names ("same"), or a folder around it ("around"); else nothing."""
    with contextlib.suppress(OSError, ValueError):  # one is not there yet
        if os.path.samefile(output, other):  # a file can have several names
            return "same"
    with contextlib.suppress(OSError, ValueError):
        place, place_of_other = Path(os.path.realpath(output)), Path(os.path.realpath(other))
        return "same" if place == place_of_other else "around" if place_of_other.is_relative_to(place) else ""
    return ""


def _hidden(target: Path) -> Path:
    token = f"{_HOST}-{os.getpid():x}-{secrets.token_hex(4)}"
    return target.with_name(f".{target.stem}.{token}{target.suffix}")


def remove_leftovers(target: Path) -> None:
    """Removes what writers of `target` left under hidden names when they were killed."""
    start = f".{target.stem}."
    for name in os.listdir(target.parent) if target.parent.is_dir() else []:
        if name.startswith(start) and (found := _HIDDEN.fullmatch(name)):
            same = found[1] == target.stem and (found[5] or "") == target.suffix
            if same and _is_left(target.parent / name, found):
                _remove(target.parent / name)


def remove_all_leftovers(folder: Path) -> None:
    """Removes every hidden name in a folder of our own but those that somebody is writing under."""
    for name in os.listdir(folder):
        found = _HIDDEN.fullmatch(name)
        if name.startswith(".") and (found is None or _is_left(folder / name, found)):
            _remove(folder / name)


def _is_left(path: Path, name: re.Match[str]) -> bool:
    """Whether nobody is writing under a hidden name any more."""
    host, process = name[2], int(name[3], 16)
    if path.name in _writing:
        return False
    if host != _HOST:
        with contextlib.suppress(OSError):
            return time.time() - path.lstat().st_mtime > _LEFT_SECONDS
        return False
    if process == os.getpid():  # of an earlier process of that number: ours are known
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        return False
    return False


def _remove(path: Path) -> None:
    """Remove a file or folder, as far as possible: what stays is found again at the next start."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(folder: str | Path, flag: str) -> Iterator[None]:
    """A folder for this process alone while the block runs; made if it is not there. Nothing in it says so afterwards.

    Args:
      folder: to hold.
      flag: that it was given by.

    Raises:
      InputError: another process holds it, or it cannot be made.
    """
    check_name(folder, flag)
    number = None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if fcntl is not None:
            number = os.open(folder, os.O_RDONLY)
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(number or 0)
        raise InputError(
            f"{flag} {folder} is another running process's; one at a time is accepted; wait for it, or give another"
        ) from error
    except OSError as error:
        if number is None:
            raise InputError(
                f"{flag} {folder} cannot be written ({error.strerror}); a folder, or a place for one, is accepted; "
                "choose another"
            ) from error  # else the disk knows no locks
    try:
        yield
    finally:
        if number is not None:
            os.close(number)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A hidden path beside `target` that becomes `target` when the block ends well, and else is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    temporary = _hidden(target)
    _writing.add(temporary.name)
    try:
        yield temporary
        _flush(temporary)  # or a power failure may leave the name with nothing behind it
        put(temporary, target)
    finally:  # also after KeyboardInterrupt
        _remove(temporary)
        _writing.discard(temporary.name)


def _flush(path: Path) -> None:
    """Until a file, or all files of a folder, are on the disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def put(new: Path, target: Path) -> None:
    """Renames a file or folder to `target`, in place of the file or folder of that name; both are on one disk."""
    if new.is_dir() and target.exists():
        _swap_folders(new, target)
    else:
        os.replace(new, target)


def _swap_folders(new: Path, target: Path) -> None:
    """Puts `new` where `target` is; where the system can, there is no moment at which neither is there."""
    if _exchange(new, target):
        _remove(new)  # what was there
        return
    old = _hidden(target)
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    _remove(old)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two names at once; False where the system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        return ctypes.CDLL(None).renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
    except (AttributeError, OSError, TypeError):
        return False


# -------------------------------------------------------------------------------------------------- whatever goes wrong


class Output(NamedTuple):
    """Something that took long to make: what it is in words, where it goes, and what writes it to a path.

    plain: writes it as `.npy`, in which little can go wrong, for where `write` fails.
    """

    what: str
    path: str | Path
    write: Callable[[Path], None]
    plain: Callable[[Path], None] | None = None


def write_all(*outputs: Output) -> None:
    """Writes each output to its path or, whatever goes wrong there, to another place; no failure stops the others.

    Other places are another name beside it, the folder of temporary files, the current folder and the user's own.

    Raises:
      InputError: one is in another place, which is named, or could not be written at all.
    """
    problems = []
    for output in outputs:
        try:
            output.write(Path(output.path))
        except Exception as error:  # whatever it was: hours of work are worth another attempt
            problems.append(_rescue(output, error))
    if problems:
        raise InputError("; ".join(problems))


def _rescue(output: Output, failure: Exception) -> str:
    """Write to another place; what became of it, in words."""
    path = Path(output.path)
    failed = f"{path} cannot be written ({reason(failure)})"
    for folder in (path.parent, Path(tempfile.gettempdir()), Path.cwd(), Path.home()):
        for suffix, write in ((path.suffix, output.write), (".npy", output.plain)):
            place = folder / f"{path.stem or output.what}-{os.getpid()}-{secrets.token_hex(2)}{suffix}"
            if write is None:
                continue
            try:
                write(place)
            except Exception as error:  # the next one, then
                failure = error
            else:
                return f"{failed}; the {output.what} is in {place} instead"
    print(f"The {output.what} could not be kept: make room, and the same command with the same --seed makes it again.")
    return f"{failed}, nor any other place ({reason(failure)}); make room or rights, and run the same command again"
