"""Measures how a network changes from step to step, for the rules of the step caches; see `wanjax calibrate`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding.rules import replicate
from wanjax.config import SampleConfig
from wanjax.diffusion import caching
from wanjax.diffusion.denoise import network_input
from wanjax.diffusion.guidance import guided
from wanjax.errors import InputError
from wanjax.models.dit import Context, DiT
from wanjax.sampling import cache_rules
from wanjax.sampling.calibration import Calibration, calibrated_for
from wanjax.sampling.pipeline import Pipeline, Step
from wanjax.sampling.request import Request

DEGREE = 4  # of teacache's polynomial, as published


class Change(NamedTuple):
    """From a step to the next, scalars: relative L1 changes of the first block's modulated input and of the residual,
    the logarithm of the residual's growth, and with guidance the L1 change of the branches' difference, relative to the
    conditional velocity.
    """

    modulated_input: jax.Array
    residual: jax.Array
    growth: jax.Array
    cfg_delta: jax.Array | None


class Measurements(NamedTuple):
    """Of a step: the first block's modulated input `[1, l, e]`, the residual `[branches, l, e]` and, with guidance, the
    unconditional less the conditional velocity `[1, f, h, w, c]`; and what changed since the step before, which says
    nothing at the first.
    """

    modulated_input: jax.Array
    residual: jax.Array
    cfg_delta: jax.Array | None
    change: Change


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """The plain predictor, which measures how the network changes from step to step; for one video.

    dit, context, image_condition, guidance: as `wanjax.diffusion.denoise.Guided`'s, of batch 1.
    """

    dit: DiT
    context: Context
    image_condition: jax.Array | None
    guidance: jax.Array | float

    def with_guidance(self, guidance: float) -> Measured:
        """See `wanjax.diffusion.denoise.Predictor`."""
        return dataclasses.replace(self, guidance=guidance)

    def init(self, sample: jax.Array) -> Measurements:
        """Zeros."""
        branches = self.context.k.shape[1]
        x = self.dit.embed(network_input(sample, self.image_condition), jnp.zeros(1)).x
        cfg_delta, none = (replicate(jnp.zeros(sample.shape)), jnp.zeros(())) if branches == 2 else (None, None)
        change = Change(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), none)
        return Measurements(jnp.zeros_like(x), jnp.zeros_like(caching.per_branch(x, branches)), cfg_delta, change)

    def __call__(
        self, i: jax.Array, timestep: jax.Array, sample: jax.Array, memory: Measurements
    ) -> tuple[jax.Array, Measurements]:
        """See `wanjax.diffusion.denoise.Predictor`."""
        branches, dit = self.context.k.shape[1], self.dit
        tokens = dit.embed(network_input(sample, self.image_condition), timestep[None])
        velocity, residual = caching.evaluate(dit, tokens, self.context, branches)
        modulated_input, length = dit.modulated_input(tokens), tokens.rotation.length
        cfg_delta = velocity[1:] - velocity[:1] if branches == 2 else None
        change = Change(
            caching.relative_change(modulated_input, memory.modulated_input, length),
            caching.relative_change(residual, memory.residual, length),
            growth(residual, memory.residual, length),
            moved(cfg_delta, memory.cfg_delta, velocity[:1]),
        )
        return guided(velocity, self.guidance, branches), Measurements(modulated_input, residual, cfg_delta, change)


def moved(x: jax.Array | None, before: jax.Array | None, velocity: jax.Array) -> jax.Array | None:
    """Mean of |x - before| over that of the conditional |velocity|, all `[1, f, h, w, c]`; None without guidance."""
    return None if x is None or before is None else jnp.abs(x - before).mean() / jnp.abs(velocity).mean()


def growth(x: jax.Array, before: jax.Array, length: int) -> jax.Array:
    """Logarithm of the mean, over branches and tokens before `length`, of |x| over |before|, `[b, l, e]` both."""
    sizes, sizes_before = (jnp.linalg.norm(y.astype(jnp.float32), axis=-1) for y in (x, before))  # [b, l]
    ratios = jnp.where(jnp.arange(x.shape[1]) < length, sizes / jnp.maximum(sizes_before, 1e-6), 0)
    return jnp.log(jnp.sum(ratios) / (len(x) * length))


def measure(pipe: Pipeline, request: Request) -> np.ndarray:
    """One plain run without decoding: `[steps - 1, k]`, those numbers of `Change` that there are, a row a step.

    Where another expert takes over, nothing has changed: there is nothing to compare with.
    """
    changes: list[list[float]] = []
    starts = {phase.first for phase in request.phases}

    def keep(step: Step) -> None:
        row = [float(x) for x in jax.tree.leaves(step.memory.change)]
        changes.append([0.0] * len(row) if step.done - 1 in starts else row)

    pipe(request, on_step=keep, predictor=make_measured, decode=False)
    return np.asarray(changes[1:])


def make_measured(
    request: Request, dit: DiT, context: Context, image_condition: jax.Array | None, guidance: float
) -> Measured:
    """What measures a request."""
    return Measured(dit, context, image_condition, guidance)


def calibrate(config: SampleConfig, prompts: Sequence[dict[str, Any]] = ({},)) -> Calibration:
    """Measurements of plain runs.

    Args:
      config: of the runs; its caches do not count.
      prompts: settings in which they differ: prompts, pictures, seeds.

    Raises:
      InputError: a configuration cannot be used, has fewer than three steps, or the network's output is not finite.
    """
    config = dataclasses.replace(config, cache=None, cfg_cache=None, calibration=None, fast=False)
    pipe = Pipeline(config)
    requests = [pipe.prepare(**settings) for settings in prompts]
    if requests[0].config.steps < 3:
        raise InputError(
            f"{requests[0].config.steps} steps to measure; 3 or more are needed; use those that you sample with"
        )
    first, networks = requests[0], pipe.networks
    if len({phase.branches for phase in first.phases}) > 1:
        raise InputError(
            "guidance 1 in some steps and not in others; one kind of step is measured; calibrate with guidance in all "
            "steps or in none"
        )
    changes = np.mean([measure(pipe, request) for request in requests], axis=0)  # [steps - 1, k]
    if not np.isfinite(changes).all():
        raise InputError("the network's output became NaN or infinite; finite weights are needed; try --dtype float32")
    inputs, residuals, growths, *differences = changes.T
    starts = tuple(phase.first for phase in first.phases)
    within = ~np.isin(np.arange(1, first.config.steps), starts)
    calibration = Calibration(
        **calibrated_for(config, networks.checkpoint, networks.loras, first.task, first.shift),
        steps=first.config.steps,
        guidance=max(first.guidance, key=lambda scale: abs(scale - 1)),
        frames=config.frames,
        height=first.height,
        width=first.width,
        prompts=len(requests),
        sigmas=_floats(first.schedule.sigmas[:-1]),
        magnitude=_floats(np.cumsum([0, *growths])),
        input_change=_floats(inputs),
        residual_change=_floats(residuals),
        polynomial=_floats(fit(inputs[within], residuals[within])),
        thresholds={},
        difference_change=_floats(differences[0]) if differences else (),
        starts=starts,
    )
    return dataclasses.replace(calibration, thresholds=halving(calibration))


def fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coefficients, highest first, of a polynomial of `DEGREE` that is near the points; of less where they are few."""
    degree = min(DEGREE, max(1, len(x) // 4))
    return np.polynomial.Polynomial.fit(x, y, degree).convert().coef[::-1]


def halving(calibration: Calibration) -> dict[str, float]:
    """For teacache and magcache: the least thresholds, to 1%, that run the blocks in no more than half of the steps."""
    tried = np.geomspace(1e-4, 1e2, 1400)
    found = {
        kind: next((t for t in tried if schedule(t).sum() <= calibration.steps / 2), None)
        for kind, schedule in schedules(calibration).items()
    }
    return {kind: float(f"{t:.5g}") for kind, t in found.items() if t is not None}


def schedules(calibration: Calibration) -> dict[str, Callable[[float], np.ndarray]]:
    """For teacache and magcache: given a threshold, at which of the steps measured the blocks would run, bool `[n]`."""
    foretold = np.maximum(np.polyval(calibration.polynomial, calibration.input_change), 0)
    ratios = calibration.ratios(np.asarray(calibration.sigmas))
    return {
        "teacache": functools.partial(change_schedule, foretold, starts=calibration.starts),
        "magcache": functools.partial(caching.magnitude_schedule, ratios, starts=calibration.starts),
    }


def change_schedule(changes: np.ndarray, threshold: float, starts: Sequence[int] = (0,)) -> np.ndarray:
    """teacache: at which steps the blocks are run, bool `[n]`, for changes `[n - 1]` foretold from step to step and
    steps at which nothing is kept yet.
    """
    recompute, total = np.isin(np.arange(len(changes) + 1), (0, *starts, len(changes))), 0.0
    for i, change in enumerate(changes, start=1):
        total += change
        recompute[i] |= total >= threshold
        total = 0.0 if recompute[i] else total
    return recompute


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(x) for x in values)


def report(calibration: Calibration) -> str:
    """A table of the measurements, and what to do with them."""
    ran = {kind: schedules(calibration)[kind](t) for kind, t in calibration.thresholds.items()}
    columns = {"input change": calibration.input_change, "residual change": calibration.residual_change}
    columns["growth"] = _floats(calibration.ratios(np.asarray(calibration.sigmas))[1:])
    if calibration.difference_change:
        columns["guided error"] = _floats(abs(calibration.guidance - 1) * np.asarray(calibration.difference_change))
    lines = [" ".join(["step   sigma", *columns, *ran])]
    for i, sigma in enumerate(calibration.sigmas):
        changes = [f"{f'{x[i - 1]:.4f}' if i else '-':>{len(name)}}" for name, x in columns.items()]
        marks = [f"{'runs' if recompute[i] else '-':>{len(kind)}}" for kind, recompute in ran.items()]
        lines.append(" ".join([f"{i:4} {sigma:7.4f}", *changes, *marks]))
    for kind, recompute in ran.items():
        steps = " ".join(map(str, np.flatnonzero(recompute)))
        lines.append(f"half of the steps: --cache {kind}:{calibration.thresholds[kind]:g} runs steps {steps}")
    if calibration.difference_change:
        lines += [start_of_cfg_cache(calibration, every) for every in (2, 4)]
    return "\n".join(lines)


def start_of_cfg_cache(calibration: Calibration, every: int) -> str:
    """What `--cfg-cache` would do with the steps and the guidance measured."""
    n = calibration.steps
    start = cache_rules.cfg_start(calibration, np.asarray(calibration.sigmas), calibration.guidance, every)
    where = f"from step {start} of {n} on ({start / n:.0%})" if start < n else "nowhere: leave it out"
    return f"guided error up to {cache_rules.MAX_CFG_ERROR:g}: --cfg-cache {every} {where}"
