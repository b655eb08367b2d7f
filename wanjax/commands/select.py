"""Scores clips and keeps those worth training on.

    wanjax select clips/             # scores, shows their distributions, keeps all that can be used
    wanjax select clips/ --min difference=0.1 resolution=480 --max cuts=0 --top sharpness=0.5
    wanjax select clips/all.jsonl --clip CHECKPOINT --top clip_difference=0.3 --out clips/stage2.jsonl

Writes a manifest of the kept clips with their scores, and a contact sheet of kept and dropped ones. A clip is scored
once, as training would see it; the scores stay beside the input (.scores.jsonl), so that other thresholds take seconds
and a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import math
import os
import sys

from wanjax.cli import (
    INTERRUPTED,
    Parser,
    add_settings,
    number,
    numbers,
    printable_path,
    several,
    whole_number,
    whole_numbers,
)
from wanjax.config import TrainConfig
from wanjax.selection import SCORES


def make_parser() -> Parser:
    """The command's flags."""
    scores = "\n".join(f"  {name:16s} {meaning}" for name, meaning in SCORES.items())
    parser = Parser(
        "wanjax select",
        description=__doc__,
        epilog=f"scores:\n{scores}\n  and any other column of the input that holds numbers",
    )
    add = parser.add_argument
    add("input", type=printable_path, help="folder of videos, manifest (.jsonl, .json, .csv, .parquet) or .tar shards")
    out = "manifest of the kept clips (default: selected.jsonl beside the input, or in it)"
    kept = "where scores are kept between runs (default: beside the input, .scores.jsonl)"
    add("--out", type=printable_path, help=out)
    add("--sheet", type=printable_path, help="contact sheet (default: beside the manifest, .png)")
    add("--scores", type=printable_path, help=kept)
    limits = {"nargs": "+", "type": limit, "default": [], "action": "extend"}
    add("--min", **limits, metavar="NAME=VALUE", help="drop clips with less")
    add("--max", **limits, metavar="NAME=VALUE", help="drop clips with more")
    add("--top", **limits, metavar="NAME=SHARE", help="of the clips left, keep the share with the highest values")
    add("--bottom", **limits, metavar="NAME=SHARE", help="of the clips left, keep the share with the lowest values")
    add(
        "--duplicates",
        type=whole_number,
        nargs="?",
        const=6,
        metavar="BITS",
        help="drop near duplicates; bits of 64 that may differ in a frame (6)",
    )
    clip = "score clip_difference too, with this checkpoint's CLIP tower"
    add("--clip", type=printable_path, metavar="CHECKPOINT", help=clip)
    add("--frames", type=whole_number, default=81, help="of the longest clips in training (81)")
    add("--area", type=whole_number, default=480 * 832, help="pixels of a frame in training (480 * 832)")
    add("--fps", type=number, default=16.0, help="frames a second in training (16)")
    add(
        "--lengths",
        type=several(whole_numbers),
        metavar="N,N,..",
        help="of the clips in training (--frames and parts of it)",
    )
    add(
        "--ratios",
        type=several(numbers),
        metavar="X,X,..",
        help="width / height in training (16:9, 4:3, 1:1, 3:4, 9:16)",
    )
    add("--caption-encoding", default="", metavar="NAME", help="of caption files, or guess (UTF-8)")
    add_settings(parser, TrainConfig, ["compile_cache"])
    add("--threads", type=whole_number, default=os.cpu_count() or 1, help="clips to score at once (all cores)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = make_parser().parse_args(argv)

    from wanjax.sampling.compile_cache import cache_folder, use_persistent_cache
    from wanjax.selection.select import select

    use_persistent_cache(cache_folder(args.compile_cache))
    try:
        select(args)
    except KeyboardInterrupt:
        print("interrupted; the scores so far are kept, the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)


def limit(text: str) -> tuple[str, float]:
    """NAME=NUMBER."""
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan  # with which nothing compares
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: NAME=NUMBER, such as difference=0.1")
    return name, value
