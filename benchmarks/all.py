"""Runs every measurement that this machine can make, and writes down what came out: `make bench`.

    python benchmarks/all.py [--quick] [--only scaling start_time] [--folder out/bench]

In FOLDER are then DATE.json, with each benchmark's own last line, and DATE.md, a table of its figures; what was not run
is in both, with the reason. --quick takes few repeats and clips, in minutes instead of hours: good for seeing that all
works, not for figures to show.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHOWN = 16
"""Rows of the table for a benchmark; the JSON has all."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A benchmark.

    command, quick: its script with flags; for --quick.
    needs: a module without which it cannot run, and the extra that brings it.
    """

    command: str
    quick: str
    needs: tuple[str, str] | None = None


CASES = {
    "against_diffusers": Case("against_diffusers.py", "against_diffusers.py --repeats 1", ("diffusers", "golden")),
    "scaling": Case("scaling.py", "scaling.py --devices 8"),
    "acceleration": Case("acceleration.py", "acceleration.py --clips 4"),
    "demo_quality": Case("demo_quality.py", "demo_quality.py --clips 4"),
    "quantized": Case("quantized.py", "quantized.py --tokens 256 --heads 1"),
    "kernels": Case("tpu_kernels.py", "tpu_kernels.py --targets v6e:2x4 --kernels forward", ("libtpu", "aot")),
    "start_time": Case("second_start.py", "second_start.py --repeats 1"),
    "decoding": Case("decoding.py", "decoding.py --clips 1 --rounds 1"),
    "chip": Case("on_chip.py --small --no-count", "on_chip.py --small --no-count --limit 60"),
}
"""By name. What trains, breaks or fuzzes is not measured here: demo_lora, faults, fuzz, server."""


def run(case: Case, quick: bool, limit: float) -> dict[str, Any]:
    """What a benchmark printed last, how long it took; or why there is nothing."""
    if case.needs and importlib.util.find_spec(case.needs[0]) is None:
        return {"not run": f"{case.needs[0]} is not installed: pip install 'wanjax[{case.needs[1]}]'"}
    script, *flags = (case.quick if quick else case.command).split()
    words = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    try:
        done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"not run": f"it took longer than {limit:.0f} s; --limit allows more"}
    seconds = round(time.perf_counter() - start, 1)
    command = f"python benchmarks/{' '.join([script, *flags])}"
    print(done.stdout, end="")
    if done.returncode:
        return {"command": command, "seconds": seconds, "not run": f"it failed with exit code {done.returncode}"}
    try:
        result = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"command": command, "seconds": seconds, "not run": "its last line is no JSON"}
    return {"command": command, "seconds": seconds, "result": result}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The numbers of a result, with the path to each."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name} {key}".strip())
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{name} {i + 1}".strip())
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, f"{value:.6g}"


def table(about: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """All figures as Markdown."""
    lines = [f"# Measured on {about['date']}", "", ", ".join(f"{k} {v}" for k, v in about.items() if k != "date"), ""]
    lines += ["| benchmark | figure | |", "|---|---|---|"]
    for name, row in found.items():
        if "not run" in row:
            lines.append(f"| {name} | not measured | {row['not run']} |")
            continue
        figures = list(leaves(row["result"]))
        lines.append(f"| **{name}** | `{row['command']}` | {row['seconds']} s |")
        lines += [f"| | {figure} | {value} |" for figure, value in figures[:SHOWN]]
        if len(figures) > SHOWN:
            lines.append(f"| | {len(figures) - SHOWN} more in the JSON | |")
    return "\n".join(lines) + "\n"


def about_machine(quick: bool) -> dict[str, Any]:
    """When, on what, of which state of the code."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    now = datetime.datetime.now().astimezone().replace(microsecond=0)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    return {"date": now.isoformat(), **machine, "commit": git.stdout.strip() or "none", "quick": quick}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 1 where a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats and clips")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--folder", type=Path, default=Path("out/bench"), help="of what is written (out/bench)")
    parser.add_argument("--limit", type=float, default=7200, help="seconds for each")
    args = parser.parse_args(argv)
    about, found = about_machine(args.quick), {}
    args.folder.mkdir(parents=True, exist_ok=True)
    place = args.folder / about["date"].replace(":", "").split("+")[0]
    for name in args.only:
        print(f"== {name}", flush=True)
        found[name] = run(CASES[name], args.quick, args.limit)
        place.with_suffix(".json").write_text(json.dumps({"about": about, "benchmarks": found}, indent=1) + "\n")
        place.with_suffix(".md").write_text(table(about, found))
    print(f"{place}.json and {place}.md")
    return int(any("failed" in row.get("not run", "") for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
