"""The DiT's blocks in 8 bits: half the memory of bfloat16, and twice the speed where a chip multiplies such numbers.

    python -m wanjax.weights.quantize --checkpoint Wan2.1-FLF2V-14B-720P --output flf2v-fp8 --format fp8 --layers 1:39

    dit = quantize(dit, "fp8")                      # or "int8", for chips without fp8
    dit = quantize(dit, "int8", layers=(1, 39))     # all blocks but the first and the last

The matrices that make q, k, v and the output of both attentions, and those of the feed-forward, have one scale each;
activations one for every token, found when they come. All else stays as it is. `Checkpoint.load` quantises while it
reads if its configuration says so, and never holds more than one layer's matrix in full. The command saves a checkpoint
so, with everything else as it was.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from wanjax.cli import Parser, exit_codes
from wanjax.config import DiTConfig, SampleConfig
from wanjax.errors import InputError
from wanjax.models.dit import DiT, quantized
from wanjax.ops.quantized import DTYPES, Format
from wanjax.weights import Checkpoint, save
from wanjax.weights.save import check_target


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
    for first, stop, in_8_bits in config.stacks:
        blocks = jax.tree.map(lambda x, first=first, stop=stop: x[first:stop], model.blocks)
        stacks.append(_quantize(blocks, format) if in_8_bits else blocks)
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


def in_8_bits(config: SampleConfig) -> bool:
    """Whether the DiT will be quantised; found without waking JAX's devices.

    Raises:
      InputError: as `Checkpoint`.
    """
    if config.quantize is not None or config.checkpoint is None:
        return config.quantize in ("fp8", "int8")
    return Checkpoint(config.checkpoint).config("dit").quantize != "off"


@partial(jax.jit, static_argnums=1)
def _quantize(blocks, format: Format):
    return jax.lax.map(lambda block: quantized(block, format), blocks)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    description = (__doc__ or "").split("\n\n")
    parser = Parser(
        "python -m wanjax.weights.quantize",
        description="\n\n".join([description[0], description[1], description[-1]]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", metavar="DIR", required=True, help="in the Diffusers or the official layout")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to make; must not be there, or be empty")
    parser.add_argument("--format", choices=tuple(DTYPES), required=True, help="int8: for chips without fp8")
    parser.add_argument("--layers", metavar="FIRST:STOP", help="blocks to quantise, STOP not included (default: all)")
    parser.add_argument("--layout", choices=("diffusers", "official"), help="of the output (default: the checkpoint's)")
    text = "of what stays as it is in the DiT (default: bfloat16)"
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help=text)
    flags = parser.parse_args(argv)
    source, output = Checkpoint(flags.checkpoint), Path(flags.output)
    config = source.config("dit", param_dtype=jnp.dtype(flags.dtype))
    config = with_format(config, flags.format, read_layers(flags.layers) if flags.layers is not None else None)
    source.check("dit", config)
    check_target(output, source)
    dit = source.load("dit", config)
    save(output, flags.layout or source.layout, {"dit": dit}, base=source, say=print)


def read_layers(text: str) -> tuple[int, int]:
    """The first block and the one behind the last.

    Raises:
      InputError: they cannot be read.
    """
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal()):
        raise InputError(f"layers {text!r}; FIRST:STOP is accepted, whole numbers; for example --layers 1:39")
    return int(first), int(stop)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # little is computed, and hosts have the memory: leave accelerators alone
    with exit_codes():
        main()
