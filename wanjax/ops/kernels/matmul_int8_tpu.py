"""Products of int8 for TPUs that multiply it faster than bfloat16, and the rounding of tokens before them.

As `matmul_tpu`, with sums in int32 and the scales of rows and of the weight behind them.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from wanjax.ops.kernels.matmul_tpu import COLUMNS, LONG, ROWS, Activation, block_rows, divisor, params
from wanjax.ops.kernels.tile_table import tiles

QUANTIZE_ROWS, GROUP = 256, 32  # of a block; at a time, those of a memory tile of int8


def has_units() -> bool:
    """Whether the chip that is compiled for multiplies int8 faster than bfloat16."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # not known while a program for several platforms is traced
        return False
    return info.int8_ops_per_second > info.bf16_ops_per_second


def quantize_kernel(x_ref, out_ref, scale_ref) -> None:
    """Some rows `[parts, rows, channels]`, each by a scale of its own."""
    parts, rows_here, width = x_ref.shape

    @pl.loop(0, rows_here // GROUP)
    def _(i: jax.Array) -> None:
        rows = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
        x = [x_ref[part, rows, :].astype(jnp.float32) for part in range(parts)]
        tops = [jnp.max(jnp.abs(part), axis=-1, keepdims=True) for part in x]
        top = reduce(jnp.maximum, tops)
        scale = jnp.where(top > 0, top / 127, 1.0)
        for n, part in enumerate(x):
            rounded = jnp.clip(jnp.round(part / scale), -127, 127).astype(jnp.int8)
            out_ref[rows, pl.ds(n * width, width)] = rounded
        scale_ref[rows, :] = scale


@partial(jax.jit, static_argnames=("read", "interpret"))
def quantize(x: jax.Array, *, read: int = 1, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """`[b, l, e]` in int8, and the scale of every row, float32 `[b, l, 1]`; `read` as in `matmul_tpu`."""
    b, length, width = x.shape
    rows = min(QUANTIZE_ROWS * 5120 // width // GROUP * GROUP, pl.cdiv(length, GROUP) * GROUP)

    def block(channels: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, channels), lambda n, i: (n, i, 0))

    return pl.pallas_call(
        quantize_kernel,
        grid=(b, pl.cdiv(length, rows)),
        in_specs=[pl.BlockSpec((read, None, rows, width // read), lambda n, i: (0, n, i, 0))],
        out_specs=(block(width), block(1)),
        out_shape=(jax.ShapeDtypeStruct(x.shape, jnp.int8), jax.ShapeDtypeStruct((b, length, 1), jnp.float32)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="quantize",
    )(x.reshape(b, length, read, width // read).transpose(2, 0, 1, 3))


def product_kernel(x_ref, row_scale_ref, kernel_ref, bias_ref, out_ref, *, activation: Activation) -> None:
    """Some rows by some columns, all channels at once."""
    dims = (((1,), (0,)), ((), ()))
    total = jax.lax.dot_general(x_ref[...], kernel_ref[...], dims, preferred_element_type=jnp.int32)
    y = total.astype(jnp.float32) * row_scale_ref[...] + bias_ref[...]
    out_ref[...] = activation(y).astype(out_ref.dtype)


@partial(jax.jit, static_argnames=("activation", "read", "written", "interpret"))
def matmul(
    x, kernel, scale, bias, *, activation: Activation, read: int = 1, written: int = 1, interpret: bool = False
) -> jax.Array:
    """`activation(x @ (kernel * scale) + bias)`, with `x` rounded to int8 by a scale for each of its rows.

    Args:
      x: `[b, l, in]`.
      kernel, scale: int8 `[in, out]` and float32 `[]`.
      bias: `[out]`.
      activation: of float32.
      read, written: as in `matmul_tpu`.
    """
    b, length, width = x.shape
    out_width = kernel.shape[1]
    rounded, row_scale = quantize(x, read=read, interpret=interpret)
    sizes = tiles("matmul_int8", *kernel.shape, rows=ROWS, columns=COLUMNS if width <= LONG else COLUMNS // 2)
    rows, columns = block_rows(length, sizes["rows"]), divisor(out_width // written, sizes["columns"])
    per_part = out_width // written // columns
    here: Any = lambda n, i, j: (n, i, 0)  # noqa: E731
    out = pl.pallas_call(
        partial(product_kernel, activation=activation),
        grid=(b, pl.cdiv(length, rows), out_width // columns),
        in_specs=[
            pl.BlockSpec((None, rows, width), here),
            pl.BlockSpec((None, rows, 1), here),
            pl.BlockSpec((width, columns), lambda n, i, j: (0, j)),
            pl.BlockSpec((1, columns), lambda n, i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec(
            (None, None, rows, columns),
            lambda n, i, j: (jax.lax.div(j, per_part), n, i, jax.lax.rem(j, per_part)),
        ),
        out_shape=jax.ShapeDtypeStruct((written, b, length, out_width // written), x.dtype),
        compiler_params=params(),
        cost_estimate=pl.CostEstimate(
            flops=b * length * kernel.size,  # at twice the rate
            bytes_accessed=x.size + kernel.size + 2 * b * length * out_width,
            transcendentals=0,
        ),
        interpret=interpret,
        name="matmul_int8",
    )(rounded, row_scale * scale, kernel, bias.astype(jnp.float32)[None])
    return out.transpose(1, 2, 0, 3).reshape(b, length, out_width)
