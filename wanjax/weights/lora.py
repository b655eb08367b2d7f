"""Low-rank adapters on the DiT's linear layers (LoRA, arXiv 2106.09685).

dit = attach(dit, LoRAConfig(rank=16), rngs)    # the same velocity at first, as b is zero
save("lora.safetensors", dit)                   # diffusers and PEFT read it, see `wanjax.weights.lora_files`
dit = merge(dit)                                # the same velocity without adapters

files = parse(("style.safetensors", "motion.safetensors:0.5"))
dit = load(checkpoint, config, files, merged=True)
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sharding.rules import gather
from wanjax.config import DiTConfig, LoRAConfig
from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.models.layers import Linear, LowRank, QuantizedLinear
from wanjax.weights import Checkpoint
from wanjax.weights.load import is_param, parameter_shapes, replicated
from wanjax.weights.lora_files import LoRAFile, Term, write_lora
from wanjax.weights.lora_targets import chosen
from wanjax.weights.mapping import NetworkName
from wanjax.weights.placing import ChooseSharding
from wanjax.weights.tensors import Reader

M = TypeVar("M", bound=nnx.Module)
MOST_STRENGTH = 1000
"""Of an adapter, either way: far more makes weights infinite."""
Layer = Linear | QuantizedLinear
Read = tuple[Term, Reader]


def linear_layers(dit: DiT) -> dict[str, Layer]:
    """The layers that can have an adapter, by path; those of a stack of blocks are one."""
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(dit) if isinstance(module, Layer)}


def is_adapter(parameter: Any) -> bool:
    """Whether a parameter is one of those that are trained when the network is not."""
    return isinstance(parameter, nnx.LoRAParam)


def attach(dit: DiT, config: LoRAConfig, rngs: nnx.Rngs) -> DiT:
    """The same network with an adapter beside every target, `a` random and `b` zero, float32.

    Args:
      dit: stays as it is, and shares its arrays with the result; may be quantised. On a mesh, lay the result out with
        `sharding.rules.shard_parameters`.
      config: rank, alpha, targets.
      rngs: keys for `a`, uniform in +-1 / sqrt(in) as in PEFT.

    Raises:
      InputError: a target is no part of the name of any layer.
    """
    dit = copy(dit)
    layers = linear_layers(dit)
    for path, target in chosen(config, layers).items():
        layer, rank = layers[path], target.rank
        *stacked, fan_in, fan_out = layer.kernel.shape
        bound = 1 / math.sqrt(fan_in)
        a = jax.random.uniform(rngs.params(), (*stacked, fan_in, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stacked, rank, fan_out), jnp.float32)
        magnitude = column_lengths(layer) if config.dora else None
        alpha = rank if target.alpha is None else target.alpha
        layer.lora = LowRank(a, b, axes=axes_of(layer), alpha=alpha, magnitude=magnitude)
    return dit


@jax.jit
def column_lengths(layer: Layer) -> jax.Array:
    """DoRA's magnitudes before training: the lengths of a kernel's columns, float32 `[out]`, perhaps of all blocks."""

    def one(layer: Layer) -> jax.Array:
        w = layer.whole().astype(jnp.float32)
        return jnp.sqrt(jnp.sum(w * w, axis=0))

    return one(layer) if layer.kernel.ndim == 2 else jax.lax.map(one, layer)


def split(dit: DiT) -> tuple[DiT, DiT]:
    """The adapters alone and the network without them: twice the same tree, None where the other has a parameter."""
    both = ((lambda x: x if is_adapter(x) else None), (lambda x: None if is_adapter(x) else x))
    adapters, frozen = (jax.tree.map(part, dit, is_leaf=is_param) for part in both)
    return adapters, frozen


def join(adapters: DiT, frozen: DiT) -> DiT:
    """The network whose `split` these are."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, adapters, frozen, is_leaf=lambda x: x is None or is_param(x)
    )


def detach(dit: DiT) -> DiT:
    """The network without its adapters."""
    dit = copy(dit)
    for layer in linear_layers(dit).values():
        layer.lora = None
    return dit


def merge(dit: DiT) -> DiT:
    """The same network with its adapters added to its weights.

    Raises:
      InputError: a layer with an adapter is quantised.
    """
    dit = copy(dit)
    for path, layer in linear_layers(dit).items():
        if layer.lora is None:
            continue
        if isinstance(layer, QuantizedLinear):
            raise InputError(
                f"{path} is in 8 bits, and an adapter cannot be merged into it; leave it beside the weights"
            )
        kernel: Any = layer.kernel
        layer.kernel = kernel.replace(_merged(kernel[...], layer.lora))
        layer.lora = None
    return dit


