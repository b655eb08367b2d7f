"""Attention in 8 bits for TPUs that multiply int8 at twice the rate in a matrix unit deeper than a head (v6e).

Built as `bounded_tpu`: no running maximum, weights of two units in VMEM. A score costs, beside its two products, a
conversion from int32, then half an operation each for rounding to bfloat16, its unit, the exponential and the sum: all
these are of bfloat16, two numbers a lane.

Keys lose their mean over tokens and are rotated, as in `int8fp8`, but by 1 and -1, which is exact in bfloat16, and have
one scale for a head. What softmax is taken relative to is a whole number of the scores' own unit; channels against 1
and 127, in the spare half of the unit's depth, subtract it exactly. It is a query's largest score among SAMPLES keys
from all over the sequence: so exponents are small where weights are large, and bfloat16 holds them to 2**-9 of
themselves, a fifth of what weights in fp8 would lose. Values and weights are bfloat16.

The sum of weights is about 1 at least. A query with a sum beyond MOST_SUM has log-sum-exp minus infinity here, and its
block is computed again, in 16 bits, by the running maximum (`bounded_tpu.repaired`). Other chips than these gain
nothing by 8 bits and get `flash_tpu`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from wanjax.ops.kernels import LOWEST, Forward, bounded_tpu, flash_tpu
from wanjax.ops.kernels.bounded_tpu import COLUMNS, Unit, for_units
from wanjax.ops.kernels.tiles_tpu import (
    LANES,
    LOG2E,
    columns,
    compiler_params,
    forward_cost,
    mask,
    pad_rows,
    pipeline,
    place,
    widen,
)

MOST_QUERIES, KEYS = 4096, 2048  # of a block
PART = 1024  # keys at a time of a block that only partly counts
GROUP = 32  # weights of a lane that are summed up in bfloat16
ROWS = 1024  # keys of a block that are rounded
SAMPLES = 256
MOST_SUM = 2.0**32  # exponents up to 32 are off by 2**-4


def gains() -> bool:
    """Whether the chip that is compiled for is one that this kernel is for."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # not known while a program for several platforms is traced
        return True
    return info.mxu_column_size > LANES and info.int8_ops_per_second > info.bf16_ops_per_second


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Matrix product over one axis of each, summed in int32 or float32."""
    sums = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=sums)


def hadamard() -> np.ndarray:
    """`[LANES, LANES]` of 1 and -1, orthogonal but for the factor sqrt(LANES): exact in bfloat16."""
    matrix = np.ones((1, 1))
    while len(matrix) < LANES:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return matrix


class Keys(NamedTuple):
    """Keys in 8 bits, rotated.

    Attributes:
      k: int8 `[b, lk, n * LANES]`.
      mean, scale: of each head, float32 `[b * n, 1, LANES]`: what they lost, and by what they were divided.
    """

    k: jax.Array
    mean: jax.Array
    scale: jax.Array


def keys_kernel(valid_ref, k_ref, turn_ref, out_ref, mean_ref, scale_ref, sum_ref, high_ref, low_ref):
    """A block of keys; the grid is (heads, 2, blocks): all of a head's statistics, then the rounding."""
    phase, block, rows = pl.program_id(1), pl.program_id(2), k_ref.shape[0]

    def keys() -> jax.Array:
        k = mask(k_ref[...], jnp.clip(valid_ref[0] - block * rows, 0, rows), 0)
        return dot(k, turn_ref[...], (1, 0))

    @pl.when((phase == 0) & (block == 0))
    def _():
        for ref in (sum_ref, high_ref, low_ref):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(phase == 0)
    def _():
        parts = keys().reshape(-1, 8, LANES)
        sum_ref[...] += jnp.sum(parts, axis=0)
        high_ref[...] = jnp.maximum(high_ref[...], jnp.max(parts, axis=0))
        low_ref[...] = jnp.minimum(low_ref[...], jnp.min(parts, axis=0))

    @pl.when((phase == 1) & (block == 0))
    def _():
        count = jnp.maximum(valid_ref[0], 1).astype(jnp.float32)
        mean = jnp.sum(sum_ref[...], axis=0, keepdims=True) / count  # [1, LANES]
        high = jnp.max(high_ref[...], axis=0, keepdims=True)
        low = jnp.min(low_ref[...], axis=0, keepdims=True)
        top = jnp.max(jnp.maximum(high - mean, mean - low), axis=1, keepdims=True) / 127
        mean_ref[...] = mean
        scale_ref[...] = jnp.broadcast_to(jnp.where(top > 0, top, 1), scale_ref.shape)

    @pl.when(phase == 1)
    def _():
        k = (keys() - mean_ref[...]) / scale_ref[...]
        out_ref[...] = jnp.clip(jnp.round(k), -127, 127).astype(jnp.int8)


