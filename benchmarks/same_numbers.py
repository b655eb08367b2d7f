"""Shows that a refactoring changed no number: runs the same things in two checkouts and compares what they wrote.

    python benchmarks/same_numbers.py OLD NEW        # folders, or revisions of this repository
    python benchmarks/same_numbers.py                # HEAD and the working tree
    python benchmarks/same_numbers.py v1 . --only demo magcache train --keep out/same

Sampled are latents and videos of the demo model: solvers, guidance, step caches, 8 bits, adapters, and meshes of eight
fake devices. Trained are tiny networks for ten steps, for their losses and exported weights. And a calibration file, a
latent cache, converted and quantised checkpoints are made. All of it on the CPU, in processes of each checkout.
Everything must be equal to the bit, but for the `samples/` figures of validation, which may differ by 1e-5 of their
size. A line for each file says whether it is equal, or how many numbers differ and by how much. The last line is JSON;
the exit code is 1 where something is not as it must be. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from comparison.cases import CASES, Case, choose, spelled, write_configs
from comparison.files import compare, only

from wanjax.cli import exit_codes
from wanjax.errors import InputError

ROOT = Path(__file__).parents[1]
RUN_COMMANDS = Path(__file__).parent / "comparison/run_commands.py"


class Side(NamedTuple):
    """A checkout.

    name: old or new.
    folder: of the checkout.
    out: where its outputs go.
    compiled: where its compiled programs go.
    """

    name: str
    folder: Path
    out: Path
    compiled: Path

    @property
    def log(self) -> Path:
        """What the commands print."""
        return self.out / "log.txt"

    def run(self, cases: dict[str, Case]) -> dict[str, str]:
        """Run cases, a process for each number of devices; of those that failed, how."""
        write_configs(self.out)
        failed = dict.fromkeys(cases, "did not end")
        for devices in sorted({case.devices for case in cases.values()}):
            chosen = {name: case for name, case in cases.items() if case.devices == devices}
            for ended in self.process(chosen, devices):
                print(f"{self.name}: {ended['case']} {ended['seconds']:.1f} s", file=sys.stderr, flush=True)
                del failed[ended["case"]]
                if ended["code"]:
                    failed[ended["case"]] = f"exit code {ended['code']}"
        return failed

    def process(self, cases: dict[str, Case], devices: int) -> Iterator[dict[str, Any]]:
        """What `run_commands.py` says of cases that it runs in this checkout."""
        commands = json.dumps([(name, spelled(case, self.folder, self.out)) for name, case in cases.items()])
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        variables = {
            "PYTHONPATH": str(self.folder),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            # The cases share most of their programs: JAX keeps what it compiled, of this checkout and for this run.
            "WANJAX_COMPILE_CACHE": "off",
            "JAX_COMPILATION_CACHE_DIR": str(self.compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with self.log.open("a") as log:
            child = subprocess.Popen(
                [sys.executable, str(RUN_COMMANDS), commands],
                cwd=self.folder,
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            with child:
                assert child.stdout is not None
                yield from (json.loads(line) for line in child.stdout if line.startswith('{"case"'))


class Row(NamedTuple):
    """A line of the report; the verdict is equal, close or DIFFERENT."""

    case: str
    file: str
    verdict: str
    remark: str


def compare_case(name: str, case: Case, old: Side, new: Side, failed: list[str]) -> Iterator[Row]:
    """A row for each file of a case, or one that says that it failed."""
    found = [
        {str(path.relative_to(side.out)) for pattern in case.files for path in side.out.glob(pattern) if path.is_file()}
        for side in (old, new)
    ]
    if failed or not any(found):
        yield Row(name, "", "DIFFERENT", "; ".join(failed) or "nothing was written")
        return
    for side, file in only(*found):
        yield Row(name, file, "DIFFERENT", f"only {side} has it")
    for file in sorted(found[0] & found[1]):
        yield Row(name, file, *compare(old.out / file, new.out / file))


def checkout(given: str, folder: Path) -> Path:
    """A folder as it is; a revision of this repository, unpacked into `folder`.

    Raises:
      InputError: it is neither.
    """
    if Path(given).is_dir():
        if not (Path(given) / "sample_jax.py").is_file():
            raise InputError(f"{given} has no sample_jax.py; a checkout of this project is needed; give its root")
        return Path(given).resolve()
    made = subprocess.run(["git", "archive", given], cwd=ROOT, capture_output=True)
    if made.returncode:
        raise InputError(f"{given} is neither a folder nor a revision of {ROOT}; one of them is needed; such as HEAD")
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder.resolve()


def run_both(old: Side, new: Side, cases: dict[str, Case]) -> list[Row]:
    """Run the cases in both checkouts at the same time, and compare."""
    with ThreadPoolExecutor(2) as threads:
        failed = list(threads.map(lambda side: side.run(cases), (old, new)))
    rows = []
    for name, case in cases.items():
        reasons = [f"{side.name}: {how[name]}" for side, how in zip((old, new), failed, strict=True) if name in how]
        rows += compare_case(name, case, old, new, reasons)
    for side, how in zip((old, new), failed, strict=True):
        if how:
            print(f"{side.log} ends:\n{side.log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
    return rows


def print_table(rows: list[Row]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join(f"{text:{width}}" for text, width in zip(row, (*widths, 0), strict=True)).rstrip())


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", default="HEAD", help="folder or revision (default: HEAD)")
    parser.add_argument("new", nargs="?", default=str(ROOT), help="likewise (default: the working tree)")
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"of {', '.join(CASES)}; with those that they need")
    parser.add_argument("--keep", metavar="DIR", help="keep outputs and logs in this folder, which is new or empty")
    return parser.parse_args()


def main() -> None:
    flags, start = read_flags(), time.perf_counter()
    cases = choose(flags.only)
    if flags.keep and Path(flags.keep).exists() and any(Path(flags.keep).iterdir()):
        raise InputError(f"--keep {flags.keep} is not empty; a new or empty folder is accepted; give another")
    with tempfile.TemporaryDirectory(prefix="same_numbers_") as temporary:
        folder = Path(temporary).resolve()
        out = Path(flags.keep).resolve() if flags.keep else folder / "out"
        old, new = (
            Side(name, checkout(given, folder / f"checkout-{name}"), out / name, folder / f"compiled-{name}")
            for name, given in (("old", flags.old), ("new", flags.new))
        )
        rows = run_both(old, new, cases)
    print_table(rows)
    counts = {
        verdict.lower(): sum(row.verdict == verdict for row in rows) for verdict in ("equal", "close", "DIFFERENT")
    }
    result = {"benchmark": "same_numbers", "cases": len(cases)} | counts
    print(json.dumps(result | {"seconds": round(time.perf_counter() - start, 1)}))
    sys.exit(1 if counts["different"] else 0)


if __name__ == "__main__":
    with exit_codes():
        main()
