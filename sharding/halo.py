"""Pictures whose height and width are split over devices: what a window sees over the edge of its part.

A convolution of such pictures takes the nearest rows and columns from its neighbours first, and zeros where there is no
neighbour: the zeros that pad the whole picture. Each output is the same sum as on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec

Padding = tuple[tuple[int, int], tuple[int, int]]
"""Zeros above and below, left and right."""


def windowed(
    function: Callable[[jax.Array, jax.Array, Padding], jax.Array], x: jax.Array, kernel: jax.Array, padding: Padding
) -> jax.Array:
    """A function of every position's surroundings, such as a convolution, on each device's own part.

    Args:
      function: of pictures, kernel and padding; it divides height and width by its strides, and a part's too.
      x: `[b, f, h, w, c]`, split over any axis but the last.
      kernel: whole.
      padding: of the whole picture. No part is smaller.

    Returns:
      `[b, f, h, w, c]`, split as `x`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(x, kernel, padding)
    spec = jax.typeof(x).sharding.spec
    above_below, left_right = ((0, 0) if names else n for names, n in zip(spec[2:4], padding, strict=True))

    def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
        for axis, size in zip((2, 3), padding, strict=True):  # columns after rows: they bring the corners along
            if spec[axis]:
                x = extend(x, axis, spec[axis], *size)
        return function(x, kernel, (above_below, left_right))

    return jax.shard_map(local, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False)(x, kernel)


def extend(x: jax.Array, axis: int, names: str | Sequence[str], before: int, behind: int) -> jax.Array:
    """A device's part with the neighbours' nearest slices along `axis`, which `names` split; zeros at the ends."""
    names = (names,) if isinstance(names, str) else tuple(names)
    last = jax.lax.axis_size(names) - 1
    size = x.shape[axis]
    parts = [x]
    if before:  # a device that receives nothing gets zeros
        edge = jax.lax.slice_in_dim(x, size - before, size, axis=axis)
        parts.insert(0, jax.lax.ppermute(edge, names, [(i, i + 1) for i in range(last)]))
    if behind:
        edge = jax.lax.slice_in_dim(x, 0, behind, axis=axis)
        parts.append(jax.lax.ppermute(edge, names, [(i + 1, i) for i in range(last)]))
    return jax.lax.concatenate(parts, axis)


def to_whole_frames(function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, seen: jax.Array) -> jax.Array:
    """A function, such as attention, of each position and all positions of its frame, on each device's own part.

    Args:
      function: of `x` and `seen`; returns what is shaped like `x`.
      x: `[b, f, h, w, c]`, split over any axis but the last.
      seen: `[b, f, h, w, ..]`, split as `x`; gathered here, so that each device has all positions.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(x, seen)
    spec = jax.typeof(x).sharding.spec
    whole = PartitionSpec(*spec[:2], None, None, None)
    seen = jax.sharding.reshard(seen, whole)
    return jax.shard_map(function, in_specs=(spec, whole), out_specs=spec, check_vma=False)(x, seen)
