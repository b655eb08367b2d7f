"""Cycles of full-size programs on a TPU that is not there, by source line, from what libtpu writes while it compiles.

    python benchmarks/tpu_static.py --config configs/flf2v_14b_720p.py --target v6e:2x4
        [--mesh data=2,ulysses=4] [--programs "DiT step" umT5 CLIP "VAE encode" "VAE decode"] [--layers 2]
        [--quantize int8] [--attention int8fp8] [--keep DIR | --read DIR] [--top 25]

Needs the extra `aot`. Compiled is what `wanjax plan` names, the first program unless told otherwise: the step of
sampling or of training. A layer is one pass of each loop over the layers; all else is "once". With --layers fewer
layers are compiled, which leaves a layer as it is. --keep leaves the compiler's files in folders of DIR, --read judges
them again. What is counted, and what these figures cannot tell, is in `wanjax.report.cycles` and
`wanjax.report.bundles`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from wanjax.cli import exit_codes
from wanjax.config import DiTConfig
from wanjax.errors import InputError
from wanjax.report import memory, static
from wanjax.report.compiled import Case
from wanjax.report.cycles import KINDS, Count
from wanjax.weights.quantize import requantized


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/flf2v_14b_720p.py", help="configs/*.py")
    parser.add_argument("--target", default="v6e:2x4", help="topology of TPUs")
    parser.add_argument("--mesh", help="instead of the configuration's for the target")
    parser.add_argument("--programs", nargs="+", metavar="NAME", default=[None], help="the first one by default")
    parser.add_argument("--layers", type=int, help="of the DiT, instead of all")
    parser.add_argument("--quantize", choices=("fp8", "int8"), help="the DiT's matrices")
    parser.add_argument("--attention", help="kernel of self-attention")
    parser.add_argument("--keep", type=Path, help="folder that keeps the compiler's files")
    parser.add_argument("--read", type=Path, help="folder of an earlier --keep, instead of compiling")
    parser.add_argument("--top", type=int, default=25, help="rows of the table of instructions")
    return parser


def compile_all(folder: Path, args: argparse.Namespace) -> None:
    """Every program asked for into a folder of its own in `folder`."""
    config, dit, meshes, _ = memory.load(args.config)
    changes = {"num_layers": args.layers, "attention": args.attention}
    dit = dataclasses.replace(dit, **{name: value for name, value in changes.items() if value})
    if isinstance(getattr(config, "dit", None), DiTConfig):  # of a training that starts anew
        config = dataclasses.replace(config, dit=dit)
    mesh = args.mesh or meshes.get(args.target)
    if mesh is None:
        raise InputError(f"no mesh for {args.target} in {args.config}, which has {list(meshes)}; give --mesh")
    for program in args.programs:
        own = folder / re.sub(r"\W+", "_", program or "step")
        case = Case(config, requantized(dit, args.quantize), args.target, mesh)
        static.static_cycles(case, program, limit=None, folder=own)


def print_instructions(count: Count, layers: int, top: int) -> None:
    """Instructions by what they take of a layer, or once; then attention's kernels."""
    print(f"{'M cycles':>9} {'times':>6} {'M each':>8} {'bundles':>8}  {'kind':12} instruction, result, source")
    for item in sorted(count.items.values(), key=lambda item: -item.total)[:top]:
        passes = item.passes(layers)
        once = "" if passes else " (once)"
        shape = re.sub(r"\{[^}]*\}+", "", item.instruction.result)[:44]
        row = (
            f"{item.total / (passes or 1) / 1e6:9.3f} {item.times:6} {item.cycles / 1e6:8.3f} {item.bundles / 1e6:8.3f}"
        )
        print(f"{row}  {item.kind:12} {item.instruction.name} {shape} {item.source}{once}")
    for name, kernel in count.kernels.items():
        if kernel.tiles and re.search("flash|int8fp8|bounded", name):
            each = f"{kernel.block / kernel.tiles:.0f} a tile, {kernel.step / kernel.tiles:.0f} with the rest of a step"
            print(f"{name}: {kernel.steps} steps; {each}")
    sizes = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in count.payload.items())
    print(f"payload, GiB: {sizes}\n")


def print_table(found: list[static.Cycles]) -> None:
    """A layer and the rest of every program, by kind."""
    print(f"{'M cycles':24} " + " ".join(f"{kind:>13}" for kind in (*KINDS, "not attention", "total")))
    for cycles in found:
        for title, row in (("a layer", cycles.layer), ("once", cycles.once)):
            total = sum(row.values())
            cells = [*(row[kind] for kind in KINDS), total - row["attention"], total]
            if title == "once" or cycles.layers:
                print(f"{cycles.program + ', ' + title:24} " + " ".join(f"{cell / 1e6:13.2f}" for cell in cells))
    for cycles in found:
        total, clock, peak = cycles.total / 1e6, cycles.clock / 1e9, cycles.peak / 2**30
        time = f"{cycles.seconds:.3f} s at {clock:.2f} GHz"
        print(f"{cycles.program}: {total:.1f}M cycles a run, {time}; {cycles.runs} of them; peak {peak:.2f} GiB")


def as_json(cycles: static.Cycles, facts: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, cycles of a layer by kind, and sums."""
    layer = {kind: round(value) for kind, value in cycles.layer.items()}
    sums = {"layer": sum(cycles.layer.values()), "once": sum(cycles.once.values()), "total": cycles.total}
    return {**facts, **layer, **{name: round(value) for name, value in sums.items()}}


def main() -> None:
    """Run the command line."""
    args = make_parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="tpu_static") as temporary:
        folder = args.read or args.keep or Path(temporary)
        if not args.read:
            compile_all(folder, args)
        found = [static.read(path.parent) for path in sorted(folder.glob(f"*/{static.FACTS}"))]
        for count, _, facts in found:
            print(f"{facts['program']} on {facts['target']}, {facts['mesh']}")
            print_instructions(count, facts["layers"], args.top)
    print_table([cycles for _, cycles, _ in found])
    print(json.dumps([as_json(cycles, facts) for _, cycles, facts in found]))


if __name__ == "__main__":
    with exit_codes():
        main()
