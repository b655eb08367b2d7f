"""From the switches of a request to the rules of the step caches (`wanjax.diffusion.caching`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from wanjax.config import SampleConfig
from wanjax.diffusion import solvers
from wanjax.diffusion.caching import Rules, magnitude_schedule
from wanjax.errors import InputError
from wanjax.sampling.calibration import Calibration
from wanjax.sampling.steps import is_guided, scales

FAST = {"cache": "fixed:2", "cfg_cache": "2"}
"""What `--fast` stands for, where the flags do not say otherwise."""
CFG_WARMUP_SHARE = 0.4
"""Of the steps: the first ones, in which both branches of guidance are always run, unless a calibration says more."""
MAX_CFG_ERROR = 0.1
"""Of the guided velocity, relative to the conditional one, that the CFG cache may make at a step."""
MOST_STEPS = 10_000
ACCEPTED = "accepted: off, fixed:K (K steps, 1 or more), teacache:T, magcache:T (T above 0)"


def switches(config: SampleConfig) -> tuple[str, float, int]:
    """The step cache's kind and number, and k of the CFG cache; what changes nothing is ("off", 0, 1).

    Raises:
      InputError: they cannot be read.
    """
    preset = FAST if config.fast else {}
    text = config.cache or preset.get("cache", "off")
    kind, _, given = text.partition(":")
    number = _number(given)
    valid = {"off": not given, "fixed": 1 <= number <= MOST_STEPS and number == int(number)}
    if not valid.get(kind, kind in ("teacache", "magcache") and number > 0):
        raise InputError(f"cache {text!r}; {ACCEPTED}; for example --cache fixed:2")
    if kind == "fixed" and number == 1:
        kind = "off"

    text = config.cfg_cache or (preset.get("cfg_cache", "off") if is_guided(config) else "off")
    if text != "off" and not (text.isdecimal() and len(text) < 10 and 0 < int(text) <= MOST_STEPS):
        raise InputError(
            f"cfg-cache {text!r}; accepted: off, or a number of steps from 1 to {MOST_STEPS}; for example --cfg-cache 2"
        )
    every = 1 if text == "off" else int(text)
    if every > 1 and not is_guided(config):
        raise InputError(
            f"cfg-cache {every} with guidance 1, which has no unconditional branch; guidance above 1 is needed; "
            "leave --cfg-cache out"
        )
    return kind, 0.0 if kind == "off" else number, every


def make_rules(
    config: SampleConfig,
    schedule: solvers.Schedule,
    calibration: Calibration | None = None,
    starts: Sequence[int] = (0,),
) -> Rules | None:
    """The rules of a run; None if every step does everything.

    Args:
      config: its switches; its checkpoint is named in errors.
      schedule: the solver's.
      calibration: of this checkpoint and schedule; teacache and magcache need one, the CFG cache starts by it.
      starts: steps at which nothing is kept yet: the first, and where another expert takes over.

    Raises:
      InputError: a switch cannot be read, or needs a calibration.
    """
    kind, number, every = switches(config)
    if kind in ("teacache", "magcache") and calibration is None:
        raise InputError(
            f"cache {kind} needs measurements of this checkpoint, shift and solver; give --calibration FILE, made by "
            f"wanjax calibrate --checkpoint {config.checkpoint} --output FILE (see its --help)"
        )
    steps = len(schedule.timesteps)
    begins = np.isin(np.arange(steps), starts)
    recompute = threshold = polynomial = may_skip_uncond = None
    if kind == "fixed":
        since = np.arange(steps) - np.maximum.accumulate(np.where(begins, np.arange(steps), 0))
        recompute = since % int(number) == 0
    elif kind == "teacache" and calibration is not None:
        recompute = begins | np.isin(np.arange(steps), (0, steps - 1))
        threshold, polynomial = np.float32(number), np.asarray(calibration.polynomial, np.float32)
    elif kind == "magcache" and calibration is not None:
        recompute = magnitude_schedule(calibration.ratios(schedule.sigmas[:-1]), number, starts)
    if every > 1:
        start = math.ceil(CFG_WARMUP_SHARE * steps)
        if calibration is not None and calibration.difference_change:
            ran = recompute if threshold is None else None
            scale = max(scales(config), key=lambda x: abs(x - 1))
            start = cfg_start(calibration, schedule.sigmas[:-1], scale, every, ran)
        may_skip_uncond = (np.arange(steps) >= start) & ~begins
    if recompute is None and may_skip_uncond is None:
        return None
    interval = None if may_skip_uncond is None else np.int32(every)
    return Rules(recompute, threshold, polynomial, interval, may_skip_uncond)


def cfg_start(
    calibration: Calibration, sigmas: np.ndarray, guidance: float, every: int, recompute: np.ndarray | None = None
) -> int:
    """The first step from which on no restored branch would be wrong by more than `MAX_CFG_ERROR`; n: there is none.

    Args:
      calibration: measured with guidance.
      sigmas: `[n]`, of the steps.
      guidance: of the run.
      every: the CFG cache's k: the difference is at most k - 1 evaluations old.
      recompute: `[n]` bool, the steps that run the blocks; None: all.
    """
    ran = np.arange(len(sigmas)) if recompute is None else np.flatnonzero(recompute)
    way = calibration.difference(sigmas)[ran]
    before = way[np.maximum(np.arange(len(ran)) - (every - 1), 0)]
    harmful = abs(guidance - 1) * (way - before) > MAX_CFG_ERROR
    harmful[0] = True  # there is no difference yet
    return int(ran[harmful][-1]) + 1


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0
