"""What `wanjax.sampling.calibrate` measured, as a small JSON: how the residual of the block stack changes in a run.

It is valid for the weights, task, shift, solver and conventions that it names, and refused with any other. The number
of steps may differ: the residual's magnitude is a curve over sigma, read off at the new steps. Prompts, size, frames
and guidance may differ too; the file says which they were.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from wanjax.config import SampleConfig
from wanjax.errors import InputError
from wanjax.files import replacing
from wanjax.sampling.steps import boundary_name
from wanjax.settings import Config
from wanjax.untrusted import read_json
from wanjax.weights import Checkpoint
from wanjax.weights.layouts import EXPERTS
from wanjax.weights.lora_files import LoRAFile
from wanjax.weights.mapping import NetworkName

FORMAT = "wanjax calibration 1"
MUST_AGREE = ("weights", "task", "shift", "solver", "conventions", "boundary")

Loras = Mapping[NetworkName, Sequence[LoRAFile]]
"""Adapters by DiT."""


@dataclasses.dataclass(frozen=True)
class Calibration(Config):
    """The measurements, means over prompts and branches.

    weights .. conventions: what they are valid for; `weights` is a `fingerprint`.
    steps, guidance, frames, height, width, prompts: of the runs measured.
    sigmas: `[steps]`.
    magnitude: `[steps]`: logarithm of the residual's magnitude, relative to the first step's.
    input_change, residual_change: `[steps - 1]`: relative L1 changes, from each step to the next, of the first block's
      modulated input and of the residual.
    polynomial: maps the first to the second; coefficients, highest first.
    thresholds: for teacache and magcache: thresholds that run the blocks in about half of the steps measured.
    difference_change: `[steps - 1]`: L1 changes, from each step to the next, of the unconditional less the conditional
      velocity, relative to the conditional one; empty if measured without guidance.
    boundary: of two experts (see `steps.boundary_name`); None for one DiT.
    starts: steps at which an expert begins. From the step before to such a one all changes are 0: networks differ.
    """

    weights: str
    task: str
    shift: float
    solver: str
    conventions: str
    steps: int
    guidance: float
    frames: int
    height: int
    width: int
    prompts: int
    sigmas: tuple[float, ...]
    magnitude: tuple[float, ...]
    input_change: tuple[float, ...]
    residual_change: tuple[float, ...]
    polynomial: tuple[float, ...]
    thresholds: dict[str, float]
    format: str = FORMAT
    difference_change: tuple[float, ...] = ()
    boundary: str | None = None
    starts: tuple[int, ...] = (0,)

    def ratios(self, sigmas: np.ndarray) -> np.ndarray:
        """The residual's magnitude at each of `sigmas` `[n]` (falling) over that at the one before; the first is 1."""
        curve = np.interp(-np.asarray(sigmas, np.float64), -np.asarray(self.sigmas), self.magnitude)  # [n]
        return np.exp(np.diff(curve, prepend=curve[:1]))

    def difference(self, sigmas: np.ndarray) -> np.ndarray:
        """How far the branches' difference has come at each of `sigmas` `[n]`: its changes from the start, added up."""
        way = np.cumsum([0, *self.difference_change])
        return np.interp(-np.asarray(sigmas, np.float64), -np.asarray(self.sigmas), way)

    def check(self, path: str, run: dict[str, Any]) -> None:
        """Raises `InputError` if a run differs in one of `MUST_AGREE`; `path` is for the message."""
        for name in MUST_AGREE:
            if getattr(self, name) != run[name]:
                raise InputError(
                    f"calibration {path} is for {name} {getattr(self, name)}, this run has {run[name]}; the same "
                    f"{', '.join(MUST_AGREE)} are needed; measure anew with wanjax calibrate"
                )

    def write(self, path: str) -> None:
        """The file appears whole or not at all."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        with replacing(Path(path)) as partial:
            partial.write_text(text + "\n")


def read(path: str) -> Calibration:
    """The file's calibration.

    Raises:
      InputError: it is none, or is damaged.
    """
    advice = "a file that wanjax calibrate wrote is accepted; give one, or make it anew"
    try:
        values: dict[str, Any] = read_json(path)
        values = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
        calibration = Calibration(**values)
        curves = (calibration.magnitude, calibration.sigmas, (0.0, *calibration.input_change))
        differences = calibration.difference_change or calibration.residual_change
        changes = ((0.0, *calibration.residual_change), (0.0, *differences))
        numbers = np.asarray([*curves, *changes], np.float64)  # equally long, and numbers
        coefficients = np.asarray(calibration.polynomial, np.float64)
        whole = numbers.shape == (5, calibration.steps) and coefficients.ndim == 1 and coefficients.size > 0
        whole = whole and np.isfinite(numbers).all() and np.isfinite(coefficients).all()
        whole = bool(whole) and bool(np.all(np.diff(numbers[1]) < 0)) and calibration.format == FORMAT
    except OSError as error:
        raise InputError(f"calibration {path} cannot be read ({error.strerror}); {advice}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"calibration {path} cannot be used (not its fields); {advice}") from error
    if not whole:
        raise InputError(f"calibration {path} cannot be used (tables of wrong length or values); {advice}")
    return calibration


def read_for(config: SampleConfig, checkpoint: Checkpoint, loras: Loras, task: str, shift: float) -> Calibration | None:
    """The calibration that is asked for, if it is for this run.

    Raises:
      InputError: it is not, or cannot be read.
    """
    if config.calibration is None:
        return None
    measured = read(config.calibration)
    measured.check(config.calibration, calibrated_for(config, checkpoint, loras, task, shift))
    return measured


def calibrated_for(
    config: SampleConfig, checkpoint: Checkpoint, loras: Loras, task: str, shift: float
) -> dict[str, Any]:
    """What a calibration's runs and those that use it must have in common: `MUST_AGREE`."""
    weights = weights_fingerprint(checkpoint, loras)
    boundary = boundary_name(config, checkpoint.boundary)
    same = {"solver": config.solver, "conventions": config.conventions, "boundary": boundary}
    return {"weights": weights, "task": task, "shift": float(shift), **same}


def weights_fingerprint(checkpoint: Checkpoint, loras: Loras = MappingProxyType({})) -> str:
    """Tells the weights of the DiT, with adapters, from others: a hash of files' sizes and of some of their bytes.

    Both ends and seven places between are read of each file, so that tens of gigabytes take no time; whoever changes
    single weights elsewhere is not found out.
    """
    digest = hashlib.sha256()
    files: list[tuple[Path, float]] = []
    for name in EXPERTS[: checkpoint.experts]:
        files += [(file.path, 1.0) for file in checkpoint.weights(name).files]
        files += [(lora.path, lora.strength) for lora in loras.get(name, ())]
    for path, strength in files:
        size = path.stat().st_size
        digest.update(f"{size} {strength}\n".encode())
        with path.open("rb") as stream:
            for part in range(9):
                stream.seek(math.floor(part / 8 * max(0, size - 2**16)))
                digest.update(stream.read(2**16))
    return digest.hexdigest()[:16]
