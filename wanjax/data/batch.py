"""From samples on hosts to a batch on the mesh, of which every host makes only its own part.

A source is random access: sample `i` is the same whenever and on whichever host it is made. So the position in the data
is one number, and a run that was saved on some hosts goes on with the very next sample on any others.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from sharding.rules import activation_spec


class Sample(NamedTuple):
    """An encoded clip; a `Batch` is the same with a leading batch axis.

    latents: of the VAE, normalised, `[f, h, w, c]`.
    text: umT5 features `[l, text_dim]`, zero rows behind the caption.
    image: CLIP features of the given frames one after the other `[l, image_dim]`; None for a network without images.
    control: control branch `[f, h, w, 4 + c]`, see `wanjax.conditioning`; None for a network without one.
    """

    latents: np.ndarray
    text: np.ndarray
    image: np.ndarray | None
    control: np.ndarray | None


class Batch(NamedTuple):
    """`Sample`s on the mesh, with a leading batch axis."""

    latents: jax.Array
    text: jax.Array
    image: jax.Array | None
    control: jax.Array | None


class Source(Protocol):
    """Samples by number, without end."""

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, from 0."""
        ...


class Batches:
    """Endless batches on the ambient mesh; an iterator whose position can be saved and set.

    Attributes:
      position: batches handed out so far; all there is to save.

    Args:
      source: of the samples.
      size: samples in a batch, over all hosts.
      position: batches to leave out.
    """

    def __init__(self, source: Source, size: int, position: int = 0):
        self.source = source
        self.size = size
        self.position = position

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        batch = make_batch(self.source, self.position * self.size, self.size)
        self.position += 1
        return batch


def make_batch(source: Source, start: int, size: int) -> Batch:
    """Samples `start` to `start + size - 1` as a batch, split over the ambient mesh by its rules."""
    mesh = jax.sharding.get_mesh()

    def sharding(shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, activation_spec(shape, "batch", *(None,) * (len(shape) - 1)))

    rows: Any = sharding((size,)).addressable_devices_indices_map((size,)).values()
    wanted = sorted({i for (part,) in rows for i in range(*part.indices(size))})
    samples = {i: source[start + i] for i in wanted}

    def assemble(*parts: np.ndarray) -> jax.Array:
        by_row = dict(zip(wanted, parts, strict=True))

        def read(index: Any) -> np.ndarray:
            return np.stack([by_row[i] for i in range(*index[0].indices(size))])

        shape = (size, *parts[0].shape)
        return jax.make_array_from_callback(shape, sharding(shape), read)

    return Batch(*jax.tree.map(assemble, *samples.values()))
