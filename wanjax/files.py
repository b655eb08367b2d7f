"""Files and folders that appear whole or not at all.

target = check_output("out/video.mp4")      # before hours of work
with replacing(target) as path:             # a hidden name beside it, which becomes `target` at the end
    write(path)
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from wanjax.errors import InputError

VIDEO = (".mp4", ".gif", ".npy", "")
ARRAY = (".npy",)
_NAMES = {"": "a folder (a name without a dot) for .png pictures"}


def check_output(path: str | Path, accepted: tuple[str, ...] = VIDEO) -> Path:
    """The absolute path, after making sure that something can be written there.

    Args:
      path: a file, replaced if it exists, or a folder for pictures: new, empty or holding an earlier output.
      accepted: file name extensions; `""` stands for a folder.

    Raises:
      InputError: the extension is not accepted, a folder lies where the file should or the reverse, the folder holds
        something else than an earlier output, or its place cannot be written to.
    """
    kind = Path(path).suffix.lower()
    if kind not in accepted:
        names = ", ".join(_NAMES.get(suffix, suffix) for suffix in accepted)
        raise InputError(f"output {path}: cannot write {kind or 'a folder'}; accepted: {names}; change the name")
    try:
        target = Path(path).resolve()
        _check_existing(target, folder=kind == "")
        place = next(parent for parent in target.parents if parent.exists())
        probe = place / _hidden(target).name
        probe.touch(exist_ok=False)  # the only test of permissions, read-only disks and name lengths that holds
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"output {path} cannot be written ({error.strerror}); accepted: a place you may write to; choose another"
        ) from error
    return target


def _check_existing(target: Path, folder: bool) -> None:
    if folder and target.exists() and not target.is_dir():
        raise InputError(
            f"output {target} is a file; accepted: {', '.join(VIDEO[:-1])} or a folder; choose another name"
        )
    if not folder and target.is_dir():
        raise InputError(f"output {target} is a folder; accepted: a file of that name or none; choose another name")
    if folder and target.is_dir():
        foreign = [entry for entry in os.listdir(target) if not re.fullmatch(r"\d{5,}\.png", entry)]
        if foreign:
            raise InputError(
                f"output folder {target} holds {foreign[0]!r}; accepted: a new or empty folder, or an earlier output: "
                "numbered .png files, which are replaced; choose another name"
            )


def _hidden(target: Path) -> Path:
    return target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A hidden path beside `target` that becomes `target` when the block ends well, and else is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(target)
    try:
        yield temporary
        if temporary.is_dir() and target.exists():
            _swap_folders(temporary, target)
        else:
            os.replace(temporary, target)
    finally:  # also after KeyboardInterrupt
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _swap_folders(new: Path, target: Path) -> None:
    """Puts `new` where `target` is: no system call replaces a folder that is not empty."""
    old = _hidden(target)
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old)
