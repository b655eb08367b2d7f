"""What a second start of the same command costs: with executables on disk, and with JAX's own persistent cache alone.

    python benchmarks/second_start.py [--repeats 3]

Whole processes of `sample_jax.py` on the demo, in turns: the first start, which compiles everything; a second one that
finds executables (`wanjax.sampling.compile_cache`), and neither traces nor compiles; a second one that finds JAX's
persistent cache only, and traces and lowers everything again before it may look. And, as the demo is small, how long
tracing and lowering the 14B step takes, which executables save at every start. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from sharding.mesh import MeshShape, make_mesh
from wanjax.config import DiTConfig, SampleConfig
from wanjax.report import programs

ROOT = Path(__file__).parents[1]
JAX_ALONE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def seconds(folder: Path, environment: dict[str, str]) -> float:
    """Of one run of the demo, as a whole process."""
    start = time.perf_counter()
    command = [sys.executable, "sample_jax.py", "--output", str(folder / "video.npy")]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True, capture_output=True)
    return time.perf_counter() - start


def starts(folder: Path) -> dict[str, float]:
    """First and second starts with empty caches in `folder`."""
    ours = {"WANJAX_COMPILE_CACHE": str(folder / "ours")}
    alone = {"WANJAX_COMPILE_CACHE": "off", "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"), **JAX_ALONE}
    found = {"first start": seconds(folder, ours), "second, executables": seconds(folder, ours)}
    seconds(folder, alone)
    return found | {"second, JAX's cache alone": seconds(folder, alone)}


def tracing() -> float:
    """Seconds that the 14B step at 720p takes to trace and lower, on one device."""
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        stage = programs.denoise_step(SampleConfig(), DiTConfig(), programs.AbstractInputs(mesh))
        start = time.perf_counter()
        stage.lower()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    rounds = []
    for _ in range(parser.parse_args().repeats):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(starts(Path(folder)))
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    fastest = "second, executables"
    for name, value in medians.items():
        print(f"{name:28} {value:6.1f} s   {value / medians[fastest]:.2f}")
    lowered = tracing()
    print(f"{'tracing the 14B step':28} {lowered:6.1f} s")
    result = {name.replace(",", "").replace("'s", "").replace(" ", "_"): round(x, 2) for name, x in medians.items()}
    print(json.dumps({"benchmark": "second_start", **result, "trace_14b_step": round(lowered, 2)}))


if __name__ == "__main__":
    main()
