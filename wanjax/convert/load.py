"""Reading a published checkpoint: straight from its files onto the devices, one tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from wanjax.convert import clip, dit, umt5, vae
from wanjax.convert.layouts import (
    DIFFUSERS_FOLDERS,
    DIFFUSERS_STEMS,
    OFFICIAL_STEMS,
    LayoutName,
    NetworkName,
    Settings,
    Weights,
    detect,
    read_json,
)
from wanjax.convert.mapping import Entry, Shape, expand, match
from wanjax.convert.tensors import Reader, copy
from wanjax.errors import InputError

TABLES = {
    "diffusers": {"dit": dit.DIFFUSERS, "vae": vae.DIFFUSERS, "umt5": umt5.DIFFUSERS, "clip": clip.DIFFUSERS},
    "official": {"dit": dit.OFFICIAL, "vae": vae.OFFICIAL, "umt5": umt5.OFFICIAL, "clip": clip.OFFICIAL},
}
MODULES = {"dit": dit, "vae": vae, "umt5": umt5, "clip": clip}
ChooseSharding = Callable[[tuple[str, ...], nnx.Param], Sharding]


class Checkpoint:
    """A published Wan2.1 checkpoint on disk.

    Attributes:
      path: its folder.
      layout: "diffusers" or "official".

    Raises:
      InputError: the folder has neither layout.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.layout: LayoutName = detect(self.path)
        self._weights: dict[str, Weights] = {}

    def has(self, network: NetworkName) -> bool:
        """Whether the checkpoint holds the network."""
        if self.layout == "diffusers":
            return (self.path / DIFFUSERS_FOLDERS[network]).is_dir()
        return any(self.path.glob(f"{OFFICIAL_STEMS[network]}.*"))

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of umT5's tokenizer."""
        return self.path / ("tokenizer" if self.layout == "diffusers" else "google/umt5-xxl")

    @property
    def flow_shift(self) -> float | None:
        """The schedule's shift, where the checkpoint says it."""
        file = self.path / "scheduler/scheduler_config.json"
        return read_json(file).get("flow_shift") if file.is_file() else None

    def config(self, network: NetworkName, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32) -> Any:
        """The network's configuration, with sizes from the checkpoint's own files.

        Raises:
          InputError: the files are missing or damaged, or the network is not one of Wan2.1.
        """
        shapes = {TABLES[self.layout][network].standard_name(k): i.shape for k, i in self.weights(network).items()}
        settings: Mapping[str, Any] = {}
        if self.layout == "diffusers":
            settings = Settings(self.path / DIFFUSERS_FOLDERS[network] / "config.json")
        elif network == "dit":
            settings = Settings(self.path / "config.json")
        config = getattr(MODULES[network], f"read_{self.layout}")(settings, shapes)
        return dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype)

    def load(self, network: NetworkName, config: Any, sharding: ChooseSharding | None = None) -> Any:
        """The network with its weights on the devices, in the dtypes of `config`.

        Args:
          network: "dit", "vae", "umt5" or "clip".
          config: from `config`, perhaps with other dtypes.
          sharding: says where a parameter goes, given its path and its abstract value. None: a copy on every device of
            the ambient mesh, or the default device where there is no mesh.

        Raises:
          InputError: a tensor is unknown, missing, double or misshapen, or a file is missing or damaged.
        """
        abstract = abstract_model(network, config)
        leaves = parameters(abstract)
        weights = self.weights(network)
        entries = self.entries(network, config, {path: leaf.shape for path, leaf in leaves.items()})
        found = {key: info.shape for key, info in weights.items()}
        matched = match(TABLES[self.layout][network], entries, found, str(weights.where))
        placer = _Placer(leaves, sharding or _replicated)
        for file in weights.files:
            with file.open() as reader:
                for key in file.infos:
                    if key in matched:
                        placer.place(matched[key], reader.view(key), reader)
        values = [leaf.replace(placer.values[path]) for path, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract, is_leaf=_is_param), values)

    def weights(self, network: NetworkName) -> Weights:
        """The network's files, opened at first use."""
        if network not in self._weights:
            if not self.has(network):
                raise InputError(f"{self.path} has no {network}; give a checkpoint that has it.")
            if self.layout == "diffusers":
                folder, stem = self.path / DIFFUSERS_FOLDERS[network], DIFFUSERS_STEMS[network]
            else:
                folder, stem = self.path, OFFICIAL_STEMS[network]
            self._weights[network] = Weights(folder, stem)
        return self._weights[network]

    def entries(self, network: NetworkName, config: Any, shapes: Mapping[str, Shape]) -> dict[str, Entry]:
        """The table of this very network."""
        rules = TABLES[self.layout][network].rules
        if network == "vae" and self.layout == "diffusers":
            return expand(rules, shapes, lambda i: vae.diffusers_names(i, config))
        return expand(rules, shapes)


def abstract_model(network: NetworkName, config: Any) -> Any:
    """The network without weights."""
    return jax.eval_shape(lambda: MODULES[network].build(config, nnx.Rngs(0)))


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def parameters(model: Any) -> dict[str, nnx.Param]:
    """Every parameter by its path, in the order of the tree."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_param)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _replicated(path: tuple[str, ...], leaf: nnx.Param) -> Sharding:
    if jax.sharding.get_abstract_mesh().empty:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(jax.sharding.get_mesh(), PartitionSpec())


class _Placer:
    """Collects parameters on the devices; of a stacked one, layer by layer into one buffer."""

    def __init__(self, leaves: dict[str, nnx.Param], sharding: ChooseSharding):
        self.values: dict[str, jax.Array] = {}
        self._leaves = leaves
        self._sharding = {path: sharding(tuple(path.split(".")), leaf) for path, leaf in leaves.items()}

    def place(self, entry: Entry, tensor: np.ndarray, reader: Reader) -> None:
        for slot, view in entry.split(tensor):
            leaf, sharding = self._leaves[slot.path], self._sharding[slot.path]
            if slot.layer is None:
                self.values[slot.path] = _put(view, leaf.dtype, sharding, reader)
                continue
            if slot.path not in self.values:
                self.values[slot.path] = _zeros(leaf.shape, leaf.dtype, sharding)
            value = _put(view, leaf.dtype, _of_layer(sharding), reader)
            self.values[slot.path] = _insert(self.values[slot.path], value, slot.layer)


def _put(view: np.ndarray, dtype: DTypeLike, sharding: Sharding, reader: Reader) -> jax.Array:
    """A view into a file as an array on the devices; every host reads its own part."""
    return jax.make_array_from_callback(view.shape, sharding, lambda index: copy(view[index], dtype, reader))


def _of_layer(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stacked parameter."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    if sharding.spec and sharding.spec[0] is not None:
        raise ValueError(f"the layer axis of a stacked parameter cannot be sharded, given {sharding.spec}")
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _zeros(shape: Shape, dtype: DTypeLike, sharding: Sharding) -> jax.Array:
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(shape, dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: jax.Array, layer: jax.Array, index: jax.Array | int) -> jax.Array:
    """Writes a layer into the stack, in place."""
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)
