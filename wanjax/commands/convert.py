"""A checkpoint in the other layout, bit for bit: `wanjax convert SRC DST --layout diffusers|official`."""

from __future__ import annotations

from wanjax.cli import Parser, add_settings, given_settings, number, printable
from wanjax.config import SampleConfig
from wanjax.errors import InputError

FILES = ("dit", "dit_low", "vae", "text_encoder", "image_encoder", "tokenizer")
"""Flags of single networks, as `wanjax sample` has them."""


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax convert", description=__doc__)
    parser.add_argument(
        "source",
        type=printable,
        metavar="SRC",
        nargs="?",
        help="folder of a Wan2.1 checkpoint, Diffusers or official layout",
    )
    parser.add_argument("target", type=printable, metavar="DST", help="folder to make; must not be there, or be empty")
    parser.add_argument("--layout", choices=("diffusers", "official"), required=True, help="layout of DST")
    parser.add_argument("--flow-shift", type=number, help="shift of the schedule (default: that of SRC, or official)")
    parser.add_argument("--max-shard-gb", type=number, default=5.0, help="largest file in GB (default: 5)")
    parser.add_argument(
        "--no-pth", action="store_true", help="official: .safetensors with the same names for .pth; needs no torch"
    )
    add_settings(parser, SampleConfig, FILES)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = make_parser().parse_args(argv)
    for flag, value, most in (("--max-shard-gb", args.max_shard_gb, 10**6), ("--flow-shift", args.flow_shift, 1000)):
        if value is not None and not 0 < value <= most:
            raise InputError(f"{flag} {value:g}; a number above 0 to {most} is accepted; change it, or leave it out")

    from wanjax.weights.single import given_files

    given = SampleConfig(**given_settings(args, SampleConfig, FILES))
    if args.source is None and not given_files(given):
        raise InputError(
            "nothing to convert; a checkpoint's folder, or files as --dit and so on, are accepted; give some"
        )

    import jax

    from wanjax.conditioning.text import Tokenizer
    from wanjax.weights.save import convert

    if given.tokenizer is not None:
        Tokenizer(given.tokenizer)  # which refuses what is none

    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators alone
    convert(
        args.source,
        args.target,
        args.layout,
        given_files(given),
        given.tokenizer,
        flow_shift=args.flow_shift,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        pth=False if args.no_pth else None,
        say=print,
    )
