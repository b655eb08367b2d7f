"""Products of tokens and weights: what linear layers compute, and the kernel that does it on TPUs where that pays.

Weights are split over devices and gathered here. Gradients are those of JAX's own products. Where none is wanted, an
activation or a gated sum behind a product is part of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sharding.local import per_token
from sharding.mesh import current_shape
from sharding.rules import gather
from wanjax.ops.kernels import matmul_int8_tpu, matmul_tpu
from wanjax.ops.quantized import matmul

Activation = Callable[[jax.Array], jax.Array]
Weights = tuple[tuple[jax.Array, jax.Array | None], ...]
"""Kernels `[in, out]` and biases `[out]` or None, in the dtype of the tokens."""


def identity(x: jax.Array) -> jax.Array:
    """`x`."""
    return x


def products(x: jax.Array, weights: Weights, *, read: int = 1, written: Sequence[int] = (1,)) -> tuple[jax.Array, ...]:
    """`x @ kernel + bias` for each of `weights`: `[.., in]` -> `[.., out]`.

    `read` and, of every result, `written` only say how channels lie in memory, see `wanjax.ops.kernels.matmul_tpu`.
    """
    if not supported(x, weights):
        return plain_products(x, weights)

    def on_tpu(x: jax.Array, weights: Weights) -> tuple[jax.Array, ...]:
        # All are here before the first is used: behind it its result is sent, and a weight would have to wait for that.
        kernels = tuple(gather(kernel) for kernel, _ in weights)
        kernels = jax.lax.optimization_barrier(kernels) if len(kernels) > 1 else kernels
        run = partial(matmul_tpu.matmul, activation=identity, read=read)
        each = zip(kernels, weights, written, strict=True)
        return tuple(per_token(partial(run, written=parts), x, k, bias_of(w)) for k, w, parts in each)

    run = jax.custom_vjp(lambda *args: jax.lax.platform_dependent(*args, tpu=on_tpu, default=plain_products))
    run.defvjp(lambda *args: (run(*args), args), lambda args, dout: jax.vjp(plain_products, *args)[1](dout))
    return run(x, weights)


def activated(x: jax.Array, weights: Weights, activation: Activation) -> jax.Array:
    """`activation` of the product with one weight."""

    def composed(x: jax.Array, weights: Weights) -> jax.Array:
        return activation(products(x, weights)[0])

    def on_tpu(x: jax.Array, weights: Weights) -> jax.Array:
        run = partial(matmul_tpu.matmul, activation=activation)
        return per_token(run, x, gather(weights[0][0]), bias_of(weights[0]))

    return fused(composed, on_tpu)(x, weights) if supported(x, weights) else composed(x, weights)


def finished(y: jax.Array, bias: jax.Array | None, activation: Activation, dtype: DTypeLike) -> jax.Array:
    """`activation(y + bias)` of scaled sums `[.., out]` in float32, rounded once, before the activation."""
    y = y if bias is None else y + bias.astype(jnp.float32)
    return activation(y.astype(dtype))


def quantized_product(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    activation: Activation,
    read: int = 1,
    written: int = 1,
) -> jax.Array:
    """`activation(x @ (kernel * scale) + bias)` in the 8 bits of `kernel`, whole on every device; without gradient."""

    def plain(x: jax.Array, kernel: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
        return finished(matmul(x, kernel, scale), bias, activation, x.dtype)

    def on_tpu(x: jax.Array, kernel: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
        if not matmul_int8_tpu.has_units():
            return plain(x, kernel, scale, bias)
        bias = jnp.zeros(kernel.shape[1:], jnp.float32) if bias is None else bias
        run = partial(matmul_int8_tpu.matmul, activation=activation, read=read, written=written)
        return per_token(run, x, kernel, scale, bias)

    if kernel.dtype != jnp.int8 or not supported(x, ((kernel, bias),)):
        return plain(x, kernel, scale, bias)
    return jax.lax.platform_dependent(x, kernel, scale, bias, tpu=on_tpu, default=plain)


def weight_only_product(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    activation: Activation,
    read: int = 1,
    written: int = 1,
) -> jax.Array:
    """`activation(x @ (kernel * scale) + bias)` of tokens as they are, `kernel` whole on every device; with gradients.

    Every number of 8 bits is one of bfloat16 too, and the scale comes after the sum: no weight is rounded again.
    """
    (y,) = products(x, ((kernel.astype(x.dtype), None),), read=read, written=(written,))  # [.., out]
    return finished(y.astype(jnp.float32) * scale, bias, activation, x.dtype)


def fused(composed: Callable[..., Any], on_tpu: Callable[..., Any]) -> Callable[..., Any]:
    """`composed`, on TPUs by another function where no gradient is wanted."""
    run = jax.custom_vjp(lambda *args: jax.lax.platform_dependent(*args, tpu=on_tpu, default=composed))
    run.defvjp(lambda *args: jax.vjp(composed, *args), lambda vjp, dout: vjp(dout))
    return run


def plain_products(x: jax.Array, weights: Weights) -> tuple[jax.Array, ...]:
    """`products` as JAX has them."""

    def product(kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = x @ gather(kernel, x)  # [.., out]
        return y if bias is None else y + gather(bias)

    return tuple(product(*weight) for weight in weights)


def supported(x: jax.Array, weights: Weights) -> bool:
    """Whether TPUs have a kernel for these."""
    rows = x.shape[1] // current_shape().sequence if x.ndim == 3 else 0
    return all(matmul_tpu.supports(x, kernel, rows) for kernel, _ in weights)


def bias_of(weight: tuple[jax.Array, jax.Array | None]) -> jax.Array:
    """The bias, or zeros."""
    kernel, bias = weight
    return jnp.zeros(kernel.shape[1:], kernel.dtype) if bias is None else gather(bias)
