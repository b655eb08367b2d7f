"""The command `wanjax`: one module a command, imported when it is asked for, so that `--help` answers at once."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

from wanjax.cli import Parser, exit_codes

COMMANDS = {
    "sample": "two pictures and a sentence go in, a video comes out",
    "app": "a page in the browser: two pictures, a prompt, a video",
    "serve": "a server of videos: /v1/videos, with a queue that survives restarts",
    "decode": "make the video of latents that sampling kept",
    "train": "train a network, or adapters beside one",
    "convert": "a checkpoint in the other layout, bit for bit",
    "quantize": "a checkpoint with the DiT's blocks in 8 bits",
    "calibrate": "measure a checkpoint for the step caches",
    "runs": "a page of trainings: curves, samples, settings",
    "cache": "encode clips once, before training",
    "select": "score clips and keep those worth training on",
    "plan": "whether a full-size run fits on hardware that is not here, and how long it takes",
    "report": "bytes and collectives of a run's programs, as counted or compiled",
    "demo": "the small model that ships with the package",
}


def make_parser(complete: bool = False) -> Parser:
    """The parser of `wanjax` itself.

    Args:
      complete: with the flags of every command, for completion; else a command's flags are its own business.
    """
    parser = Parser("wanjax", description="Wan first-last-frame-to-video in JAX. `wanjax COMMAND --help` says more.")
    parser.add_argument("--version", action="version", version=f"wanjax {importlib.metadata.version('wanjax')}")
    if not complete:
        parser.add_argument("--completion", choices=("bash", "zsh", "tcsh"), help="print a script for tab completion")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, help in COMMANDS.items():
        parents = [module(name).make_parser()] if complete else []
        commands.add_parser(name, help=help, add_help=False, parents=parents)
    return parser


def module(command: str):
    """The module of a command."""
    return importlib.import_module(f"wanjax.commands.{command}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line and end the process as it says."""
    argv = sys.argv[1:] if argv is None else argv
    with exit_codes():
        if argv and argv[0] in COMMANDS:
            module(argv[0]).main(argv[1:])
        elif argv and argv[0].startswith("--completion"):
            print(completion(make_parser().parse_args([*argv, "sample"]).completion))
        else:
            make_parser().parse_args(argv or ["--help"])


def completion(shell: str) -> str:
    """A script that completes commands and flags, for a shell to read."""
    import shtab

    return shtab.complete(make_parser(complete=True), shell)
