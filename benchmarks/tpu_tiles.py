"""Searches block sizes of the TPU kernels by static cycles, and writes those into the table that the kernels read.

    python benchmarks/tpu_tiles.py [--targets v6e:2x4 tpu7x:2x2x1] [--kernels flash_forward matmul ..] [--write]

Needs the extra `aot`; a target takes a quarter of an hour of one core. Each kernel is compiled alone, one size after
the other changed while the others stay at the best so far. Counted are its bundles (`wanjax.report.bundles`), whole
blocks and the rest that the ragged loop goes through, or the bytes that its blocks fetch at the memory's nominal speed
if that takes longer. With --write, sizes that gain 1% or more over the kernel's own go to
`wanjax/ops/kernels/tiles.json`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wanjax.report.bundles import FLAGS, Kernel, read_kernel
from wanjax.report.cycles import CHIPS

LENGTHS = (75776, 37888, 18944, 32768)
"""Keys of a device of four, filled up to whole tiles: 81 frames of 720p whole, over a ring of 2 and of 4; of 480p."""
ROWS = 75600
"""Tokens of 81 frames of 720p on one device: no whole memory tiles of int8, so that blocks need more room than else."""
HEADS, HEAD_DIM = 1, 128
GAIN = 0.01


class Case(NamedTuple):
    """A kernel at shapes for which it is the same program.

    Attributes:
      kernel: its name in the table, and in the compiler's files.
      shapes: as the kernel asks the table for.
      choices: sizes to try; the first of each are the kernel's own.
      make: the function to compile for the first shape, and the shapes of its arguments, as `(shape, dtype)`.
      cycles: of a call, by the kernel's bundles, its sizes, the bytes of memory in a cycle, and a shape.
    """

    kernel: str
    shapes: tuple[tuple[int, ...], ...]
    choices: dict[str, tuple[int, ...]]
    make: Callable[[], tuple[Callable[..., Any], list[Any]]]
    cycles: Callable[..., float]


def forward() -> Case:
    """Attention's forward pass: queries and keys of a block."""
    shapes = tuple((length,) for length in LENGTHS)

    def make():
        from wanjax.ops.kernels import flash_tpu

        x = ((1, HEADS, LENGTHS[0], HEAD_DIM), "bfloat16")
        return lambda q, k, v: flash_tpu.forward(q, k, v, None, "bfloat16"), [x, x, x]

    def cycles(kernel: Kernel, sizes: dict[str, int], bytes_a_cycle: float, length: int) -> float:
        whole, rest = divmod(length, sizes["keys"])
        parts = math.ceil(rest / 1024) * kernel.ragged + kernel.step - kernel.block if rest else 0
        rows = math.ceil(length / sizes["queries"])
        fetched = 2 * 2 * length * HEAD_DIM * rows
        return max(rows * (whole * kernel.step + parts), fetched / bytes_a_cycle) * HEADS

    # More keys are a longer program, which may wait for its instructions: no schedule shows that.
    return Case("flash_forward", shapes, {"queries": (1024, 2048), "keys": (6144, 4096)}, make, cycles)


def backward() -> Case:
    """Attention's backward pass."""
    shapes = tuple((length,) for length in LENGTHS)

    def make():
        from wanjax.ops.kernels import flash_tpu

        x, row = ((1, HEADS, LENGTHS[0], HEAD_DIM), "bfloat16"), ((1, HEADS, LENGTHS[0]), "float32")
        return lambda q, k, v, *rest: flash_tpu.backward(q, k, v, None, *rest), [x, x, x, row, row, x]

    def cycles(kernel: Kernel, sizes: dict[str, int], bytes_a_cycle: float, length: int) -> float:
        whole, rest = divmod(length, sizes["keys"])
        steps = math.ceil(length / sizes["queries"])
        parts = math.ceil(rest / 256) * kernel.ragged + kernel.step - kernel.block if rest else 0
        fetched = 2 * 2 * length * HEAD_DIM * math.ceil(length / sizes["keys"])
        return max(steps * (whole * kernel.step + parts), fetched / bytes_a_cycle) * HEADS

    return Case("flash_backward", shapes, {"queries": (1024, 2048, 512), "keys": (1024, 2048, 512)}, make, cycles)


def product(width: int, out: int, dtype: str = "bfloat16") -> Case:
    """A product of a layer of the DiT: rows of a block, and columns or, of many channels, channels at a time."""
    eight_bit, is_long = dtype == "int8", width > 8192 and dtype != "int8"

    def make():
        import jax

        from wanjax.ops.kernels import matmul_int8_tpu, matmul_tpu

        x, bias = ((1, ROWS, width), "bfloat16"), ((out,), "bfloat16")
        run, scale = jax.nn.gelu if out > width else lambda x: x, ((), "float32")
        if eight_bit:
            multiply = matmul_int8_tpu.matmul
            return lambda *args: multiply(*args, activation=run), [x, ((width, out), dtype), scale, bias]
        return lambda *args: matmul_tpu.matmul(*args, activation=run), [x, ((width, out), dtype), bias]

    def cycles(kernel: Kernel, sizes: dict[str, int], bytes_a_cycle: float, *_: int) -> float:
        size = 1 if eight_bit else 2
        fetched = size * (ROWS * width + math.ceil(ROWS / sizes["rows"]) * width * out) + 2 * ROWS * out
        return max(kernel.cycles, fetched / bytes_a_cycle)

    if is_long:
        choices = {"rows": (640, 512, 768), "channels": (768, 512, 1152)}
        return Case("matmul_long", ((width, out),), choices, make, cycles)
    choices = {"rows": (1024, 768, 1536, 2048), "columns": (512, 256, 1024) if width <= 8192 else (256, 512, 128)}
    return Case("matmul_int8" if eight_bit else "matmul", ((width, out),), choices, make, cycles)


