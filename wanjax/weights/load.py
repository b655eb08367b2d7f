"""Reading a published checkpoint: straight from its files onto the devices, one tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from wanjax.config import DiTConfig, check_network
from wanjax.errors import InputError
from wanjax.remote import fetch
from wanjax.settings import SettingError
from wanjax.weights.extra import MOST_SHIFT, Extra
from wanjax.weights.layouts import (
    EXPERTS,
    PARTS,
    TOKENIZER,
    Settings,
    TensorShapes,
    Weights,
    count_experts,
    detect,
    network_place,
    tensor_files,
)
from wanjax.weights.mapping import Entry, LayoutName, NetworkName, Shape, expand, match
from wanjax.weights.placing import Changes, ChooseSharding, Placer
from wanjax.weights.single import FLAGS, SingleFile
from wanjax.weights.tables.dit import read_quantization
from wanjax.weights.tensors import TensorInfo

NOT_OF_TENSORS = ("text_len", "max_distance", "image_size")
"""Numbers of a configuration that no tensor's size follows."""
BOUNDARIES = {"t2v": 0.875, "i2v": 0.9, "flf2v": 0.9}
"""By task, where a checkpoint of two experts does not say its own: those of the official configurations (Wan2.2)."""


class Checkpoint:
    """A published checkpoint of Wan2.1, or of Wan2.2's two experts, on disk.

    Attributes:
      path: its folder; where there are files alone, that of the first.
      is_folder: whether there is a checkpoint's folder.
      layout: "diffusers" or "official"; of files alone, as their DiT is spelt.
      files: of networks that have a file of their own.
      experts: how many DiTs it has: 1, or 2 of which "dit" is for high noise and "dit_low" for low.
      extra: what a conversion kept beside it, if it was converted.

    Args:
      path: a folder; None: files say all.
      files: of single networks, in place of the folder's.
      tokenizer: a `tokenizer.json`, or a folder with one, in place of the folder's.

    Raises:
      InputError: the folder has neither layout, or lacks one of two experts, or as `SingleFile`.
    """

    def __init__(
        self,
        path: str | Path | None,
        files: Mapping[NetworkName, str | Path] = MappingProxyType({}),
        tokenizer: str | Path | None = None,
    ):
        self.files = {name: SingleFile(file, name) for name, file in files.items()}
        self.is_folder, self._tokenizer = path is not None, tokenizer
        self._weights: dict[str, Weights] = {}
        if path is not None:
            self.path = fetch(path)
            self.layout: LayoutName = detect(self.path)
            self.extra = Extra.read(self.path)
            self.experts = count_experts(self.path, self.layout)
        else:
            first = next(iter(self.files.values()))
            self.path, self.layout, self.extra, self.experts = first.path.parent, first.layout, None, 1
        if "dit_low" in self.files:
            if self.experts == 1 and "dit" not in self.files:
                raise InputError(
                    f"--dit-low {self.files['dit_low'].path} without its expert for high noise; give that too, as --dit"
                )
            self.experts = 2

    def has(self, network: NetworkName) -> bool:
        """Whether the checkpoint holds the network."""
        if network in self.files:
            return True
        if not self.is_folder or (network == "dit_low" and self.experts == 1):
            return False
        folder, stem = self.place(network)
        return folder.is_dir() if self.layout == "diffusers" else bool(tensor_files(folder, stem))

    def place(self, network: NetworkName) -> tuple[Path, str]:
        """Folder and stem of the network's tensor files."""
        return network_place(self.path, self.layout, network, self.experts)

    def layout_of(self, network: NetworkName) -> LayoutName:
        """Whose names the network's tensors have."""
        return self.files[network].layout if network in self.files else self.layout

    @property
    def tokenizer(self) -> Path | bytes:
        """umT5's tokenizer: its folder, its file or, where umT5's file alone has one inside, what a file would hold."""
        if self._tokenizer is not None:
            return Path(self._tokenizer)
        folder = self.path / TOKENIZER[self.layout]
        file = self.files.get("umt5")
        inside = None if file is None or (self.is_folder and folder.is_dir()) else file.tokenizer
        return folder if inside is None else inside

    @property
    def boundary(self) -> float | None:
        """The timestep / 1000 from which on upwards the expert for high noise works; None for one DiT.

        Raises:
          InputError: what the checkpoint says is no number between 0 and 1.
        """
        if self.experts == 1:
            return None
        index = self.path / "model_index.json"
        is_said = self.is_folder and self.layout == "diffusers" and index.is_file()
        said = Settings(index).get("boundary_ratio") if is_said else None
        if said is None and self.extra:
            said = self.extra.boundary
        if said is None:
            return BOUNDARIES[self.config("dit").task]
        if not (isinstance(said, int | float) and 0 <= said <= 1):
            raise InputError(f"{index} has boundary_ratio = {said}; 0 to 1 is accepted; download it again.")
        return float(said)

    @property
    def flow_shift(self) -> float | None:
        """The schedule's shift, where the checkpoint says it.

        Raises:
          InputError: what the checkpoint says is no shift.
        """
        file = self.path / "scheduler/scheduler_config.json"
        if self.is_folder and self.layout == "diffusers" and file.is_file():
            settings = Settings(file)
            said = settings.get("flow_shift", settings.get("shift"))
            if said is not None and (not isinstance(said, int | float) or not 0 < said <= MOST_SHIFT):
                raise InputError(f"{file} has flow_shift = {said}; above 0 to {MOST_SHIFT} is accepted; correct it.")
            return said
        return self.extra.flow_shift if self.extra else None

    def config(self, network: NetworkName, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32) -> Any:
        """The network's configuration, with sizes from the checkpoint's own files.

        Raises:
          InputError: the files are missing or damaged, or the network is not one of Wan2.1.
        """
        self._require(network)
        numbers = self.extra.numbers.get(network, {}) if self.extra and network not in self.files else {}
        numbers = {name: tuple(x) if isinstance(x, list) else x for name, x in numbers.items()}
        try:
            config = PARTS[network].read[self.layout_of(network)](self._settings(network), self._shapes(network))
            if network in EXPERTS:
                config = dataclasses.replace(config, **self._quantization(network, config.num_layers))
            config = dataclasses.replace(config, **numbers, dtype=dtype, param_dtype=param_dtype)
            return _checked(config, dict(self.weights(network).items()))
        except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            if isinstance(error, InputError) and not isinstance(error, SettingError):
                raise
            where = self.files[network].path if network in self.files else self.place(network)[0]
            raise InputError(
                f"{where} has no usable configuration of the {network} ({getattr(error, 'detail', '') or error}); "
                "the published one is accepted; download it again"
            ) from error

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
          network: "dit", "dit_low", "vae", "umt5" or "clip".
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
        placer = Placer(leaves, sharding or replicated, config.quantize if scales else None, changes or {})
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
            file = self.files.get(network)
            self._weights[network] = Weights(*self.place(network)) if file is None else file.weights
        return self._weights[network]

    def match(self, network: NetworkName, config: Any) -> dict[str, Entry]:
        """Which tensor of the files fills which parameter; see `mapping.match`."""
        table = PARTS[network].tables[self.layout_of(network)]
        weights = self.weights(network)
        shapes = parameter_shapes(network, config)
        quantised = network in EXPERTS and self._check_quantization(network, config) != "off"
        if not quantised:  # it has no scales: `load` finds them
            shapes = {path: shape for path, shape in shapes.items() if not path.endswith("kernel_scale")}
        entries = expand(table, shapes, config)
        for key, info in weights.items():
            known = jnp.issubdtype(info.dtype, jnp.floating) or (quantised and info.dtype == jnp.int8)
            if not table.is_unused(table.bare_name(key)) and not known:
                raise InputError(f"{weights.where} has {key} as {info.dtype}; give a checkpoint that is not quantised.")
        return match(table, entries, {key: info.shape for key, info in weights.items()}, str(weights.where))

    def _quantization(self, network: NetworkName, num_layers: int) -> dict[str, Any]:
        there = network in self.files or tensor_files(*self.place(network))
        return read_quantization(dict(self.weights(network).items()) if there else {}, num_layers)

    def _check_quantization(self, network: NetworkName, config: DiTConfig) -> str:
        """The format of the stored DiT, which is that of `config` or "off"."""
        stored = self._quantization(network, config.num_layers)
        format = stored["quantize"]
        if format != "off" and (format, stored["quantized_layers"]) != (config.quantize, config.quantized_layers):
            raise InputError(
                f"{self.path} is quantised to {format}, which can be loaded as it is only, not as {config.quantize}; "
                "ask for no other format, or give the checkpoint that it was made of"
            )
        return format

    def _require(self, network: NetworkName) -> None:
        if not self.has(network):
            flag = "--" + FLAGS[network].replace("_", "-")
            what = f"{self.path} has no {network}" if self.is_folder else f"no {network} is given"
            raise InputError(f"{what}; give a checkpoint that has it, or its file as {flag}.")

    def _settings(self, network: NetworkName) -> Mapping[str, Any]:
        if network in self.files:
            return self.files[network].settings
        folder, _ = self.place(network)
        return Settings(folder / "config.json") if self.layout in PARTS[network].write else {}

    def _shapes(self, network: NetworkName) -> Mapping[str, Shape]:
        if network in self.files:
            return self.files[network].shapes
        if self.layout == "diffusers":  # its JSON says all
            return {}
        weights, table = self.weights(network), PARTS[network].tables[self.layout_of(network)]
        return TensorShapes({table.bare_name(key): info.shape for key, info in weights.items()}, weights.where)


def _checked(config: Any, stored: Mapping[str, TensorInfo]) -> Any:
    """The configuration, if the stored tensors can be of it.

    Before anything is built: a network of a thousand million layers would fill the memory before it did not fit.
    """
    check_network(config)
    numbers = sum(math.prod(info.shape) for info in stored.values())
    bounds = {"num_layers": len(stored), "num_res_blocks": len(stored), **dict.fromkeys(NOT_OF_TENSORS, 2**20)}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        most = bounds.get(field.name, max(numbers, 2**10))
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and number > most:
                raise ValueError(
                    f"{field.name} is {value!r}, the file's {len(stored):,} tensors are of {most:,} at most"
                )
        if isinstance(value, tuple) and len(value) > len(stored):
            raise ValueError(f"{field.name} has {len(value):,} entries, the file {len(stored):,} tensors")
    return config


def abstract_model(network: NetworkName, config: Any) -> Any:
    """The network without weights."""
    return jax.eval_shape(lambda: PARTS[network].build(config, nnx.Rngs(0)))


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
