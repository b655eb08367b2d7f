"""What the kernels for TPUs share: units of a block as a pipeline, masks, products, operands in whole lanes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOG2E = math.log2(math.e)
LANES = 128
VMEM_BYTES = 56 * 2**20  # a core of tpu7x has 64 MiB, the others more

Unit = tuple[Any, Any, Any]  # queries; first key; how many of the keys from there count, or None for all


def pipeline(
    units: Sequence[Any],
    before: Callable[[Any], Any],
    middle: Callable[[Any, Any], Any],
    after: Callable[[Any, Any], None],
) -> None:
    """Each unit through three stages, written down in the order that lets three units overlap."""
    begun: list[Any] = []
    done: list[Any] = []
    for t in range(len(units) + 2):
        if t < len(units):
            begun.append(before(units[t]))
        if t >= 2:
            after(units[t - 2], done.pop(0))
        if 1 <= t <= len(units):
            done.append(middle(units[t - 1], begun.pop(0)))


def rows_by_head(x: jax.Array) -> jax.Array:
    """`[b, n, l, d]` -> `[b * n, l, d]`."""
    return x.reshape(-1, *x.shape[2:])


def columns(x: jax.Array) -> jax.Array:
    """`[b, n, l, d]` -> `[b, l, n * d]`, the order of the projections around: where the caller made the one from the
    other, XLA cancels both, and nothing is copied."""
    b, n, length, d = x.shape
    return x.swapaxes(1, 2).reshape(b, length, n * d)


def place(head: Any, block: Any, heads: int) -> tuple[Any, Any, Any]:
    """Where `columns` has a block of the rows of one of the `b * heads` heads."""
    return jax.lax.div(head, heads), block, jax.lax.rem(head, heads)


def pad_rows(x: jax.Array, block: int, whole: bool = False) -> jax.Array:
    """`x` `[.., l, d]`, three axes, with at least one block of rows. Longer ones need not be `whole` blocks, but where
    JAX's interpreter is to replace some of a kernel's results: it cannot where a block reaches past the end.
    """
    missing = -x.shape[1] % block if whole else max(0, block - x.shape[1])
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0)))


def widen(x: jax.Array) -> jax.Array:
    """The last axis filled up with zeros, which change no score, to whole lanes."""
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, -x.shape[-1] % LANES)))


def scaled(q: jax.Array, scale: float) -> jax.Array:
    """`q * scale`, in float32 first: the factor is not exact in bf16."""
    return (q.astype(jnp.float32) * scale).astype(q.dtype)


def mask(x: jax.Array, valid: jax.Array | None, value: float) -> jax.Array:
    """`value` in the rows that do not count."""
    if valid is None:
        return x
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < valid, x, jnp.asarray(value, x.dtype))


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Matrix product over one axis of each, summed in float32."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def forward_cost(q: jax.Array, k: jax.Array, v: jax.Array, lk: int, width: int) -> pl.CostEstimate:
    """Of attention to `lk` keys, heads of `width`; for XLA, which lets weights travel behind what takes long."""
    return pl.CostEstimate(
        flops=4 * q.size * lk,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v, q)),
        transcendentals=q.size // width * lk,
    )


def compiler_params(queries_or_keys: str) -> pltpu.CompilerParams:
    """Heads in any order, the last axis of the grid in sequence."""
    semantics: Any = ("parallel", queries_or_keys, "arbitrary")
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)
