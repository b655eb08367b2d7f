"""The small model that ships with the package fills in between two frames of its own.

wanjax demo                                       # the same as wanjax sample without flags
wanjax demo --publish out/demo/stage3/model       # puts a model that `make demo` trained into the package
"""

from __future__ import annotations

from wanjax.cli import Parser, printable, printable_path
from wanjax.commands import sample


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax demo", description=__doc__)
    parser.add_argument("--publish", metavar="DIR", type=printable_path, help="a trained model in the Diffusers layout")
    parser.add_argument("--output", type=printable, metavar="PATH", help="of the video (default: out/video.mp4)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    flags = make_parser().parse_args(argv)
    if flags.publish is None:
        sample.main([] if flags.output is None else ["--output", flags.output])
        return

    from wanjax.demo.publish import publish

    publish(flags.publish)
