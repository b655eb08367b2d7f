"""Flash attention for TPUs (arXiv 2205.14135, 2307.08691) in Pallas.

Scores are laid out `[keys, queries]`: a query's maximum and sum are then taken down the sublanes, by plain vector
operations, and its statistics are one row, which broadcasts for free. A block is worked through in units, some keys
by some queries, as a pipeline: while the vector units are at one unit's softmax, the matrix units make the next unit's
scores and use up the last unit's weights. That order alone is worth 1.5x on v6e; the sizes are the best of those tried,
by the compiler's own schedules.

The exponentials are powers of two, log2(e) being part of the scaling of `q`. Outside the kernels all is natural.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from wanjax.ops.kernels import LOWEST, Forward, Gradients

LOG2E = math.log2(math.e)
LANES = 128
QUERIES = 1024  # of a block
KEYS_FORWARD, KEYS_BACKWARD = 2048, 1024
UNIT_QUERIES, UNIT_KEYS = 512, 256
VMEM_BYTES = 56 * 2**20  # a core of tpu7x has 64 MiB, the others more
DQ_BYTES = 16 * 2**20  # of the backward pass's gradient of the queries, which stays in VMEM twice

Unit = tuple[Any, Any, Any]  # queries; first key; how many of the keys from there count, or None for all


def pipeline(
    units: Sequence[Unit],
    before: Callable[[Unit], Any],
    middle: Callable[[Unit, Any], Any],
    after: Callable[[Unit, Any], None],
) -> None:
    """Each unit through three stages, written down in the order that lets three units overlap."""
    begun: list[Any] = []
    done: list[Any] = []
    for t in range(len(units) + 2):
        if t < len(units):
            begun.append(before(units[t]))
        if t >= 2:
            after(units[t - 2], done.pop(0))
        if 1 <= t <= len(units):
            done.append(middle(units[t - 1], begun.pop(0)))


def for_units(queries: int, keys: int, unit_keys: int, valid: jax.Array, run: Callable[[Sequence[Unit]], None]) -> None:
    """`run` with the units of a block of which `valid` keys count: all at once, or only those with a valid key."""
    size = queries if queries <= UNIT_QUERIES else queries // 2
    columns = [pl.ds(start, size) for start in range(0, queries, size)]

    @pl.when(valid == keys)
    def _() -> None:
        units: list[Unit] = [(c, start, None) for start in range(0, keys, unit_keys) for c in columns]
        run(units)

    @pl.when(valid < keys)
    def _() -> None:
        @pl.loop(0, jax.lax.div(valid + unit_keys - 1, unit_keys))
        def _(i: jax.Array) -> None:
            start = pl.multiple_of(i * unit_keys, unit_keys)
            units: list[Unit] = [(c, start, valid - start) for c in columns]
            run(units)


def forward_kernel(valid_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, sum_ref, top_ref, total_ref, *, unit_keys: int):
    """One block of keys for one block of queries; the grid is (heads, queries, keys)."""
    step, (keys, queries) = pl.program_id(2), (k_ref.shape[0], q_ref.shape[0])

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        top_ref[...] = jnp.full_like(top_ref, LOWEST * LOG2E)
        total_ref[...] = jnp.zeros_like(total_ref)

    def score(unit: Unit) -> jax.Array:
        columns, start, valid = unit
        k = k_ref[pl.ds(start, unit_keys), :]
        return mask(dot(k, q_ref[columns, :], (1, 1)), valid, -jnp.inf)  # [keys, queries]

    def softmax(unit: Unit, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        columns = unit[0]
        top = jnp.maximum(top_ref[:, columns], jnp.max(scores, axis=0, keepdims=True))  # [1, queries]
        weights = jnp.exp2(scores - top)
        shrink = jnp.exp2(top_ref[:, columns] - top)
        top_ref[:, columns] = top
        total_ref[:, columns] = shrink * total_ref[:, columns] + jnp.sum(weights, axis=0, keepdims=True)
        return weights.astype(v_ref.dtype), shrink  # the matrix unit takes the dtype of v

    def add(unit: Unit, done: tuple[jax.Array, jax.Array]) -> None:
        columns, start, valid = unit
        weights, shrink = done
        v = mask(v_ref[pl.ds(start, unit_keys), :], valid, 0)
        sum_ref[:, columns] = shrink * sum_ref[:, columns] + dot(v, weights, (0, 0))  # [d, queries]

    valid = jnp.clip(valid_ref[0] - step * keys, 0, keys)
    for_units(queries, keys, unit_keys, valid, lambda units: pipeline(units, score, softmax, add))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        total = jnp.where(total_ref[...] == 0, 1, total_ref[...])  # no valid key
        out_ref[...] = (sum_ref[...] / total).T.astype(out_ref.dtype)  # [queries, d]
        lse_ref[...] = (top_ref[...] + jnp.log2(total)) / LOG2E


def backward_kernel(
    valid_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref, dk_ref, dv_ref, *, unit_keys: int
):
    """One block of queries for one block of keys; the grid is (heads, keys, queries).

    The gradient of a whole head's queries, `[d, lq]`, stays in VMEM, so that one pass makes all three gradients.
    """
    (keys, queries), dtype = (k_ref.shape[0], q_ref.shape[0]), q_ref.dtype
    first_query = pl.multiple_of(pl.program_id(2) * queries, queries)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    @pl.when(pl.program_id(1) == 0)
    def _():
        dq_ref[:, pl.ds(first_query, queries)] = jnp.zeros((dq_ref.shape[0], queries), jnp.float32)

    def load(ref, unit: Unit) -> jax.Array:
        return mask(ref[pl.ds(unit[1], unit_keys), :], unit[2], 0)  # [keys, d]

    def score(unit: Unit) -> tuple[jax.Array, jax.Array]:
        columns = unit[0]
        scores = mask(dot(load(k_ref, unit), q_ref[columns, :], (1, 1)), unit[2], -jnp.inf)  # [keys, queries]
        return scores, dot(load(v_ref, unit), dout_ref[columns, :], (1, 1))

    def softmax(unit: Unit, begun: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores, dweights = begun
        weights = jnp.exp2(scores - lse_ref[:, unit[0]])
        dscores = weights * (dweights - delta_ref[:, unit[0]])
        return weights.astype(dtype), dscores.astype(dtype)  # the matrix unit takes the dtype of q

    def add(unit: Unit, done: tuple[jax.Array, jax.Array]) -> None:
        columns, rows = unit[0], pl.ds(unit[1], unit_keys)
        weights, dscores = done
        dv_ref[rows, :] += dot(weights, dout_ref[columns, :], (1, 0))  # [keys, d]
        dk_ref[rows, :] += dot(dscores, q_ref[columns, :], (1, 0))
        place = pl.ds(pl.multiple_of(first_query + columns.start, LANES), columns.size)
        dq_ref[:, place] += dot(load(k_ref, unit), dscores, (0, 0))  # [d, queries]

    valid = jnp.clip(valid_ref[0] - pl.program_id(1) * keys, 0, keys)
    for_units(queries, keys, unit_keys, valid, lambda units: pipeline(units, score, softmax, add))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dk_ref[...] /= LOG2E  # q came with the factor


@partial(jax.jit, static_argnames=("dtype", "interpret"))
def forward(q, k, v, valid, dtype: DTypeLike, *, interpret: bool = False) -> Forward:
    """A kernel's `forward`. Reads past the ends of `q`, `k` and `v` are harmless: such keys do not count."""
    b, n, lq, d = q.shape
    valid, q, k, v, unit_keys, keys = prepare(q, k, v, valid, KEYS_FORWARD)
    heads, _, width = q.shape
    queries = query_block(lq)
    q = pad_rows(q, queries)  # [b * n, lq, d]

    def key_block(h, i, j, valid):  # stays where it is once no valid key is left: nothing more is fetched
        return h, jnp.minimum(j, jax.lax.div(jnp.maximum(valid[0] - 1, 0), keys)), 0

    by_query = pl.BlockSpec((None, queries, width), lambda h, i, j, _: (h, i, 0))
    by_key = pl.BlockSpec((None, keys, width), key_block)
    row = pl.BlockSpec((None, 1, queries), lambda h, i, j, _: (h, 0, i))
    out, lse = pl.pallas_call(
        partial(forward_kernel, unit_keys=unit_keys),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads, pl.cdiv(lq, queries), pl.cdiv(k.shape[1], keys)),
            in_specs=[by_query, by_key, by_key],
            out_specs=[by_query, row],
            scratch_shapes=[pltpu.VMEM((rows, queries), jnp.float32) for rows in (width, 1, 1)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((heads, q.shape[1], width), dtype),
            jax.ShapeDtypeStruct((heads, 1, q.shape[1]), jnp.float32),
        ],
        compiler_params=compiler_params("parallel"),
        interpret=interpret,
        name="flash_forward",
    )(valid, q, k, v)
    return out[:, :lq, :d].reshape(b, n, lq, d), lse[:, :, :lq].reshape(b, n, lq)


