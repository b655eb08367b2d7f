"""Flash attention for TPUs (arXiv 2205.14135, 2307.08691) in Pallas.

Scores are laid out `[keys, queries]`: a query's maximum and sum are then taken down the sublanes, by plain vector
operations, and its statistics are one row, which broadcasts for free. A block is worked through in units, some keys
by some queries, as a pipeline: while the vector units are at one unit's softmax, the matrix units make the next unit's
scores and use up the last unit's weights. That order alone is worth 1.5x on v6e; the sizes are the best of those tried,
by the compiler's own schedules.

The exponentials are powers of two, log2(e) being part of the scaling of `q`. Outside the kernels all is natural.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from wanjax.ops.kernels import LOWEST, Forward, Gradients, bounded_tpu
from wanjax.ops.kernels.tile_table import tiles
from wanjax.ops.kernels.tiles_tpu import (
    LANES,
    LOG2E,
    Unit,
    columns,
    compiler_params,
    dot,
    forward_cost,
    mask,
    pad_rows,
    pipeline,
    place,
    rows_by_head,
    scaled,
    widen,
)

QUERIES = 1024  # of a block, where `tile_table` has no other; so KEYS_FORWARD and KEYS_BACKWARD
KEYS_FORWARD, KEYS_RUNNING, KEYS_BACKWARD = 6144, 2048, 1024
UNIT_QUERIES, UNIT_KEYS = 512, 256
DQ_BYTES = 16 * 2**20  # of the backward pass's gradient of the queries, which stays in VMEM twice


def for_units(queries: int, keys: int, unit_keys: int, valid: jax.Array, run: Callable[[Sequence[Unit]], None]) -> None:
    """`run` with the units of a block of which `valid` keys count: all at once, or only those with a valid key."""
    size = queries if queries <= UNIT_QUERIES else queries // 2
    columns = [pl.ds(start, size) for start in range(0, queries, size)]

    @pl.when(valid == keys)
    def _() -> None:
        units: list[Unit] = [(c, start, None) for start in range(0, keys, unit_keys) for c in columns]
        run(units)

    if keys == unit_keys:  # which need not be whole lanes, as an index that is not known must be

        @pl.when((valid < keys) & (valid > 0))
        def _() -> None:
            run([(c, 0, valid) for c in columns])

        return

    @pl.when(valid < keys)
    def _() -> None:
        @pl.loop(0, jax.lax.div(valid + unit_keys - 1, unit_keys))
        def _(i: jax.Array) -> None:
            start = pl.multiple_of(i * unit_keys, unit_keys)
            units: list[Unit] = [(c, start, valid - start) for c in columns]
            run(units)


def running_kernel(valid_ref, first_ref, q_ref, k_ref, v_ref, *refs, scale: float, unit_keys: int):
    """One block of keys for one block of queries; the grid is (heads, queries, keys)."""
    out_ref, lse_ref, query_ref, acc_ref, row_max_ref, row_sum_ref = refs[-6:]  # before these: what is replaced in part
    step, (keys, queries) = pl.program_id(2), (k_ref.shape[0], q_ref.shape[0])

    @pl.when(step == 0)
    def _():
        query_ref[...] = scaled(q_ref[...], scale)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        row_max_ref[...] = jnp.full_like(row_max_ref, LOWEST * LOG2E)
        row_sum_ref[...] = jnp.zeros_like(row_sum_ref)

    def score(unit: Unit) -> jax.Array:
        columns, start, valid = unit
        k = k_ref[pl.ds(start, unit_keys), :]
        return mask(dot(k, query_ref[columns, :], (1, 1)), valid, -jnp.inf)  # [keys, queries]

    def softmax(unit: Unit, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        columns = unit[0]
        row_max = jnp.maximum(row_max_ref[:, columns], jnp.max(scores, axis=0, keepdims=True))  # [1, queries]
        weights = jnp.exp2(scores - row_max)
        rescale = jnp.exp2(row_max_ref[:, columns] - row_max)
        row_max_ref[:, columns] = row_max
        row_sum_ref[:, columns] = rescale * row_sum_ref[:, columns] + jnp.sum(weights, axis=0, keepdims=True)
        return weights.astype(v_ref.dtype), rescale  # the matrix unit takes the dtype of v

    def add(unit: Unit, done: tuple[jax.Array, jax.Array]) -> None:
        columns, start, valid = unit
        weights, rescale = done
        v = mask(v_ref[pl.ds(start, unit_keys), :], valid, 0)
        acc_ref[:, columns] = rescale * acc_ref[:, columns] + dot(v, weights, (0, 0))  # [d, queries]

    valid = jnp.clip(valid_ref[0] - step * keys, 0, keys)
    for_units(queries, keys, unit_keys, valid, lambda units: pipeline(units, score, softmax, add))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        row_sum = jnp.where(row_sum_ref[...] == 0, 1, row_sum_ref[...])  # no valid key
        out_ref[...] = (acc_ref[...] / row_sum).T.astype(out_ref.dtype)  # [queries, d]
        lse_ref[...] = (row_max_ref[...] + jnp.log2(row_sum)) / LOG2E


def backward_kernel(
    valid_ref, qt_ref, k_ref, v_ref, dout_t_ref, lse_ref, delta_ref, dq_ref, dk_ref, dv_ref, kt_ref, dk_acc_ref,
    dv_acc_ref, *, unit_keys: int,
):  # fmt: skip
    """One block of queries for one block of keys; the grid is (heads, keys, queries).

    The gradient of a whole head's queries, `[d, lq]`, stays in VMEM, so that one pass makes all three gradients. All
    three are summed transposed, `[d, l]`: weights, which fill the matrix unit both ways, then stay in it while the 128
    channels go through; the other way round it would be half empty.
    """
    (keys, queries), dtype = (k_ref.shape[0], qt_ref.shape[1]), k_ref.dtype
    first_query = pl.multiple_of(pl.program_id(2) * queries, queries)
    valid = jnp.clip(valid_ref[0] - pl.program_id(1) * keys, 0, keys)

    @pl.when(pl.program_id(2) == 0)
    def _():
        kt_ref[...] = mask(k_ref[...], valid, 0).T
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    @pl.when(pl.program_id(1) == 0)
    def _():
        dq_ref[:, pl.ds(first_query, queries)] = jnp.zeros((dq_ref.shape[0], queries), jnp.float32)

    def score(unit: Unit) -> tuple[jax.Array, jax.Array]:
        columns, rows, count = unit[0], pl.ds(unit[1], unit_keys), unit[2]
        scores = mask(dot(k_ref[rows, :], qt_ref[:, columns], (1, 0)), count, -jnp.inf)  # [keys, queries]
        return scores, dot(mask(v_ref[rows, :], count, 0), dout_t_ref[:, columns], (1, 0))

    def softmax(unit: Unit, begun: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores, dweights = begun
        weights = jnp.exp2(scores - lse_ref[:, unit[0]])
        dscores = weights * (dweights - delta_ref[:, unit[0]])
        return weights.astype(dtype), dscores.astype(dtype)  # the matrix unit takes the dtype of k

    def add(unit: Unit, done: tuple[jax.Array, jax.Array]) -> None:
        columns, rows = unit[0], pl.ds(unit[1], unit_keys)
        weights, dscores = done
        dv_acc_ref[:, rows] += dot(dout_t_ref[:, columns], weights, (1, 1))  # [d, keys]
        dk_acc_ref[:, rows] += dot(qt_ref[:, columns], dscores, (1, 1))
        here = pl.ds(pl.multiple_of(first_query + columns.start, LANES), columns.size)
        dq_ref[:, here] += dot(kt_ref[:, rows], dscores, (1, 0))  # [d, queries]

    for_units(queries, keys, unit_keys, valid, lambda units: pipeline(units, score, softmax, add))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dk_ref[...] = dk_acc_ref[...].T / LOG2E  # q came with the factor
        dv_ref[...] = dv_acc_ref[...].T


@partial(jax.jit, static_argnames=("dtype", "interpret"))
def forward(q, k, v, valid, dtype: DTypeLike, *, interpret: bool = False) -> Forward:
    """A kernel's `forward`. Reads past the ends of `q`, `k` and `v` are harmless: such keys do not count.

    Many keys: softmax relative to a bound. Few: by the running maximum, which is then seldom corrected.
    """
    b, n, lq, d = q.shape
    lk, scale = k.shape[2], d**-0.5 * LOG2E
    sizes = tiles("flash_forward", lk, queries=QUERIES, keys=KEYS_FORWARD)
    queries = query_block(lq, sizes["queries"])
    q = pad_rows(columns(widen(q)), queries, whole=interpret)  # [b, lq, n * d]
    run = partial(running, heads=n, scale=scale, queries=queries, interpret=interpret)
    if lk <= KEYS_RUNNING or not bounded_tpu.compiles():
        valid, k, v, unit_keys, keys = prepare(k, v, valid, KEYS_RUNNING, columns)
        out, lse = run(valid, q, k, v, dtype, keys=keys, unit_keys=unit_keys)
    else:
        valid, k, v, unit_keys, keys = prepare(k, v, valid, sizes["keys"], columns, bounded_tpu.RAGGED_UNITS)

        def repair(out: jax.Array, lse: jax.Array, *first: jax.Array) -> Forward:
            blocks = {"keys": KEYS_RUNNING, "unit_keys": unit_keys}
            return run(valid, q, k, v, dtype, **blocks, replaced=(out, lse), first=first)

        blocks = {"queries": queries, "keys": keys, "part": bounded_tpu.RAGGED_UNITS * unit_keys}
        options = {"heads": n, "scale": scale, "repair": repair, "interpret": interpret}
        out, lse = bounded_tpu.forward(q, k, v, valid, dtype, **blocks, **options)
    out = out[:, :lq].reshape(b, lq, n, -1)[..., :d].swapaxes(1, 2)  # [b, n, lq, d]
    return out, lse[:, :, :lq].reshape(b, n, lq)


def running(
    valid, q, k, v, dtype: DTypeLike, *, heads: int, scale: float, queries: int, keys: int, unit_keys: int,
    interpret: bool, replaced: tuple[jax.Array, ...] = (), first: Sequence[jax.Array | int] = (0, 0),
) -> Forward:  # fmt: skip
    """Output `[b, lq, n * d]` and log-sum-exp `[b * n, 1, lq]` by the running maximum of `heads` heads.

    Or `replaced`, such a pair, with one block of queries of one head, `first`, made so.
    """
    (b, lq, _), width = q.shape, q.shape[2] // heads
    counts = () if replaced else (b * heads, pl.cdiv(lq, queries))

    def key_block(h, i, j, valid, first):  # stays where it is once no valid key is left: nothing more is fetched
        return place(h + first[0], jnp.minimum(j, jax.lax.div(jnp.maximum(valid[0] - 1, 0), keys)), heads)

    by_query = pl.BlockSpec((None, queries, width), lambda h, i, j, _, at: place(h + at[0], i + at[1], heads))
    by_key = pl.BlockSpec((None, keys, width), key_block)
    row = pl.BlockSpec((None, 1, queries), lambda h, i, j, _, at: (h + at[0], 0, i + at[1]))
    rows = [pltpu.VMEM((rows, queries), jnp.float32) for rows in (width, 1, 1)]
    return pl.pallas_call(
        partial(running_kernel, scale=scale, unit_keys=unit_keys),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*(counts or (1, 1)), pl.cdiv(k.shape[1], keys)),
            in_specs=[by_query, by_key, by_key, *(pl.BlockSpec(memory_space=pl.ANY) for _ in replaced)],
            out_specs=[by_query, row],
            scratch_shapes=[pltpu.VMEM((queries, width), q.dtype), *rows],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((b * heads, 1, lq), jnp.float32)],
        input_output_aliases={5 + i: i for i in range(len(replaced))},
        compiler_params=compiler_params("parallel"),
        cost_estimate=forward_cost(q, k, v, k.shape[1], width),
        interpret=interpret,
        name="flash_running" if replaced else "flash_forward",
    )(valid, jnp.array(first, jnp.int32), q, k, v, *replaced)


@partial(jax.jit, static_argnames=("interpret",))
def backward(q, k, v, valid, lse, delta, dout, *, interpret: bool = False) -> Gradients:
    """A kernel's `backward`; so many queries at a time that their gradient fits in VMEM."""
    b, n, lq, d = q.shape
    lk = k.shape[2]
    sizes = tiles("flash_backward", lk, queries=QUERIES, keys=KEYS_BACKWARD)
    valid, k, v, unit_keys, keys = prepare(k, v, valid, sizes["keys"], rows_by_head)
    q = rows_by_head(widen(scaled(q, d**-0.5 * LOG2E)))  # [b * n, lq, d]
    heads, _, width = q.shape
    queries = query_block(lq, sizes["queries"])
    parts = pl.cdiv(lq * width * 4, DQ_BYTES)
    part = pl.cdiv(pl.cdiv(lq, parts), queries) * queries

    def split(x: jax.Array) -> jax.Array:  # padding has zeros everywhere, which adds nothing to any gradient
        x = jnp.pad(x, ((0, 0), (0, part * parts - x.shape[1]), (0, 0)))
        return x.reshape(heads, parts, part, -1).swapaxes(0, 1)  # [parts, b * n, part, ..]

    dout = widen(dout.reshape(heads, lq, d))  # [b * n, lq, d]
    lse, delta = (x.reshape(heads, lq, 1) for x in (lse * LOG2E, delta))
    call = partial(backward_part, valid, k, v, keys=keys, unit_keys=unit_keys, queries=queries, interpret=interpret)

    def step(sums, rows):
        # The barrier keeps XLA from fusing the sums into the kernel and then finding too little VMEM for both.
        dq, *dkv = jax.lax.optimization_barrier(call(*rows))
        return jax.tree.map(jnp.add, sums, tuple(dkv)), dq

    rows = (*(split(x).swapaxes(2, 3) for x in (q, dout)), split(lse), split(delta))
    if parts == 1:
        dq, dk, dv = call(*(x[0] for x in rows))
        dq = dq[None]
    else:
        zeros = jnp.zeros(k.shape, jnp.float32)
        (dk, dv), dq = jax.lax.scan(step, (zeros, zeros), rows)
    dq = dq.transpose(1, 0, 3, 2).reshape(b, n, parts * part, width)[:, :, :lq, :d]  # [b, n, lq, d]
    dk, dv = (x[:, :lk, :d].reshape(b, n, lk, d) for x in (dk, dv))
    return dq * d**-0.5, dk, dv


