"""Attention to one block of the keys, for accelerators; the reference is in `wanjax.ops.attention`.

A kernel is two functions. `q` is `[b, n, lq, d]`, `k` and `v` are `[b, n, lk, d]`; of the keys the first `valid` count,
an int32 from 0 to `lk`, or all of them if it is None.

    forward(q, k, v, valid, dtype) -> (out, lse)
        `out` `[b, n, lq, d]` in `dtype`. `lse` `[b, n, lq]`, float32: the logarithm of the sum of exp(q k / sqrt(d)).
        Without any valid key `out` is 0 and `lse` is LOWEST.
    backward(q, k, v, valid, lse, delta, dout) -> (dq, dk, dv)
        All float32, as blocks' gradients are summed. `lse` is over ALL keys, of which these may be a part; `delta` is
        `sum(out * dout)` over d, with the output of all keys. Both float32, `[b, n, lq]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

Forward = tuple[jax.Array, jax.Array]
Gradients = tuple[jax.Array, jax.Array, jax.Array]

# Floor of a row's maximum: a row without any key then has weights 0, output 0 and a finite log-sum-exp.
LOWEST = -1e30


class Kernel(NamedTuple):
    """The two functions."""

    forward: Callable[..., Forward]
    backward: Callable[..., Gradients]
