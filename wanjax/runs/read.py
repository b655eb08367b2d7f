"""What a workdir holds of a run: figures by step, how it was started, samples, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from wanjax.errors import InputError
from wanjax.untrusted import read_bytes

MOST_BYTES = 2**33
"""Of a run's metrics."""
SAMPLE = re.compile(r"(\d{6,12})(?:-([\w-]{1,80}))?\.mp4")
Curve = tuple[list[int], list[float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it is now.

    name: of the workdir.
    folder: the workdir.
    curves: by the figure's name, steps and values.
    starts: the lines of `starts.jsonl`, see `wanjax.training.provenance`.
    samples: by what is sampled, the files with their steps.
    checkpoints: their steps.
    """

    name: str
    folder: Path
    curves: dict[str, Curve]
    starts: list[dict[str, Any]]
    samples: dict[str, list[tuple[int, Path]]]
    checkpoints: list[int]

    @property
    def step(self) -> int:
        """The last that was written."""
        return max((steps[-1] for steps, _ in self.curves.values()), default=0)

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the last start."""
        config = self.starts[-1].get("config") if self.starts else None
        return config if isinstance(config, dict) else {}


def read_run(folder: Path, name: str) -> Run:
    """What is in a workdir; lines that are damaged are left out.

    Raises:
      InputError: it has no metrics.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise InputError(f"{folder} has no metrics.jsonl; a training's workdir is needed; check the path")
    curves: dict[str, Curve] = defaultdict(lambda: ([], []))
    for line in _objects(metrics):
        step = line.pop("step", None)
        for figure, value in line.items() if type(step) is int else ():
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves[figure][0].append(step)
                curves[figure][1].append(float(value))
    starts = _objects(folder / "starts.jsonl") if (folder / "starts.jsonl").is_file() else []
    checkpoints = sorted(int(x.name) for x in folder.glob("checkpoints/*") if x.name.isdecimal() and len(x.name) < 12)
    return Run(name, folder, dict(curves), starts, _samples(folder / "samples"), checkpoints)


def _objects(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in read_bytes(path, MOST_BYTES).splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # of a killed run the last one may be half
            continue
        found += [value] if isinstance(value, dict) else []
    return found


def _samples(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    found: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for path in sorted(folder.glob("*.mp4")) if folder.is_dir() else ():
        named = SAMPLE.fullmatch(path.name)
        if named:
            found[named[2] or "held-out clips"].append((int(named[1]), path))
    return dict(sorted(found.items()))
