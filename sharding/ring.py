"""Ring attention (arXiv 2310.01889): every device keeps its queries, keys and values go round.

These functions are one device's program, inside `jax.shard_map`. At each hop the next keys and values are already on
their way while the present ones are attended to; nothing is gathered, so a device's memory does not grow with the ring.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sharding.mesh import current_shape
from wanjax.config import Attention
from wanjax.ops.attention import kernel
from wanjax.ops.kernels import Forward, Gradients, merge_tpu

RING = "ring"
KeysAndValues = tuple[jax.Array, jax.Array]


def ring_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, length: int, dtype: DTypeLike, choice: Attention = "auto"
) -> Forward:
    """Attention of this device's queries to the keys of the whole ring.

    Args:
      q, k, v: this device's part, `[b, n, l, d]`; the device's place in the ring is its part's place in the sequence.
      length: only the keys before this index of the whole sequence count; at least 1.
      dtype: of the output.
      choice: as `wanjax.ops.attention.kernel` takes it.

    Returns:
      Output `[b, n, l, d]` and log-sum-exp, float32 `[b, n, l]`.
    """
    ring = current_shape().ring
    if ring == 1:
        return kernel(choice).forward(q, k, v, valid_keys(0, k.shape[2], length), dtype)

    def attend(hop: jax.Array | int, kv: KeysAndValues) -> Forward:
        return kernel(choice).forward(q, *kv, valid_keys(hop, k.shape[2], length), jnp.float32)  # the parts are summed

    def step(hop: jax.Array, carry: tuple[KeysAndValues, Forward]) -> tuple[KeysAndValues, Forward]:
        kv, result = carry
        return (send(kv[0]), send(kv[1])), merge(result, attend(hop, kv), jnp.float32)

    carry = (send(k), send(v)), attend(0, (k, v))
    kv, result = jax.lax.fori_loop(1, ring - 1, step, carry)
    return merge(result, attend(ring - 1, kv), dtype)  # where nothing is left to send


def ring_backward(q, k, v, length: int, lse, delta, dout, choice: Attention = "auto") -> Gradients:
    """Gradients of this device's queries, keys and values; `lse` and `delta` as in `wanjax.ops.kernels`.

    A block of keys takes the sum of its gradients with it round the ring, one hop late: what the device before has
    added arrives while this device computes its own share.
    """
    ring = current_shape().ring
    if ring == 1:
        return kernel(choice).backward(q, k, v, valid_keys(0, k.shape[2], length), lse, delta, dout)

    def differentiate(hop: jax.Array | int, kv: jax.Array) -> Gradients:
        return kernel(choice).backward(q, *kv, valid_keys(hop, kv.shape[3], length), lse, delta, dout)

    def step(hop: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        kv, dq, dkv = carry
        following, arriving = send(kv), send(dkv)
        # Both must be here before the sums, or XLA holds the sums to be enough to hide a transfer behind.
        grads, following, arriving = jax.lax.optimization_barrier((differentiate(hop, kv), following, arriving))
        return following, dq + grads[0], arriving + jnp.stack(grads[1:])

    kv = jnp.stack((k, v))
    nothing = jnp.zeros(q.shape, jnp.float32), jnp.zeros(kv.shape, jnp.float32)
    kv, dq, dkv = jax.lax.fori_loop(0, ring - 1, step, (kv, *nothing))
    arriving = send(dkv)
    grads = differentiate(ring - 1, kv)
    dk, dv = send(arriving + jnp.stack(grads[1:]))  # the last hop of a full round: home
    return dq + grads[0], dk, dv


def send(x: jax.Array) -> jax.Array:
    """`x` to the next device of the ring, in exchange for that of the device before.

    In the backward pass keys and values travel as one array, and so do their gradients: XLA keeps two transfers in the
    air, not four.
    """
    ring = current_shape().ring
    return jax.lax.ppermute(x, RING, [(i, (i + 1) % ring) for i in range(ring)])


def valid_keys(hop: jax.Array | int, block: int, length: int) -> jax.Array | None:
    """How many keys count of the `block` that is here after `hop` hops; None if all keys of the ring do."""
    ring = current_shape().ring
    if block * ring == length:
        return None
    home = jax.lax.rem(jax.lax.axis_index(RING) + ring - hop, ring) if ring > 1 else 0
    return jnp.clip(length - home * block, 0, block).astype(jnp.int32)


def merge(one: Forward, other: Forward, dtype: DTypeLike) -> Forward:
    """Attention to two blocks of keys from that to each, `[b, n, l, d]` and `[b, n, l]`, float32; output in `dtype`."""

    def plain(one: Forward, other: Forward) -> Forward:
        lse = jnp.logaddexp(one[1], other[1])
        first, second = (jnp.exp(part_lse - lse)[..., None] * part for part, part_lse in (one, other))
        return (first + second).astype(dtype), lse

    if not merge_tpu.supports(one[0]):
        return plain(one, other)
    return jax.lax.platform_dependent(one, other, tpu=partial(merge_tpu.merge, dtype=dtype), default=plain)
