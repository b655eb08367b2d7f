"""Classifier-free guidance (arXiv 2207.12598): the conditional velocity, led away from the unconditional one."""

from __future__ import annotations

import jax


def guided(velocity: jax.Array, guidance: jax.Array | float, branches: int) -> jax.Array:
    """`negative + guidance * (positive - negative)`.

    Args:
      velocity: `[b * branches, ..]`: with two branches, of each sample the conditional (positive) velocity, then the
        unconditional (negative) one; with one branch the velocity itself, which is returned.
      guidance: scale; 1 is the conditional velocity.
      branches: 1 or 2.

    Returns:
      `[b, ..]`.
    """
    if branches == 1:
        return velocity
    positive, negative = velocity[0::2], velocity[1::2]  # [b, ..] each
    return negative + guidance * (positive - negative)
