"""Steps of the sampler without most of the network: what changed little since an earlier step is used again.

    rules = make_rules(config, schedule, calibration)
    carry = solvers.init(noise), init(dit, rules, noise, control, branches)
    carry = denoise_steps(dit, schedule, rules, carry, control, context, guidance, 0, 50)

The step cache (`--cache`) keeps the residual of the whole block stack, `blocks(x) - x`, and adds it to later x:
  fixed:k      the blocks are run at every k-th step
  teacache:t   when the relative L1 changes of the first block's modulated input, each mapped by a polynomial to the
               change of the residual that it foretells, have added up to t since they last were
               (arXiv 2411.19108)
  magcache:t   when the error to expect, |1 - the residual's growth since|, has added up to t; not more than `SKIPS`
               times in a row, and never in the first steps (arXiv 2506.09045)

The CFG cache (`--cfg-cache k`) runs the unconditional branch, in the later part of sampling, at every k-th of the steps
that run the blocks; between, its velocity is the conditional one's plus their difference when it last ran
(FasterCache, arXiv 2410.19355). With guidance g, the guided velocity then is wrong by g - 1 times what the difference
has changed since; a calibration says from which step on that stays below `HARMLESS`.

Everything happens inside the jitted loop: the rules and what is kept are arrays, the choice is a `lax.switch`, so what
is left out is not computed. What the rules do not need is None in both, and the program has no trace of it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding.rules import constrain, repeat, replicate
from wanjax.config import SampleConfig
from wanjax.diffusion import solvers
from wanjax.errors import InputError
from wanjax.models.dit import Context, DiT, Tokens
from wanjax.sampling.calibration import Calibration

FAST = {"cache": "fixed:2", "cfg_cache": "2"}
"""What `--fast` stands for, where the flags do not say otherwise."""

RETAINED = 0.2  # share of the first steps that magcache leaves alone, as published
SKIPS = 4  # that it makes in a row
GUIDED = 0.4  # share of the first steps in which both branches of guidance are always run, unless it is measured
HARMLESS = 0.1  # error of the guided velocity, relative to the conditional one, that the CFG cache may make at a step
ACCEPTED = "accepted: off, fixed:K (K steps, 1 or more), teacache:T, magcache:T (T above 0)"


Array = Any  # numpy's on the host, jax's in the loop; None where it is not needed


class Rules(NamedTuple):
    """What is known before the run: arguments of the jitted loop."""

    fresh: Array
    """`[n]` bool: the blocks must be run at this step. None: at every step."""
    threshold: Array
    """teacache's t, float32; None: `fresh` is all there is."""
    polynomial: Array
    """teacache's coefficients, highest first, float32; or None."""
    every: Array
    """The CFG cache's k, int32; None: both branches always."""
    late: Array
    """`[n]` bool: the unconditional branch may be left out at this step. None: at none."""


class CacheState(NamedTuple):
    """What a step leaves to the next; beside it goes the solver's state. What the rules do not need is None."""

    evaluations: jax.Array
    """Evaluations of the DiT so far, float32; of one of two branches: half."""
    residual: Array
    """Of the block stack when it last ran, `[branches, l, e]`."""
    first_input: Array
    """teacache: the first block's modulated input at the step before, `[1, l, e]`."""
    change: Array
    """teacache: sum of the changes foretold since the blocks last ran, float32."""
    difference: Array
    """CFG cache: unconditional less conditional velocity when both last ran, float32 `[1, f, h, w, c]`."""
    alone: Array
    """CFG cache: how often the conditional branch has run alone since, int32."""


# -------------------------------------------------------------------------------------------------------- before a run


def switches(config: SampleConfig) -> tuple[str, float, int]:
    """The step cache's kind and number, and k of the CFG cache; what changes nothing is ("off", 0, 1).

    Raises:
      InputError: they cannot be read.
    """
    preset = FAST if config.fast else {}
    text = config.cache or preset.get("cache", "off")
    kind, _, given = text.partition(":")
    number = _number(given)
    valid = {"off": not given, "fixed": number >= 1 and number == int(number)}
    if not valid.get(kind, kind in ("teacache", "magcache") and number > 0):
        raise InputError(f"cache {text!r}; {ACCEPTED}; for example --cache fixed:2")
    if kind == "fixed" and number == 1:
        kind = "off"

    text = config.cfg_cache or (preset.get("cfg_cache", "off") if config.guidance != 1 else "off")
    if text != "off" and not (text.isdecimal() and int(text) > 0):
        raise InputError(f"cfg-cache {text!r}; accepted: off, or a number of steps from 1; for example --cfg-cache 2")
    every = 1 if text == "off" else int(text)
    if every > 1 and config.guidance == 1:
        raise InputError(
            f"cfg-cache {every} with guidance 1, which has no unconditional branch; guidance above 1 is needed; "
            "leave --cfg-cache out"
        )
    return kind, 0.0 if kind == "off" else number, every


