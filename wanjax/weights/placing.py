"""Tensors of files onto the devices, one at a time, cast, changed or quantised there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from wanjax.errors import InputError
from wanjax.ops.quantized import Format, quantize_weight
from wanjax.weights.mapping import Entry, Shape
from wanjax.weights.tensors import Reader, TensorFile, copy, is_finite

ChooseSharding = Callable[[tuple[str, ...], nnx.Param], Sharding]
Changes = Mapping[tuple[str, int | None], Callable[[jax.Array], jax.Array]]
"""What becomes of parameters, or of single layers of them, by path and layer; see `Checkpoint.load`."""


class Placer:
    """Collects parameters on the devices; those of stacked layers are written into one buffer layer by layer."""

    def __init__(self, leaves: Mapping[str, Any], sharding: ChooseSharding, quantize: Format | None, changes: Changes):
        self.values: dict[str, jax.Array] = {}
        self._leaves = leaves
        self._quantize: Format | None = quantize
        self._changes = changes
        self._sharding = {path: sharding(tuple(path.split(".")), leaf) for path, leaf in leaves.items()}
        self._last: jax.Array | None = None
        self._reading = ""

    def place_file(self, file: TensorFile, matched: Mapping[str, Entry]) -> None:
        """Place the tensors of a file that are parameters, by their keys."""
        with file.open() as reader:
            for key in file.infos:
                if key in matched:
                    self._reading = f"{file.path}: tensor {key}"
                    self._place(matched[key], reader.view(key), reader)

    def _place(self, entry: Entry, tensor: np.ndarray, reader: Reader) -> None:
        for slot, view in entry.split(tensor):
            leaf, sharding = self._leaves[slot.path], self._sharding[slot.path]
            change = self._changes.get((slot.path, slot.layer))
            scale_path = f"{slot.path}_scale"
            quantize = self._quantize if scale_path in self._leaves else None
            one = sharding if slot.layer is None else _of_layer(sharding)
            value = self._put(view, view.dtype if change or quantize else leaf.dtype, one, reader)
            value = change(value) if change else value
            if quantize and slot.layer is not None:
                has_channels = self._leaves[scale_path].ndim > 1  # beside that of the layers
                value, scale = _quantized(value, quantize, has_channels)
                scale = jax.device_put(scale, _of_layer(self._sharding[scale_path]))  # that of channels is whole
                self._insert(scale_path, scale, slot.layer)
            value = value.astype(leaf.dtype)  # once: what was changed or quantised came in the file's dtype
            if slot.layer is None:
                self.values[slot.path] = value
            else:
                self._insert(slot.path, value, slot.layer)

    def _insert(self, path: str, layer: jax.Array, index: int) -> None:
        if path not in self.values:
            leaf = self._leaves[path]
            self.values[path] = zeros(leaf.shape, leaf.dtype, self._sharding[path])
        self.values[path] = _insert(self.values[path], layer, index)

    def _put(self, view: np.ndarray, dtype: DTypeLike, sharding: Sharding, reader: Reader) -> jax.Array:
        """A view into a file as an array on the devices, of which every host reads its own part only."""

        def read(index: Any) -> np.ndarray:
            part = copy(view[index], dtype, reader)
            if jnp.issubdtype(part.dtype, jnp.floating) and not is_finite(part):
                raise InputError(
                    f"{self._reading} holds NaN or infinity, or numbers beyond {part.dtype}; finite weights are "
                    "needed; download the file again, or give another checkpoint"
                )
            jax.block_until_ready(self._last)  # transfers may not queue up: what waits for them is host memory
            return part

        self._last = jax.make_array_from_callback(view.shape, sharding, read)
        return self._last


def _of_layer(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stacked parameter."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    if sharding.spec and sharding.spec[0] is not None:
        raise ValueError(f"the layer axis of a stacked parameter cannot be sharded, given {sharding.spec}")
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)


def zeros(shape: Shape, dtype: DTypeLike, sharding: Sharding) -> jax.Array:
    """Zeros that are split from the beginning."""
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(shape, dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: jax.Array, layer: jax.Array, index: jax.Array | int) -> jax.Array:
    """Writes a layer into the stack, in place."""
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


_quantized = jax.jit(quantize_weight, static_argnums=(1, 2))