@jax.jit
def _merged(kernel: jax.Array, lora: LowRank) -> jax.Array:
    def one(layer: tuple[jax.Array, LowRank]) -> jax.Array:
        w, lora = layer
        whole = _sum(w, lora.a[...], lora.b[...], lora.scale)
        if lora.magnitude is not None:
            ratio = gather(lora.magnitude[...]) / lora.lengths(w)
            whole = whole * (
                ratio
                if jax.sharding.get_abstract_mesh().empty
                else jax.sharding.reshard(ratio, jax.typeof(w).sharding.spec[1:])
            )
        return whole.astype(w.dtype)  # once, behind the sum in float32

    return one((kernel, lora)) if kernel.ndim == 2 else jax.lax.map(one, (kernel, lora))


def _sum(w: jax.Array, a: jax.Array | None, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """`w + scale * a @ b`, or `w + scale * b`, split as `w`; float32, as bfloat16 would lose most of what is added."""
    whole = jax.sharding.get_abstract_mesh().empty
    b = gather(b.astype(jnp.float32))
    if a is None:
        b = b if whole else jax.sharding.reshard(b, jax.typeof(w).sharding.spec)
        return w.astype(jnp.float32) + scale * b
    spec = None if whole else jax.typeof(w).sharding.spec
    product = jnp.matmul(gather(a.astype(jnp.float32)), b, precision="highest", out_sharding=spec)
    return w.astype(jnp.float32) + scale * product


def save(path: str | Path, dit: DiT) -> None:
    """Writes the adapters of a network; see `wanjax.weights.lora_files.write_lora`.

    Raises:
      InputError: there are none, or `path` cannot be written.
    """
    adapters = {name: layer.lora for name, layer in linear_layers(dit).items() if layer.lora is not None}
    if not adapters:
        raise InputError(f"no adapters to write to {path}; attach some first")
    write_lora(path, dit.config, adapters)


# ---- files


def parse(arguments: Sequence[str]) -> tuple[LoRAFile, ...]:
    """Files given as PATH or PATH:strength.

    Raises:
      InputError: a strength is no number or beyond `MOST_STRENGTH`, or as `LoRAFile`.
    """
    files = []
    for argument in arguments:
        path, _, number = argument.rpartition(":")
        try:
            path, strength = (argument, 1.0) if not path or Path(argument).exists() else (path, float(number))
        except ValueError:
            path, strength = argument, 1.0  # a colon of the path's own
        if not abs(strength) <= MOST_STRENGTH:  # nor is NaN
            raise InputError(
                f"LoRA {argument}; a strength from -{MOST_STRENGTH} to {MOST_STRENGTH} is accepted; use {path}:1"
            )
        files.append(LoRAFile(path, strength))
    return tuple(files)


def check(files: Sequence[LoRAFile], dit: DiTConfig, is_quantized: bool, merged: bool | None) -> bool:
    """Whether `load` shall merge, if it can do what is asked for.

    Args:
      files: to load.
      dit: the network.
      is_quantized: whether its weights are so in the checkpoint already.
      merged: the user's choice; None: merge unless `is_quantized`.

    Raises:
      InputError: weights that are stored in 8 bits would have to change, or as `LoRAFile.terms`.
    """
    if is_quantized and merged and files:
        raise InputError(
            "--lora-merge with a checkpoint in 8 bits, whose weights cannot change; "
            "leave it out, or give the checkpoint that it was made of"
        )
    merged = not is_quantized if merged is None else merged
    shapes = parameter_shapes("dit", dit)
    for file in files:
        for term in file.terms(dit):
            if is_quantized and not term.is_beside and f"{term.slot.path}_scale" in shapes:
                raise InputError(
                    f"{file.path} has {term.magnitude or term.b}, by which weights would change that the checkpoint "
                    "has in 8 bits; give the checkpoint that it was made of"
                )
    return merged


def describe_adapters(file: LoRAFile, dit: DiTConfig) -> str:
    """One line: what the file adapts, and which matrices of the blocks it does not."""
    terms = file.terms(dit)
    matrices = {k for k in parameter_shapes("dit", dit) if k.startswith("blocks.") and k.endswith(".kernel")}
    adapted = {term.slot.path for term in terms if term.a is not None or len(term.slot.shape) > 1}
    factors = sum(term.a is not None or bool(term.parts) for term in terms)
    line = f"{file.path} at {file.strength:g}: adapters of {factors} layers"
    line += f", {len(terms) - factors} differences in full" if factors < len(terms) else ""
    without = sorted({re.sub(r"^blocks\.(\d+\.)?|\.kernel$", "", k) for k in matrices - adapted})
    left_out = file.left_out(dit)
    line += f"; left out: {len(left_out)} layers of an image branch, which the network has not" if left_out else ""
    return line + (f"; none for {', '.join(without)}" if without else "")


def load(
    checkpoint: Checkpoint,
    config: DiTConfig,
    files: Sequence[LoRAFile],
    merged: bool,
    sharding: ChooseSharding | None = None,
    network: NetworkName = "dit",
) -> DiT:
    """A checkpoint's DiT with adapters from files: merged, or one beside each layer, of all their ranks together.

    Merged is before weights are cast or quantised, a layer at a time. What is no plain product of two factors (DoRA,
    LoKr, LoHa, differences), and the patch embedding, are merged always.

    Args:
      checkpoint, config, sharding: as `Checkpoint.load` takes them.
      files: as `check` found them good.
      merged: what `check` returned.
      network: "dit" or "dit_low".
    """
    changes: dict[tuple[str, int | None], list[Read]] = defaultdict(list)
    beside: dict[str, dict[int | None, list[Read]]] = defaultdict(lambda: defaultdict(list))
    with contextlib.ExitStack() as stack:
        for file in files:
            reader = stack.enter_context(file.open())
            for term in file.terms(config):
                path, layer, _ = term.slot
                if merged or not term.is_beside:
                    changes[path, layer].append((term, reader))
                else:
                    beside[path.removesuffix(".kernel")][layer].append((term, reader))
        functions = {place: partial(_change, terms=terms) for place, terms in changes.items()}
        dit = checkpoint.load(network, config, sharding, functions)
        for path, layer in linear_layers(dit).items():
            if path in beside:
                layer.lora = _stacked(path, layer, beside[path], config.param_dtype, sharding or replicated)
    return dit


_add = jax.jit(_sum)


def _change(value: jax.Array, terms: Sequence[Read]) -> jax.Array:
    for term, reader in terms:
        changed = _add(value, *term.read(reader), term.scale)
        if term.magnitude is not None:
            changed = _normalised(value, changed, term.read_magnitude(reader), term.strength)
        value = changed
    return value


@jax.jit
def _normalised(before: jax.Array, w: jax.Array, magnitude: jax.Array, strength: jax.Array | float) -> jax.Array:
    """DoRA: the columns or rows of `w` `[in, out]` in the lengths of `magnitude`, `[1, out]` or `[in, 1]`.

    At another strength than 1 so much of the way from `before`.
    """
    norm = jnp.sqrt(jnp.sum(w * w, axis=0 if magnitude.shape[0] == 1 else 1, keepdims=True))
    before = before.astype(jnp.float32)  # sums are made in it, as in `_sum`
    return before + strength * (w * (magnitude / norm) - before)


def _stacked(
    path: str,
    layer: Layer,
    terms: Mapping[int | None, Sequence[Read]],
    dtype: DTypeLike,
    sharding: ChooseSharding,
) -> LowRank:
    """The adapters of one layer, or of one layer of every block, as one: their ranks side by side, the rest zero."""
    read = {i: [(*term.read(reader), term.scale) for term, reader in pairs] for i, pairs in terms.items()}
    scales = {scale for pairs in read.values() for *_, scale in pairs}
    common = scales.pop() if len(scales) == 1 else None
    rank = max(sum(len(b) for _, b, _ in pairs) for pairs in read.values())
    *stacked, fan_in, fan_out = layer.kernel.shape
    a, b = np.zeros((*stacked, fan_in, rank), np.float32), np.zeros((*stacked, rank, fan_out), np.float32)
    for i, pairs in read.items():
        rows = 0
        for a_i, b_i, scale in pairs:
            part = slice(rows, rows := rows + len(b_i))
            a[... if i is None else i][:, part] = a_i
            b[... if i is None else i][part] = b_i if common is not None else scale * b_i
    alpha = (1 if common is None else common) * rank

    def place(name: str, leaf: Any) -> Any:
        host = leaf[...].astype(dtype)  # as the other weights
        split = sharding((*path.split("."), "lora", name), leaf)
        return leaf.replace(jax.make_array_from_callback(host.shape, split, lambda index: host[index]))

    lora = LowRank(a, b, axes=axes_of(layer), alpha=alpha)
    lora.a, lora.b = place("a", lora.a), place("b", lora.b)
    return lora


def axes_of(layer: Layer) -> tuple[str | None, ...]:
    """Logical names of a kernel's axes."""
    return layer.kernel.get_metadata()["axes"]


def copy(module: M) -> M:
    """Another tree of the same arrays."""
    return nnx.merge(*nnx.split(module))
