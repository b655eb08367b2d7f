"""Attention to the text and, apart from it, to the images, summed, in one kernel for TPUs.

There are so few keys that all of a head's lie in the chip's memory at once: no running maximum, nothing is rescaled.
Operands and result are in the projections' own order, `[b, l, e]`. Scores are `[keys, queries]` as in `flash_tpu`.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOG2E = math.log2(math.e)
LANES, TILE = 128, 16  # of bf16
QUERIES, UNIT_QUERIES = 4096, 256
MOST_KEYS = 1024


def supports(q: jax.Array, *keys: jax.Array) -> bool:
    """Whether the kernel takes queries `[b, lq, n, d]` and keys `[b, lk, n, d]`."""
    return q.dtype == jnp.bfloat16 and q.shape[3] % LANES == 0 and all(k.shape[1] <= MOST_KEYS for k in keys)


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Matrix product over one axis of each, summed in float32."""
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def kernel(q_ref, *refs: Any, lengths: tuple[int, ...], scale: float) -> None:
    """Some queries of a head; the grid is (heads, queries). `lengths` of the keys that count, of every pair."""
    *pairs, out_ref = refs

    def score(columns: Any) -> list[jax.Array]:
        q = (q_ref[columns, :].astype(jnp.float32) * scale).astype(q_ref.dtype)  # the factor is not exact in bf16
        return [dot(k_ref[...], q, (1, 1)) for k_ref in pairs[::2]]  # [keys, queries] each

    def softmax(scores: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
        done = []
        for s, length in zip(scores, lengths, strict=True):
            if s.shape[0] > length:
                s = jnp.where(jax.lax.broadcasted_iota(jnp.int32, s.shape, 0) < length, s, -jnp.inf)
            weights = jnp.exp2(s - jnp.max(s, axis=0, keepdims=True))
            done.append((weights.astype(q_ref.dtype), jnp.sum(weights, axis=0, keepdims=True)))
        return done

    def write(columns: Any, done: list[tuple[jax.Array, jax.Array]]) -> None:
        each = zip(pairs[1::2], done, strict=True)
        parts = [dot(v_ref[...], weights, (0, 0)) / total for v_ref, (weights, total) in each]  # [d, queries]
        out_ref[columns, :] = reduce(jnp.add, parts).T.astype(out_ref.dtype)

    queries = q_ref.shape[0]
    units = [pl.ds(start, min(UNIT_QUERIES, queries)) for start in range(0, queries, UNIT_QUERIES)]
    scores, done = score(units[0]), []
    for i in range(len(units)):  # the next unit's scores are made while this one's softmax is
        following = score(units[i + 1]) if i + 1 < len(units) else []
        if i > 0:
            write(units[i - 1], done)
        done, scores = softmax(scores), following
    write(units[-1], done)


@partial(jax.jit, static_argnames=("interpret",))
def forward(q, *keys_and_values: jax.Array, interpret: bool = False) -> jax.Array:
    """The sum of attention to each pair of keys and values, `[b, lq, n, d]`.

    Args:
      q: `[b, lq, n, d]`.
      keys_and_values: `[b, lk, n, d]`, one or several pairs of them, keys first.
    """
    b, length, n, d = q.shape
    lengths = tuple(k.shape[1] for k in keys_and_values[::2])
    blocks = pl.cdiv(length, QUERIES)
    queries = pl.cdiv(pl.cdiv(length, blocks), UNIT_QUERIES) * UNIT_QUERIES

    def columns(x: jax.Array) -> jax.Array:  # [b, l, e]
        return x.reshape(b, x.shape[1], n * d)

    def by_head(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, d), lambda h, i: (jax.lax.div(h, n), 0, jax.lax.rem(h, n)))

    padded = [jnp.pad(columns(x), ((0, 0), (0, -x.shape[1] % TILE), (0, 0))) for x in keys_and_values]
    by_query = pl.BlockSpec((None, queries, d), lambda h, i: (jax.lax.div(h, n), i, jax.lax.rem(h, n)))
    out = pl.pallas_call(
        partial(kernel, lengths=lengths, scale=d**-0.5 * LOG2E),
        grid=(b * n, pl.cdiv(length, queries)),
        in_specs=[by_query, *(by_head(x.shape[1]) for x in padded)],
        out_specs=by_query,
        out_shape=jax.ShapeDtypeStruct((b, length, n * d), q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=48 * 2**20),
        interpret=interpret,
        name="cross_attention",
    )(columns(q), *padded)
    return out.reshape(q.shape)
