"""Adam with its moments in 8 bits: a quarter of their memory, and updates that are nearly the same.

    m = b1 m + (1 - b1) g           stored as m = scale * code,    code in -127 .. 127, scale = max |m| / 127 of a block
    v = b2 v + (1 - b2) g^2         stored as v = scale * code^2,  code in 0 .. 255,    scale = max v / 255^2
    update = m / (1 - b1^t) / (sqrt(max(v, scale) / (1 - b2^t)) + eps)

A block is 128 neighbours along the last axis. A code is one of the two next to the number, drawn so that the mean of
what is stored is the number itself: v changes by a thousandth in a step, which rounding to the nearest would lose, step
after step. Squares of codes span as much as 16 bits do, and a v below the smallest of a block counts as that: no
element takes a long step because its v was rounded to nothing. Small arrays keep 32 bits.

Source: 8-bit optimisers by blocks (arXiv 2110.02861), with other codes and with stochastic rounding in place of their
dynamic data type.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

BLOCK = 128
SMALLEST = 4096
"""Numbers of an array from which on its moments have 8 bits, as in bitsandbytes."""
EPS = 1e-8


class Adam8BitState(NamedTuple):
    """How many steps were taken; codes of both moments in the shapes of the weights, and their scales `[.., blocks]`.

    Small arrays have float32 moments in place of codes, and scales that are not looked at.
    """

    count: Any
    mu: Any
    mu_scale: Any
    nu: Any
    nu_scale: Any


def scale_by_adam_8bit(b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments in 8 bits; what is random in it follows from the count of steps alone."""

    def init(params: Any) -> Adam8BitState:
        mu = jax.tree.map(lambda x: jnp.zeros(x.shape, _dtype(x, jnp.int8)), params)
        nu = jax.tree.map(lambda x: jnp.zeros(x.shape, _dtype(x, jnp.uint8)), params)
        scales = (jax.tree.map(lambda x: jnp.zeros(_scales(x.shape), jnp.float32), params) for _ in range(2))
        return Adam8BitState(jnp.zeros((), jnp.int32), mu, next(scales), nu, next(scales))

    def update(updates: Any, state: Adam8BitState, params: Any = None) -> tuple[Any, Adam8BitState]:
        count = optax.safe_increment(state.count)
        leaves, tree = jax.tree.flatten(updates)
        moments = [jax.tree.leaves(x) for x in state[1:]]
        results = []
        for number, (g, *stored) in enumerate(zip(leaves, *moments, strict=True)):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), count), number)
            results.append(_update(g, tuple(stored), count, b1, b2, key))
        new, *moments = (jax.tree.unflatten(tree, list(column)) for column in zip(*results, strict=True))
        return new, Adam8BitState(count, *moments)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]  # its states are arrays


def _update(g: jax.Array, stored: tuple[jax.Array, ...], count: Any, b1: float, b2: float, key: jax.Array) -> Any:
    """Of one array: the update, codes and scale of the mean, codes and scale of the square."""
    mu, mu_scale, nu, nu_scale = stored
    is_small = mu.dtype == jnp.float32
    m, v = (mu, nu) if is_small else (_times(mu, mu_scale), _times(nu, nu_scale, squared=True))
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    least: jax.Array | float = 0.0
    if is_small:
        mu, nu = m, v
    else:
        mu_scale, nu_scale = _largest(m) / 127, _largest(v) / 255**2
        least = _spread(nu_scale, v.shape)
        key_m, key_v = jax.random.split(key)
        mu = jnp.clip(_rounded(_over(m, mu_scale), key_m), -127, 127).astype(jnp.int8)
        nu = jnp.clip(_rounded(_over(v, nu_scale), key_v, squared=True), 0, 255).astype(jnp.uint8)
    bias_m, bias_v = (1 - b ** count.astype(jnp.float32) for b in (b1, b2))
    update = m / bias_m / (jnp.sqrt(jnp.maximum(v, least) / bias_v) + EPS)
    return update.astype(g.dtype), mu, mu_scale, nu, nu_scale


def _rounded(x: jax.Array, key: jax.Array, squared: bool = False) -> jax.Array:
    """The code below or the one above, by chance, so that in the mean it, or its square, is `x`."""
    below = jnp.floor(jnp.sqrt(x) if squared else x)
    first, second = (code * code if squared else code for code in (below, below + 1))
    chance = (jax.random.bits(key, x.shape, jnp.uint8).astype(jnp.float32) + 0.5) / 256
    return below + ((x - first) > chance * (second - first))


def _dtype(x: jax.Array, code: Any) -> Any:
    return jnp.float32 if math.prod(x.shape) < SMALLEST else code


def _scales(shape: tuple[int, ...]) -> tuple[int, ...]:
    *rest, n = shape or (1,)
    return (*rest, n // BLOCK if n % BLOCK == 0 else 1)


def _blocks(x: jax.Array) -> jax.Array:
    """`[.., n]` -> `[.., blocks, n / blocks]`."""
    return x.reshape(*_scales(x.shape), -1)


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(_blocks(x)), axis=-1)


def _spread(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each block to one for each of its elements."""
    return jnp.broadcast_to(scale[..., None], (*scale.shape, shape[-1] // scale.shape[-1])).reshape(shape)


def _times(code: jax.Array, scale: jax.Array, squared: bool = False) -> jax.Array:
    x = code.astype(jnp.float32)
    return (x * x if squared else x) * _spread(scale, code.shape)


def _over(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / scale`; of a block of zeros, zeros."""
    return x / jnp.maximum(_spread(scale, x.shape), jnp.finfo(jnp.float32).tiny)
