"""From samples on hosts to a batch on the mesh, of which every host makes only its own part.

A source is random access: sample `i` is the same whenever and on whichever host it is made. So the position in the data
is one number, and a run that was saved on some hosts goes on with the very next sample on any others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from sharding.rules import activation_spec


class SampleSource(Protocol):
    """Samples by number, without end: NamedTuples of arrays, all of the same shapes, or None."""

    def __getitem__(self, index: int) -> Any:
        """Sample `index`, from 0."""
        ...

    def name(self, index: int) -> str:
        """Which clip sample `index` is, for messages."""
        ...


class Batches:
    """Endless batches on the ambient mesh; an iterator whose position can be saved and set.

    Some batches are made ahead, by threads, while the devices compute.

    Attributes:
      position: batches handed out so far; all there is to save.

    Args:
      source: of the samples.
      size: samples in a batch, over all hosts.
      position: batches to leave out.
      encode: applied to each batch on the mesh.
      ahead: batches made ahead.
    """

    def __init__(
        self,
        source: SampleSource,
        size: int,
        position: int = 0,
        *,
        encode: Callable[[Any], Any] | None = None,
        ahead: int = 4,
    ):
        self.source, self.size, self.position, self.encode = source, size, position, encode
        rows = host_rows(size)
        numbers = grain.MapDataset.range(position, sys.maxsize)
        samples = numbers.map(lambda number: [source[int(number) * size + row] for row in rows])
        options = grain.ReadOptions(num_threads=min(ahead, 2), prefetch_buffer_size=ahead)
        self._parts = iter(samples.to_iter_dataset(options))

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        batch = shard_batch(next(self._parts), self.size)
        self.position += 1
        return batch if self.encode is None else self.encode(batch)

    def example(self, number: int) -> Any:
        """A batch of the shapes of batch `number`: one of its samples again and again. The position stays."""
        rows = host_rows(self.size)
        batch = shard_batch([self.source[number * self.size + rows[0]]] * len(rows), self.size)
        return batch if self.encode is None else self.encode(batch)

    def names(self, number: int) -> list[str]:
        """The clips of batch `number`."""
        return [self.source.name(number * self.size + row) for row in range(self.size)]


def make_batch(source: SampleSource, start: int, size: int) -> Any:
    """Samples `start` to `start + size - 1` as a batch, split over the ambient mesh by its rules."""
    return shard_batch([source[start + row] for row in host_rows(size)], size)


def host_rows(size: int) -> list[int]:
    """The rows of a batch that this host's devices hold."""
    mesh = jax.sharding.get_mesh()
    parts: Any = (
        NamedSharding(mesh, activation_spec((size,), "batch")).addressable_devices_indices_map((size,)).values()
    )
    return sorted({row for (part,) in parts for row in range(*part.indices(size))})


def _rows(index: Any, size: int) -> range:
    """The rows of a device's part."""
    return range(*index[0].indices(size))


def shard_batch(samples: Sequence[Any], size: int) -> Any:
    """This host's samples, one for each of `host_rows`, as a batch on the ambient mesh."""
    mesh, rows = jax.sharding.get_mesh(), host_rows(size)

    def assemble(*values: np.ndarray) -> jax.Array:
        by_row = dict(zip(rows, values, strict=True))
        shape = (size, *values[0].shape)
        sharding = NamedSharding(mesh, activation_spec(shape, "batch", *(None,) * (len(shape) - 1)))
        return jax.make_array_from_callback(
            shape, sharding, lambda index: np.stack([by_row[row] for row in _rows(index, size)])
        )

    return jax.tree.map(assemble, *samples)
