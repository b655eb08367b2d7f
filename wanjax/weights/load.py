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
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from wanjax.config import DiTConfig
from wanjax.errors import InputError
from wanjax.ops.quantized import Format, quantize_weight
from wanjax.weights.extra import Extra
from wanjax.weights.layouts import (
    NETWORKS,
    TOKENIZER,
    Settings,
    TensorShapes,
    Weights,
    detect,
    network_place,
    tensor_files,
)
from wanjax.weights.mapping import Entry, LayoutName, NetworkName, Shape, expand, match
from wanjax.weights.tables.dit import read_quantization
from wanjax.weights.tensors import Reader, TensorFile, copy

ChooseSharding = Callable[[tuple[str, ...], nnx.Param], Sharding]
Changes = Mapping[tuple[str, int | None], Callable[[jax.Array], jax.Array]]
"""What becomes of parameters, or of single layers of them, by path and layer; see `Checkpoint.load`."""


class Checkpoint:
    """A published Wan2.1 checkpoint on disk.

    Attributes:
      path: its folder.
      layout: "diffusers" or "official".
      extra: what a conversion kept beside it, if it was converted.

    Raises:
      InputError: the folder has neither layout, or is one of Wan2.2.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.layout: LayoutName = detect(self.path)
        self.extra = Extra.read(self.path)
        self._weights: dict[str, Weights] = {}
        index = self.path / "model_index.json"
        if index.is_file() and (Settings(index).get("transformer_2") or [None])[0] is not None:
            raise InputError(f"{self.path} has two transformers (Wan2.2); give a checkpoint of Wan2.1.")

    def has(self, network: NetworkName) -> bool:
        """Whether the checkpoint holds the network."""
        folder, stem = network_place(self.path, self.layout, network)
        return folder.is_dir() if self.layout == "diffusers" else bool(tensor_files(folder, stem))

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of umT5's tokenizer."""
        return self.path / TOKENIZER[self.layout]

    @property
    def flow_shift(self) -> float | None:
        """The schedule's shift, where the checkpoint says it."""
        file = self.path / "scheduler/scheduler_config.json"
        if self.layout == "diffusers" and file.is_file():
            settings = Settings(file)
            return settings.get("flow_shift", settings.get("shift"))
        return self.extra.flow_shift if self.extra else None

    def config(self, network: NetworkName, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32) -> Any:
        """The network's configuration, with sizes from the checkpoint's own files.

        Raises:
          InputError: the files are missing or damaged, or the network is not one of Wan2.1.
        """
        self._require(network)
        numbers = self.extra.numbers.get(network, {}) if self.extra else {}
        numbers = {name: tuple(x) if isinstance(x, list) else x for name, x in numbers.items()}
        try:
            config = NETWORKS[network].read[self.layout](self._settings(network), self._shapes(network))
            if network == "dit":
                config = dataclasses.replace(config, **self._quantization(config.num_layers))
            return _checked(dataclasses.replace(config, **numbers, dtype=dtype, param_dtype=param_dtype))
        except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            if isinstance(error, InputError):
                raise
            where = network_place(self.path, self.layout, network)[0]
            raise InputError(f"{where} has no usable configuration of the {network} ({error}).") from error

    def check(self, network: NetworkName, config: Any) -> None:
        """Find out, from the files' headers alone, whether `load` would work.

        Raises:
          InputError: as `load`.
        """
        self.match(network, config)

    def load(
        self, network: NetworkName, config: Any, sharding: ChooseSharding | None = None, changes: Changes | None = None
    ) -> Any:
        """The network with its weights on the devices, in the dtypes of `config`.

        A host holds, beyond what its devices keep, about one tensor at a time.

        Args:
          network: "dit", "vae", "umt5" or "clip".
          config: from `config`, perhaps with other dtypes, or quantised: each weight then is, as soon as it is read.
          sharding: says where a parameter goes, given its path and its abstract value; the leading axis of stacked
            layers must stay whole. None: a copy on every device of the ambient mesh, or on the default device where
            there is no mesh.
          changes: given a parameter, or a layer of it, in the dtype of the file and sharded, what to take instead of
            it; found before it is cast or quantised.

        Raises:
          InputError: a tensor is unknown, missing, double or misshapen, or a file is missing or damaged.
        """
        abstract = abstract_model(network, config)
        leaves = parameters(abstract)
        matched = self.match(network, config)
        filled = {slot.path for entry in matched.values() for slot in entry.slots}
        scales = {path for path in leaves if path.endswith("kernel_scale")} - filled
        placer = _Placer(leaves, sharding or replicated, config.quantize if scales else None, changes or {})
        for file in self.weights(network).files:
            placer.place_file(file, matched)
        values = [leaf.replace(placer.values[path]) for path, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract, is_leaf=is_param), values)

    def weights(self, network: NetworkName) -> Weights:
        """The network's files, looked at when first asked for.

        Raises:
          InputError: the checkpoint has none, or they are damaged.
        """
        if network not in self._weights:
            self._require(network)
            self._weights[network] = Weights(*network_place(self.path, self.layout, network))
        return self._weights[network]

    def match(self, network: NetworkName, config: Any) -> dict[str, Entry]:
        """Which tensor of the files fills which parameter; see `mapping.match`."""
        table = NETWORKS[network].tables[self.layout]
        weights = self.weights(network)
        shapes = parameter_shapes(network, config)
        quantised = network == "dit" and self._check_quantization(config) != "off"
        if not quantised:  # it has no scales: `load` finds them
            shapes = {path: shape for path, shape in shapes.items() if not path.endswith("kernel_scale")}
        entries = expand(table, shapes, config)
        for key, info in weights.items():
            known = jnp.issubdtype(info.dtype, jnp.floating) or (quantised and info.dtype == jnp.int8)
            if not table.is_unused(table.bare_name(key)) and not known:
                raise InputError(f"{weights.where} has {key} as {info.dtype}; give a checkpoint that is not quantised.")
        return match(table, entries, {key: info.shape for key, info in weights.items()}, str(weights.where))

    def _quantization(self, num_layers: int) -> dict[str, Any]:
        place = network_place(self.path, self.layout, "dit")
        return read_quantization(dict(self.weights("dit").items()) if tensor_files(*place) else {}, num_layers)

    def _check_quantization(self, config: DiTConfig) -> str:
        """The format of the stored DiT, which is that of `config` or "off"."""
        stored = self._quantization(config.num_layers)
        format = stored["quantize"]
        if format != "off" and (format, stored["quantized_layers"]) != (config.quantize, config.quantized_layers):
            raise InputError(
                f"{self.path} is quantised to {format}, which can be loaded as it is only, not as {config.quantize}; "
                "ask for no other format, or give the checkpoint that it was made of"
            )
        return format

    def _require(self, network: NetworkName) -> None:
        if not self.has(network):
            raise InputError(f"{self.path} has no {network}; give a checkpoint that has it.")

    def _settings(self, network: NetworkName) -> Mapping[str, Any]:
        folder, _ = network_place(self.path, self.layout, network)
        return Settings(folder / "config.json") if self.layout in NETWORKS[network].write else {}

    def _shapes(self, network: NetworkName) -> Mapping[str, Shape]:
        if self.layout == "diffusers":  # its JSON says all
            return {}
        weights, table = self.weights(network), NETWORKS[network].tables[self.layout]
        return TensorShapes({table.bare_name(key): info.shape for key, info in weights.items()}, weights.where)