def rounded_keys(k: jax.Array, valid: jax.Array, heads: int, interpret: bool) -> Keys:
    """Keys `[b, lk, n * LANES]` in 8 bits."""
    b, length, _ = k.shape
    rows = min(ROWS, pl.cdiv(length, 32) * 32)
    of_head = pl.BlockSpec((None, 1, LANES), lambda h, phase, i, _: (h, 0, 0))
    row = jax.ShapeDtypeStruct((b * heads, 1, LANES), jnp.float32)
    return Keys(
        *pl.pallas_call(
            keys_kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(b * heads, 2, pl.cdiv(length, rows)),
                in_specs=[
                    pl.BlockSpec((None, rows, LANES), lambda h, phase, i, _: place(h, i, heads)),
                    pl.BlockSpec((LANES, LANES), lambda h, phase, i, _: (0, 0)),
                ],
                out_specs=[
                    pl.BlockSpec((None, rows, LANES), lambda h, phase, i, _: place(h, i * phase, heads)),
                    *[of_head] * 2,
                ],
                scratch_shapes=[pltpu.VMEM((8, LANES), jnp.float32)] * 3,
            ),
            out_shape=[jax.ShapeDtypeStruct(k.shape, jnp.int8), row, row],
            compiler_params=compiler_params("arbitrary"),
            interpret=interpret,
            name="int8fp8_keys",
        )(valid, k, jnp.asarray(hadamard(), k.dtype))
    )


