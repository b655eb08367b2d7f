"""Adapters in training: from a file, and with dropout."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.models.layers import LowRank
from wanjax.weights import lora
from wanjax.weights.lora_files import LoRAFile


def start_from(dit: DiT, file: LoRAFile) -> DiT:
    """The same network whose adapters are those of a file.

    Raises:
      InputError: the file has others than the network: other layers, ranks, or magnitudes; or as `LoRAFile.terms`.
    """
    dit = lora.copy(dit)
    layers = {path: layer for path, layer in lora.linear_layers(dit).items() if layer.lora is not None}
    read: dict[str, dict[int | None, tuple[np.ndarray, ...]]] = defaultdict(dict)
    with file.open() as reader:
        for term in file.terms(dit.config):
            path, i, _ = term.slot
            path = path.removesuffix(".kernel")
            if term.a is None or path not in layers:
                raise InputError(f"{file.path} has {term.b}, where the run has no adapter; the same layers are needed")
            a, b = term.read(reader)
            assert a is not None
            b = b * (term.scale / layers[path].lora.scale)  # pyright: ignore[reportOptionalMemberAccess]
            lengths = () if term.magnitude is None else (term.read_magnitude(reader).reshape(-1),)
            read[path][i] = (a, b, *lengths)
    for path, layer in layers.items():
        layer.lora = _started(file, path, layer, read[path])
    return dit


def _started(
    file: LoRAFile, path: str, layer: lora.Layer, read: Mapping[int | None, tuple[np.ndarray, ...]]
) -> LowRank:
    """The adapter of a layer, or of that layer of every block, as a file has it."""
    own = layer.lora
    assert own is not None
    parts = [own.a, own.b, *([] if own.magnitude is None else [own.magnitude])]
    layers = [read[i] for i in sorted(read, key=lambda i: i or 0)]
    ours = [tuple(x.shape) for x in parts]
    theirs = {tuple(tuple(x.shape) for x in one) for one in layers}
    one = [shape[len(layer.kernel.shape) - 2 :] for shape in ours]  # without the axis of blocks
    if theirs != {tuple(one)} or len(layers) != math.prod(layer.kernel.shape[:-2]):
        raise InputError(
            f"{file.path} has factors of shapes {sorted(theirs)} in {len(layers)} layers {path}, the run {ours}; the "
            "same layers, ranks and magnitudes are needed; change the run's lora, or give another file"
        )
    found = (np.stack(x).reshape(shape) for x, shape in zip(zip(*layers, strict=True), ours, strict=True))
    values = [jnp.asarray(x, jnp.float32) for x in found]
    return LowRank(*values[:2], axes=lora.axes_of(layer), alpha=own.alpha, magnitude=values[2] if values[2:] else None)


def with_dropout(dit: DiT, share: float, key: jax.Array) -> DiT:
    """The network whose adapters see a share of their input as zero, drawn from a key."""
    dit = lora.copy(dit)
    for i, layer in enumerate(lora.linear_layers(dit).values()):
        if layer.lora is not None:
            stacked = layer.kernel.shape[:-2]
            one = jax.random.fold_in(key, i)
            layer.lora.key = jax.random.key_data(jax.random.split(one, stacked) if stacked else one)
            layer.lora.dropout = share
    return dit
