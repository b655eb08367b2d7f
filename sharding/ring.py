"""Ring attention (arXiv 2310.01889): every device keeps its queries, keys and values go round.

These functions are one device's program, inside `jax.shard_map`. At each hop the next keys and values are already on
their way while the present ones are attended to; nothing is gathered, so a device's memory does not grow with the ring.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sharding.mesh import current_shape
from wanjax.ops.attention import kernel
from wanjax.ops.kernels import LOWEST, Gradients

RING = "ring"


def ring_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, length: int, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Attention of this device's queries to the keys of the whole ring.

    Args:
      q, k, v: this device's part, `[b, n, l, d]`; the device's place in the ring is its part's place in the sequence.
      length: only the keys before this index of the whole sequence count; at least 1.
      dtype: of the output.

    Returns:
      Output `[b, n, l, d]` and log-sum-exp, float32 `[b, n, l]`.
    """
    ring = current_shape().ring
    if ring == 1:
        return kernel().forward(q, k, v, valid_keys(0, k.shape[2], length), dtype)

    def attend(hop: jax.Array | int, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        # float32: the parts are summed
        return kernel().forward(q, k, v, valid_keys(hop, k.shape[2], length), jnp.float32)

    def step(hop: jax.Array, carry):
        k, v, *sofar = carry
        return *send((k, v)), *merge(*sofar, *attend(hop, k, v))

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], LOWEST, jnp.float32)
    k, v, *sofar = jax.lax.fori_loop(0, ring - 1, step, (k, v, *nothing))
    out, lse = merge(*sofar, *attend(ring - 1, k, v))  # where nothing is left to send
    return out.astype(dtype), lse


def ring_backward(q, k, v, length: int, lse, delta, dout) -> Gradients:
    """Gradients of this device's queries, keys and values; `lse` and `delta` as in `wanjax.ops.attention.Kernel`.

    A block of keys takes the sum of its gradients with it round the ring, one hop late: what the device before has
    added arrives while this device computes its own share.
    """
    ring = current_shape().ring

    def differentiate(hop: jax.Array | int, k: jax.Array, v: jax.Array) -> Gradients:
        return kernel().backward(q, k, v, valid_keys(hop, k.shape[2], length), lse, delta, dout)

    if ring == 1:
        return differentiate(0, k, v)

    def add(hop: jax.Array | int, k: jax.Array, v: jax.Array, dq: jax.Array, *dkv: jax.Array) -> list[jax.Array]:
        sofar = dq, *send(dkv)
        return [x + more for x, more in zip(sofar, differentiate(hop, k, v), strict=True)]

    def step(hop: jax.Array, carry):
        k, v, *sofar = carry
        return *send((k, v)), *add(hop, k, v, *sofar)

    nothing = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    k, v, *sofar = jax.lax.fori_loop(0, ring - 1, step, (k, v, *nothing))
    dq, *dkv = add(ring - 1, k, v, *sofar)
    dk, dv = send(dkv)  # the last hop of a full round: home
    return dq, dk, dv


def send(blocks):
    """Each array to the next device of the ring, in exchange for that of the device before."""
    ring = current_shape().ring
    return jax.lax.ppermute(tuple(blocks), RING, [(i, (i + 1) % ring) for i in range(ring)])


def valid_keys(hop: jax.Array | int, block: int, length: int) -> jax.Array | None:
    """How many keys count of the `block` that is here after `hop` hops; None if all keys of the ring do."""
    ring = current_shape().ring
    if block * ring == length:
        return None
    home = jax.lax.rem(jax.lax.axis_index(RING) + ring - hop, ring) if ring > 1 else 0
    return jnp.clip(length - home * block, 0, block).astype(jnp.int32)


def merge(out: jax.Array, lse: jax.Array, more: jax.Array, more_lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention to two blocks of keys from that to each, all float32."""
    total = jnp.logaddexp(lse, more_lse)  # [b, n, l]
    weight, more_weight = (jnp.exp(x - total)[..., None] for x in (lse, more_lse))
    return weight * out + more_weight * more, total
