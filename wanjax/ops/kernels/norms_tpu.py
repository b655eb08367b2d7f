"""Norms over the channels of every token for TPUs, with what stands around them, in one pass over memory.

XLA makes three of it: sums, their use, and another array in another order of heads for the kernel that comes next.
Whatever is rounded in `wanjax.ops.norms` is rounded here; only the sums are of another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
ROWS = 256  # of a block
GROUP = 16  # rows at a time: those of a memory tile of bf16


def supports(x: jax.Array) -> bool:
    """Whether the kernels take `x`: bf16, whole lanes."""
    return x.dtype == jnp.bfloat16 and x.shape[-1] % LANES == 0


def for_groups(rows: int, run: Any) -> None:
    """`run` with every slice of GROUP rows."""

    @pl.loop(0, rows // GROUP)
    def _(i: jax.Array) -> None:
        run(pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP))


def layer_norm_kernel(*arguments: Any, eps: float, adds: bool, gates: bool) -> None:
    """Blocks of `x`, perhaps `y` and its gate, of factor and shift; then of the sum, if any, and the result."""
    refs = list(arguments)
    x_ref = refs.pop(0)
    y_ref = refs.pop(0) if adds else None
    gate_ref = refs.pop(0) if gates else None
    factor_ref, shift_ref, *out = refs

    def run(rows: Any) -> None:
        x = x_ref[rows, :].astype(jnp.float32)
        if y_ref is not None:
            y = y_ref[rows, :].astype(jnp.float32)
            total = (x + (y if gate_ref is None else y * gate_ref[...])).astype(x_ref.dtype)
            out[0][rows, :] = total
            x = total.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
        out[-1][rows, :] = (x * factor_ref[...] + shift_ref[...]).astype(x_ref.dtype)

    for_groups(x_ref.shape[0], run)


@partial(jax.jit, static_argnames=("eps", "interpret"))
def layer_norm(x, y, gate, factor, shift, *, eps: float, interpret: bool = False) -> tuple[jax.Array, ...]:
    """`wanjax.ops.norms.layer_norm` and `add_layer_norm`; `y` and `gate` may be None."""
    b, length, width = x.shape
    rows = min(ROWS, pl.cdiv(length, GROUP) * GROUP)
    block = pl.BlockSpec((None, rows, width), lambda i, j: (i, j, 0))

    def channels(a: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, width), lambda i, j: (i if a.shape[0] > 1 else 0, 0, 0))

    given = [a for a in (x, y) if a is not None], [a for a in (gate, factor, shift) if a is not None]
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    count = len(given[0])
    return pl.pallas_call(
        partial(layer_norm_kernel, eps=eps, adds=y is not None, gates=gate is not None),
        grid=(b, pl.cdiv(length, rows)),
        in_specs=[*[block] * count, *map(channels, given[1])],
        out_specs=(block,) * count,
        out_shape=(shape,) * count,
        compiler_params=params(("parallel", "parallel")),
        interpret=interpret,
        name="layer_norm",
    )(*given[0], *given[1])


def gated_sum_kernel(x_ref, y_ref, gate_ref, out_ref) -> None:
    """Blocks of `x`, `y`, the gate and the result."""

    def run(rows: Any) -> None:
        y = y_ref[rows, :].astype(jnp.float32) * gate_ref[...]
        out_ref[rows, :] = (x_ref[rows, :].astype(jnp.float32) + y).astype(out_ref.dtype)

    for_groups(x_ref.shape[0], run)


@partial(jax.jit, static_argnames=("interpret",))
def gated_sum(x, y, gate, *, interpret: bool = False) -> jax.Array:
    """`wanjax.ops.norms.gated_sum`."""
    b, length, width = x.shape
    rows = min(ROWS, pl.cdiv(length, GROUP) * GROUP)
    block = pl.BlockSpec((None, rows, width), lambda i, j: (i, j, 0))
    channels = pl.BlockSpec((None, 1, width), lambda i, j: (i if gate.shape[0] > 1 else 0, 0, 0))
    return pl.pallas_call(
        gated_sum_kernel,
        grid=(b, pl.cdiv(length, rows)),
        in_specs=[block, block, channels],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=params(("parallel", "parallel")),
        interpret=interpret,
        name="gated_sum",
    )(x, y, gate)


def rms_norm_kernel(*refs: Any, eps: float, turns: bool) -> None:
    """Blocks of `x`, of the scale, perhaps of three tables; then of the result `[parts, rows, channels]`."""
    x_ref, scale_ref, *tables, out_ref = refs
    parts, _, width = out_ref.shape

    def run(rows: Any) -> None:
        x = x_ref[rows, :].astype(jnp.float32)
        root = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
        turn = [table[rows, :] for table in tables]
        for first in range(0, parts * width, LANES):
            here = pl.ds(first, LANES)
            y = (x[:, first : first + LANES] * root * scale_ref[:, here]).astype(x_ref.dtype)
            y = rotated(y, turn) if turns else y
            out_ref[first // width, rows, pl.ds(first % width, LANES)] = y

    for_groups(x_ref.shape[0], run)


def rotated(x: jax.Array, tables: Sequence[jax.Array]) -> jax.Array:
    """Pairs of neighbouring lanes turned: the partner comes from the lane before or behind, by tables with zeros in
    place of the other one."""
    cos, before, behind = tables
    x32 = x.astype(jnp.float32)
    partner = pltpu.roll(x32, 1, 1) * before + pltpu.roll(x32, LANES - 1, 1) * behind
    return (x32 * cos + partner).astype(x.dtype)


@partial(jax.jit, static_argnames=("eps", "parts", "interpret"))
def rms_norm(x, scale, cos, sin, *, eps: float, parts: int = 1, interpret: bool = False) -> jax.Array:
    """`wanjax.ops.norms.rms_norm` and `rms_norm_rotate`; `cos` and `sin` may be None.

    In memory the result lies in `parts` of its channels one behind the other, as an all-to-all over heads sends it.
    """
    b, length, width = x.shape
    rows = min(ROWS, pl.cdiv(length, GROUP) * GROUP)
    tables = []
    if cos is not None:
        odd = jnp.arange(cos.shape[1]) % 2 == 1
        tables = [cos, jnp.where(odd, sin, 0), jnp.where(odd, 0, -sin)]
        tables = [jnp.tile(table, (1, LANES // cos.shape[1])) for table in tables]  # [l, lanes]
    by_rows = pl.BlockSpec((rows, LANES), lambda i, j: (j, 0))
    out = pl.pallas_call(
        partial(rms_norm_kernel, eps=eps, turns=cos is not None),
        grid=(b, pl.cdiv(length, rows)),
        in_specs=[
            pl.BlockSpec((None, rows, width), lambda i, j: (i, j, 0)),
            pl.BlockSpec((1, width), lambda i, j: (0, 0)),
            *[by_rows] * len(tables),
        ],
        out_specs=pl.BlockSpec((parts, None, rows, width // parts), lambda i, j: (0, i, j, 0)),
        out_shape=jax.ShapeDtypeStruct((parts, b, length, width // parts), x.dtype),
        compiler_params=params(("parallel", "parallel")),
        interpret=interpret,
        name="rms_norm",
    )(x, scale[None], *tables)
    return out.transpose(1, 2, 0, 3).reshape(x.shape)


def params(semantics: Any) -> pltpu.CompilerParams:
    """Of every kernel here."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=48 * 2**20)
