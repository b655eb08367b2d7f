"""What made a run: a line of `WORKDIR/starts.jsonl` for every start, so that it can be told and made again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from wanjax.config import TrainConfig

FILE = "starts.jsonl"
_PATIENCE = 10
"""Seconds that git may take."""


def write_start(config: TrainConfig, command: Sequence[str], step: int) -> None:
    """Append a line about this start; called by the process that writes into the workdir.

    Args:
      config: of the run, with what flags changed.
      command: the words of the command line.
      step: from which it goes on.
    """
    assert config.workdir is not None
    devices = jax.devices()
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
        "command": list(command),
        "config": plain(config),
        "commit": commit(),
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }
    with (Path(config.workdir) / FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")


def plain(value: Any) -> Any:
    """A configuration as JSON has it: objects with their fields, and with the name of their type."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__} | fields
    if isinstance(value, (tuple, list)):
        return [plain(x) for x in value]
    if isinstance(value, dict):
        return {str(name): plain(x) for name, x in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def commit() -> str | None:
    """The commit of the sources that run, and whether they differ from it; None: they are no checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        name = _git(root, "rev-parse", "HEAD")
        return name + (", changed" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout of somebody else's
        return None


def _git(root: Path, *words: str) -> str:
    ran = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=_PATIENCE, check=True
    )
    return ran.stdout.strip()


def versions() -> dict[str, str]:
    """Of all packages that are installed."""
    found = ((package.metadata["Name"], package.version) for package in importlib.metadata.distributions())
    return dict(sorted(((name, version) for name, version in found if name), key=lambda pair: pair[0].lower()))
