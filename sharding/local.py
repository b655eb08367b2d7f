"""What needs no other device: functions of one token, attention to keys that every device has whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from wanjax.ops.attention import summed_attention


def local_attention(q: jax.Array, *keys_and_values: jax.Array) -> jax.Array:
    """Full attention without communication: each device has some of the queries and all of the keys.

    Args:
      q: `[b, lq, n, d]`, split over the batch and perhaps over the tokens.
      keys_and_values: of one or several sequences, whose results are summed: `[b, lk, n, d]`, split over the batch as
        `q` is.

    Returns:
      `[b, lq, n, d]`, split as `q`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return summed_attention(q, *keys_and_values)
    queries = jax.typeof(q).sharding.spec
    specs = (queries, *[PartitionSpec(queries[0])] * len(keys_and_values))
    return jax.shard_map(summed_attention, in_specs=specs, out_specs=queries, check_vma=False)(q, *keys_and_values)


def per_token(function: Callable[..., Any], x: jax.Array, *others: jax.Array) -> Any:
    """A function of every token, such as a norm, on each device's own part.

    Args:
      function: of `x` and the others; returns one or several arrays shaped like `x`.
      x: `[b, l, e]`, split over the batch and perhaps over the tokens.
      others: `[b, l, e]` and, what is the same for all tokens of a sample, `[b, 1, e]`: split as `x`. All else as it
        is: what has no axis for tokens is whole.

    Returns:
      What the function does, split as `x`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(x, *others)
    split = jax.typeof(x).sharding.spec

    def place(a: jax.Array) -> jax.Array:
        if a.ndim < 3 or a.shape[0] != x.shape[0]:
            return a
        return jax.sharding.reshard(a, split if a.shape[1] == x.shape[1] else PartitionSpec(split[0]))

    others = tuple(map(place, others))
    specs = (split, *(jax.typeof(a).sharding.spec for a in others))
    return jax.shard_map(function, in_specs=specs, out_specs=split, check_vma=False)(x, *others)
