"""The arithmetic of `int8fp8` as a flash kernel for TPUs, built and laid out as `flash_tpu`.

What a chip has no unit for is multiplied in bfloat16: int8 and float8_e4m3fn fit into it, their products into the
float32 sums. So the scores are the same on every chip; values are rounded to fp8 only where that is faster.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from wanjax.ops.kernels import LOWEST, Forward
from wanjax.ops.kernels.flash_tpu import (
    LANES,
    Unit,
    compiler_params,
    for_units,
    mask,
    pad_rows,
    pipeline,
    query_block,
    widen,
)
from wanjax.ops.kernels.int8fp8 import LOG2E, SHIFT, UNIT_KEYS, Values, dot, finish, prepare

KEYS = 2048  # of a block


def chip() -> tuple[DTypeLike, Values]:
    """The dtype that scores are multiplied in and the rounding of values, of the chip that is compiled for."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # not known while a program for several platforms is traced
        return jnp.int8, "bf16"
    scores = jnp.int8 if info.int8_ops_per_second > info.bf16_ops_per_second else jnp.bfloat16
    return scores, "fp8" if info.fp8_ops_per_second > info.bf16_ops_per_second else "bf16"


def kernel(
    valid_ref, q_ref, q_scale_ref, k_ref, k_scale_ref, v_ref, v_scale_ref, out_ref, lse_ref, sum_ref, top_ref, total_ref
):
    """One block of keys for one block of queries; the grid is (heads, queries, keys)."""
    step, (keys, queries) = pl.program_id(2), (k_ref.shape[0], q_ref.shape[0])

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        top_ref[...] = jnp.full_like(top_ref, LOWEST * LOG2E)
        total_ref[...] = jnp.zeros_like(total_ref)

    def score(unit: Unit) -> jax.Array:
        columns, start, valid = unit
        products = dot(k_ref[pl.ds(start, UNIT_KEYS), :], q_ref[columns, :], (1, 1))  # [keys, queries]
        # lax: Mosaic lowers Python's // only where it knows the chip.
        place = start // UNIT_KEYS if isinstance(start, int) else jax.lax.div(start, UNIT_KEYS)
        scale = q_scale_ref[:, columns] * k_scale_ref[pl.ds(place, 1), :1]  # [1, queries]
        return mask(products.astype(jnp.float32) * scale, valid, -jnp.inf)

    def softmax(unit: Unit, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        columns = unit[0]
        top = jnp.maximum(top_ref[:, columns], jnp.max(scores, axis=0, keepdims=True))  # [1, queries]
        weights = jnp.exp2(scores - (top - SHIFT))
        shrink = jnp.exp2(top_ref[:, columns] - top)
        top_ref[:, columns] = top
        total_ref[:, columns] = shrink * total_ref[:, columns] + jnp.sum(weights, axis=0, keepdims=True)
        return weights.astype(v_ref.dtype), shrink

    def add(unit: Unit, done: tuple[jax.Array, jax.Array]) -> None:
        columns, start, _ = unit  # values that do not count are zeros
        weights, shrink = done
        added = dot(v_ref[:, pl.ds(start, UNIT_KEYS)], weights, (1, 0))  # [d, queries]
        sum_ref[:, columns] = shrink * sum_ref[:, columns] + added

    valid = jnp.clip(valid_ref[0] - step * keys, 0, keys)
    for_units(queries, keys, UNIT_KEYS, valid, lambda units: pipeline(units, score, softmax, add))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        total = jnp.where(total_ref[...] == 0, 1, total_ref[...])  # no valid key
        out_ref[...] = ((sum_ref[...] / total).T * v_scale_ref[...]).astype(out_ref.dtype)  # [queries, d]
        lse_ref[...] = (top_ref[...] - SHIFT + jnp.log2(total)) / LOG2E


def forward(q, k, v, valid, dtype: DTypeLike) -> Forward:
    """A kernel's `forward`, in the arithmetic of the chip."""
    scores, values = chip()
    return run(q, k, v, valid, dtype, scores=scores, values=values)


@partial(jax.jit, static_argnames=("dtype", "scores", "values", "interpret"))
def run(q, k, v, valid, dtype: DTypeLike, *, scores: DTypeLike, values: Values, interpret: bool = False) -> Forward:
    """`forward` with scores multiplied in `scores`, int8 or bfloat16, and values rounded to `values`."""
    lq, d = q.shape[2:]
    x = prepare(q, k, v, valid, values)
    heads, length, _ = x.k.shape
    keys, queries = min(KEYS, length), query_block(lq)
    padded_q = pad_rows(widen(x.q.astype(scores)), queries)  # [b * n, lq, d]
    width, rows = padded_q.shape[2], max(0, queries - lq)
    q_scale = jnp.pad(x.q_scale, ((0, 0), (0, rows)))[:, None]  # [b * n, 1, lq]
    k_scale = jnp.broadcast_to(x.k_scale[..., None], (*x.k_scale.shape, LANES))  # [b * n, units, lanes]
    v_scale = widen(x.v_scale[:, None])  # [b * n, 1, d]
    transposed_v = widen(x.v).swapaxes(1, 2)  # [b * n, d, lk]

    def block(j, valid):  # stays where it is once no valid key is left: nothing more is fetched
        return jnp.minimum(j, jax.lax.div(jnp.maximum(valid[0] - 1, 0), keys))

    by_query = pl.BlockSpec((None, queries, width), lambda h, i, j, _: (h, i, 0))
    row = pl.BlockSpec((None, 1, queries), lambda h, i, j, _: (h, 0, i))
    by_key = pl.BlockSpec((None, keys, width), lambda h, i, j, valid: (h, block(j, valid), 0))
    by_unit = pl.BlockSpec((None, keys // UNIT_KEYS, LANES), lambda h, i, j, valid: (h, block(j, valid), 0))
    by_column = pl.BlockSpec((None, width, keys), lambda h, i, j, valid: (h, 0, block(j, valid)))
    by_channel = pl.BlockSpec((None, 1, width), lambda h, i, j, _: (h, 0, 0))
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads, pl.cdiv(lq, queries), pl.cdiv(length, keys)),
            in_specs=[by_query, row, by_key, by_unit, by_column, by_channel],
            out_specs=[by_query, row],
            scratch_shapes=[pltpu.VMEM((rows, queries), jnp.float32) for rows in (width, 1, 1)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(padded_q.shape, dtype),
            jax.ShapeDtypeStruct(q_scale.shape, jnp.float32),
        ],
        compiler_params=compiler_params("parallel"),
        interpret=interpret,
        name="int8fp8_forward",
    )(x.valid[None], padded_q, q_scale, widen(x.k.astype(scores)), k_scale, transposed_v, v_scale)
    return finish(out[:, :lq, :d], lse[:, 0, :lq] + x.shift, q.shape, x.valid)
