"""The networks of a checkpoint on the devices: each is loaded when it is first asked for, and kept or let go."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax

from sharding.rules import parameter_sharding
from wanjax.weights import lora
from wanjax.weights.layouts import EXPERTS
from wanjax.weights.load import Checkpoint, abstract_model
from wanjax.weights.lora_files import LoRAFile
from wanjax.weights.mapping import NetworkName

Keep = Literal["one", "all"]
"""Whether a network that has done its part goes, so that the largest of them must fit, or stays, so that all must."""


class Networks:
    """The networks of a checkpoint by name, laid out by the rules of the ambient mesh.

    Attributes:
      loads: how often a network was read.

    Args:
      checkpoint: where their weights are.
      configs: of "dit", "dit_low", "vae", "umt5", "clip"; those that are None, or not there, cannot be asked for.
      keep: what `release` does.
      loras, merged: adapters by DiT, and whether they go into its weights.

    Raises:
      InputError: a network cannot be loaded, as far as the files' headers say.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        configs: Mapping[NetworkName, Any],
        keep: Keep = "all",
        loras: Mapping[NetworkName, Sequence[LoRAFile]] = MappingProxyType({}),
        merged: bool = False,
    ):
        self.checkpoint, self.keep, self.loras, self.merged = checkpoint, keep, dict(loras), merged
        self.configs: dict[NetworkName, Any] = {name: config for name, config in configs.items() if config is not None}
        self.loads = 0
        self._loaded: dict[NetworkName, Any] = {}
        for name, config in self.configs.items():
            checkpoint.check(name, config)

    def __getitem__(self, name: NetworkName) -> Any:
        """The network; read now if it is not there.

        Raises:
          InputError: as `Checkpoint.load`.
        """
        if name not in self._loaded:
            self.loads += 1
            config = self.configs[name]
            if name in EXPERTS:
                files = self.loras.get(name, ())
                loaded = lora.load(self.checkpoint, config, files, self.merged, parameter_sharding, name)
            else:
                loaded = self.checkpoint.load(name, config, parameter_sharding)
            self._loaded[name] = loaded
        return self._loaded[name]

    def release(self, *names: NetworkName) -> None:
        """These have done their part: they go, unless all are kept. Their memory is free when nobody else has them."""
        if self.keep == "one":
            for name in names:
                self._loaded.pop(name, None)

    def read_ahead(self, name: NetworkName) -> threading.Thread | None:
        """Reads a network's files while something else is computed; None: the network is there already.

        The host then has them in memory when the network is asked for: in the system's cache, which gives way to
        whatever else needs memory.
        """
        if name in self._loaded:
            return None
        files = [file.path for file in self.checkpoint.weights(name).files]
        thread = threading.Thread(target=read_through, args=(files,), name=f"read ahead {name}", daemon=True)
        thread.start()
        return thread

    @property
    def loaded(self) -> tuple[NetworkName, ...]:
        """Those that are there."""
        return tuple(self._loaded)

    def bytes(self) -> int:
        """Of all weights together, as they will lie on the devices."""
        return sum(self.bytes_of(name) for name in self.configs)

    def bytes_of(self, name: NetworkName) -> int:
        """Of one network's weights."""
        model = abstract_model(name, self.configs[name])
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(model))


def read_through(files: Sequence[Path], chunk: int = 2**24) -> int:
    """Reads files from front to back and keeps nothing; their bytes. One that cannot be read is left to the loader."""
    total = 0
    for path in files:
        with contextlib.suppress(OSError), path.open("rb") as file:
            while part := file.read(chunk):
                total += len(part)
    return total