def make_rules(
    config: SampleConfig, schedule: solvers.Schedule, calibration: Calibration | None = None
) -> Rules | None:
    """The rules of a run; None if every step does everything.

    Args:
      config: its switches; its checkpoint is named in errors.
      schedule: the solver's.
      calibration: of this checkpoint and schedule; teacache and magcache need one, the CFG cache starts by it.

    Raises:
      InputError: a switch cannot be read, or needs a calibration.
    """
    kind, number, every = switches(config)
    if kind in ("teacache", "magcache") and calibration is None:
        raise InputError(
            f"cache {kind} needs measurements of this checkpoint, shift and solver; give --calibration FILE, made by "
            f"python -m wanjax.sampling.calibrate --checkpoint {config.checkpoint} --output FILE (see its --help)"
        )
    steps = len(schedule.timesteps)
    fresh = threshold = polynomial = late = None
    if kind == "fixed":
        fresh = np.arange(steps) % int(number) == 0
    elif kind == "teacache" and calibration is not None:
        fresh = np.isin(np.arange(steps), (0, steps - 1))
        threshold, polynomial = np.float32(number), np.asarray(calibration.polynomial, np.float32)
    elif kind == "magcache" and calibration is not None:
        fresh = magnitude_schedule(calibration.ratios(schedule.sigmas[:-1]), number)
    if every > 1:
        start = math.ceil(GUIDED * steps)
        if calibration is not None and calibration.difference_change:
            ran = fresh if threshold is None else None
            start = cfg_start(calibration, schedule.sigmas[:-1], config.guidance, every, ran)
        late = np.arange(steps) >= start
    if fresh is None and late is None:
        return None
    return Rules(fresh, threshold, polynomial, np.int32(every) if late is not None else None, late)


def cfg_start(
    calibration: Calibration, sigmas: np.ndarray, guidance: float, every: int, fresh: np.ndarray | None = None
) -> int:
    """The first step from which on no step's restored branch would be wrong by more than `HARMLESS`; n: there is none.

    Args:
      calibration: measured with guidance.
      sigmas: `[n]`, of the steps.
      guidance: of the run.
      every: the CFG cache's k: the difference is at most k - 1 evaluations old.
      fresh: `[n]` bool, the steps that run the blocks; None: all.
    """
    ran = np.arange(len(sigmas)) if fresh is None else np.flatnonzero(fresh)
    way = calibration.difference(sigmas)[ran]
    before = way[np.maximum(np.arange(len(ran)) - (every - 1), 0)]
    harmful = abs(guidance - 1) * (way - before) > HARMLESS
    harmful[0] = True  # there is no difference yet
    return int(ran[harmful][-1]) + 1


def magnitude_schedule(ratios: np.ndarray, threshold: float) -> np.ndarray:
    """magcache: at which steps the blocks are run, bool `[n]`.

    Args:
      ratios: `[n]`: the residual's magnitude over that of the step before.
      threshold: what the errors of reused steps may add up to.
    """
    fresh = np.ones(len(ratios), bool)
    growth, error, skips = 1.0, 0.0, 0
    for i in range(max(1, math.ceil(RETAINED * len(ratios))), len(ratios)):
        growth *= ratios[i]
        error += abs(1 - growth)
        skips += 1
        fresh[i] = error >= threshold or skips > SKIPS
        if fresh[i]:
            growth, error, skips = 1.0, 0.0, 0
    return fresh


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


# ---------------------------------------------------------------------------------------------------------- in the loop


@functools.partial(jax.jit, static_argnames="branches")
def init(dit: DiT, rules: Rules, sample: jax.Array, control: jax.Array | None, branches: int) -> CacheState:
    """Nothing kept yet. Latents and control branch as in the loop; `branches`: 2 with guidance, else 1."""
    tokens = dit.embed(latents(sample, control), jnp.zeros(1))
    by_change = rules.threshold is not None
    return CacheState(
        evaluations=jnp.zeros(()),
        residual=jnp.zeros_like(_branches(tokens.x, branches)) if rules.fresh is not None else None,
        first_input=jnp.zeros_like(tokens.x) if by_change else None,
        change=jnp.zeros(()) if by_change else None,
        difference=replicate(jnp.zeros(sample.shape)) if rules.late is not None else None,
        alone=jnp.zeros((), jnp.int32) if rules.late is not None else None,
    )


@functools.partial(jax.jit, donate_argnames="carry")
def denoise_steps(
    dit: DiT,
    schedule: solvers.Schedule,
    rules: Rules,
    carry: tuple[solvers.SolverState, CacheState],
    control: jax.Array | None,
    context: Context,
    guidance: jax.Array | float,
    start: jax.Array | int,
    stop: jax.Array | int,
) -> tuple[solvers.SolverState, CacheState]:
    """`pipeline.denoise_steps` by the rules: the same arguments, and what is kept beside the solver's state."""
    rules, schedule = jax.tree.map(jnp.asarray, (rules, schedule))

    def body(i: jax.Array, carry: tuple[solvers.SolverState, CacheState]):
        state, cache = carry
        # Both branches of guidance see the same latents at the same time: their tokens are made once.
        tokens = dit.embed(latents(state.sample, control), schedule.timesteps[i][None])
        velocity, cache = predict(dit, rules, i, tokens, context, cache)
        return solvers.step(schedule, i, state, guided(velocity, guidance)), cache

    return jax.lax.fori_loop(start, stop, body, carry)