def backward_part(valid, k, v, qt, dout_t, lse, delta, *, keys: int, unit_keys: int, queries: int, interpret: bool):
    """Gradients of some of the queries, `[b * n, d, part]`, and by these of the keys and values, `[b * n, lk, d]`."""
    heads, width, part = qt.shape
    lse, delta = (x.reshape(heads, 1, part) for x in (lse, delta))
    by_query = pl.BlockSpec((None, width, queries), lambda h, j, i, _: (h, 0, i))
    by_key = pl.BlockSpec((None, keys, width), lambda h, j, i, _: (h, j, 0))
    row = pl.BlockSpec((None, 1, queries), lambda h, j, i, _: (h, 0, i))
    by_head = pl.BlockSpec((None, width, part), lambda h, j, i, _: (h, 0, 0))
    return pl.pallas_call(
        partial(backward_kernel, unit_keys=unit_keys),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads, pl.cdiv(k.shape[1], keys), part // queries),
            in_specs=[by_query, by_key, by_key, by_query, row, row],
            out_specs=[by_head, by_key, by_key],
            scratch_shapes=[pltpu.VMEM((width, keys), x) for x in (k.dtype, jnp.float32, jnp.float32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((heads, width, part), jnp.float32),
            jax.ShapeDtypeStruct(k.shape, jnp.float32),
            jax.ShapeDtypeStruct(k.shape, jnp.float32),
        ],
        compiler_params=compiler_params("arbitrary"),
        interpret=interpret,
        name="flash_backward",
    )(valid, qt, k, v, dout_t, lse, delta)


def prepare(k, v, valid, largest: int, order: Callable[[jax.Array], jax.Array], units: int = 1):
    """Keys and values in `order`, `columns` or `rows_by_head`; keys of a unit and, whole `units`, of a block."""
    lk = k.shape[2]
    k, v = (order(widen(x)) for x in (k, v))
    valid = jnp.full((1,), lk if valid is None else valid, jnp.int32)
    unit_keys = UNIT_KEYS
    if lk <= 2 * UNIT_KEYS + LANES and lk % UNIT_KEYS:  # text or image tokens, which do not come in multiples of 256
        unit_keys = pl.cdiv(lk, 16) * 16  # sublanes of bf16
    keys = min(largest, pl.cdiv(lk, units * unit_keys) * units * unit_keys)
    return valid, pad_rows(k, keys), pad_rows(v, keys), unit_keys, keys


def query_block(length: int, largest: int = QUERIES) -> int:
    """Queries of a block: one unit of whole lanes, or two."""
    multiple = LANES if length <= UNIT_QUERIES else 2 * LANES
    return min(largest, pl.cdiv(length, multiple) * multiple)