@partial(jax.jit, static_argnames=("interpret",))
def backward(q, k, v, valid, lse, delta, dout, *, interpret: bool = False) -> Gradients:
    """A kernel's `backward`; so many queries at a time that their gradient fits in VMEM."""
    b, n, lq, d = q.shape
    lk = k.shape[2]
    valid, q, k, v, unit_keys, keys = prepare(q, k, v, valid, KEYS_BACKWARD)
    heads, _, width = q.shape
    queries = query_block(lq)
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

    rows = tuple(map(split, (q, dout, lse, delta)))
    if parts == 1:
        dq, dk, dv = call(*(x[0] for x in rows))
        dq = dq[None]
    else:
        zeros = jnp.zeros(k.shape, jnp.float32)
        (dk, dv), dq = jax.lax.scan(step, (zeros, zeros), rows)
    dq = dq.transpose(1, 0, 3, 2).reshape(b, n, parts * part, width)[:, :, :lq, :d]  # [b, n, lq, d]
    dk, dv = (x[:, :lk, :d].reshape(b, n, lk, d) for x in (dk, dv))
    return dq * d**-0.5, dk, dv


def backward_part(valid, k, v, q, dout, lse, delta, *, keys: int, unit_keys: int, queries: int, interpret: bool):
    """Gradients of some of the queries, `[b * n, d, part]`, and by these of the keys and values, `[b * n, lk, d]`."""
    heads, part, width = q.shape
    lse, delta = (x.reshape(heads, 1, part) for x in (lse, delta))
    by_query = pl.BlockSpec((None, queries, width), lambda h, j, i, _: (h, i, 0))
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
        ),
        out_shape=[
            jax.ShapeDtypeStruct((heads, width, part), jnp.float32),
            jax.ShapeDtypeStruct(k.shape, jnp.float32),
            jax.ShapeDtypeStruct(k.shape, jnp.float32),
        ],
        compiler_params=compiler_params("arbitrary"),
        interpret=interpret,
        name="flash_backward",
    )(valid, q, k, v, dout, lse, delta)


