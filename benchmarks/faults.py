"""Faults of machines, and what becomes of a run: kills at random times, damaged checkpoints, a full disk, two writers.

    python benchmarks/faults.py                       # 3 of each: some minutes on a CPU
    python benchmarks/faults.py --kills 100

A training run is killed with SIGKILL again and again and started again; its losses have to be those of a run that was
not, to the bit, and its folder has to hold no file more. Caches, conversions and quantised checkpoints likewise. Prints
a table; exit code 1 if something was not held.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/diffusers"
STEPS = 12
CONFIG = """
import dataclasses, runpy
from wanjax.config import ShapesData
tiny = runpy.run_path({tiny!r})["get_config"]
def get_config():
    return dataclasses.replace(
        tiny(), checkpoint={golden!r}, dit=None, data=ShapesData("all", 0, 4), height=32, width=32, save_every=2,
        warmup=2, batch=1,
    )
"""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="of each kind of writer (3)")
    parser.add_argument("--damaged", type=int, default=5, help="damaged checkpoints (5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bucket", help="address for runs into a bucket (file:// of a folder of its own)")
    parser.add_argument("--only", default="", help="of the faults, those with these words in their names")
    flags = parser.parse_args()
    rng = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), rng)
        rows = {
            f"train, {flags.kills} kills": lambda: faults.killed_training(flags.kills),
            f"train into a bucket, {flags.kills} kills": lambda: faults.killed_bucket(flags.kills, flags.bucket),
            f"cache, {flags.kills} kills": lambda: faults.killed_writer(flags.kills, faults.cache, "clips"),
            f"convert, {flags.kills} kills": lambda: faults.killed_writer(flags.kills, faults.convert, "converted"),
            f"quantize, {flags.kills} kills": lambda: faults.killed_writer(flags.kills, faults.quantize, "int8"),
            f"{flags.damaged} damaged checkpoints": lambda: faults.damaged(flags.damaged),
            "full disk while training": faults.full_disk,
            "two runs on a workdir": faults.two_writers,
            **{
                f"{name}: one of four {what}": functools.partial(faults.one_of_four, name, what)
                for name in ("train", "sample")
                for what in ("with another flag", "of another version", "without a file")
            },
        }
        results = {name: _outcome(check) for name, check in rows.items() if flags.only in name}
    for name, (result, seconds) in results.items():
        print(f"{name:40s} {seconds:6.0f} s  {result}")
    sys.exit(0 if all(result.startswith("held") for result, _ in results.values()) else 1)


def _outcome(check: Callable[[], str]) -> tuple[str, float]:
    start = time.monotonic()
    try:
        result = f"held: {check()}"
    except AssertionError as error:
        result = f"NOT HELD: {error}"
    return result, time.monotonic() - start


class Faults:
    """Each method makes a fault, and raises `AssertionError` unless what is promised was held; says what it saw."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        self.config = folder / "config.py"
        self.config.write_text(CONFIG.format(tiny=str(ROOT / "configs/train_tiny.py"), golden=str(GOLDEN)))
        self._whole: Path | None = None

    def run(
        self, *command: str, after: float | None = None, limit: int | None = None, copies: Path | None = None
    ) -> subprocess.CompletedProcess:
        """A command of wanjax, killed after some seconds, or with a largest size of files; copies of buckets apart."""

        def limited() -> None:
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        variables = {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "jax"),
        }
        variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        variables |= {"WANJAX_REMOTE_CACHE": str(copies)} if copies else {}
        process = subprocess.Popen(
            [sys.executable, "-m", "wanjax", *command], cwd=self.folder, env=os.environ | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=limited,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    # ---- writers

    def train(self, workdir: Path | str, **options: object) -> subprocess.CompletedProcess:
        """A training run."""
        flags = ("--config", str(self.config), "--workdir", str(workdir), "--steps", str(STEPS))
        return self.run("train", *flags, **options)  # pyright: ignore[reportArgumentType]

    def cache(self, target: Path, after: float | None = None) -> subprocess.CompletedProcess:
        """A latent cache."""
        return self.run("cache", "--config", str(self.config), "--out", str(target), "--batch", "1", after=after)

    def convert(self, target: Path, after: float | None = None) -> subprocess.CompletedProcess:
        """A checkpoint in the other layout."""
        return self.run("convert", str(GOLDEN), str(target), "--layout", "official", "--no-pth", after=after)

    def quantize(self, target: Path, after: float | None = None) -> subprocess.CompletedProcess:
        """A checkpoint in 8 bits."""
        return self.run(
            "quantize", "--checkpoint", str(GOLDEN), "--output", str(target), "--format", "int8", after=after
        )

    def whole(self) -> Path:
        """The folder of a run that nothing happened to."""
        if self._whole is None:
            self._whole = self.folder / "whole"
            done = self.train(self._whole)
            assert done.returncode == 0, done.stderr[-500:]
        return self._whole

    # ---- faults

    def killed_training(self, kills: int) -> str:
        """Killed at random times, a run has the losses of one that was not, and leaves nothing lying about."""
        whole, started = self.whole(), time.monotonic()
        assert self.train(self.folder / "timed").returncode == 0
        seconds, workdir, restarts = time.monotonic() - started, self.folder / "killed", 0
        for _ in range(kills):
            done = self.train(workdir, after=self.rng.uniform(0.2, 1.0) * seconds)
            restarts += 1
            if done.returncode == 0:  # it was done before: another one
                assert losses(workdir) == losses(whole), "other losses"
                shutil.rmtree(workdir)
        done = self.train(workdir)
        assert done.returncode == 0, done.stderr[-500:]
        assert losses(workdir) == losses(whole), "other losses"
        more = names(workdir) - names(whole)
        assert not more, f"left lying about: {sorted(more)[:3]}"
        return f"{restarts} kills, {STEPS} losses equal to the bit, nothing left"

    def killed_bucket(self, kills: int, bucket: str | None) -> str:
        """Each start is on a machine that knows nothing of the ones before: the bucket alone is left of them."""
        from wanjax.remote import fetch

        whole, started = self.whole(), time.monotonic()
        address = f"{bucket or f'file://{self.folder}/bucket'}/run"
        assert self.train(f"{address}-timed", copies=self.folder / "timed-copies").returncode == 0
        seconds = time.monotonic() - started
        steps = []
        for number in range(kills):
            done = self.train(
                address, after=self.rng.uniform(0.3, 0.9) * seconds, copies=self.folder / f"copies{number}"
            )
            said = [line for line in done.stdout.splitlines() if ", step " in line]
            steps.append(int(said[0].rpartition("step ")[2]) if said else None)
        done = self.train(address, copies=self.folder / "last-copies")
        assert done.returncode == 0, done.stderr[-500:]
        workdir = fetch(address)
        assert losses(workdir) == losses(whole), "other losses"
        weights = "model/transformer/diffusion_pytorch_model.safetensors"
        assert (workdir / weights).read_bytes() == (whole / weights).read_bytes(), "other weights"
        return f"{kills} kills, begun at steps {steps}, losses and weights equal to the bit"

    def killed_writer(self, kills: int, write: Callable[..., subprocess.CompletedProcess], name: str) -> str:
        """Killed at random times, a writer leaves its target whole or not there, and its next start leaves no more."""
        (self.folder / name).mkdir()
        whole, started = self.folder / name / "whole", time.monotonic()
        done = write(whole)
        assert done.returncode == 0, done.stderr[-500:]
        seconds, target = time.monotonic() - started, self.folder / name / "killed"
        for _ in range(kills):
            write(target, after=self.rng.uniform(0.3, 1.0) * seconds)
            if name != "clips" and target.exists():
                assert names(target) == names(whole), "a part under the name of the whole"
                shutil.rmtree(target)
        done = write(target)
        assert done.returncode == 0, done.stderr[-500:]
        assert names(target) == names(whole), f"{sorted(names(target) ^ names(whole))[:3]}"
        left = {path.name for path in (self.folder / name).iterdir()} - {"whole", "killed"}
        assert not left, f"left lying about: {sorted(left)[:3]}"
        return f"{kills} kills, the same files, nothing left"

    def damaged(self, count: int) -> str:
        """A newest checkpoint with a fault anywhere is named, and the one before it taken."""
        from wanjax.training.whole import AFTERWARDS

        for number in range(count):
            workdir = self.folder / f"damaged{number}"
            shutil.copytree(self.whole(), workdir)
            shutil.rmtree(workdir / "model")
            steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
            files = [path for path in (workdir / f"checkpoints/{steps[-1]}").rglob("*") if path.is_file()]
            file = self.rng.choice([path for path in files if path.stat().st_size and path.name not in AFTERWARDS])
            data = bytearray(file.read_bytes())
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            file.write_bytes(data)
            done = self.train(workdir)
            assert done.returncode == 0, done.stderr[-500:]
            assert f"checkpoints/{steps[-1]} is not taken" in done.stderr, f"{file}: {done.stderr[-500:]}"
            assert losses(workdir) == losses(self.whole()), f"other losses, {file}"
        return f"{count} flipped bits: each named, the checkpoint before it taken, losses equal"

    def full_disk(self) -> str:
        """No file can be larger than some kB: one line, and with room again the run goes on to the same losses."""
        workdir = self.folder / "full"
        done = self.train(workdir, limit=20_000)
        assert done.returncode, "exit code 0"
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: checkpoint"), line
        assert "cannot be written" in line, line
        done = self.train(workdir)
        assert done.returncode == 0, done.stderr[-500:]
        assert losses(workdir) == losses(self.whole()), "other losses"
        return "one line, then the same losses"

    def two_writers(self) -> str:
        """The second run on a workdir is refused, and the first is not disturbed."""
        workdir = self.folder / "shared"
        command = [sys.executable, "-m", "wanjax", "train", "--config", str(self.config), "--workdir", str(workdir)]
        first = subprocess.Popen(
            [*command, "--steps", str(STEPS)], env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not (workdir / "metrics.jsonl").exists() and first.poll() is None:
            time.sleep(0.05)
        second = self.train(workdir)
        assert first.wait() == 0, "the first one failed"
        assert second.returncode == 2, f"exit code {second.returncode}"
        assert "another running process" in second.stderr.splitlines()[-1]
        assert losses(workdir) == losses(self.whole()), "other losses"
        return "the second refused in one line, the first undisturbed"

    def one_of_four(self, name: str, what: str) -> str:
        """One process of a run is unlike the others: all end with its reason, the last line of each, and soon."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        variables = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
        command = {
            "train": ("--config", str(self.config), "--workdir", str(self.folder / "four"), "--batch", "4"),
            "sample": ("--prompt", "x", "--output", str(self.folder / "four.mp4"), "--mesh", "ring=4"),
        }[name]
        flag = {"train": ("--steps", "7"), "sample": ("--steps", "7")}[name]
        file = {"train": ("--config", str(self.folder / "gone.py")), "sample": ("--config", "gone.py")}[name]
        words = {"with another flag": "has steps 7", "of another version": "has version", "without a file": "gone.py"}
        processes = []
        for index in range(4):
            odd = index == 2
            argv = [*command, *(flag if odd and "flag" in what else file if odd and "file" in what else ())]
            place = {"PYTHONPATH": str(self.other_version())} if odd and "version" in what else {}
            process = subprocess.Popen(
                [sys.executable, "-m", "wanjax", name, *argv], cwd=self.folder, text=True,
                env=os.environ | variables | place | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            processes.append(process)
        ends: dict[int, float] = {}
        while len(ends) < 4:
            ends |= {i: time.monotonic() for i, x in enumerate(processes) if i not in ends and x.poll() is not None}
            time.sleep(0.05)
        for process in processes:
            output = process.communicate()[0]
            assert process.returncode == 2, f"exit code {process.returncode}: {output[-300:]}"
            assert words[what] in output.splitlines()[-1], output[-300:]
        seconds = max(ends.values()) - min(ends.values())
        assert seconds < 10, f"the last one ended {seconds:.1f} s after the first"
        return f"all ended within {seconds:.1f} s, each with the reason in its last line"

    def other_version(self) -> Path:
        """A copy of the sources with one line more."""
        folder = self.folder / "other version"
        if not folder.exists():
            for package in ("wanjax", "sharding"):
                shutil.copytree(ROOT / package, folder / package)
            with (folder / "wanjax/errors.py").open("a") as file:
                file.write("# another version\n")
        return folder


def losses(workdir: Path) -> dict[int, float]:
    """By step, as they were written."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def names(folder: Path) -> set[str]:
    """Of all files, but those of TensorBoard and of checkpoints' contents, whose names say when they were written."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {"/".join(x.split("/")[:2]) if x.startswith("checkpoints/") else x for x in found if "tensorboard" not in x}


if __name__ == "__main__":
    main()
