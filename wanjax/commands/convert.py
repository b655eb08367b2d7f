"""A checkpoint in the other layout, bit for bit: `wanjax convert SRC DST --layout diffusers|official`."""

from __future__ import annotations

import math

from wanjax.cli import Parser
from wanjax.errors import InputError


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax convert", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="folder of a Wan2.1 checkpoint, Diffusers or official layout")
    parser.add_argument("target", metavar="DST", help="folder to make; must not be there, or be empty")
    parser.add_argument("--layout", choices=("diffusers", "official"), required=True, help="layout of DST")
    parser.add_argument("--flow-shift", type=float, help="shift of the schedule (default: that of SRC, or official)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest file in GB (default: 5)")
    parser.add_argument(
        "--no-pth", action="store_true", help="official: .safetensors with the same names for .pth; needs no torch"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = make_parser().parse_args(argv)
    if not 0 < args.max_shard_gb < math.inf:
        raise InputError(f"--max-shard-gb is {args.max_shard_gb}; give a number above 0.")
    if args.flow_shift is not None and not 0 < args.flow_shift < math.inf:
        raise InputError(f"--flow-shift is {args.flow_shift}; give a number above 0.")

    import jax

    from wanjax.weights.save import convert

    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators alone
    convert(
        args.source,
        args.target,
        args.layout,
        flow_shift=args.flow_shift,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        pth=False if args.no_pth else None,
        say=print,
    )
