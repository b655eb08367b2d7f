"""Attention over tokens that are split among devices: Ulysses (arXiv 2309.14509) inside, a ring outside.

Tokens lie on (ring, ulysses). Within a member of the ring, an all-to-all turns "some tokens of all heads" into "all the
member's tokens of some heads"; the ring then brings the other members' keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec as P

from sharding.mesh import current_shape
from sharding.ring import RING, ring_backward, ring_forward
from wanjax.config import Attention
from wanjax.errors import InputError
from wanjax.ops.attention import named, softmax_delta, swap
from wanjax.ops.kernels import Gradients

T = TypeVar("T")
ULYSSES = "ulysses"


def check_heads(num_heads: int, ulysses: int) -> None:
    """Raises `InputError`, with the factors that work, if `ulysses` devices cannot share the heads evenly."""
    if num_heads % ulysses:
        factors = ", ".join(str(i) for i in range(1, num_heads + 1) if num_heads % i == 0)
        raise InputError(
            f"ulysses={ulysses} cannot split {num_heads} attention heads; the factors that work are {factors}; "
            "use one of them and give the other devices to ring"
        )


def sequence_attention(q: jax.Array, k: jax.Array, v: jax.Array, length: int, choice: Attention = "auto") -> jax.Array:
    """Full attention over a sequence whose tokens are sharded over (ring, ulysses); without a mesh, over all of it.

    Args:
      q, k, v: `[b, l, n, d]`, padded so that l divides by ring * ulysses. The batch may be sharded in any way.
      length: tokens that are not padding; only these are attended to.
      choice: of the kernel, as `wanjax.ops.attention.kernel` takes it.

    Returns:
      `[b, l, n, d]` in the dtype of `q`, tokens over (ring, ulysses). What padding gets is finite, of no meaning.

    Raises:
      InputError: the heads cannot be split by ulysses.
    """
    head_dim = q.shape[3]
    check_heads(q.shape[2], current_shape().ulysses)
    if not jax.sharding.get_abstract_mesh().empty:
        q, k, v = (jax.sharding.reshard(x, specs(q)[0]) for x in (q, k, v))
    # As the projections make them and the next one takes them: on TPUs heads as an axis of their own are a copy.
    merged = [x.reshape(*x.shape[:2], -1) for x in (q, k, v)]
    out: jax.Array = _attend(merged[0], merged[1], merged[2], length, head_dim, choice)  # [b, l, e]
    return out.reshape(q.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, length: int, head_dim: int, choice: Attention) -> jax.Array:
    return _forward(q, k, v, length, head_dim, choice)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, length: int, head_dim: int, choice: Attention):
    def local(q: jax.Array, k: jax.Array, v: jax.Array):
        exchanged = to_heads(q), to_heads(k), to_heads(v)  # [b, l, e / ulysses]
        q, k, v = (split_heads(x, head_dim) for x in exchanged)  # [b, n, l, d]
        out, lse = ring_forward(q, k, v, length, q.dtype, choice)
        return to_tokens(merge_heads(out)), lse, exchanged

    tokens, heads, rows = specs(q)
    out, lse, qkv = per_device(local, (tokens,) * 3, (tokens, rows, (heads,) * 3))(q, k, v)
    out, lse = named(out), named(lse)
    # q, k and v are kept as exchanged, which saves the backward pass three all-to-alls.
    return out, (*qkv, out, lse)


def _backward(length: int, head_dim: int, choice: Attention, saved, dout: jax.Array) -> Gradients:
    def local(q, k, v, out, lse, dout) -> Gradients:
        out, heads_dout = (x.reshape(*x.shape[:2], -1, head_dim) for x in (out, dout))
        delta = to_heads(softmax_delta(out, heads_dout)).swapaxes(1, 2)  # [b, n, l]
        heads = [split_heads(x, head_dim) for x in (q, k, v)]  # [b, n, l, d]
        grads = ring_backward(
            heads[0], heads[1], heads[2], length, lse, delta, split_heads(to_heads(dout), head_dim), choice
        )
        # Rounded before the exchange: half the bytes, and custom_vjp wants these dtypes.
        dq, dk, dv = (to_tokens(merge_heads(g.astype(x.dtype))) for g, x in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv  # [b, l, e]

    tokens, heads, rows = specs(saved[3])
    in_specs = (heads, heads, heads, tokens, rows, tokens)
    return per_device(local, in_specs, (tokens,) * 3)(*saved, dout)


_attend.defvjp(_forward, _backward)  # pyright: ignore[reportFunctionMemberAccess]


def per_device(function: Callable[..., T], in_specs, out_specs) -> Callable[..., T]:
    """`function` on every device's own part; `function` itself without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def specs(x: jax.Array) -> tuple[P, P, P]:
    """Shardings of `[b, l, ..]` by tokens, of `[b, l, e]` by tokens and heads, and of `[b, n, l]` likewise."""
    batch = jax.typeof(x).sharding.spec[0]
    return P(batch, (RING, ULYSSES)), P(batch, RING, ULYSSES), P(batch, ULYSSES, RING)


def to_heads(x: jax.Array) -> jax.Array:
    """All heads of some tokens -> some heads of all the ring member's tokens, `[b, l, e]` -> `[b, l * u, e / u]`.

    What goes to one device is one block: XLA then has nothing to reorder but what the kernels around left in another
    order.
    """
    parts, (b, length, width) = current_shape().ulysses, x.shape
    if parts == 1:
        return x
    x = x.reshape(b, length, parts, width // parts).transpose(2, 0, 1, 3)  # [u, b, l, e / u]
    x = jax.lax.all_to_all(x, ULYSSES, 0, 0, tiled=True)
    return x.transpose(1, 0, 2, 3).reshape(b, parts * length, width // parts)


def to_tokens(x: jax.Array) -> jax.Array:
    """The inverse of `to_heads`."""
    parts, (b, length, width) = current_shape().ulysses, x.shape
    if parts == 1:
        return x
    x = x.reshape(b, parts, length // parts, width).transpose(1, 0, 2, 3)  # [u, b, l, e / u]
    x = jax.lax.all_to_all(x, ULYSSES, 0, 0, tiled=True)
    return x.transpose(1, 2, 0, 3).reshape(b, length // parts, parts * width)


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """`[b, l, e]` -> `[b, n, l, d]`."""
    return swap(x.reshape(*x.shape[:2], -1, head_dim))


def merge_heads(x: jax.Array) -> jax.Array:
    """`[b, n, l, d]` -> `[b, l, e]`."""
    return swap(x).reshape(x.shape[0], x.shape[2], -1)
