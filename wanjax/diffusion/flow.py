"""Flow matching: the straight path between data and noise, and what a network learns on it.

    x_t      = (1 - s) x0 + s noise          s = sigma: 0 is data, 1 is noise
    velocity = noise - x0 = d x_t / d s      what the network predicts
    shift    : s -> shift s / (1 + (shift - 1) s), which adds log(shift) to logit(s): more noise for shift > 1
    timestep = 1000 s                        what the network is told
    sigmas   ~ sigmoid(mean + std N(0, 1)), shifted; of an expert the same density on its span, renormalised

Source: Wan (arXiv 2503.20314, section 4.2), Stable Diffusion 3 (arXiv 2403.03206) for the logit-normal and the shift.
Everything is computed and returned in float32: bfloat16 has 8 bits, and s moves by less than that between steps.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

NUM_TIMESTEPS = 1000


def shift_sigma(sigma: Any, shift: float) -> Any:
    """Shifted noise level, in the number type of `sigma` (numpy float64 on the host, jax float32 inside a step).

    Args:
      sigma: noise level(s) in [0, 1], any shape.
      shift: positive; 1 changes nothing.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


WHOLE = (0.0, 1.0)
"""All noise levels."""


def sample_sigmas(
    key: jax.Array,
    batch: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    span: tuple[float, float] = WHOLE,
) -> jax.Array:
    """Noise levels for a training batch: shifted logit-normal, float32 `[b]` in [0, 1].

    Args:
      key: PRNG key.
      batch: how many.
      mean, std: of the normal under the sigmoid.
      shift: positive; applied after the sigmoid.
      span: the least and the largest; between them the density has the same shape as ever.
    """
    if span == WHOLE:
        normal = jax.random.normal(key, (batch,), jnp.float32)  # [b]
        return shift_sigma(jax.nn.sigmoid(mean + std * normal), shift)
    low, high = (_normal_at(sigma, mean, std, shift) for sigma in span)
    normal = jax.random.truncated_normal(key, low, high, (batch,), jnp.float32)  # [b]
    return jnp.clip(shift_sigma(jax.nn.sigmoid(mean + std * normal), shift), *span)


def share_of(span: tuple[float, float], mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> float:
    """How much of the density that `sample_sigmas` draws from lies in a span; 1 for all noise levels."""
    low, high = (0.5 * math.erfc(-_normal_at(sigma, mean, std, shift) / math.sqrt(2)) for sigma in span)
    return high - low


def _normal_at(sigma: float, mean: float, std: float, shift: float) -> float:
    """The number under the sigmoid, drawn from N(0, 1), that becomes this noise level."""
    if sigma in WHOLE:
        return math.copysign(math.inf, sigma - 0.5)
    before = shift_sigma(sigma, 1 / shift)
    return (math.log(before) - math.log1p(-before) - mean) / std


def timestep(sigma: jax.Array) -> jax.Array:
    """What the network is told for noise level `sigma`: 0 to 1000, not truncated."""
    return NUM_TIMESTEPS * sigma


def interpolate(x0: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """`x_t`, float32.

    Args:
      x0, noise: `[b, ..]`.
      sigma: `[b]`.
    """
    s = _per_sample(sigma, x0)
    return (1 - s) * _float32(x0) + s * _float32(noise)


def velocity(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """The training target `noise - x0`, float32 `[b, ..]`."""
    return _float32(noise) - _float32(x0)


def denoised(x: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """The `x0` that a velocity at `x` leads to, float32 `[b, ..]`; `sigma` is `[b]`."""
    return _float32(x) - _per_sample(sigma, x) * _float32(velocity)


def loss(prediction: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Mean squared error of each sample, float32 `[b]`; the caller takes the mean over the batch.

    Args:
      prediction, target: velocities `[b, ..]`.
      weight: `[b]`, multiplied onto each sample's error; None: all one.
    """
    error = _float32(prediction) - _float32(target)
    mse = jnp.mean(error * error, axis=tuple(range(1, error.ndim)))  # [b]
    return mse if weight is None else _float32(weight) * mse


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _per_sample(sigma: jax.Array, x: jax.Array) -> jax.Array:
    """`[b]` -> `[b, 1, ..]` of the rank of `x`."""
    return jnp.expand_dims(_float32(sigma), tuple(range(1, x.ndim)))  # [b, 1, ..]
