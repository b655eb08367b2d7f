"""What a run leaves to look at: `WORKDIR/metrics.jsonl`, TensorBoard's files in `WORKDIR/tensorboard`, trackers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from sharding.distributed import is_main
from wanjax.files import replacing
from wanjax.training.trackers import Trackers
from wanjax.untrusted import read_bytes

MOST_BYTES = 2**33
"""Of a run's metrics."""


class Log:
    """Writes the values of steps, on the main process only; a context manager that closes its files.

    A line of `metrics.jsonl` is a step; floats are written so that reading gives the same bits. TensorBoard gets the
    same under `train/NAME`, or under NAME where that has a `/`.

    Args:
      workdir: folder of the run.
      step: of the state that the run goes on from; what was written of later steps is of a run that was lost, and is
        dropped.
      trackers: that are told the same; None: none.
    """

    def __init__(self, workdir: Path, step: int, trackers: Trackers | None = None):
        self._trackers = trackers
        self.path = workdir / "metrics.jsonl"
        self._events = None
        if not is_main():
            return
        workdir.mkdir(parents=True, exist_ok=True)
        kept, damaged = self._read(step)
        if damaged:
            print(f"{self.path}: {damaged} damaged line(s) are left out", file=sys.stderr)
        with replacing(self.path) as new:
            new.write_bytes(b"".join(kept))
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def _read(self, step: int) -> tuple[list[bytes], int]:
        """The lines up to a step, and how many there are that are none: a failing disk leaves NULs or parts."""
        kept, damaged = [], 0
        if not self.path.exists():
            return kept, damaged
        for line in read_bytes(self.path, MOST_BYTES).splitlines(keepends=True):
            try:
                is_kept = bool(json.loads(line)["step"] <= step)
            except (ValueError, TypeError, KeyError, RecursionError):
                damaged += line.endswith(b"\n")  # the last line of a killed run may be half a line
                continue
            if is_kept and line.endswith(b"\n"):
                kept.append(line)
        return kept, damaged

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events.close()
        if self._trackers is not None:
            self._trackers.tell("close")

    def write(self, step: int, values: Mapping[str, float | np.floating]) -> None:
        """Append the values of a step."""
        if self._events is None:
            return
        line = json.dumps({"step": step} | {name: float(x) for name, x in values.items()})
        with self.path.open("a") as file:
            file.write(line + "\n")
        for name, value in values.items():
            self._events.add_scalar(_tag(name), float(value), step)
        if self._trackers is not None:
            self._trackers.tell("write", step, {_tag(name): float(x) for name, x in values.items()})

    def show(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 `[H, W, 3]`."""
        if self._events is not None:
            self._events.add_image(name, picture, step, dataformats="HWC")
        if self._trackers is not None:
            self._trackers.tell("show", step, name, picture)

    def play(self, step: int, name: str, path: Path) -> None:
        """A video file, for trackers: TensorBoard has none."""
        if self._trackers is not None:
            self._trackers.tell("play", step, name, path)


def _tag(name: str) -> str:
    return name if "/" in name else f"train/{name}"
