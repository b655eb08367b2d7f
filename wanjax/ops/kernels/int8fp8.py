"""Attention in 8 bits (SageAttention2, arXiv 2411.10958): the arithmetic, and a plain implementation of it.

Keys lose their mean over tokens, which is most of what their outlying channels hold: softmax does not see the
difference, and the log-sum-exp gets it back, so that blocks with other means can be merged with this one. What outlies
still is spread over all channels: one rotation of queries and keys, which no product of the two sees (arXiv
2404.00456). They become int8, with a scale for a query and for UNIT_KEYS keys; the scores are exact int32 products.
Of VALUE_DTYPES "fp8": weights, up to 256, and values, with a scale for a channel, are rounded to
float8_e4m3fn. "bf16", for chips that would convert fp8 before they multiply: to bfloat16. Sums are float32, statistics
those of the weights before they are rounded.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from wanjax.errors import InputError
from wanjax.ops.kernels import LOWEST, Forward, Gradients
from wanjax.ops.quantized import round_to, scale_of

LOG2E = math.log2(math.e)
UNIT_KEYS = 256
SHIFT = 8.0  # weights are at most 2**8: room below for the small ones; float8_e4m3fn ends at 448
Values = Literal["fp8", "bf16"]
VALUE_DTYPES = {"fp8": jnp.float8_e4m3fn, "bf16": jnp.bfloat16}


class Operands(NamedTuple):
    """What is multiplied, heads in one axis and keys filled up to whole units with zeros.

    Attributes:
      q, q_scale: int8 `[b * n, lq, d]`, float32 `[b * n, lq]`, with 1 / sqrt(d) and log2(e) in it.
      k, k_scale: int8 `[b * n, lk, d]`, float32 `[b * n, lk / UNIT_KEYS]`.
      v, v_scale: `[b * n, lk, d]`, float32 `[b * n, d]`.
      shift: what the log-sum-exp, of the smoothed keys, lacks: float32 `[b * n, lq]`.
      valid: keys that count.
    """

    q: jax.Array
    q_scale: jax.Array
    k: jax.Array
    k_scale: jax.Array
    v: jax.Array
    v_scale: jax.Array
    shift: jax.Array
    valid: jax.Array


def prepare(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None, values: Values) -> Operands:
    """Queries `[b, n, lq, d]`, keys and values `[b, n, lk, d]` in 8 bits; see `wanjax.ops.kernels` for `valid`."""
    d, lk = q.shape[-1], k.shape[2]
    units = -(-lk // UNIT_KEYS)
    valid = jnp.asarray(lk if valid is None else valid, jnp.int32)
    q, k, v = (x.reshape(-1, x.shape[2], d).astype(jnp.float32) for x in (q, k, v))  # [b * n, l, d]
    counts = (jnp.arange(lk) < valid)[None, :, None]
    k, v = jnp.where(counts, k, 0), jnp.where(counts, v, 0)  # padding may not set a scale
    mean = jnp.sum(k, axis=1, keepdims=True) / jnp.maximum(valid, 1)  # [b * n, 1, d]
    k = jnp.where(counts, k - mean, 0)
    shift = jnp.sum(q * mean, axis=-1) * d**-0.5  # [b * n, lq]

    rotation_matrix = jnp.asarray(rotation(d))
    q, k = (jnp.matmul(x, rotation_matrix, precision="highest") for x in (q, k))
    q_scale = scale_of(jnp.max(jnp.abs(q), axis=-1), jnp.int8)  # [b * n, lq]
    k, v = (jnp.pad(x, ((0, 0), (0, units * UNIT_KEYS - lk), (0, 0))) for x in (k, v))
    unit_max = jnp.max(jnp.abs(k).reshape(-1, units, UNIT_KEYS * d), axis=-1)  # [b * n, units]
    k_scale = scale_of(unit_max, jnp.int8)
    v_scale = jnp.ones((len(v), d), jnp.float32)
    if values == "fp8":
        v_scale = scale_of(jnp.max(jnp.abs(v), axis=1), VALUE_DTYPES[values])  # [b * n, d]
    return Operands(
        q=round_to(q / q_scale[..., None], jnp.int8),
        q_scale=q_scale * (d**-0.5 * LOG2E),
        k=round_to(k / jnp.repeat(k_scale, UNIT_KEYS, axis=1)[..., None], jnp.int8),
        k_scale=k_scale,
        v=round_to(v / v_scale[:, None], VALUE_DTYPES[values]) if values == "fp8" else v.astype(jnp.bfloat16),
        v_scale=v_scale,
        shift=shift,
        valid=valid,
    )


def rotation(d: int) -> np.ndarray:
    """An orthogonal matrix `[d, d]` without any large number: the discrete cosine transform."""
    rows, columns = np.arange(d)[:, None], np.arange(d)[None]
    cosines = np.cos(np.pi * (2 * columns + 1) * rows / (2 * d)) * (2 / d) ** 0.5
    return np.where(rows == 0, d**-0.5, cosines).astype(np.float32)


def finish(out: jax.Array, lse: jax.Array, shape: tuple[int, ...], valid: jax.Array) -> Forward:
    """Results by head, `[b * n, lq, d]` and `[b * n, lq]`, as a kernel returns them."""
    return out.reshape(shape), jnp.where(valid == 0, LOWEST, lse).reshape(shape[:-1])


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Matrix product over one axis of each, summed in int32 or float32."""
    sums = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=sums)


