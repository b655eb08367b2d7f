"""Three-dimensional rotary position embedding (Wan2.1 `wan/modules/model.py`: rope_params, rope_apply).

Channel pairs (2i, 2i+1) of a head are rotated by an angle that grows with the token's position. Of head dim d, the
first d - 4 (d // 6) channels see the latent frame, the next 2 (d // 6) the row, the last 2 (d // 6) the column.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sharding.rules import constrain
from wanjax.ops import norms

THETA = 10000.0


@functools.partial(jax.tree_util.register_dataclass, data_fields=("cos", "sin"), meta_fields=("length",))
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosine and sine for every token and channel, float32 `[l, d]`; tokens behind `length` are padding."""

    cos: jax.Array
    sin: jax.Array
    length: int


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that see time, height and width."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def make_rotation(grid: tuple[int, int, int], head_dim: int, padded: int) -> Rotation:
    """The rotation of every token of a `(f, h, w)` grid of patches, in (f, h, w) order, `padded` tokens in all.

    Angles, sines and cosines are taken in float64 on the host, one short table an axis, and only spread over the grid
    on the device: float32 angles would be wrong by 1e-5 at position 100, the whole table would weigh 77 MB at 720p.
    """
    cos, sin = [], []
    for axis, (size, dim) in enumerate(zip(grid, axis_dims(head_dim), strict=True)):
        frequencies = THETA ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles = np.repeat(np.outer(np.arange(size), frequencies), 2, axis=1)  # [size, dim]
        shape = [1, 1, 1, dim]
        shape[axis] = size
        for out, table in ((cos, np.cos(angles)), (sin, np.sin(angles))):
            table = jnp.asarray(table.reshape(shape), jnp.float32)
            out.append(jnp.broadcast_to(table, (*grid, dim)))  # [f, h, w, dim]
    length = grid[0] * grid[1] * grid[2]

    def flatten(parts: list[jax.Array]) -> jax.Array:
        table = jnp.concatenate(parts, axis=-1).reshape(length, head_dim)  # [l, d]
        return constrain(jnp.pad(table, ((0, padded - length), (0, 0))), "tokens", None)

    return Rotation(flatten(cos), flatten(sin), length)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotate `x` `[b, l, n, d]`; float32 inside, returned in the dtype of `x`."""
    return norms.rotate(x, rotation.cos, rotation.sin)
