"""Attention kernels compiled for TPUs that need not be there: VLIW bundles per 1024 x 1024 tile of scores.

    python benchmarks/tpu_kernels.py [--targets v6e:2x4,tpu7x:2x2x1] [--kernels forward,backward,int8fp8] [--keep DIR]

Needs jax[tpu], as the extra `aot` installs it. libtpu writes down the final schedule of every kernel; counted is the
block without a branch that holds most of the matrix products, which is one block of queries by one block of keys. A
bundle is a cycle as long as nothing waits for memory. Not in it: what a step of the grid adds, the last block, which
only partly counts, and what XLA does before and behind. The last line is JSON.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LENGTH, HEADS, HEAD_DIM = 75600, 10, 128  # 81 frames at 720p, a quarter of the heads of 14B
KERNELS = {"forward": "flash_forward", "backward": "flash_backward", "int8fp8": "int8fp8_forward"}
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2,3})?\s*:\s*>*\s*(\{.*)")
BORDER = re.compile(r"(Start|End) region|sbr\.rel|loop exit")
SLOTS = {
    "products": r"vmatmul",
    "exponentials": r"vpow2",
    "additions": r"vadd\.f32",
    "other arithmetic": r"(?:vmul|vsub|vmax|vand|vpack|vunpack|vcvt|vsel|vcombine)[\w.]*",
    "loads": r"vld",
    "stores": r"vst",
}
FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final_bundles$"


def compile_kernel(name: str, target: str) -> int:
    """Compiles a kernel alone; how many scores its block has."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from wanjax.ops.kernels import flash_tpu, int8fp8_tpu
    from wanjax.report.topology import topology_mesh

    mesh = topology_mesh(target, "data=1")  # by it the kernels know the chip
    sharding = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((1, HEADS, LENGTH, HEAD_DIM), jnp.bfloat16, sharding=sharding)
    row = jax.ShapeDtypeStruct((1, HEADS, LENGTH), jnp.float32, sharding=sharding)
    module = int8fp8_tpu if name == "int8fp8" else flash_tpu
    queries = module.query_block(LENGTH)
    if name == "backward":
        keys, arguments = flash_tpu.KEYS_BACKWARD, (x, x, x, row, row, x)
        function = jax.jit(lambda q, k, v, *rest: flash_tpu.backward(q, k, v, None, *rest))
    else:
        keys, arguments = flash_tpu.KEYS_FORWARD if name == "forward" else int8fp8_tpu.KEYS, (x, x, x)
        function = jax.jit(lambda q, k, v: module.forward(q, k, v, None, jnp.bfloat16))
    with jax.set_mesh(mesh):
        function.lower(*arguments).compile()
    return queries * min(keys, LENGTH)


def block(path: Path) -> list[str]:
    """The bundles of the stretch without a branch that has most of the matrix products."""
    rows: list[str] = []
    for line in path.read_text(errors="replace").splitlines():
        if found := BUNDLE.match(line):
            rows.append(found[1])
        elif rows:
            rows[-1] += line  # a bundle that spans lines
    borders = [i for i, row in enumerate(rows) if BORDER.search(row)]
    stretches = [rows[a:b] for a, b in itertools.pairwise(borders)]
    return max(stretches, key=lambda rows: sum(row.count("vmatmul") for row in rows))


def measure(name: str, target: str, folder: Path) -> dict[str, float]:
    """Bundles and operations per tile, by a process of its own: libtpu reads its flags once."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "LIBTPU_INIT_ARGS": FLAGS.format(folder)}
    root = Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--compile", name, "--targets", target]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} does not compile for {target}:\n{done.stderr[-2000:]}")
    tiles = int(done.stdout.split()[-1]) / 2**20
    file = next(folder.glob(f"*{KERNELS[name]}*-final_bundles.txt"), None)
    if file is None:  # 8 bits on a chip where they gain nothing
        return {}
    rows = block(file)
    counts = collections.Counter({"bundles": len(rows)})
    for slot, operation in SLOTS.items():
        counts[slot] = sum(len(re.findall(rf"(?<![\w.]){operation}(?![\w])", row)) for row in rows)
    counts["spills"] = sum(row.count("_spill") for row in rows)
    return {key: round(count / tiles, 1) for key, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="v6e:2x4,tpu7x:2x2x1", help="topologies, with commas between")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="of forward, backward, int8fp8")
    parser.add_argument("--keep", help="folder for the compiler's files; else they go")
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # one kernel, in the process that it is measured by
    args = parser.parse_args()
    if args.compile:
        print(compile_kernel(args.compile, args.targets))
        return
    table = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.kernels.split(","):
            for target in args.targets.split(","):
                folder = Path(args.keep or temporary).absolute() / f"{name}_{target.replace(':', '_')}"
                table[f"{name} {target}"] = row = measure(name, target, folder)
                print(
                    f"{name:9} {target:12} " + ", ".join(f"{key} {count:.0f}" for key, count in row.items()), flush=True
                )
    print(json.dumps(table))


if __name__ == "__main__":
    main()