def kernel(
    valid_ref, q_ref, k_ref, v_ref, sample_ref, mean_ref, scale_ref, turn_ref, out_ref, lse_ref, query_ref,
    row_ref, base_ref, acc_ref, row_sum_ref, vt_ref, weights_ref, part_vt_ref, part_weights_ref, *, scale: float,
):  # fmt: skip
    """One block of keys for one block of queries; the grid is (heads, queries, keys)."""
    step, (keys, queries) = pl.program_id(2), (k_ref.shape[0], q_ref.shape[0])

    @pl.when(step == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        row_sum_ref[...] = jnp.zeros_like(row_sum_ref)

        @for_groups(queries)
        def _(here):
            query, row, base = rounded_queries(q_ref[here, :], sample_ref, mean_ref, scale_ref, turn_ref, scale)
            query_ref[here, :], row_ref[:, here], base_ref[:, here] = query, row, base

    def score(unit: Unit) -> jax.Array:
        k = k_ref[unit.rows, :]
        lanes = jax.lax.broadcasted_iota(jnp.int32, k.shape, 1)
        k = jnp.concatenate([k, jnp.where(lanes == 0, 1, 127).astype(jnp.int8)], axis=1)
        scores = dot(k, query_ref[unit.columns, :], (1, 1)).astype(jnp.float32)  # [keys, queries]
        scores = mask(scores, unit.valid, -jnp.inf).astype(jnp.bfloat16)
        return scores * row_ref[:, unit.columns].astype(jnp.bfloat16)

    def scratch(valid: Any) -> Any:  # of its own for each kind of block, or Mosaic takes an order for both that costs
        return (vt_ref, weights_ref) if valid is None else (part_vt_ref, part_weights_ref)

    def softmax(unit: Unit, scores: jax.Array) -> None:
        weights = jnp.exp2(scores)
        row_sum_ref[:, unit.columns] += sums(weights)
        scratch(unit.valid)[1][unit.slot] = weights

    def add(unit: Unit, _: None) -> None:
        vt, weights = scratch(unit.valid)
        acc_ref[:, unit.columns] += dot(vt[...], weights[unit.slot], (1, 0))  # [d, queries]

    def run(units: Sequence[Unit]) -> None:
        _, rows, valid, _ = units[0]
        scratch(valid)[0][...] = mask(v_ref[rows, :], valid, 0).T.astype(jnp.bfloat16)
        pipeline(units, score, softmax, add)

    for_units(queries, keys, PART, jnp.clip(valid_ref[0] - step * keys, 0, keys), run)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        otherwise = jnp.where(valid_ref[0] == 0, LOWEST, -jnp.inf)

        @for_groups(queries)
        def _(here):
            row_sum = jnp.sum(row_sum_ref[:, here], axis=0, keepdims=True)  # [1, queries]
            fits = (row_sum > 0) & (row_sum <= MOST_SUM)
            row_sum = jnp.where(fits, row_sum, 1)
            out_ref[here, :] = (acc_ref[:, here] / row_sum).T.astype(out_ref.dtype)  # [queries, d]
            lse_ref[:, here] = jnp.where(fits, (base_ref[:, here] + jnp.log2(row_sum)) / LOG2E, otherwise)


def for_groups(queries: int) -> Callable[[Callable[[Any], None]], None]:
    """Decorates what is to run for every slice of COLUMNS queries, which code for all at once would be long for."""
    group = math.gcd(queries, COLUMNS)

    def decorate(run: Callable[[Any], None]) -> None:
        pl.loop(0, queries // group)(lambda i: run(pl.ds(pl.multiple_of(i * group, group), group)))

    return decorate


def sums(weights: jax.Array) -> jax.Array:
    """Float32 sums `[8, queries]` of bfloat16 `[keys, queries]`; of up to GROUP of them in bfloat16, pair by pair."""
    rows, queries = weights.shape
    tiles = weights.reshape(-1, math.gcd(rows // 16, GROUP), 16, queries)
    parts = [tiles[:, i] for i in range(tiles.shape[1])]
    while len(parts) > 1:
        parts = [*map(jnp.add, parts[::2], parts[1::2]), *parts[len(parts) // 2 * 2 :]]
    return jnp.sum(parts[0].astype(jnp.float32).reshape(-1, 8, queries), axis=0)


def rounded_queries(q, sample_ref, mean_ref, scale_ref, turn_ref, scale: float) -> tuple[jax.Array, ...]:
    """Queries `[queries, 2 * LANES]`, and as rows `[1, queries]` the unit of their scores and what these are less."""
    turned = dot(q, turn_ref[...], (1, 0))  # [queries, LANES]
    top = jnp.max(jnp.abs(turned), axis=1, keepdims=True)
    of_keys = scale_ref[:, :1] * (scale / LANES)
    unit = jnp.where(top > 0, top / 127, 1) * of_keys * (1 + 2**-7)  # [queries, 1]; not less once rounded
    unit = unit.astype(jnp.bfloat16).astype(jnp.float32)
    q = jnp.clip(jnp.round(turned / (unit / of_keys)), -127, 127).astype(jnp.int8)
    lost = jnp.sum(turned * mean_ref[...], axis=1, keepdims=True) * (scale / LANES)

    lanes = jax.lax.broadcasted_iota(jnp.int32, turned.shape, 1).astype(jnp.float32)
    largest = jnp.max(dot(q, sample_ref[...], (1, 1)).astype(jnp.float32), axis=1, keepdims=True)
    most = 127.0 * (LANES - 1)
    many = jnp.clip(jnp.round(largest / 127), -most, most)  # times 127
    rest = jnp.clip(largest - 127 * many, -127, 127)
    each = jnp.where(many < 0, -1, 1) * jnp.clip(jnp.abs(many) - 127 * (lanes - 1), 0, 127)
    spare = jnp.where(lanes == 0, -rest, -each).astype(jnp.int8)
    return jnp.concatenate([q, spare], axis=1), *as_rows(unit, (127 * many + rest) * unit + lost)


def as_rows(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two columns `[n, 1]` as rows `[1, n]`."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (first.shape[0], LANES), 1)
    rows = jnp.where(lanes == 0, first, second).T
    return rows[:1], rows[1:2]


def forward(q, k, v, valid, dtype: DTypeLike) -> Forward:
    """A kernel's `forward`; that in 16 bits on chips where 8 gain nothing."""
    if not gains() or q.shape[3] > LANES:
        return flash_tpu.forward(q, k, v, valid, dtype)
    return run(q, k, v, valid, dtype)


@partial(jax.jit, static_argnames=("dtype", "interpret"))
def run(q, k, v, valid, dtype: DTypeLike, *, interpret: bool = False) -> Forward:
    """`forward` by the kernel."""
    b, n, lq, d = q.shape
    scale, queries = d**-0.5 * LOG2E, query_block(lq)
    q = pad_rows(columns(widen(q)), queries, whole=interpret)  # [b, lq, n * LANES]
    lk = k.shape[2]
    keys = min(KEYS, pl.cdiv(lk, PART) * PART)
    k, v = (pad_rows(columns(widen(x)), keys) for x in (k, v))  # [b, lk, n * LANES]
    valid = jnp.full((1,), lk if valid is None else valid, jnp.int32)
    operands = rounded_keys(k, valid, n, interpret)

    def repair(out: jax.Array, lse: jax.Array, *first: jax.Array) -> Forward:
        blocks = {"queries": queries, "keys": keys, "unit_keys": flash_tpu.UNIT_KEYS}
        options = {"heads": n, "scale": scale, "interpret": interpret, "replaced": (out, lse), "first": first}
        return flash_tpu.running(valid, q, k, v, dtype, **blocks, **options)

    out, lse = attend(q, operands, v, valid, dtype, n, (queries, keys), scale, interpret)
    out, lse = bounded_tpu.repaired(out, lse, queries, repair)
    out = out[:, :lq].reshape(b, lq, n, -1)[..., :d].swapaxes(1, 2)  # [b, n, lq, d]
    return out, lse[:, :, :lq].reshape(b, n, lq)


def query_block(length: int) -> int:
    """Queries of a block: many, as its first and last unit are worked at alone, but few beyond the last query."""
    if length <= MOST_QUERIES // 2:
        multiple = LANES if length <= LANES else COLUMNS
        return pl.cdiv(length, multiple) * multiple
    sizes = range(MOST_QUERIES // 2, MOST_QUERIES + 1, COLUMNS)
    return min(sizes, key=lambda size: pl.cdiv(length, size) * (size + COLUMNS))


def attend(q, operands: Keys, v, valid, dtype, heads: int, blocks: tuple[int, int], scale: float, interpret: bool):
    """Output `[b, lq, n * LANES]` and log-sum-exp `[b * n, 1, lq]`, minus infinity where blocks need repair."""
    (b, lq, _), lk, (queries, keys) = q.shape, v.shape[1], blocks
    k = operands.k
    places = jnp.arange(SAMPLES) * valid // SAMPLES

    def key_block(h, i, j, valid):  # stays where it is once no valid key is left: nothing more is fetched
        return place(h, jnp.minimum(j, jax.lax.div(jnp.maximum(valid[0] - 1, 0), keys)), heads)

    by_query = pl.BlockSpec((None, queries, LANES), lambda h, i, j, _: place(h, i, heads))
    of_head = pl.BlockSpec((None, 1, LANES), lambda h, i, j, _: (h, 0, 0))
    row = pl.BlockSpec((None, 1, queries), lambda h, i, j, _: (h, 0, i))
    shapes = {
        "query": ((queries, 2 * LANES), k.dtype),
        "unit of scores": ((1, queries), jnp.float32),
        "base": ((1, queries), jnp.float32),
        "sums of values": ((LANES, queries), jnp.float32),
        "sums of weights": ((8, queries), jnp.float32),
        "transposed v": ((LANES, keys), jnp.bfloat16),
        "weights": ((2, keys, min(COLUMNS, queries)), jnp.bfloat16),
        "transposed v of a part": ((LANES, PART), jnp.bfloat16),
        "weights of a part": ((2, PART, min(COLUMNS, queries)), jnp.bfloat16),
    }
    return pl.pallas_call(
        partial(kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b * heads, pl.cdiv(lq, queries), pl.cdiv(lk, keys)),
            in_specs=[
                by_query,
                pl.BlockSpec((None, keys, LANES), key_block),
                pl.BlockSpec((None, keys, LANES), key_block),
                pl.BlockSpec((None, SAMPLES, LANES), lambda h, i, j, _: place(h, 0, heads)),
                *[of_head] * 2,
                pl.BlockSpec((LANES, LANES), lambda h, i, j, _: (0, 0)),
            ],
            out_specs=[by_query, row],
            scratch_shapes=[pltpu.VMEM(*shape) for shape in shapes.values()],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((b * heads, 1, lq), jnp.float32)],
        compiler_params=compiler_params("parallel"),
        cost_estimate=forward_cost(q, k, v, lk, LANES),
        interpret=interpret,
        name="int8fp8_forward",
    )(valid, q, k, v, jnp.take(k, places, axis=1), *operands[1:], jnp.asarray(hadamard(), q.dtype))
