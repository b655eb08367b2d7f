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
from wanjax.ops.attention import named, row_products, swap
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
    check_heads(q.shape[2], current_shape().ulysses)
    if not jax.sharding.get_abstract_mesh().empty:
        q, k, v = (jax.sharding.reshard(x, specs(q)[0]) for x in (q, k, v))
    return _attend(q, k, v, length, choice)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, length: int, choice: Attention) -> jax.Array:
    return _forward(q, k, v, length, choice)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, length: int, choice: Attention):
    def local(q: jax.Array, k: jax.Array, v: jax.Array):
        qh, kh, vh = (to_heads(swap(x)) for x in (q, k, v))  # [b, n, l, d]
        out, lse = ring_forward(qh, kh, vh, length, q.dtype, choice)
        return swap(to_tokens(out)), lse, (qh, kh, vh)

    tokens, heads, rows = specs(q)
    out, lse, qkv = per_device(local, (tokens,) * 3, (tokens, rows, (heads,) * 3))(q, k, v)
    out, lse = named(out), named(lse)
    # q, k and v are kept as exchanged, which saves the backward pass three all-to-alls.
    return out, (*qkv, out, lse)


def _backward(length: int, choice: Attention, saved, dout: jax.Array) -> Gradients:
    def local(q, k, v, out, lse, dout) -> Gradients:
        delta = to_heads(row_products(out, dout).swapaxes(1, 2)[..., None])[..., 0]  # [b, n, l]
        grads = ring_backward(q, k, v, length, lse, delta, to_heads(swap(dout)), choice)
        # Rounded before the exchange: half the bytes, and custom_vjp wants these dtypes.
        dq, dk, dv = (swap(to_tokens(g.astype(x.dtype))) for g, x in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv  # [b, l, n, d]

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
    """Shardings of `[b, l, n, d]` by tokens, of `[b, n, l, d]` by heads and tokens, and of `[b, n, l]` likewise."""
    batch = jax.typeof(x).sharding.spec[0]
    return P(batch, (RING, ULYSSES), None, None), P(batch, ULYSSES, RING, None), P(batch, ULYSSES, RING)


def to_heads(x: jax.Array) -> jax.Array:
    """All heads of some tokens -> some heads of all the ring member's tokens, `[b, n, l, d]` both."""
    return x if current_shape().ulysses == 1 else jax.lax.all_to_all(x, ULYSSES, 1, 2, tiled=True)


def to_tokens(x: jax.Array) -> jax.Array:
    """The inverse of `to_heads`."""
    return x if current_shape().ulysses == 1 else jax.lax.all_to_all(x, ULYSSES, 2, 1, tiled=True)
