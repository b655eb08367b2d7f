"""Flash attention for TPUs without a running maximum: softmax relative to a bound that is known beforehand.

No score of a query exceeds `norm(q) * max(norm(k))` (Cauchy-Schwarz). Softmax may be taken relative to any number as
long as the weights neither overflow nor vanish: relative to this bound, less SHIFT, none overflows, and what the inner
loop does besides its two products is one exponential, one addition and one rounding a score; nothing is rescaled. The
subtraction costs nothing where the matrix unit is deeper than a head: the bound is one more channel of the query,
against ones.

Weights vanish where all scores of a query lie far below its bound. A query whose sum of weights comes out less than
LEAST_SUM, which float32 still tells from what vanishes, has log-sum-exp minus infinity here, and `forward` has its
block of queries computed again by `flash_tpu`'s kernel with the running maximum. Nothing is assumed about the weights
of a network, and nothing is paid where no block needs it.

The sum of weights is that of what is multiplied, cut off to bfloat16: so the rounding of a weight that outweighs all
others, which is exactly 1 relative to a running maximum, cancels here too. The log-sum-exp gets back what is cut off on
average; it errs by up to 0.005 where a single key has all the weight.

Like `flash_tpu`: scores are `[keys, queries]`, powers of two, units as a pipeline. A unit is COLUMNS queries by all
keys of the block, so that the sums of its products stay in registers; the weights of two units lie in VMEM, which keeps
the second products close behind the first ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from wanjax.ops.kernels import LOWEST, Forward
from wanjax.ops.kernels.tiles_tpu import LANES, LOG2E, compiler_params, dot, forward_cost, mask, pipeline, place, scaled

COLUMNS = 256  # queries of a unit
NORM_ROWS = 2048  # keys of a block of which the longest is sought
RAGGED_UNITS = 4  # units of keys at a time of a block that only partly counts
SHIFT = 64.0  # the largest weight is 2**SHIFT: 2**63 of room above for sums over keys times values
LEAST_SUM = 2.0**-88  # keys that vanish, below 2**-126 each, are less than 2**-21 of that even if there are 2**17
MOST_SUM = 2.0**100
TRUNCATION = 2.0**-8 * math.log(2)  # what a number loses of itself, on average, when cut off to bfloat16


class Unit(NamedTuple):
    """Queries, keys, how many of these count or None for all, and where its weights lie."""

    columns: Any
    rows: Any
    valid: Any
    slot: int


def for_units(queries: int, keys: int, part: int, valid: jax.Array, run: Callable[[Sequence[Unit]], None]) -> None:
    """`run` with the units of a block of which `valid` keys count; `part` of them at a time if not all do."""
    columns = [pl.ds(start, min(COLUMNS, queries - start)) for start in range(0, queries, COLUMNS)]

    @pl.when(valid == keys)
    def _() -> None:
        run([Unit(c, pl.ds(0, keys), None, i % 2) for i, c in enumerate(columns)])

    @pl.when(valid < keys)
    def _() -> None:
        @pl.loop(0, jax.lax.div(valid + part - 1, part))
        def _(i: jax.Array) -> None:
            start = pl.multiple_of(i * part, part)
            run([Unit(c, pl.ds(start, part), valid - start, i % 2) for i, c in enumerate(columns)])


def kernel(
    valid_ref, norm_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, query_ref, bound_ref, acc_ref, row_sum_ref, vt_ref,
    weights_ref, *, scale: float, part: int,
):  # fmt: skip
    """One block of keys for one block of queries; the grid is (heads, queries, keys)."""
    step, (keys, queries), dtype = pl.program_id(2), (k_ref.shape[0], q_ref.shape[0]), k_ref.dtype
    width, depth, norm = q_ref.shape[1], query_ref.shape[1], norm_ref[pl.program_id(0)]

    @pl.when(step == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        row_sum_ref[...] = jnp.zeros_like(row_sum_ref)
        query, bound = bounded(q_ref[...], norm, scale)
        query_ref[:, :width] = query
        bound_ref[...] = bound.T[:1]  # [1, queries]
        if depth > width:
            query_ref[:, width:] = -bound.astype(dtype)

    def score(unit: Unit) -> jax.Array:
        k = k_ref[unit.rows, :]
        if depth > width:
            k = jnp.concatenate([k, first_lane(k.shape[0], 1, dtype)], axis=1)
        scores = mask(dot(k, query_ref[unit.columns, :], (1, 1)), unit.valid, -jnp.inf)  # [keys, queries]
        return scores if depth > width else scores - bound_ref[:, unit.columns]

    def softmax(unit: Unit, scores: jax.Array) -> None:
        weights = jnp.exp2(scores)
        weights = truncated(weights) if dtype == jnp.bfloat16 else weights
        row_sum_ref[:, unit.columns] += jnp.sum(weights.reshape(-1, 8, weights.shape[1]), axis=0)
        weights_ref[unit.slot, : unit.rows.size, : unit.columns.size] = weights.astype(dtype)

    def add(unit: Unit, _: None) -> None:
        weights = weights_ref[unit.slot, : unit.rows.size, : unit.columns.size]
        acc_ref[:, unit.columns] += dot(vt_ref[:, unit.rows], weights, (1, 0))  # [d, queries]

    def run(units: Sequence[Unit]) -> None:
        rows, valid = units[0].rows, units[0].valid
        vt_ref[:, rows] = mask(v_ref[rows, :], valid, 0).T
        pipeline(units, score, softmax, add)

    for_units(queries, keys, part, jnp.clip(valid_ref[0] - step * keys, 0, keys), run)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        row_sum = jnp.sum(row_sum_ref[...], axis=0, keepdims=True)  # [1, queries]
        fits = (row_sum >= LEAST_SUM) & (row_sum <= MOST_SUM)
        out_ref[...] = (acc_ref[...] / jnp.where(fits, row_sum, 1)).T.astype(out_ref.dtype)  # [queries, d]
        otherwise = jnp.where(valid_ref[0] == 0, LOWEST, -jnp.inf)
        lost = 1 + TRUNCATION if dtype == jnp.bfloat16 else 1.0
        lse_ref[...] = jnp.where(
            fits, (bound_ref[...] + jnp.log2(jnp.where(fits, row_sum, 1) * lost)) / LOG2E, otherwise
        )


def bounded(q: jax.Array, norm: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Scaled queries, and in lane 0 what softmax is taken relative to, both `[queries, width or LANES]`."""
    query = scaled(q, scale)
    query32 = query.astype(jnp.float32)
    bound = jnp.sqrt(jnp.sum(query32 * query32, axis=1, keepdims=True)) * norm - SHIFT
    # As the matrix unit sees it. To be an exact bound is no matter, with so much room above.
    bound = bound.astype(jnp.bfloat16).astype(jnp.float32)
    return query, bound * first_lane(len(q), 1, jnp.float32)


