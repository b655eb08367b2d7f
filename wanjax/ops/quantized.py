"""Products of 8-bit numbers: what is multiplied is int8 or float8_e4m3fn, what that was scaled by is multiplied later.

The product is qwix's, on arrays; its way of rewriting whole models cannot see into a scan over layers. The rounding is
ours: qwix lets numbers beyond the largest int8 saturate, which XLA forgets when it fuses the way there and back.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import qwix
from jax.typing import DTypeLike

from wanjax.errors import InputError

Format = Literal["fp8", "int8"]
DTYPES = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
# Tried as the largest int8 weight, as parts of the largest there is: uniform steps are finer if the few outermost
# weights are cut off. A float's steps shrink towards zero by themselves.
CUTS = {"fp8": (1.0,), "int8": (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)}


def largest(dtype: DTypeLike) -> float:
    """The largest number of an 8-bit dtype that has its negative too."""
    return 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)


def round_to(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Float32 to the nearest number of an 8-bit dtype, which is the largest for all that are larger."""
    x = jnp.clip(jnp.round(x) if dtype == jnp.int8 else x, -largest(dtype), largest(dtype))
    return x.astype(dtype)


def scale_of(top: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The scale by which `top` becomes the largest number; 1 where all is zero."""
    return jnp.where(top > 0, top / largest(dtype), 1.0)


def quantize_weight(kernel: jax.Array, format: Format, channel_scales: bool = False) -> tuple[jax.Array, jax.Array]:
    """A kernel in 8 bits with one scale, of `CUTS` the one with the smallest sum of squared errors; or with
    `channel_scales`, one for each output, by which its largest weight becomes the largest number.

    Returns:
      The kernel in the format's dtype, and a float32 scalar or `[out]`: their product is about `kernel`.
    """
    dtype, kernel = DTYPES[format], kernel.astype(jnp.float32)  # a scale in bf16 is off by up to 0.4%
    if channel_scales:
        scale = scale_of(jnp.max(jnp.abs(kernel), axis=0), dtype)  # [out]
        return round_to(kernel / scale, dtype), scale
    scales = scale_of(jnp.max(jnp.abs(kernel)) * jnp.asarray(CUTS[format]), dtype)

    def error(scale: jax.Array) -> jax.Array:
        return jnp.sum((round_to(kernel / scale, dtype).astype(jnp.float32) * scale - kernel) ** 2)

    best = scales[jnp.argmin(jax.lax.map(error, scales))] if len(CUTS[format]) > 1 else scales[0]
    return round_to(kernel / best, dtype), best


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """`x @ (kernel * scale)`, with `x` rounded to the dtype of `kernel` by a scale for each of its rows.

    Args:
      x: `[.., in]`.
      kernel, scale: from `quantize_weight`, `[in, out]` and `[]` or `[out]`.

    Returns:
      `[.., out]`, float32.

    Raises:
      InputError: its gradient is asked for, which would be zero: rounding has none.
    """
    return _matmul(x, kernel, scale)


def _matmul(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    last, x = x.ndim - 1, x.astype(jnp.float32)
    row_scale = scale_of(jnp.max(jnp.abs(x), axis=-1, keepdims=True), kernel.dtype)  # [.., 1]
    rows = qwix.QArray(round_to(x / row_scale, kernel.dtype), row_scale)
    return qwix.dot_general(rows, qwix.QArray(kernel, scale.reshape(1, -1)), (((last,), (0,)), ((), ())))  # [.., out]


def _forward(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> tuple[jax.Array, None]:
    return _matmul(x, kernel, scale), None


def _backward(saved: None, dout: jax.Array):
    raise InputError("a product of 8-bit numbers has no gradient; matrices in full are needed; train without quantize")


matmul.defvjp(_forward, _backward)