def forward(q, k, v, valid, dtype: DTypeLike, *, values: Values = "fp8", keys: int = UNIT_KEYS) -> Forward:
    """A kernel's `forward`, for one head and `keys` keys, a divisor of UNIT_KEYS, at a time."""
    operands = prepare(q, k, v, valid, values)

    def attend(head: Operands) -> Forward:
        length, d = head.q.shape

        def step(carry: tuple[jax.Array, ...], unit: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], None]:
            out, row_max, row_sum = carry
            k, k_scale, v, start = unit
            scores = dot(head.q, k, (1, 1)).astype(jnp.float32) * (head.q_scale * k_scale)[:, None]  # [lq, keys]
            scores = jnp.where(start + jnp.arange(keys) < operands.valid, scores, -jnp.inf)
            new_max = jnp.maximum(row_max, jnp.max(scores, axis=-1))  # [lq]
            weights = jnp.exp2(scores - (new_max - SHIFT)[:, None])
            rescale = jnp.exp2(row_max - new_max)
            added = dot(weights.astype(v.dtype), v, (1, 0))  # [lq, d]
            return (rescale[:, None] * out + added, new_max, rescale * row_sum + jnp.sum(weights, axis=-1)), None

        units = (
            head.k.reshape(-1, keys, d),
            jnp.repeat(head.k_scale, UNIT_KEYS // keys),
            head.v.reshape(-1, keys, d),
            jnp.arange(0, len(head.k), keys),
        )
        start = jnp.zeros((length, d)), jnp.full((length,), LOWEST * LOG2E), jnp.zeros(length)
        (out, row_max, row_sum), _ = jax.lax.scan(step, start, units)
        row_sum = jnp.where(row_sum == 0, 1, row_sum)  # no valid key
        out = (out / row_sum[:, None] * head.v_scale).astype(dtype)
        return out, (row_max - SHIFT + jnp.log2(row_sum)) / LOG2E + head.shift

    heads = operands._replace(valid=jnp.zeros(len(operands.q)))
    out, lse = jax.lax.map(attend, heads)
    return finish(out, lse, q.shape, operands.valid)


def backward(*_: jax.Array) -> Gradients:
    """There is none: rounding has no slope.

    Raises:
      InputError: always.
    """
    raise InputError("attention int8fp8 has no gradient; it is for sampling only; train with attention auto")
