"""Everything that static counts promise, on one real TPU chip or GPU, in under eight minutes.

    python benchmarks/on_chip.py [--limit 420] [--only errors attention ...] [--json FILE]

No network, no checkpoint: random weights in the shapes of FLF2V-14B at 720p, 81 frames. Every kernel against float64,
then attention, products, a block, the VAE and, where it fits, a whole step, with the share of the chip's bf16 peak (of
which 8 bits may take more than all) and beside each time what it should be: on TPUs by the bundles and XLA's estimates
of the very program that ran, see `wanjax.report.cycles`; on GPUs by operations at the peak or memory at its nominal
speed. Beside ours: splash attention of JAX (TPUs); attention of torch and a block of diffusers (GPUs, where these are
installed). A part that fails is a row that says so; parts that would not end in time are left out and say that.

With --target nothing runs: the program is compiled for a chip that need not be there (extra `aot`), and the table has
what the static count says. With --small, and by itself on CPUs, all shapes are small and times mean nothing. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from wanjax.report.bundles import FLAGS

PARTS = {"errors": 90, "attention": 60, "products": 40, "block": 90, "vae": 60, "step": 150}
"""What is measured, in that order, and seconds that each may take on a chip."""


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=420, help="seconds; what would take longer is left out")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    parser.add_argument("--small", action="store_true", help="small shapes, as on CPUs")
    parser.add_argument(
        "--target", help="a topology that is only compiled for, such as v6e:2x4: what is to be expected"
    )
    parser.add_argument("--no-count", action="store_true", help="without what the static count says")
    parser.add_argument("--json", type=Path, help="file for the last line, as well")
    return parser


def run(args: argparse.Namespace, started: float, bundles: Path | None) -> tuple[dict, list]:
    """What was measured on, and the rows, which are printed as they come; libtpu writes `bundles` if it is there."""
    import jax
    from chip import errors, parts, rivals
    from chip.measuring import Chip, Row

    chip = Chip(bundles, args.target)
    small = args.small or chip.platform == "cpu"
    sizes = parts.SMALL if small else parts.FULL
    rows: list[Row] = []

    def show(found: Iterable[Row]) -> None:
        for row in found:
            rows.append(row)
            print(line(row), flush=True)

    def attention() -> None:
        show(parts.attention(chip, sizes))
        if chip.platform != "cpu":
            show(rivals.attention(chip, sizes))

    def block() -> None:
        show(parts.block(chip, sizes))
        if chip.platform == "gpu":
            tera = next((row.tera for row in rows if row.part == "block forward, bf16"), None)
            show([rivals.diffusers_block(chip, sizes, tera)])

    run: dict[str, Callable[[], None]] = {
        "errors": lambda: show(errors.errors(small)),
        "attention": attention,
        "products": lambda: show(parts.products(chip, sizes)),
        "block": block,
        "vae": lambda: show(parts.vae_chunks(chip, sizes)),
        "step": lambda: show(parts.step(chip, sizes)),
    }
    about = {"device": chip.kind, "peak": chip.peak, "small": small}
    print(f"{chip.kind}{', small shapes' if small else ''}\n{HEAD}")
    with jax.set_mesh(chip.mesh):
        for name in args.only if chip.runs else [name for name in args.only if name != "errors"]:
            left = args.limit - (time.monotonic() - started)
            if chip.runs and not small and left < PARTS[name]:
                show([Row(name, why=f"left out: may take {PARTS[name]} s, {max(left, 0):.0f} s are left")])
                continue
            try:
                run[name]()
            except Exception as error:
                show([Row(name, why=f"{type(error).__name__}: {error}"[:200])])
    return about, rows


HEAD = f"{'':38} {'shape':30} {'error':>9} {'JAX has':>9} {'ms':>10} {'TFLOP/s':>8} {'of peak':>8} {'count':>10}"


def line(row) -> str:
    """A row as text."""

    def cell(value: float | None, width: int, format: str, factor: float = 1) -> str:
        return " " * width if value is None else f"{value * factor:{width}{format}}"

    speed = row.tera / row.seconds if row.tera and row.seconds else None
    cells = (
        cell(row.error, 9, ".2e"),
        cell(row.plain, 9, ".2e"),
        cell(row.seconds, 10, ".3f", 1e3),
        cell(speed, 8, ".1f"),
        cell(row.share, 8, ".1%"),
        cell(row.count, 10, ".3f", 1e3),
    )
    return f"{row.part:38} {row.shape:30} {' '.join(cells)}  {row.why}".rstrip()


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    started = time.monotonic()
    args = make_parser().parse_args(argv)
    if args.target:
        os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory of the same GPU
    with tempfile.TemporaryDirectory(prefix="on_chip") as folder:
        if not args.no_count:
            flags = FLAGS.format(folder=folder)
            os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
        about, rows = run(args, started, None if args.no_count else Path(folder))
    took = round(time.monotonic() - started, 1)
    text = json.dumps({**about, "took": took, "rows": [dataclasses.asdict(row) for row in rows]})
    if args.json:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
