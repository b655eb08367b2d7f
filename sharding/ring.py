"""Ring attention (arXiv 2310.01889): every device keeps its queries, keys and values go round.

These functions are one device's program, inside `jax.shard_map`. At each hop the next keys and values are already on
their way while the present ones are attended to; nothing is gathered, so a device's memory does not grow with the ring.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sharding.mesh import current_shape
from wanjax.config import Attention
from wanjax.ops.attention import kernel
from wanjax.ops.kernels import LOWEST, Forward, Gradients

RING = "ring"


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

    def attend(hop: jax.Array | int, kv: jax.Array) -> Forward:
        return kernel(choice).forward(q, *kv, valid_keys(hop, kv.shape[3], length), jnp.float32)  # the parts are summed

    def step(hop: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        kv, out, lse = carry
        return send(kv), *merge((out, lse), attend(hop, kv))

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], LOWEST, jnp.float32)
    kv, out, lse = jax.lax.fori_loop(0, ring - 1, step, (jnp.stack((k, v)), *nothing))
    out, lse = merge((out, lse), attend(ring - 1, kv))  # where nothing is left to send
    return out.astype(dtype), lse


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

    Keys and values travel as one array, and so do their gradients: XLA keeps two transfers in the air, not four.
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


def merge(one: Forward, other: Forward) -> Forward:
    """Attention to two blocks of keys from that to each, `[b, n, l, d]` and `[b, n, l]`, all float32."""
    lse = jnp.logaddexp(one[1], other[1])
    first, second = (jnp.exp(part_lse - lse)[..., None] * part for part, part_lse in (one, other))
    return first + second, lse
