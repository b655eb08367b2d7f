"""A page of one or several trainings: curves, samples, settings, how they were started. One HTML file, no network.

wanjax runs out/train                              # writes out/train/run.html
wanjax runs out/train out/lora --out compare.html  # their curves over one another, and in what they differ
"""

from __future__ import annotations

import os
from pathlib import Path

from wanjax.cli import Parser, number, printable_path
from wanjax.errors import InputError


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax runs", description=__doc__)
    add = parser.add_argument
    add("workdirs", type=printable_path, nargs="+", metavar="WORKDIR", help="folder of a training")
    add("--out", type=printable_path, metavar="FILE", help="page to write (default: run.html in the first workdir)")
    add("--most-mb", type=number, default=100.0, metavar="MB", help="of samples in it, the newest first (default: 100)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    flags = make_parser().parse_args(argv)
    if not 0 <= flags.most_mb <= 10_000:
        raise InputError(f"--most-mb {flags.most_mb:g}; a number from 0 to 10000 is accepted; use --most-mb 100")
    out = flags.out or flags.workdirs[0] / "run.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out}; a name that ends in .html is accepted; change it")

    from wanjax.runs.page import write_page
    from wanjax.runs.read import read_run

    write_page(
        [read_run(*place) for place in zip(flags.workdirs, names(flags.workdirs), strict=True)], out, flags.most_mb
    )
    print(out)


def names(workdirs: list[Path]) -> list[str]:
    """How the runs are called: their folders' names, with as much before as tells them apart."""
    whole = [path.absolute() for path in workdirs]
    if len(whole) == 1 or len({path.name for path in whole}) == len(whole):
        return [path.name for path in whole]
    shared = os.path.commonpath(whole)
    return [os.path.relpath(path, shared) for path in whole]
