"""One network on its way into a file: from a module in memory, or from a checkpoint, of either layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from wanjax.errors import InputError
from wanjax.weights.extra import FOLDER
from wanjax.weights.layouts import PARTS
from wanjax.weights.load import Checkpoint, parameter_shapes, parameters
from wanjax.weights.mapping import Entry, LayoutName, NetworkName, Slot, Table, expand
from wanjax.weights.tensors import SafetensorsFile, TensorInfo
from wanjax.weights.write import Read


class TensorSource(Protocol):
    """A network to be written.

    Attributes:
      config: its configuration.
      infos: the tensors to write, by their names in the layout to be written.
    """

    config: Any
    infos: dict[str, TensorInfo]

    def open(self) -> contextlib.AbstractContextManager[Read]:
        """Gives a function that reads a tensor of `infos`, valid until the next one is asked for."""
        ...


class ModuleSource:
    """A module's parameters, in the dtypes that they have. Every process has to read every tensor, in order."""

    def __init__(self, name: NetworkName, module: Any, layout: LayoutName):
        table = PARTS[name].tables[layout]
        self.config = module.config
        self._leaves = parameters(module)
        entries = expand(table, {path: leaf.shape for path, leaf in self._leaves.items()}, self.config)
        self._entries = {table.prefix + key: entry for key, entry in entries.items()}
        self.infos = {
            key: TensorInfo(entry.shape, np.dtype(self._leaves[entry.slots[0].path].dtype))
            for key, entry in self._entries.items()
        }

    @contextlib.contextmanager
    def open(self) -> Iterator[Read]:
        """See `TensorSource`."""
        yield self._read

    def _read(self, key: str) -> np.ndarray:
        entry = self._entries[key]
        return entry.join([fetch(self._leaves[slot.path], slot) for slot in entry.slots])


def fetch(leaf: nnx.Param, slot: Slot) -> np.ndarray:
    """A parameter, or one layer of it, on the host."""
    value = leaf[...] if slot.layer is None else _layer(leaf[...], slot.layer)
    if not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


@jax.jit
def _layer(stack: jax.Array, index: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)


class CopySource:
    """A network of a checkpoint that has the layout to be written already: every tensor as it is."""

    def __init__(self, name: NetworkName, checkpoint: Checkpoint):
        self.config = checkpoint.config(name)
        checkpoint.check(name, self.config)
        self._weights = checkpoint.weights(name)
        self.infos = dict(self._weights.items())

    @contextlib.contextmanager
    def open(self) -> Iterator[Read]:
        """See `TensorSource`."""
        with self._weights.open() as read:
            yield read


class ConvertSource:
    """A network of a checkpoint in the other layout, bit for bit: tensors are only renamed, reshaped, joined, split.

    Attributes:
      leftovers: tensors that the layout to be written has no place for, by their old names.
      names, copies: see `extra.Extra`.
    """

    def __init__(self, name: NetworkName, checkpoint: Checkpoint, layout: LayoutName):
        self.config = checkpoint.config(name)
        self._weights, self._tables = checkpoint.weights(name), PARTS[name].tables
        self._stored = dict(self._weights.items())
        self._given = checkpoint.match(name, self.config)
        self._places = {
            slot: (key, part) for key, entry in self._given.items() for part, slot in enumerate(entry.slots)
        }
        wanted = expand(self._tables[layout], parameter_shapes(name, self.config), self.config)
        self._plan(wanted, checkpoint, name, layout)
        self._find_leftovers(self._tables[checkpoint.layout_of(name)])

    def _plan(self, wanted: dict[str, Entry], checkpoint: Checkpoint, name: NetworkName, layout: LayoutName) -> None:
        """Names and order of what is written; what an earlier conversion kept goes back to its place."""
        extra, prefix = (None if name in checkpoint.files else checkpoint.extra), self._tables[layout].prefix
        names = extra.names.get(name, {}) if extra else {}
        order = {key: n for n, key in enumerate(self._stored)}
        in_order = sorted(wanted, key=lambda key: min(order[k] for k in self._keys(wanted[key])))  # front to back
        self._wanted = {names.get(prefix + key, prefix + key): wanted[key] for key in in_order}
        self.infos = {key: TensorInfo(entry.shape, self._dtype(entry)) for key, entry in self._wanted.items()}
        kept = checkpoint.path / FOLDER / f"{name}.safetensors"
        has_kept = kept.is_file() and checkpoint.is_folder and name not in checkpoint.files
        self._kept = SafetensorsFile(kept) if has_kept else None
        self.infos |= self._kept.infos if self._kept else {}
        self._copied = extra.copies.get(name, {}) if extra else {}
        self.infos |= {key: self.infos[same] for key, same in self._copied.items()}

    def _keys(self, entry: Entry) -> list[str]:
        return [self._places[slot][0] for slot in entry.slots]

    def _dtype(self, entry: Entry) -> np.dtype:
        dtypes = {self._stored[key].dtype for key in self._keys(entry)}
        if len(dtypes) > 1:
            keys = ", ".join(self._keys(entry))
            raise InputError(
                f"{self._weights.where} has {keys} in different dtypes; one is accepted, as they go into one tensor; "
                "convert them"
            )
        return dtypes.pop()

    def _find_leftovers(self, table: Table) -> None:
        usual = {table.prefix + table.first_name(key): key for key in self._given}
        self.names = {name: key for name, key in usual.items() if name != key}
        self.leftovers, self.copies = {}, {}
        with self._weights.open() as read:
            for key in (key for key in self._stored if key not in self._given):
                same = usual.get(table.prefix + table.first_name(key))
                if same and self._stored[key] == self._stored[same] and _same_bits(read(key), read(same)):
                    self.copies[key] = same
                else:
                    self.leftovers[key] = self._stored[key]

    @contextlib.contextmanager
    def open(self) -> Iterator[Read]:
        """See `TensorSource`."""
        with contextlib.ExitStack() as stack:
            stored = stack.enter_context(self._weights.open())
            kept = stack.enter_context(self._kept.open()) if self._kept else None

            def read(key: str) -> np.ndarray:
                key = self._copied.get(key, key)
                if kept and key not in self._wanted:
                    return kept.view(key)
                return self._join(self._wanted[key], stored)

            yield read

    def _join(self, entry: Entry, stored: Read) -> np.ndarray:
        places = [self._places[slot] for slot in entry.slots]
        return entry.join([self._given[key].split(stored(key))[part][1] for key, part in places])

    def open_leftovers(self) -> contextlib.AbstractContextManager[Read]:
        """Like `open`, for `leftovers`."""
        return self._weights.open()


def _same_bits(x: np.ndarray, y: np.ndarray, chunk: int = 2**25) -> bool:
    a, b = (z.reshape(-1).view(np.uint8) for z in (x, y))
    return all(np.array_equal(a[i : i + chunk], b[i : i + chunk]) for i in range(0, a.size, chunk))


def make_sources(
    models: Mapping[NetworkName, Any], base: Checkpoint | None, layout: LayoutName
) -> dict[NetworkName, TensorSource]:
    """Where each network to be written comes from: `models`, and for those that are not there `base`.

    Raises:
      InputError: neither has any.
    """
    sources: dict[NetworkName, TensorSource] = {}
    for name in PARTS:
        if name in models:
            sources[name] = ModuleSource(name, models[name], layout)
        elif base and base.has(name):
            same = base.layout_of(name) == layout
            sources[name] = CopySource(name, base) if same else ConvertSource(name, base, layout)
    if not sources:
        raise InputError("There is no network to write; give a model or a checkpoint.")
    return sources
