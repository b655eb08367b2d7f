"""Attention to two blocks of keys from that to each, for TPUs: in one pass, in place, in the kernels' order.

Without it XLA spreads every row's weights over its head's channels in memory first.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from wanjax.ops.kernels import Forward

LANES, ROWS = 128, 2048


def kernel(out_ref, lse_ref, other_ref, other_lse_ref, merged_ref, merged_lse_ref) -> None:
    """Some rows of a head; statistics are `[1, rows]`."""
    one, other = lse_ref[...], other_lse_ref[...]
    top = jnp.maximum(one, other)
    lse = top + jnp.log(jnp.exp(one - top) + jnp.exp(other - top))

    def spread(part: jax.Array) -> jax.Array:  # [rows, lanes]
        return jnp.broadcast_to(jnp.exp(part - lse), (LANES, lse.shape[1])).T

    first, second = spread(one), spread(other)
    for lane in range(0, out_ref.shape[1], LANES):
        here = pl.ds(lane, LANES)
        merged = first * out_ref[:, here] + second * other_ref[:, here]
        merged_ref[:, here] = merged.astype(merged_ref.dtype)
    merged_lse_ref[...] = lse


def supports(out: jax.Array) -> bool:
    """Whether `merge` takes results `[b, n, l, d]`."""
    return out.shape[-1] % LANES == 0


@partial(jax.jit, static_argnames=("dtype", "interpret"))
def merge(one: Forward, other: Forward, dtype: DTypeLike, *, interpret: bool = False) -> Forward:
    """As `sharding.ring.merge`: `[b, n, l, d]` and `[b, n, l]`, float32; the output in `dtype`."""
    b, n, length, d = one[0].shape
    rows = min(ROWS, pl.cdiv(length, LANES) * LANES)
    out, other_out = (x.swapaxes(1, 2).reshape(b, length, n * d) for x in (one[0], other[0]))
    lse, other_lse = (x.reshape(b * n, 1, length) for x in (one[1], other[1]))
    block = pl.BlockSpec((None, rows, d), lambda h, i: (jax.lax.div(h, n), i, jax.lax.rem(h, n)))
    row = pl.BlockSpec((None, 1, rows), lambda h, i: (h, 0, i))
    merged, merged_lse = pl.pallas_call(
        kernel,
        grid=(b * n, pl.cdiv(length, rows)),
        in_specs=[block, row, block, row],
        out_specs=[block, row],
        out_shape=[jax.ShapeDtypeStruct(out.shape, dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)],
        input_output_aliases={0: 0, 1: 1} if dtype == jnp.float32 else {},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="merge",
    )(out, lse, other_out, other_lse)
    return merged.reshape(b, length, n, d).swapaxes(1, 2), merged_lse.reshape(b, n, length)