def truncated(x: jax.Array) -> jax.Array:
    """Float32 cut off to what bfloat16 holds, by one operation."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def first_lane(rows: int, value: float, dtype: DTypeLike) -> jax.Array:
    """`[rows, LANES]` with `value` in lane 0, else zeros."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    return jnp.where(lanes == 0, value, 0).astype(dtype)


def forward(
    q,
    k,
    v,
    valid,
    dtype: DTypeLike,
    *,
    heads: int,
    scale: float,
    queries: int,
    keys: int,
    part: int,
    repair,
    interpret: bool,
) -> Forward:
    """Output `[b, lq, n * d]` and log-sum-exp `[b * n, 1, lq]`.

    Args:
      q, k, v: `[b, l, n * d]`, at least a block of each; `d` is whole lanes.
      valid: int32 `[1]`.
      dtype: of the output.
      heads: `n`.
      scale: of the scores, with log2(e) in it.
      queries, keys, part: of a block; of a block; of these, worked through at a time where not all count.
      repair: makes `(out, lse)` with the block of queries `(head, block)` by the running maximum of them.
      interpret: as `pl.pallas_call` takes it.
    """
    (b, lq, _), lk, width = q.shape, k.shape[1], q.shape[2] // heads
    norm = longest(k, valid, heads, interpret)  # [b * n]

    def key_block(h, i, j, valid, _):  # stays where it is once no valid key is left: nothing more is fetched
        return place(h, jnp.minimum(j, jax.lax.div(jnp.maximum(valid[0] - 1, 0), keys)), heads)

    by_query = pl.BlockSpec((None, queries, width), lambda h, i, j, *_: place(h, i, heads))
    by_key = pl.BlockSpec((None, keys, width), key_block)
    row = pl.BlockSpec((None, 1, queries), lambda h, i, j, *_: (h, 0, i))
    shapes = {
        "query": ((queries, width + LANES if deep(width) else width), k.dtype),
        "bound": ((1, queries), jnp.float32),
        "sums of values": ((width, queries), jnp.float32),
        "sums of weights": ((8, queries), jnp.float32),
        "transposed v": ((width, keys), k.dtype),
        "weights": ((2, keys, min(COLUMNS, queries)), k.dtype),
    }
    out, lse = pl.pallas_call(
        partial(kernel, scale=scale, part=part),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b * heads, pl.cdiv(lq, queries), pl.cdiv(lk, keys)),
            in_specs=[by_query, by_key, by_key],
            out_specs=[by_query, row],
            scratch_shapes=[pltpu.VMEM(*shape) for shape in shapes.values()],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((b * heads, 1, lq), jnp.float32)],
        compiler_params=compiler_params("parallel"),
        cost_estimate=forward_cost(q, k, v, lk, width),
        interpret=interpret,
        name="flash_forward",
    )(valid, norm, q, k, v)
    return repaired(out, lse, queries, repair)