def _checked(config: Any) -> Any:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None and "None" in str(field.type):
            continue
        if type(field.default) in (int, float) and not (isinstance(value, int | float) and value >= 0):
            raise ValueError(f"{field.name} is {value!r}")
    return config


def abstract_model(network: NetworkName, config: Any) -> Any:
    """The network without weights."""
    return jax.eval_shape(lambda: NETWORKS[network].build(config, nnx.Rngs(0)))


def parameter_shapes(network: NetworkName, config: Any) -> Mapping[str, Shape]:
    """Shape of every parameter of the network, by path."""
    return _parameter_shapes(network, dataclasses.replace(config, dtype=jnp.float32, param_dtype=jnp.float32))


@functools.lru_cache(maxsize=8)  # tracing a model's constructor takes up to a second, and a conversion asks often
def _parameter_shapes(network: NetworkName, config: Any) -> Mapping[str, Shape]:
    return {path: leaf.shape for path, leaf in parameters(abstract_model(network, config)).items()}


def is_param(x: Any) -> bool:
    """Whether a node of a module's tree is a parameter, to stop there."""
    return isinstance(x, nnx.Variable)


def parameters(model: Any) -> dict[str, Any]:
    """Every parameter by its path, in the order of the tree."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_param)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def replicated(path: tuple[str, ...], leaf: nnx.Param) -> Sharding:
    """A copy on every device of the ambient mesh, or on the default device where there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.zeros(()).sharding  # the default device
    return NamedSharding(jax.sharding.get_mesh(), PartitionSpec())


class _Placer:
    """Collects parameters on the devices; those of stacked layers are written into one buffer layer by layer."""

    def __init__(self, leaves: Mapping[str, Any], sharding: ChooseSharding, quantize: Format | None, changes: Changes):
        self.values: dict[str, jax.Array] = {}
        self._leaves = leaves
        self._quantize: Format | None = quantize
        self._changes = changes
        self._sharding = {path: sharding(tuple(path.split(".")), leaf) for path, leaf in leaves.items()}
        self._last: jax.Array | None = None

    def place_file(self, file: TensorFile, matched: Mapping[str, Entry]) -> None:
        with file.open() as reader:
            for key in file.infos:
                if key in matched:
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
                value, scale = _quantized(value, quantize)
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


_quantized = jax.jit(quantize_weight, static_argnums=1)
