"""A checkpoint with the DiT's blocks in 8 bits, all else as it was; `wanjax sample` takes it as any other.

    wanjax quantize --checkpoint Wan2.1-FLF2V-14B-720P --output flf2v-fp8 --format fp8 --layers 1:39

The matrices that make q, k, v and the output of both attentions, and those of the feed-forward, have one scale each.
"""

from __future__ import annotations

from pathlib import Path

from wanjax.cli import Parser, printable
from wanjax.errors import InputError


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax quantize", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=printable, metavar="DIR", required=True, help="in the Diffusers or the official layout"
    )
    parser.add_argument(
        "--output", type=printable, metavar="DIR", required=True, help="folder to make; must not be there, or be empty"
    )
    parser.add_argument("--format", choices=("fp8", "int8"), required=True, help="int8: for chips without fp8")
    parser.add_argument("--layers", metavar="FIRST:STOP", help="blocks to quantise, STOP not included (default: all)")
    parser.add_argument("--layout", choices=("diffusers", "official"), help="of the output (default: the checkpoint's)")
    text = "of what stays as it is in the DiT (default: bfloat16)"
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    flags = make_parser().parse_args(argv)
    layers = read_layers(flags.layers) if flags.layers is not None else None

    import jax
    import jax.numpy as jnp

    from wanjax.config import DiTConfig
    from wanjax.models.dit import DiT
    from wanjax.weights import Checkpoint, save
    from wanjax.weights.layouts import EXPERTS
    from wanjax.weights.mapping import NetworkName
    from wanjax.weights.quantize import with_format
    from wanjax.weights.save import check_target

    jax.config.update("jax_platforms", "cpu")  # little is computed, and hosts have the memory: leave accelerators alone
    source, output = Checkpoint(flags.checkpoint), Path(flags.output)
    names = EXPERTS[: source.experts]
    configs: dict[NetworkName, DiTConfig] = {
        name: with_format(source.config(name, param_dtype=jnp.dtype(flags.dtype)), flags.format, layers)
        for name in names
    }
    for name, config in configs.items():
        source.check(name, config)
    check_target(output, source)
    models: dict[NetworkName, DiT] = {name: source.load(name, config) for name, config in configs.items()}
    save(output, flags.layout or source.layout, models, base=source, say=print)


def read_layers(text: str) -> tuple[int, int]:
    """The first block and the one behind the last.

    Raises:
      InputError: they cannot be read.
    """
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal() and len(text) < 20):
        raise InputError(f"layers {text!r}; FIRST:STOP is accepted, whole numbers; for example --layers 1:39")
    return int(first), int(stop)
