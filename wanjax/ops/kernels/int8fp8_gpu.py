"""The arithmetic of `int8fp8` as a flash kernel for NVIDIA GPUs, which Pallas compiles with Triton.

cuDNN has attention in fp8, but with one scale for a whole tensor, queries and keys of three bits of mantissa, an
output in fp8, and no log-sum-exp: neither near enough to exact attention nor of use in a ring.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from wanjax.ops.kernels import LOWEST, Forward
from wanjax.ops.kernels.int8fp8 import LOG2E, SHIFT, UNIT_KEYS, Values, dot, finish, prepare

# With three blocks of keys and values on their way, at most 88 KiB of shared memory at head dim 128: every chip since
# Ampere has them.
QUERIES, KEYS, STAGES = 128, 64, 3


def chip() -> Values:
    """The rounding of values on this machine's GPU: fp8 where Triton multiplies it, on Ada (8.9) and from Blackwell on.

    For Hopper (9.0) it would convert fp8 to float16 and leave the fastest units aside. Without a GPU, Pallas compiles
    for Hopper.
    """
    try:
        capability = float(jax.local_devices(backend="cuda")[0].compute_capability)
    except RuntimeError:
        return "bf16"
    return "fp8" if capability == 8.9 or capability >= 10 else "bf16"


def int8fp8_forward(valid_ref, q_ref, q_scale_ref, k_ref, k_scale_ref, v_ref, v_scale_ref, out_ref, lse_ref):
    """All keys for one block of queries; the grid is (queries, heads). Its own name is the one that profiles show."""
    q, q_scale, valid = q_ref[...], q_scale_ref[...], valid_ref[0]
    queries, d = q.shape

    def step(i: jax.Array, carry: tuple[jax.Array, ...], whole: bool) -> tuple[jax.Array, ...]:
        out, row_max, row_sum = carry
        keys = pl.ds(i * KEYS, KEYS)
        scale = q_scale * k_scale_ref[jax.lax.div(i, UNIT_KEYS // KEYS)]  # [queries]
        scores = dot(q, k_ref[keys, :], (1, 1)).astype(jnp.float32) * scale[:, None]  # [queries, keys]
        if not whole:
            scores = jnp.where(i * KEYS + jnp.arange(KEYS) < valid, scores, -jnp.inf)
        new_max = jnp.maximum(row_max, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - (new_max - SHIFT)[:, None])
        rescale = jnp.exp2(row_max - new_max)
        added = dot(weights.astype(v_ref.dtype), v_ref[:, keys], (1, 1))  # [queries, d]
        return rescale[:, None] * out + added, new_max, rescale * row_sum + jnp.sum(weights, axis=1)

    start = jnp.zeros((queries, d)), jnp.full((queries,), LOWEST * LOG2E), jnp.zeros(queries)
    whole = jax.lax.div(valid, KEYS)
    carry = jax.lax.fori_loop(0, whole, partial(step, whole=True), start)
    out, row_max, row_sum = jax.lax.fori_loop(whole, pl.cdiv(valid, KEYS), partial(step, whole=False), carry)
    row_sum = jnp.where(row_sum == 0, 1, row_sum)  # no valid key
    out_ref[...] = (out / row_sum[:, None] * v_scale_ref[...]).astype(out_ref.dtype)
    lse_ref[...] = (row_max - SHIFT + jnp.log2(row_sum)) / LOG2E


def forward(q, k, v, valid, dtype: DTypeLike) -> Forward:
    """A kernel's `forward`, in the arithmetic of the chip."""
    return run(q, k, v, valid, dtype, values=chip())


@partial(jax.jit, static_argnames=("dtype", "values", "interpret"))
def run(q, k, v, valid, dtype: DTypeLike, *, values: Values, interpret: bool = False) -> Forward:
    """`forward` with values rounded to `values`."""
    lq, d = q.shape[2:]
    x = prepare(q, k, v, valid, values)
    heads, lk, _ = x.k.shape
    # Triton's blocks are powers of two, with at least 16 rows and 32 columns of int8.
    queries, width = min(QUERIES, max(16, pl.next_power_of_2(lq))), max(32, pl.next_power_of_2(d))
    rows, columns = (0, -lq % queries), (0, width - d)

    by_query = pl.BlockSpec((None, queries, width), lambda i, h: (h, i, 0))
    row = pl.BlockSpec((None, queries), lambda i, h: (h, i))
    out, lse = pl.pallas_call(
        int8fp8_forward,
        grid=(pl.cdiv(lq, queries), heads),
        in_specs=[
            pl.BlockSpec((1,), lambda i, h: (0,)),
            by_query,
            row,
            pl.BlockSpec((None, lk, width), lambda i, h: (h, 0, 0)),
            pl.BlockSpec((None, lk // UNIT_KEYS), lambda i, h: (h, 0)),
            pl.BlockSpec((None, width, lk), lambda i, h: (h, 0, 0)),
            pl.BlockSpec((None, 1, width), lambda i, h: (h, 0, 0)),
        ],
        out_specs=[by_query, row],
        out_shape=[
            jax.ShapeDtypeStruct((heads, lq + rows[1], width), dtype),
            jax.ShapeDtypeStruct((heads, lq + rows[1]), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=STAGES),
        interpret=interpret,
        name="int8fp8_forward",
    )(
        x.valid[None],
        jnp.pad(x.q, ((0, 0), rows, columns)),
        jnp.pad(x.q_scale, ((0, 0), rows)),
        jnp.pad(x.k, ((0, 0), (0, 0), columns)),
        x.k_scale,
        jnp.pad(x.v, ((0, 0), (0, 0), columns)).swapaxes(1, 2),
        jnp.pad(x.v_scale, ((0, 0), columns))[:, None],
    )
    return finish(out[:, :lq, :d], lse[:, :lq] + x.shift, q.shape, x.valid)
