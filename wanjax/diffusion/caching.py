"""Step caches: steps of the sampler that reuse what an earlier step computed instead of running most of the network.

    rules = sampling.cache_rules.make_rules(config, schedule, calibration)
    predictor = Cached(dit, context, image_condition, guidance, rules)  # for the loop of `denoise.py`

The step cache (`--cache`) keeps the residual of the whole block stack, `blocks(x) - x`, and adds it to later x:
  fixed:k      the blocks are run at every k-th step
  teacache:t   when the relative L1 changes of the first block's modulated input, each mapped by a polynomial to the
               change of the residual that it foretells, have added up to t since they last were
               (arXiv 2411.19108)
  magcache:t   when the error to expect, |1 - the residual's growth since|, has added up to t; not more than
               `MAGCACHE_MAX_SKIPS` times in a row, and never in the first steps (arXiv 2506.09045)

The CFG cache (`--cfg-cache k`) runs the unconditional branch, in the later part of sampling, at every k-th of the steps
that run the blocks; between, its velocity is the conditional one's plus their difference when it last ran
(FasterCache, arXiv 2410.19355). With guidance g, the guided velocity then is wrong by g - 1 times what the difference
has changed since; a calibration says from which step on that stays below `MAX_CFG_ERROR`.

Everything happens inside the compiled loop: rules and memory are arrays, the choice is a `lax.switch`, so what is left
out is not computed. Disabled features are None in Rules and CacheState, so they compile to nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding.rules import constrain, repeat, replicate
from wanjax.diffusion.denoise import network_input
from wanjax.diffusion.guidance import guided
from wanjax.models.dit import Context, DiT, Tokens

MAGCACHE_WARMUP_SHARE = 0.2
"""Of the steps: the first ones, which magcache leaves alone, as published."""
MAGCACHE_MAX_SKIPS = 4
"""Steps in a row that magcache skips."""

Array = Any  # numpy's on the host, jax's in the loop; None where it is not needed


class Rules(NamedTuple):
    """What is known before the run: arguments of the compiled loop."""

    recompute: Array
    """`[n]` bool: the blocks must be run at this step. None: at every step."""
    threshold: Array
    """teacache's t, float32; None: `recompute` is all there is."""
    polynomial: Array
    """teacache's coefficients, highest first, float32; or None."""
    uncond_interval: Array
    """The CFG cache's k, int32; None: both branches always."""
    may_skip_uncond: Array
    """`[n]` bool: the unconditional branch may be left out at this step. None: at none."""