def predict(
    dit: DiT, rules: Rules, i: jax.Array, tokens: Tokens, context: Context, cache: CacheState
) -> tuple[jax.Array, CacheState]:
    """Velocities `[branches, f, h, w, c]` of step i, and what is kept.

    Args:
      dit: the network; what only `context()` needs may be missing.
      rules: on the device.
      i: which step.
      tokens: from `dit.embed`, batch 1.
      context: from `dit.context`; a batch of two: the prompt, then the negative prompt.
      cache: from `init` or the step before.
    """
    branches = context.k.shape[1]

    def whole(cache: CacheState) -> tuple[jax.Array, CacheState]:
        velocity, residual = evaluate(dit, tokens, context, branches)
        if cache.residual is not None:
            cache = cache._replace(residual=residual)
        if cache.difference is not None:
            cache = cache._replace(difference=velocity[1:] - velocity[:1], alone=jnp.zeros((), jnp.int32))
        return velocity, cache._replace(evaluations=cache.evaluations + 1)

    def conditional(cache: CacheState) -> tuple[jax.Array, CacheState]:
        positive, residual = evaluate(dit, tokens, jax.tree.map(lambda x: x[:, :1], context), 1)
        if cache.residual is not None:
            cache = cache._replace(residual=jnp.concatenate([residual, cache.residual[1:]]))
        velocity = jnp.concatenate([positive, positive + cache.difference])
        return velocity, cache._replace(alone=cache.alone + 1, evaluations=cache.evaluations + 0.5)

    def reused(cache: CacheState) -> tuple[jax.Array, CacheState]:
        velocity = replicate(dit.velocity(_branches(tokens.x, branches) + cache.residual, tokens))
        if cache.difference is not None:  # the unconditional residual is older than the difference's other half
            restored = velocity[:1] + cache.difference
            velocity = jnp.concatenate([velocity[:1], jnp.where(cache.alone > 0, restored, velocity[1:])])
        return velocity, cache

    run, cache = _must_run(dit, rules, i, tokens, cache)
    choices = [whole]
    choice = jnp.int32(0)
    if rules.late is not None:
        choice = jnp.where(rules.late[i] & (cache.alone + 1 < rules.every), len(choices), choice)
        choices.append(conditional)
    if run is not None:
        choice = jnp.where(run, choice, len(choices))
        choices.append(reused)
    return jax.lax.switch(choice, choices, cache)


def _must_run(
    dit: DiT, rules: Rules, i: jax.Array, tokens: Tokens, cache: CacheState
) -> tuple[jax.Array | None, CacheState]:
    """Whether the blocks must be run at step i; None: always."""
    if rules.fresh is None:
        return None, cache
    run = rules.fresh[i]
    if rules.threshold is not None:
        first_input = dit.first_input(tokens)
        change = relative_change(first_input, cache.first_input, tokens.rotation.length)
        total = cache.change + jnp.maximum(jnp.polyval(rules.polynomial, change), 0)
        run = run | (total >= rules.threshold)
        cache = cache._replace(first_input=first_input, change=jnp.where(run, 0, total))
    return run, cache


def relative_change(x: jax.Array, before: jax.Array, length: int) -> jax.Array:
    """Mean of |x - before| over that of |before|, `[b, l, e]` both; tokens from `length` on do not count."""
    counts = (jnp.arange(x.shape[1]) < length)[:, None]
    x, before = (jnp.where(counts, y.astype(jnp.float32), 0) for y in (x, before))  # sums of many bf16 numbers
    return jnp.sum(jnp.abs(x - before)) / jnp.maximum(jnp.sum(jnp.abs(before)), 1e-6)


def evaluate(dit: DiT, tokens: Tokens, context: Context, branches: int) -> tuple[jax.Array, jax.Array]:
    """Velocity, whole on every device, and residual of the block stack."""
    x = _branches(tokens.x, branches)
    out = dit.run_blocks(x, tokens, context)
    return replicate(dit.velocity(out, tokens)), out - x


def _branches(x: jax.Array, branches: int) -> jax.Array:
    """Tokens `[1, l, e]` for every branch, laid out as the blocks want them."""
    return constrain(repeat(x, branches, axis=0), "batch", "tokens", None)  # [branches, l, e]


def guided(velocity: jax.Array, guidance: jax.Array | float) -> jax.Array:
    """Classifier-free guidance: `[branches, f, h, w, c]` -> `[1, f, h, w, c]`."""
    if len(velocity) == 1:
        return velocity
    positive, negative = jnp.split(velocity, 2)
    return negative + guidance * (positive - negative)  # [1, f, h, w, c]


def latents(sample: jax.Array, control: jax.Array | None) -> jax.Array:
    """What the network sees: `[1, f, h, w, 16]` and, where there is a control branch, its 20 channels."""
    return sample if control is None else jnp.concatenate([sample, control], axis=-1)
