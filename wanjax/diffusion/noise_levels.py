"""Which noise levels a training draws, and how much each counts.

    levels = of(config, tokens)
    sigma = levels.draw(key, batch)                        # [b]
    loss = flow.loss(velocity, target, weight(sigma, config.weighting))

    logit_normal : sigma = sigmoid(mean + std N(0, 1))
    uniform      : sigma = u
    mode         : sigma = u - scale (sin^2(pi u / 2) - u)      more of the middle for a scale above 0
    shift        : behind each of these, see `flow.shift_sigma`; by resolution: shift sqrt(tokens / shift_tokens)

    sigma_sqrt   : weight = 1 / sigma^2
    cosmap       : weight = 2 / (pi (1 - 2 sigma + 2 sigma^2)), the density of sigma where a cosine schedule is uniform

Source: Stable Diffusion 3 (arXiv 2403.03206, section 3.1; equation 23 for the shift by resolution), with the names that
diffusers gives them (`compute_density_for_timestep_sampling`, `compute_loss_weighting_for_sd3`).
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from wanjax.config import Density, TrainConfig, Weighting
from wanjax.diffusion import flow

_LEAST = 1 / flow.NUM_TIMESTEPS
"""The lowest level that has a weight of its own, as of the thousand levels of diffusers: 1 / sigma^2 has no bound."""
_CELLS = 2**24
"""In which the share below a level is looked up, as many as float32 tells apart."""


@dataclasses.dataclass(frozen=True)
class NoiseLevels:
    """A density on [0, 1] to draw noise levels from; the fields are those of `TrainConfig`."""

    density: Density = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0
    stratified: bool = False

    def draw(self, key: jax.Array, batch: int, span: tuple[float, float] = flow.WHOLE) -> jax.Array:
        """Noise levels, float32 `[b]`; stratified, one out of each of `b` parts that are equally probable.

        Args:
          key: PRNG key.
          batch: how many.
          span: the least and the largest; between them the density has the same shape as ever.
        """
        if self.density == "logit_normal" and not self.stratified:
            return flow.sample_sigmas(key, batch, mean=self.mean, std=self.std, shift=self.shift, span=span)
        key, key_order = jax.random.split(key)
        u = jax.random.uniform(key, (batch,), jnp.float32)  # [b]
        if self.stratified:
            u = (jax.random.permutation(key_order, batch) + u) / batch
        low, high = self.share_below(span[0]), self.share_below(span[1])
        sigma = flow.shift_sigma(self.quantile(low + (high - low) * u), self.shift)
        return jnp.clip(sigma, *span)

    def quantile(self, u: Any) -> Any:
        """The level, before the shift, below which the share `u` of all lies; float32 of `u`'s shape."""
        if self.density == "logit_normal":
            inside = jnp.clip(u, jnp.finfo(jnp.float32).tiny, 1 - 2**-24)  # ndtri is infinite at 0 and 1
            return jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(inside))
        return u if self.density == "uniform" else u - self.mode_scale * (jnp.sin(jnp.pi / 2 * u) ** 2 - u)

    def share_below(self, sigma: float) -> float:
        """The share of all levels that lies below one, on the host in float64."""
        if sigma in flow.WHOLE:
            return sigma
        if self.density == "logit_normal":
            return flow.share_of((0.0, sigma), self.mean, self.std, self.shift)
        sigma = flow.shift_sigma(sigma, 1 / self.shift)
        if self.density == "uniform":
            return sigma

        def level(cell: int) -> float:
            u = cell / _CELLS
            return u - self.mode_scale * (math.sin(math.pi / 2 * u) ** 2 - u)

        return bisect.bisect_left(range(_CELLS), sigma, key=level) / _CELLS


def of(config: TrainConfig, tokens: int | None = None) -> NoiseLevels:
    """What a run draws from for clips of so many tokens; None: for those that its shift is for."""
    c, shifted = config, config.shift if tokens is None else shift(config, tokens)
    return NoiseLevels(c.timesteps, c.sigma_mean, c.sigma_std, c.mode_scale, shifted, c.stratified)


def share_of(config: TrainConfig, span: tuple[float, float]) -> float:
    """How much of a run's density lies in a span of noise levels."""
    levels = of(config)
    return levels.share_below(span[1]) - levels.share_below(span[0])


def shift(config: TrainConfig, tokens: int) -> float:
    """The shift of a run's noise levels for clips of so many tokens: the more there are, the less noise hides."""
    return config.shift * (1.0 if config.shift_tokens is None else math.sqrt(tokens / config.shift_tokens))


def weight(sigma: jax.Array, weighting: Weighting) -> jax.Array | None:
    """What each sample's squared error is multiplied with, float32 `[b]`; None: all alike."""
    if weighting == "none":
        return None
    if weighting == "sigma_sqrt":
        return 1 / jnp.square(jnp.maximum(sigma, _LEAST))
    return 2 / (jnp.pi * (1 - 2 * sigma + 2 * sigma * sigma))
