"""What is done at which step: which of two experts is asked, and how strongly its guidance counts.

Wan2.2's expert for high noise, "dit", takes the steps whose timestep is at or above the boundary; the one for low
noise, "dit_low", the others (Wan2.2 `wan/image2video.py`). The solver's state goes through both. Guidance is a scale
for each step; where it is 1, only the conditional branch is run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from wanjax.config import SampleConfig
from wanjax.diffusion.flow import NUM_TIMESTEPS
from wanjax.diffusion.solvers import Schedule
from wanjax.errors import InputError
from wanjax.weights.mapping import NetworkName


class Phase(NamedTuple):
    """Steps `first` to `stop - 1`, which one expert takes with 2 branches (guidance) or 1."""

    expert: NetworkName
    first: int
    stop: int
    branches: int


def scales(config: SampleConfig) -> tuple[float, ...]:
    """Every guidance scale that is asked for.

    Raises:
      InputError: one is no finite number, there is none, or there are a list by step and one for the second expert.
    """
    if isinstance(config.guidance, tuple) and config.guidance_low is not None:
        raise InputError(
            f"--guidance {_listed(config.guidance)} by step and --guidance-low {config.guidance_low:g}; one scale for "
            "each expert or one for each step is accepted; leave --guidance-low out"
        )
    given = config.guidance if isinstance(config.guidance, tuple) else (config.guidance,)
    given += () if config.guidance_low is None else (config.guidance_low,)
    for scale in given or (math.nan,):
        if not math.isfinite(scale):
            raise InputError(f"guidance {scale}; a finite number is accepted; use 5, or 1 for none")
    return given


def is_guided(config: SampleConfig) -> bool:
    """Whether any step has an unconditional branch."""
    return any(scale != 1 for scale in scales(config))


def steps_of_high(config: SampleConfig, schedule: Schedule, boundary: float | None) -> int:
    """How many steps the expert for high noise takes; all, where there is no other.

    Args:
      config: may say a boundary, or a number of steps.
      schedule: of the solver.
      boundary: the checkpoint's; None: it has one DiT.

    Raises:
      InputError: a boundary outside of 0 to 1, a step outside of the schedule, both, or either for one DiT.
    """
    steps, asked, step = len(schedule.timesteps), config.boundary, config.boundary_step
    if boundary is None:
        for name in ("boundary", "boundary_step", "guidance_low"):
            if getattr(config, name) is not None:
                flag = name.replace("_", "-")
                raise InputError(
                    f"--{flag} {getattr(config, name):g} with a checkpoint of one DiT; two experts are needed "
                    f"(Wan2.2-A14B); leave --{flag} out"
                )
        return steps
    if asked is not None and step is not None:
        raise InputError(f"--boundary {asked:g} and --boundary-step {step}; one of them is accepted; leave one out")
    if step is not None and not 0 <= step <= steps:
        raise InputError(f"--boundary-step {step} of {steps} steps; 0 to {steps} is accepted; change it")
    if asked is not None and not 0 <= asked <= 1:
        raise InputError(f"--boundary {asked:g}; 0 to 1 is accepted, of the timesteps' {NUM_TIMESTEPS}; use 0.9")
    share = boundary if asked is None else asked
    return int(np.sum(schedule.timesteps.astype(np.float64) >= share * NUM_TIMESTEPS)) if step is None else step


def guidance_by_step(config: SampleConfig, steps: int, high: int) -> np.ndarray:
    """The scale of every step, `[steps]`; `high` of them are the first expert's.

    Raises:
      InputError: as `scales`, or a list is not as long as the schedule.
    """
    scales(config)
    if isinstance(config.guidance, tuple):
        if len(config.guidance) != steps:
            raise InputError(
                f"--guidance {_listed(config.guidance)} for {steps} steps; one number, or one for each step is accepted"
            )
        return np.asarray(config.guidance, np.float64)
    low = config.guidance if config.guidance_low is None else config.guidance_low
    return np.where(np.arange(steps) < high, config.guidance, low).astype(np.float64)


def phases(guidance: np.ndarray, high: int) -> tuple[Phase, ...]:
    """The runs of steps of one expert and one number of branches.

    Args:
      guidance: `[n]`, of every step.
      high: how many steps the expert for high noise takes.
    """
    kinds: list[tuple[NetworkName, int]]
    kinds = [("dit" if i < high else "dit_low", 1 if scale == 1 else 2) for i, scale in enumerate(guidance)]
    starts = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]]
    stops = [*starts[1:], len(kinds)]
    return tuple(Phase(kinds[i][0], i, stop, kinds[i][1]) for i, stop in zip(starts, stops, strict=True))


def boundary_name(config: SampleConfig, boundary: float | None) -> str | None:
    """What a run's boundary is called in a calibration; None for one DiT."""
    if boundary is None:
        return None
    if config.boundary_step is not None:
        return f"step {config.boundary_step}"
    return f"{boundary if config.boundary is None else config.boundary:g}"


def describe_guidance(config: SampleConfig) -> str:
    """As the command line takes it."""
    if isinstance(config.guidance, tuple):
        return _listed(config.guidance)
    low = "" if config.guidance_low is None else f", {config.guidance_low} for low noise"
    return f"{config.guidance}{low}"


def _listed(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{x:g}" for x in numbers)
