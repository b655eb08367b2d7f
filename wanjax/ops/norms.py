"""Norms over the channels of every token, with the sum before or the rotation behind them.

What is computed is said here, in JAX; on TPUs a kernel does it in one pass (`wanjax.ops.kernels.norms_tpu`). Gradients
are those of what is said here. All inside is float32, and results have the dtype of `x`.

Shapes: tokens `[b, l, e]`; what is the same for all tokens of a sample `[b, 1, e]`, `[1, 1, e]` or, the scale of
`rms_norm`, `[e]`; positions `[l, d]`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wanjax.ops.kernels import norms_tpu


def with_kernel(kernel: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorated function of arrays, with `kernel` in its place on TPUs, forwards; keywords are static."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*arrays: jax.Array, **static: Any) -> Any:
            plain, on_tpu = partial(function, **static), partial(kernel, **static)
            if not norms_tpu.supports(arrays[0]):
                return plain(*arrays)
            forward = jax.custom_vjp(lambda *xs: jax.lax.platform_dependent(*xs, tpu=on_tpu, default=plain))
            forward.defvjp(lambda *xs: (forward(*xs), xs), lambda xs, dout: jax.vjp(plain, *xs)[1](dout))
            return forward(*arrays)

        return run

    return decorate


def normalize(x: jax.Array, eps: float) -> jax.Array:
    """Layer norm over the last axis without scale or bias; float32 in and out, whatever the dtype of `x`."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


@with_kernel(lambda x, factor, shift, eps: norms_tpu.layer_norm(x, None, None, factor, shift, eps=eps)[0])
def layer_norm(x: jax.Array, factor: jax.Array, shift: jax.Array, *, eps: float) -> jax.Array:
    """`normalize(x) * factor + shift`."""
    return (normalize(x, eps) * factor + shift).astype(x.dtype)


@with_kernel(norms_tpu.gated_sum)
def gated_sum(x: jax.Array, y: jax.Array, gate: jax.Array) -> jax.Array:
    """`x + y * gate`."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)


@with_kernel(norms_tpu.layer_norm)
def gated_layer_norm(x, y, gate, factor, shift, *, eps: float) -> tuple[jax.Array, jax.Array]:
    """`x + y * gate`, and its `layer_norm`."""
    x = (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)
    return x, (normalize(x, eps) * factor + shift).astype(x.dtype)


@with_kernel(lambda x, y, factor, shift, eps: norms_tpu.layer_norm(x, y, None, factor, shift, eps=eps))
def added_layer_norm(x, y, factor, shift, *, eps: float) -> tuple[jax.Array, jax.Array]:
    """`x + y`, and its `layer_norm`."""
    x = x + y
    return x, (normalize(x, eps) * factor + shift).astype(x.dtype)


def _rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)  # bf16 squares lose the small channels
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


@with_kernel(lambda x, scale, eps: norms_tpu.rms_norm(x, scale, None, None, eps=eps))
def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale`."""
    return _rms_norm(x, scale, eps=eps)


def rms_norm_rotate(x, scale, cos, sin, *, eps: float, parts: int = 1) -> jax.Array:
    """`rms_norm`, then every head of it by `rotate`; heads are as wide as `cos` and `sin`.

    Args:
      x, scale, cos, sin, eps: see above.
      parts: of the channels, which an all-to-all comes to send apart; only a matter of order in memory.
    """
    in_lanes = norms_tpu.LANES % cos.shape[1] == 0
    run = with_kernel(norms_tpu.rms_norm)(_rms_norm_rotate) if in_lanes else _rms_norm_rotate
    return run(x, scale, cos, sin, eps=eps, parts=parts)


def _rms_norm_rotate(x, scale, cos, sin, *, eps: float, parts: int) -> jax.Array:
    y = _rms_norm(x, scale, eps=eps).reshape(*x.shape[:2], -1, cos.shape[1])  # [b, l, n, d]
    return rotate(y, cos, sin).reshape(x.shape)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Pairs of channels of `x` `[b, l, n, d]` rotated by the angles of `cos` and `sin` `[l, d]`.

    The partner of each channel comes from a product with a constant matrix of 0, 1 and -1, which is exact. On TPUs the
    rolls, strided slices or `[.., d/2, 2]` reshapes that also give it break the 128 lanes: XLA then stores every piece
    of it, padded to the size of `x`, or does not compile at all.
    """
    pairs = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]])  # [d, d]: (x0, x1) -> (-x1, x0)
    partner = jax.lax.dot_general(
        x,
        jnp.asarray(pairs, x.dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,  # or accelerators round float32 to bf16
        preferred_element_type=x.dtype,
    )  # [b, l, n, d]
    cos, sin = (table[None, :, None, :] for table in (cos, sin))  # [1, l, 1, d]
    return (x.astype(jnp.float32) * cos + partner.astype(jnp.float32) * sin).astype(x.dtype)
