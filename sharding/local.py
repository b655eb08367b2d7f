"""Attention to keys that every device has whole: text and image tokens, encoders."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from wanjax.ops.attention import attention


def local_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Full attention without communication: each device has some of the queries and all of the keys.

    Args:
      q: `[b, lq, n, d]`, split over the batch and perhaps over the tokens.
      k, v: `[b, lk, n, d]`, split over the batch as `q` is.

    Returns:
      `[b, lq, n, d]`, split as `q`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return attention(q, k, v)
    queries = jax.typeof(q).sharding.spec
    keys = PartitionSpec(queries[0])
    return jax.shard_map(attention, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)(q, k, v)