class CacheState(NamedTuple):
    """What a step leaves to the next. What the rules do not need is None."""

    evaluations: jax.Array
    """DiT forward passes so far, float32; running only one branch of guidance counts 0.5."""
    residual: Array
    """Of the block stack when it last ran, `[branches, l, e]`."""
    modulated_input: Array
    """teacache: of the first block at the step before, `[1, l, e]`."""
    predicted_change: Array
    """teacache: sum of the changes foretold since the blocks last ran, float32."""
    cfg_delta: Array
    """CFG cache: unconditional less conditional velocity when both last ran, float32 `[1, f, h, w, c]`."""
    steps_since_uncond: Array
    """CFG cache: how often the conditional branch has run alone since, int32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cached:
    """The predictor that skips by `rules`; a `wanjax.diffusion.denoise.Predictor` for one video.

    dit, context, image_condition, guidance: as `wanjax.diffusion.denoise.Guided`'s, of batch 1.
    rules: which steps compute what.
    """

    dit: DiT
    context: Context
    image_condition: jax.Array | None
    guidance: jax.Array | float
    rules: Rules

    @property
    def branches(self) -> int:
        """2 with guidance, else 1."""
        return self.context.k.shape[1]

    def with_guidance(self, guidance: float) -> Cached:
        """See `Predictor`."""
        return dataclasses.replace(self, guidance=guidance)

    def init(self, sample: jax.Array) -> CacheState:
        """Nothing kept yet."""
        rules, tokens = self.rules, self.dit.embed(network_input(sample, self.image_condition), jnp.zeros(1))
        by_change = rules.threshold is not None
        by_branch = rules.may_skip_uncond is not None
        return CacheState(
            evaluations=jnp.zeros(()),
            residual=jnp.zeros_like(per_branch(tokens.x, self.branches)) if rules.recompute is not None else None,
            modulated_input=jnp.zeros_like(tokens.x) if by_change else None,
            predicted_change=jnp.zeros(()) if by_change else None,
            cfg_delta=replicate(jnp.zeros(sample.shape)) if by_branch else None,
            steps_since_uncond=jnp.zeros((), jnp.int32) if by_branch else None,
        )

    def __call__(
        self, i: jax.Array, timestep: jax.Array, sample: jax.Array, memory: CacheState
    ) -> tuple[jax.Array, CacheState]:
        """See `Predictor`."""
        # Both branches of guidance see the same latents at the same time: their tokens are made once.
        tokens = self.dit.embed(network_input(sample, self.image_condition), timestep[None])
        velocity, memory = self.branch_velocities(i, tokens, memory)
        return guided(velocity, self.guidance, self.branches), memory

    def branch_velocities(self, i: jax.Array, tokens: Tokens, cache: CacheState) -> tuple[jax.Array, CacheState]:
        """Velocities `[branches, f, h, w, c]` of step i, before guidance, and what is kept.

        Args:
          i: which step.
          tokens: from `DiT.embed`, batch 1.
          cache: from `init` or the step before.
        """
        dit, rules = self.dit, jax.tree.map(jnp.asarray, self.rules)

        def whole(cache: CacheState) -> tuple[jax.Array, CacheState]:
            velocity, residual = evaluate(dit, tokens, self.context, self.branches)
            if cache.residual is not None:
                cache = cache._replace(residual=residual)
            if cache.cfg_delta is not None:
                none = jnp.zeros((), jnp.int32)
                cache = cache._replace(cfg_delta=velocity[1:] - velocity[:1], steps_since_uncond=none)
            return velocity, cache._replace(evaluations=cache.evaluations + 1)

        def conditional(cache: CacheState) -> tuple[jax.Array, CacheState]:
            positive, residual = evaluate(dit, tokens, jax.tree.map(lambda x: x[:, :1], self.context), 1)
            if cache.residual is not None:
                cache = cache._replace(residual=jnp.concatenate([residual, cache.residual[1:]]))
            velocity = jnp.concatenate([positive, positive + cache.cfg_delta])
            since = cache.steps_since_uncond + 1
            return velocity, cache._replace(steps_since_uncond=since, evaluations=cache.evaluations + 0.5)

        def reused(cache: CacheState) -> tuple[jax.Array, CacheState]:
            velocity = replicate(dit.velocity(per_branch(tokens.x, self.branches) + cache.residual, tokens))
            if cache.cfg_delta is not None:  # the unconditional residual is older than the delta's other half
                restored = velocity[:1] + cache.cfg_delta
                negative = jnp.where(cache.steps_since_uncond > 0, restored, velocity[1:])
                velocity = jnp.concatenate([velocity[:1], negative])
            return velocity, cache

        run, cache = must_run(dit, rules, i, tokens, cache)
        choices = [whole]
        choice = jnp.int32(0)
        if rules.may_skip_uncond is not None:
            skips = rules.may_skip_uncond[i] & (cache.steps_since_uncond + 1 < rules.uncond_interval)
            choice = jnp.where(skips, len(choices), choice)
            choices.append(conditional)
        if run is not None:
            choice = jnp.where(run, choice, len(choices))
            choices.append(reused)
        return jax.lax.switch(choice, choices, cache)


def must_run(
    dit: DiT, rules: Rules, i: jax.Array, tokens: Tokens, cache: CacheState
) -> tuple[jax.Array | None, CacheState]:
    """Whether the blocks must be run at step i (None: always), and what the next step needs to say so."""
    if rules.recompute is None:
        return None, cache
    run = rules.recompute[i]
    if rules.threshold is not None:
        modulated_input = dit.modulated_input(tokens)
        change = relative_change(modulated_input, cache.modulated_input, tokens.rotation.length)
        total = cache.predicted_change + jnp.maximum(jnp.polyval(rules.polynomial, change), 0)
        run = run | (total >= rules.threshold)
        cache = cache._replace(modulated_input=modulated_input, predicted_change=jnp.where(run, 0, total))
    return run, cache


def relative_change(x: jax.Array, before: jax.Array, length: int) -> jax.Array:
    """Mean of |x - before| over that of |before|, `[b, l, e]` both; tokens from `length` on do not count."""
    counts = (jnp.arange(x.shape[1]) < length)[:, None]
    x, before = (jnp.where(counts, y.astype(jnp.float32), 0) for y in (x, before))  # sums of many bf16 numbers
    return jnp.sum(jnp.abs(x - before)) / jnp.maximum(jnp.sum(jnp.abs(before)), 1e-6)


def evaluate(dit: DiT, tokens: Tokens, context: Context, branches: int) -> tuple[jax.Array, jax.Array]:
    """Velocity, whole on every device, and residual of the block stack."""
    x = per_branch(tokens.x, branches)
    out = dit.run_blocks(x, tokens, context)
    return replicate(dit.velocity(out, tokens)), out - x


def per_branch(x: jax.Array, branches: int) -> jax.Array:
    """Tokens `[1, l, e]` for every branch, laid out as the blocks want them."""
    return constrain(repeat(x, branches, axis=0), "batch", "tokens", None)  # [branches, l, e]


def magnitude_schedule(ratios: np.ndarray, threshold: float, starts: Sequence[int] = (0,)) -> np.ndarray:
    """magcache: at which steps the blocks are run, bool `[n]`.

    Args:
      ratios: `[n]`: the residual's magnitude over that of the step before.
      threshold: what the errors of reused steps may add up to.
      starts: steps at which nothing is kept yet.
    """
    recompute = np.ones(len(ratios), bool)
    growth, error, skips = 1.0, 0.0, 0
    for i in range(max(1, math.ceil(MAGCACHE_WARMUP_SHARE * len(ratios))), len(ratios)):
        growth *= ratios[i]
        error += abs(1 - growth)
        skips += 1
        recompute[i] = error >= threshold or skips > MAGCACHE_MAX_SKIPS or i in starts
        if recompute[i]:
            growth, error, skips = 1.0, 0.0, 0
    return recompute