def cases() -> Iterator[Case]:
    """All that is tried."""
    yield forward()
    yield backward()
    for dtype in ("bfloat16", "int8"):
        for width, out in ((5120, 5120), (5120, 13824), (13824, 5120)):
            yield product(width, out, dtype)
    for width, out in ((1536, 1536), (1536, 8960), (8960, 1536)):
        yield product(width, out)


def compile_one(case: Case, target: str, sizes: dict[str, int]) -> None:
    """Compiles a case with these sizes, in the process that libtpu writes bundles for."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from wanjax.ops.kernels import tile_table
    from wanjax.report.topology import topology_mesh

    tile_table.TABLE = {case.kernel: {chip_of(target): {"x".join(map(str, case.shapes[0])): sizes}}}
    mesh = topology_mesh(target, "data=1")  # by it the kernels know the chip
    function, shapes = case.make()
    sharding = NamedSharding(mesh, PartitionSpec())
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    with jax.set_mesh(mesh):
        jax.jit(function).lower(*given).compile()


def measured(index: int, case: Case, target: str, sizes: dict[str, int]) -> Kernel | str:
    """The kernel of `cases()[index]`, by a process of its own: libtpu reads its flags once, and may abort; or why."""
    with tempfile.TemporaryDirectory(prefix="tpu_tiles") as folder:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": FLAGS.format(folder=folder)}
        root = str(Path(__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, __file__, "--targets", target, "--one", json.dumps([index, sizes])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        files = list(Path(folder).glob(f"*-{case.kernel}.*-final_bundles.txt"))
        if done.returncode or not files:
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["it does not compile"]
            return " ".join(lines[-1].split())[:160]
        return read_kernel(files[0])


def tries(index: int, case: Case, target: str) -> Iterator[dict[str, Any]]:
    """Every choice that is tried, with its cycles at every shape."""
    best, least = {key: values[0] for key, values in case.choices.items()}, math.inf
    todo = [{}, *({key: value} for key, values in case.choices.items() for value in values[1:])]
    bytes_a_cycle = CHIPS[target.partition(":")[0]].memory / CHIPS[target.partition(":")[0]].clock
    for changed in todo:
        sizes = best | changed
        kernel = measured(index, case, target, sizes)
        for shape in case.shapes:
            found = {"kernel": case.kernel, "chip": chip_of(target), "shape": shape, "own": not changed, "sizes": sizes}
            if isinstance(kernel, str):
                yield found | {"why": kernel}
                continue
            cycles = round(case.cycles(kernel, sizes, bytes_a_cycle, *shape))
            yield found | {"cycles": cycles}
            if shape == case.shapes[0] and cycles < least:
                best, least = sizes, cycles


def chip_of(target: str) -> str:
    """As `tile_table.chip` names it."""
    return target.partition(":")[0].removeprefix("tpu")


def table(found: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """The best sizes where they gain something."""
    best: dict[str, Any] = {}
    for (kernel, chip, *shape), tries in groups(found).items():
        fits = [x for x in tries if "cycles" in x]
        own, fastest = next((x for x in fits if x["own"]), None), min(fits, key=lambda x: x["cycles"], default=None)
        if fastest and (own is None or fastest["cycles"] < own["cycles"] * (1 - GAIN)):
            best.setdefault(kernel, {}).setdefault(chip, {})["x".join(map(str, shape))] = fastest["sizes"]
    return best


def groups(found: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """Tries by kernel, chip and shape."""
    grouped: dict[tuple, list[dict[str, Any]]] = {}
    for x in found:
        grouped.setdefault((x["kernel"], x["chip"], *x["shape"]), []).append(x)
    return grouped


def main() -> None:
    """Run the command line."""
    all_cases = list(cases())
    names = list(dict.fromkeys(case.kernel for case in all_cases))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["v6e:2x4", "tpu7x:2x2x1"], help="topologies")
    parser.add_argument("--kernels", nargs="+", choices=names, default=names, help="some of them")
    parser.add_argument("--write", action="store_true", help="put what is best into the kernels' table")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)  # in the process that compiles
    args = parser.parse_args()
    if args.one:
        index, sizes = args.one
        compile_one(all_cases[index], args.targets[0], sizes)
        return
    found = []
    for target in args.targets:
        for index, case in enumerate(all_cases):
            for row in tries(index, case, target) if case.kernel in args.kernels else ():
                print(json.dumps(row), flush=True)
                found.append(row)
    best = table(found)
    if args.write:
        from wanjax.ops.kernels import tile_table

        kept = json.loads(tile_table.FILE.read_text())
        for kernel, chips in best.items():
            for chip, shapes in chips.items():
                kept.setdefault(kernel, {}).setdefault(chip, {}).update(shapes)
        tile_table.FILE.write_text(json.dumps(kept, indent=2) + "\n")
    print(json.dumps(best))


if __name__ == "__main__":
    main()
