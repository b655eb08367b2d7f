"""The DiT's blocks in 8 bits: half the memory of bfloat16, and twice the speed where a chip multiplies such numbers.

    dit = quantize(dit, "fp8")                      # or "int8", for chips without fp8
    dit = quantize(dit, "int8", layers=(1, 39))     # all blocks but the first and the last

The matrices that make q, k, v and the output of both attentions, and those of the feed-forward, have one scale each;
activations one for every token, found when they come. All else stays as it is. `Checkpoint.load` quantises while it
reads if its configuration says so, and never holds more than one layer's matrix in full. `wanjax quantize`
saves a checkpoint so, with everything else as it was.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

import jax
from flax import nnx

from wanjax.config import DiTConfig, SampleConfig
from wanjax.errors import InputError
from wanjax.models.dit import DiT, quantized
from wanjax.ops.quantized import Format
from wanjax.weights import Checkpoint
from wanjax.weights.hub import checkpoint_folder
from wanjax.weights.single import given_files


def quantize(model: DiT, format: Format, layers: tuple[int, int] | None = None) -> DiT:
    """The same network with matrices in 8 bits; it cannot be trained.

    Args:
      model: a network that is not quantised. Stays as it is, and shares with the result what both have.
      format: "fp8" (float8_e4m3fn) or "int8".
      layers: the first block to quantise and the one behind the last; None: all.

    Raises:
      InputError: the network is quantised already, or has no such layers.
    """
    config = with_format(model.config, format, layers)
    stacks = []
    for first, stop, is_quantized in config.stacks:
        blocks = jax.tree.map(lambda x, first=first, stop=stop: x[first:stop], model.blocks)
        stacks.append(_quantize(blocks, format) if is_quantized else blocks)
    dit = nnx.merge(*nnx.split(model))  # another tree of the same arrays
    dit.config = config
    dit.blocks = stacks[0] if len(stacks) == 1 else nnx.List(stacks)
    return dit


def with_format(config: DiTConfig, format: Format, layers: tuple[int, int] | None = None) -> DiTConfig:
    """The configuration of the quantised network.

    Raises:
      InputError: as `quantize`.
    """
    if config.quantize != "off":
        raise InputError(f"the DiT is quantised to {config.quantize} already; give the checkpoint that it was made of")
    if layers is not None and not 0 <= layers[0] < layers[1] <= config.num_layers:
        raise InputError(
            f"layers {layers} to quantise of {config.num_layers}; the first and the one behind the last are accepted, "
            f"such as (1, {config.num_layers - 1})"
        )
    layers = None if layers == (0, config.num_layers) else layers
    return dataclasses.replace(config, quantize=format, quantized_layers=layers)


def requantized(config: DiTConfig, choice: Format | Literal["off"] | None) -> DiTConfig:
    """The configuration of a checkpoint's DiT with the format that is asked for; None: its own.

    Raises:
      InputError: it is quantised otherwise.
    """
    if choice in (None, config.quantize):
        return config
    if choice == "off" or config.quantize != "off":
        raise InputError(
            f"--quantize {choice} with a checkpoint that is quantised to {config.quantize}, which can be used as it is "
            "only; leave --quantize out, or give the checkpoint that it was made of"
        )
    return with_format(config, choice)


def is_quantized(config: SampleConfig) -> bool:
    """Whether the DiT will be quantised; found without waking JAX's devices.

    Raises:
      InputError: as `Checkpoint`.
    """
    if config.quantize is not None or (config.checkpoint is None and not given_files(config)):
        return config.quantize in ("fp8", "int8")
    return open_checkpoint(config).config("dit").quantize != "off"


def open_checkpoint(config: SampleConfig) -> Checkpoint:
    """The checkpoint that is asked for: a folder, one of the Hugging Face hub, or files of single networks.

    Raises:
      InputError: none is, or as `checkpoint_folder` and `Checkpoint`.
    """
    files = given_files(config)
    if config.checkpoint is None and not files:
        raise InputError(
            "no checkpoint; a folder in the Diffusers or the official layout is needed; give --checkpoint, or files as "
            "--dit, --vae and so on"
        )
    folder = None if config.checkpoint is None else checkpoint_folder(config.checkpoint)
    return Checkpoint(folder, files, config.tokenizer)


@partial(jax.jit, static_argnums=1)
def _quantize(blocks, format: Format):
    return jax.lax.map(lambda block: quantized(block, format), blocks)