def prepare(q, k, v, valid, largest: int):
    """Operands with heads in one axis and rows as wide as the lanes; keys of a unit and of a block."""
    d, lk = q.shape[-1], k.shape[2]
    q = (q.astype(jnp.float32) * (d**-0.5 * LOG2E)).astype(q.dtype)  # in float32: the factor is not exact in bf16
    q, k, v = (widen(x.reshape(-1, x.shape[2], d)) for x in (q, k, v))  # [b * n, l, d]
    valid = jnp.full((1,), lk if valid is None else valid, jnp.int32)
    unit_keys = UNIT_KEYS
    if lk <= 2 * UNIT_KEYS + LANES and lk % UNIT_KEYS:  # text or image tokens, which do not come in multiples of 256
        unit_keys = pl.cdiv(lk, 16) * 16  # sublanes of bf16
    keys = min(largest, pl.cdiv(lk, unit_keys) * unit_keys)
    return valid, q, pad_rows(k, keys), pad_rows(v, keys), unit_keys, keys


def query_block(length: int) -> int:
    """Queries of a block: one unit of whole lanes, or two."""
    multiple = LANES if length <= UNIT_QUERIES else 2 * LANES
    return min(QUERIES, pl.cdiv(length, multiple) * multiple)


def pad_rows(x: jax.Array, block: int) -> jax.Array:
    """`x` `[b * n, l, d]` with at least one block of rows. Longer ones need not be whole blocks."""
    return jnp.pad(x, ((0, 0), (0, max(0, block - x.shape[1])), (0, 0)))


def widen(x: jax.Array) -> jax.Array:
    """The last axis filled up with zeros, which change no score, to whole lanes."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES)))


def mask(x: jax.Array, valid: jax.Array | None, value: float) -> jax.Array:
    """`value` in the rows that do not count."""
    if valid is None:
        return x
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < valid, x, jnp.asarray(value, x.dtype))


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Matrix product over one axis of each, summed in float32."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def compiler_params(queries_or_keys: str) -> pltpu.CompilerParams:
    """Heads in any order, the last axis of the grid in sequence."""
    semantics: Any = ("parallel", queries_or_keys, "arbitrary")
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)
