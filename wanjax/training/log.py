"""What a run leaves to look at: `WORKDIR/metrics.jsonl` and TensorBoard's event files in `WORKDIR/tensorboard`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from sharding.distributed import is_main
from wanjax.files import replacing


class Log:
    """Writes the values of steps, on the main process only; a context manager that closes its files.

    A line of `metrics.jsonl` is a step; floats are written so that reading gives the same bits. TensorBoard gets the
    same under `train/NAME`, or under NAME where that has a `/`.

    Args:
      workdir: folder of the run.
      step: of the state that the run goes on from; what was written of later steps is of a run that was lost, and is
        dropped.
    """

    def __init__(self, workdir: Path, step: int):
        self.path = workdir / "metrics.jsonl"
        self._events = None
        if not is_main():
            return
        workdir.mkdir(parents=True, exist_ok=True)
        # The last line of a killed run may be half a line.
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with replacing(self.path) as new:
            new.write_text("".join(kept))
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events.close()

    def write(self, step: int, values: Mapping[str, float | np.floating]) -> None:
        """Append the values of a step."""
        if self._events is None:
            return
        line = json.dumps({"step": step} | {name: float(x) for name, x in values.items()})
        with self.path.open("a") as file:
            file.write(line + "\n")
        for name, value in values.items():
            self._events.add_scalar(name if "/" in name else f"train/{name}", float(value), step)

    def show(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 `[H, W, 3]`, for TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, picture, step, dataformats="HWC")
