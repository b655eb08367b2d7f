"""Weights & Biases and MLflow beside `metrics.jsonl` and TensorBoard: the same figures, pictures and videos.

A tracker that fails while the run goes on, such as a server that is gone, is left out from then on, and a line says so:
nothing of a run hangs on it. The run's name there is kept in `WORKDIR/trackers.json`, so that a run that goes on goes
on there too.
"""

from __future__ import annotations

import abc
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wanjax.config import TrainConfig
from wanjax.errors import InputError, one_line
from wanjax.files import replacing
from wanjax.training.provenance import plain
from wanjax.untrusted import read_json

FILE = "trackers.json"


class Tracker(abc.ABC):
    """What is told of a run, step by step."""

    name: str

    @abc.abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step, by name."""

    @abc.abstractmethod
    def show(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 `[H, W, 3]`."""

    @abc.abstractmethod
    def play(self, step: int, name: str, path: Path) -> None:
        """A video file."""

    @abc.abstractmethod
    def close(self) -> None:
        """Send what is left."""


class WandB(Tracker):
    """Weights & Biases; `WANDB_API_KEY` and `WANDB_MODE=offline` are its own."""

    name = "wandb"

    def __init__(self, config: TrainConfig, ids: dict[str, str]):
        import wandb

        ids.setdefault(self.name, secrets.token_hex(4))
        self._wandb = wandb
        self._run = wandb.init(
            project=config.project, name=run_name(config), id=ids[self.name], resume="allow", dir=config.workdir,
            config=plain(config),
        )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def show(self, step: int, name: str, picture: np.ndarray) -> None:
        """See `Tracker`."""
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def play(self, step: int, name: str, path: Path) -> None:
        """See `Tracker`."""
        self._run.log({name: self._wandb.Video(str(path), format="mp4")}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class MLflow(Tracker):
    """MLflow, at the place that its own `MLFLOW_TRACKING_URI` names."""

    name = "mlflow"

    def __init__(self, config: TrainConfig, ids: dict[str, str]):
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(config.project)
        run = mlflow.start_run(run_id=ids.get(self.name), run_name=run_name(config))
        if self.name not in ids:
            mlflow.log_params({name: str(x)[:500] for name, x in plain(config).items()})  # which MLflow takes
        ids[self.name] = run.info.run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._mlflow.log_metrics(dict(values), step=step)

    def show(self, step: int, name: str, picture: np.ndarray) -> None:
        """See `Tracker`."""
        self._mlflow.log_image(picture, f"{name}/{step:06d}.png")

    def play(self, step: int, name: str, path: Path) -> None:
        """See `Tracker`."""
        self._mlflow.log_artifact(str(path), name)

    def close(self) -> None:
        """See `Tracker`."""
        self._mlflow.end_run()


KINDS: dict[str, Callable[[TrainConfig, dict[str, str]], Tracker]] = {"wandb": WandB, "mlflow": MLflow}


def run_name(config: TrainConfig) -> str:
    """As which a tracker shows the run."""
    return config.run_name or Path(config.workdir or ".").absolute().name


def check_trackers(config: TrainConfig) -> None:
    """Whether the packages are there.

    Raises:
      InputError: one is missing, or MLflow has no place.
    """
    for name in config.track:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f'--track {name} without its package; it is needed; pip install "wanjax[{name}]", or leave it out'
            )
    if "mlflow" in config.track and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise InputError(
            "--track mlflow without MLFLOW_TRACKING_URI; a server's address, or sqlite:///mlflow.db, is needed; set it"
        )


class Trackers:
    """All trackers of a run; a failing one is left out.

    Raises:
      InputError: one cannot begin, such as for want of a key.
    """

    def __init__(self, config: TrainConfig):
        self._trackers: list[Tracker] = []
        if not config.track:
            return
        file = Path(config.workdir or ".") / FILE
        ids = _read_ids(file)
        for name in dict.fromkeys(config.track):
            try:
                self._trackers.append(KINDS[name](config, ids))
            except Exception as error:  # of the library's own kinds
                raise InputError(
                    f"--track {name} cannot begin ({one_line(error)[:200]}); what {name} itself asks for is needed; "
                    "set it up, or leave it out"
                ) from error
        with replacing(file) as new:
            new.write_text(json.dumps(ids))

    def tell(self, method: str, *values: Any) -> None:
        """Call a method of every tracker."""
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*values)
            except Exception as error:  # of the library's own kinds
                self._trackers.remove(tracker)
                print(f"{tracker.name} is told nothing more ({one_line(error)[:200]})", file=sys.stderr)


def _read_ids(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    try:
        ids = read_json(file)
        if not isinstance(ids, dict) or not all(isinstance(x, str) for x in ids.values()):
            raise ValueError("no names of runs")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} is damaged ({one_line(error)[:100]}); the trackers' runs are named there; delete it"
        ) from error
    return ids
