"""Matrix products of many rows for TPUs: what follows in the same pass, and channels read and written in parts.

Blocks of rows are as large as fit, so that a weight is read as seldom as can be: it is the larger part of what travels
from memory. XLA's own products are slower by the compiler's own count, evaluate what they fuse into an operand once for
every few columns, and copy where the channels of a device lie in parts, as an all-to-all over heads leaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from wanjax.ops.kernels.tile_table import tiles

LANES = 128
ROWS, COLUMNS = 1024, 512  # of a block, at most, where `tile_table` has no others
LONG_ROWS, CHANNELS = 640, 768  # likewise where channels are summed up in parts
VMEM_BYTES = (
    48 * 2**20
)  # as `sharding.xla_options` has it, which is the limit where a collective goes on behind a kernel
FEW_ROWS = 1024
LONG = 8192  # more channels than that are summed up in parts
Activation = Callable[[jax.Array], jax.Array]


def supports(x: jax.Array, kernel: jax.Array, rows: int) -> bool:
    """Whether `matmul` takes these, `rows` of every sample on a device: many rows, in bf16, whole lanes."""
    lanes = all(n % LANES == 0 for n in kernel.shape)
    return x.ndim == 3 and x.dtype == jnp.bfloat16 and rows >= FEW_ROWS and lanes


def divisor(size: int, most: int) -> int:
    """The largest part of `size`, of whole lanes, that divides it."""
    return max(n for n in range(LANES, most + 1, LANES) if size % n == 0)


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Product, summed in float32."""
    return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def wide_kernel(x_ref, kernel_ref, bias_ref, out_ref, *, activation: Activation) -> None:
    """Some rows `[parts, rows, in / parts]` by some columns; everything is summed at once."""
    parts, _, width = x_ref.shape
    total = dot(x_ref[0], kernel_ref[:width, :])
    for i in range(1, parts):
        total += dot(x_ref[i], kernel_ref[i * width : (i + 1) * width, :])
    out_ref[...] = activation(total + bias_ref[...]).astype(out_ref.dtype)


def long_kernel(x_ref, kernel_ref, bias_ref, out_ref, sum_ref, *, activation: Activation) -> None:
    """Some rows by all columns, some of the channels at a time."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += dot(x_ref[...], kernel_ref[...])

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = activation(sum_ref[...] + bias_ref[...]).astype(out_ref.dtype)


@partial(jax.jit, static_argnames=("activation", "read", "written", "interpret"))
def matmul(
    x, kernel, bias, *, activation: Activation, read: int = 1, written: int = 1, interpret: bool = False
) -> jax.Array:
    """`activation(x @ kernel + bias)`, rounded once.

    Args:
      x: `[b, l, in]`.
      kernel: `[in, out]`, in the dtype of `x`.
      bias: `[out]`.
      activation: of float32.
      read, written: parts of the channels that lie one behind the other in memory, of `x` and of the result. With
        many channels to sum over, both are 1.
    """
    b, length, _ = x.shape
    width, out_width = kernel.shape
    call = long_call if width > LONG else wide_call
    bias = bias.astype(jnp.float32)[None]  # as it is added
    x = x.reshape(b, length, read, width // read).transpose(2, 0, 1, 3)  # [parts, b, l, in / parts]
    out = call(x, kernel, bias, activation, written, interpret)
    return out.transpose(1, 2, 0, 3).reshape(b, length, out_width)


def block_rows(length: int, most: int) -> int:
    """Rows of a block: whole tiles of memory, little left over in the last block."""
    blocks = pl.cdiv(length, most)
    return pl.cdiv(pl.cdiv(length, blocks), 32) * 32


def wide_call(x, kernel, bias, activation: Activation, written: int, interpret: bool) -> jax.Array:
    """Result `[parts, b, l, out / parts]`."""
    parts, b, length, width = x.shape
    each = kernel.shape[1] // written
    sizes = tiles("matmul", *kernel.shape, rows=ROWS, columns=COLUMNS)
    rows, columns = block_rows(length, sizes["rows"]), divisor(each, sizes["columns"])
    per_part = each // columns
    return pl.pallas_call(
        partial(wide_kernel, activation=activation),
        grid=(b, pl.cdiv(length, rows), kernel.shape[1] // columns),
        in_specs=[
            pl.BlockSpec((parts, None, rows, width), lambda n, i, j: (0, n, i, 0)),
            pl.BlockSpec((parts * width, columns), lambda n, i, j: (0, j)),
            pl.BlockSpec((1, columns), lambda n, i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec(
            (None, None, rows, columns),
            lambda n, i, j: (jax.lax.div(j, per_part), n, i, jax.lax.rem(j, per_part)),
        ),
        out_shape=jax.ShapeDtypeStruct((written, b, length, each), x.dtype),
        compiler_params=params(),
        cost_estimate=estimate(x, kernel),
        interpret=interpret,
        name="matmul",
    )(x, kernel, bias)


def long_call(x, kernel, bias, activation: Activation, written: int, interpret: bool) -> jax.Array:
    """Result `[1, b, l, out]`."""
    parts, b, length, width = x.shape
    assert parts == written == 1
    columns = kernel.shape[1]
    sizes = tiles("matmul_long", *kernel.shape, rows=LONG_ROWS, channels=CHANNELS)
    rows, channels = block_rows(length, sizes["rows"]), divisor(width, sizes["channels"])
    return pl.pallas_call(
        partial(long_kernel, activation=activation),
        grid=(b, pl.cdiv(length, rows), width // channels),
        in_specs=[
            pl.BlockSpec((None, None, rows, channels), lambda n, i, k: (0, n, i, k)),
            pl.BlockSpec((channels, columns), lambda n, i, k: (k, 0)),
            pl.BlockSpec((1, columns), lambda n, i, k: (0, 0)),
        ],
        out_specs=pl.BlockSpec((None, rows, columns), lambda n, i, k: (n, i, 0)),
        out_shape=jax.ShapeDtypeStruct((b, length, columns), x.dtype),
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        compiler_params=params(),
        cost_estimate=estimate(x, kernel),
        interpret=interpret,
        name="matmul_long",
    )(x, kernel, bias)[None]


def estimate(x: jax.Array, kernel: jax.Array) -> pl.CostEstimate:
    """For XLA, which lets weights travel behind what it takes to last."""
    rows = x.size // kernel.shape[0]
    size = (x.size + kernel.size + rows * kernel.shape[1]) * x.dtype.itemsize
    return pl.CostEstimate(flops=2 * rows * kernel.size, bytes_accessed=size, transcendentals=0)


def params() -> pltpu.CompilerParams:
    """Of every kernel here."""
    semantics = ("parallel", "parallel", "arbitrary")
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)