def longest_kernel(valid_ref, k_ref, out_ref) -> None:
    """One block of keys; the grid is (heads, keys). What comes out, the largest square of a norm, fills its tile."""
    rows, block = k_ref.shape[0], pl.program_id(1)

    @pl.when(block == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    k = mask(k_ref[...].astype(jnp.float32), valid_ref[0] - block * rows, 0)
    squares = jnp.sum(k * k, axis=1, keepdims=True)  # [keys, 1]
    out_ref[...] = jnp.maximum(out_ref[...], jnp.max(squares, axis=0, keepdims=True))


def longest(k: jax.Array, valid: jax.Array, heads: int, interpret: bool) -> jax.Array:
    """Norms of every head's longest key, `[b * n]`, of keys `[b, l, n * d]`; XLA would write all squares."""
    b, length, width = k.shape
    squares = pl.pallas_call(
        longest_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b * heads, pl.cdiv(length, NORM_ROWS)),
            in_specs=[pl.BlockSpec((None, NORM_ROWS, width // heads), lambda h, i, _: place(h, i, heads))],
            out_specs=pl.BlockSpec((None, 8, LANES), lambda h, i, _: (h, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((b * heads, 8, LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="longest_key",
    )(valid, k)
    return jnp.sqrt(squares[:, 0, 0])


def repaired(out: jax.Array, lse: jax.Array, queries: int, repair: Callable[..., Forward]) -> Forward:
    """`out` and `lse`, with the blocks of queries that have an `lse` of minus infinity made by `repair`."""
    heads, _, lq = lse.shape
    rows = jnp.pad(lse[:, 0], ((0, 0), (0, -lq % queries)))  # [heads, blocks * queries]
    bad = jnp.any(jnp.isneginf(rows.reshape(heads, -1, queries)), axis=-1)  # [heads, blocks]

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        bad, out, lse = carry
        place = jnp.argmax(bad.ravel())  # the first
        head, block = jnp.divmod(place.astype(jnp.int32), bad.shape[1])
        return bad.at[head, block].set(False), *repair(out, lse, head, block)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), step, (bad, out, lse))[1:]


def deep(width: int) -> bool:
    """Whether the matrix unit of the chip that is compiled for has room for more channels than `width`."""
    try:
        return pltpu.get_tpu_info().mxu_column_size > width
    except ValueError:  # not known while a program for several platforms is traced
        return width < 256


def compiles() -> bool:
    """Whether the chip that is compiled for takes a repair in the middle of a program.

    v4 and v5p do not: two cores are one device, and libtpu 0.0.42 ends in a failed check (BarrierMegacore) where a
    collective of a training step is under way behind the loop of repairs.
    """
    try:
        return pltpu.get_tpu_info().generation > 5 or pltpu.get_tpu_info().num_cores == 1
    except ValueError:  # as in `deep`
        return True
