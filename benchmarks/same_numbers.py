"""Whether two checkouts of this project compute the same numbers, to the bit: for changes that must not change any.

    python benchmarks/same_numbers.py OLD NEW             # folders or git revisions
    python benchmarks/same_numbers.py                     # HEAD against the working tree
    python benchmarks/same_numbers.py OLD NEW --only demo calibration

Both run the same commands: sampling with the demo model, plain, with every cache, sharded and in 8 bits; a calibration;
a conversion; a latent cache; ten training steps of every objective. What they write is compared: arrays to the bit,
losses and figures as they are printed. Sampled figures of validation may differ by rounding (1e-4), and nothing else.
Prints a table; the last line is JSON; exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
SPELLINGS = {
    "calibrate": ("wanjax.calibrate", "wanjax.sampling.calibrate"),
    "convert": ("wanjax.convert", "wanjax.weights"),
    "quantize": ("wanjax.quantize", "wanjax.weights.quantize"),
    "cache": ("wanjax.data.cache", "wanjax.training.latent_cache"),
}
"""Of commands, before they were those of `python -m wanjax`."""
ROUNDING = {"samples/": 1e-4}
"""Relative difference that figures with such names may have."""
CONFIG = """
from wanjax.config import *
SHAPES = ShapesData("all", 0, 12)
TRAIN = dict(workdir={workdir!r}, encoders="wanjax/demo", frames=9, height=32, width=32, batch=2, steps=10, warmup=2,
             dtype="float32", ema_decay=0.9, mesh="data=1,fsdp=2,ring=2,ulysses=2", save_every=100)
DIT = DiTConfig(dim=64, ffn_dim=96, num_heads=4, num_layers=2, in_channels=68, out_channels=32, freq_dim=32,
                text_dim={text_dim}, text_len=80, image_dim={image_dim}, image_positions={image_positions})
VAE = VAEConfig(dim=8, z_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1, latents_mean=(0.0,) * 4,
                latents_std=(1.0,) * 4)
def get_config():
    return TrainConfig(**TRAIN | dict({changes}))
"""
TRAININGS = {
    "dit": "dit=DIT, data=SHAPES, tasks=TaskMix(i2v=1.0, flf2v=1.0, continuation=1.0), accumulate=2",
    "validated": "dit=DIT, data=SHAPES, validation=ShapesData('all', 50, 4), validate_every=5, sample_every=5, "
    "sample_clips=2, sample_steps=2, batch=4",
    "lora": "checkpoint='wanjax/demo', data=SHAPES, lora=LoRAConfig(rank=2), mesh='fsdp=2,ulysses=4'",
    "cached": "dit=DIT, data=CachedData(CACHE, of=SHAPES), mesh='fsdp=2,ulysses=4'",
    "vae": "encoders=None, vae=VAE, data=SHAPES, snippet=(5, 16, 16), mesh='fsdp=2,ulysses=4'",
}
DEMO = {
    "demo": "",
    "demo dpmpp": "--solver dpmpp --steps 3",
    "demo euler, guided": "--solver euler --guidance 4 --steps 3",
    "demo, diffusers' conventions": "--conventions diffusers --steps 3",
    "demo fixed:2": "--cache fixed:2 --steps 6",
    "demo cfg-cache": "--cfg-cache 2 --guidance 4 --steps 8",
    "demo fast": "--fast --guidance 4 --steps 8",
    "demo teacache": "--cache teacache:0.3 --calibration {calibration} --steps 6 --guidance 4",
    "demo magcache": "--cache magcache:0.1 --calibration {calibration} --steps 6 --guidance 4",
    "demo int8": "--quantize int8",
    "demo on data=2,ulysses=4": "--mesh data=2,ulysses=4 --guidance 4 --steps 3",
    "demo on ring=2,ulysses=4": "--mesh ring=2,ulysses=4 --steps 3",
    "demo on fsdp=8": "--mesh fsdp=8 --steps 3",
}


class Checkout:
    """A checkout, and a folder for what it writes."""

    def __init__(self, path: Path, out: Path):
        self.path, self.out = path, out
        out.mkdir(parents=True)

    def run(self, *command: str) -> None:
        """A Python command in the checkout.

        Raises:
          SystemExit: it fails.
        """
        flags = "--xla_force_host_platform_device_count=8"
        environment = os.environ | {"PYTHONPATH": str(self.path), "XLA_FLAGS": flags, "WANJAX_COMPILE_CACHE": "off"}
        done = subprocess.run(
            [sys.executable, *command], cwd=self.path, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{self.path}: {' '.join(command)} failed:\n{done.stderr[-3000:]}")

    def command(self, name: str, *flags: str) -> None:
        """A command of the package, as this checkout spells it."""
        if (self.path / "wanjax/commands").is_dir():
            return self.run("-m", "wanjax", name, *flags)
        places = {module: self.path / module.replace(".", "/") for module in SPELLINGS[name]}
        module = next(m for m, p in places.items() if p.with_suffix(".py").exists() or (p / "__main__.py").exists())
        return self.run("-m", module, *flags)

    def calibration(self) -> Path:
        """A calibration file of the demo, made when first asked for."""
        file = self.out / "calibration.json"
        if not file.exists():
            demo = "wanjax/demo"
            flags = {"checkpoint": demo, "first-frame": f"{demo}/first.png", "last-frame": f"{demo}/last.png"}
            flags |= {"prompt": "a red circle", "height": "64", "width": "64", "frames": "17", "steps": "6"}
            flags |= {"shift": "40", "guidance": "4", "dtype": "float32", "output": str(file)}
            self.command("calibrate", *(x for name, value in flags.items() for x in (f"--{name}", value)))
        return file

    def sample(self, name: str, flags: str) -> None:
        """A run of the demo: latents and video."""
        stem = self.out / name.replace(" ", "_").replace(",", "").replace("'", "").replace(":", "-").replace("=", "")
        if "{calibration}" in flags:
            flags = flags.format(calibration=self.calibration())
        files = ("--output", f"{stem}.npy", "--save-latents", f"{stem}.latents.npy")
        self.run("sample_jax.py", *files, *flags.split())

    def train(self, name: str, changes: str) -> None:
        """Ten steps: losses, figures and what is exported."""
        demo = self.path / "wanjax/demo"
        dit = json.loads((demo / "transformer/config.json").read_text())
        sizes = {
            "text_dim": dit["text_dim"],
            "image_dim": dit["image_dim"],
            "image_positions": dit["pos_embed_seq_len"],
        }
        config = self.out / f"{name}.py"
        config.write_text(CONFIG.format(workdir=str(self.out / name), changes=changes, **sizes))
        self.run("train_jax.py", "--config", str(config))

    def convert(self) -> None:
        """The demo in the other layout and back, and in 8 bits."""
        official, back = str(self.out / "official"), str(self.out / "back")
        self.command("convert", "wanjax/demo", official, "--layout", "official", "--no-pth")
        self.command("convert", official, back, "--layout", "diffusers")
        int8 = str(self.out / "int8")
        self.command("quantize", "--checkpoint", "wanjax/demo", "--output", int8, "--format", "int8", "--layers", "1:2")


def cases(checkout: Checkout) -> dict[str, Any]:
    """What is run, by name."""
    found: dict[str, Any] = {"calibration": checkout.calibration, "conversion": checkout.convert}
    found |= {name: lambda n=name, f=flags: checkout.sample(n, f) for name, flags in DEMO.items()}
    return found | {f"training {n}": lambda n=n, c=c: checkout.train(n, c) for n, c in TRAININGS.items()}


def numbers(folder: Path) -> Iterator[tuple[str, Any]]:
    """Everything that was written, by name: arrays, and figures that are not times."""
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".npy":
            yield name, np.load(file)
        elif file.suffix == ".safetensors":
            yield from ((f"{name} {key}", value) for key, value in load_file(file).items())
        elif file.name == "calibration.json":
            yield from ((f"{name} {k}", np.asarray(v)) for k, v in json.loads(file.read_text()).items() if k[0] != "_")
        elif file.name == "metrics.jsonl":
            for line in map(json.loads, file.read_text().splitlines()):
                kept = {k: v for k, v in line.items() if "/" in k or k in ("loss", "grad_norm")}
                yield from ((f"{name} step {line['step']} {k}", np.asarray(v)) for k, v in kept.items())


def compare(old: Any, new: Any, name: str) -> tuple[bool, str]:
    """Whether two values are the same, and in words how far they are from each other."""
    if old is None or new is None:
        return False, "missing in " + ("OLD" if old is None else "NEW")
    if old.dtype != new.dtype or old.shape != new.shape:
        return False, f"{old.dtype} {old.shape} against {new.dtype} {new.shape}"
    if old.tobytes() == new.tobytes():
        return True, "equal"
    if old.dtype.kind not in "fiu" and old.dtype.name != "bfloat16":
        return False, f"{old} against {new}"
    a, b = old.astype(np.float64), new.astype(np.float64)
    relative = float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12))
    allowed = next((limit for part, limit in ROUNDING.items() if part in name), 0.0)
    return relative <= allowed, f"differ by {relative:.1e} of the largest, {np.mean(a != b):.1%} of the numbers"


def checkout(name: str, folder: Path) -> Path:
    """A folder as it is, or a git revision of this repository as a folder."""
    if Path(name).is_dir():
        return Path(name).resolve()
    folder.mkdir()
    archive = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
    return folder


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", default="HEAD", help="folder or git revision (default: HEAD)")
    parser.add_argument("new", nargs="?", default=str(ROOT), help="the same (default: the working tree)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases, by a part of their names")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        pair = [Checkout(checkout(getattr(flags, x), here / f"{x}-code"), here / x) for x in ("old", "new")]
        chosen = [n for n in cases(pair[0]) if flags.only is None or any(part in n for part in flags.only)]
        for name in chosen:
            print(f"{name} ..", flush=True)
            for side in pair:
                cases(side)[name]()
        old, new = (dict(numbers(side.out)) for side in pair)
    rows = {name: compare(old.get(name), new.get(name), name) for name in {**old, **new}}
    shown = {name: words for name, (same, words) in rows.items() if words != "equal"}
    print("\n".join(f"{name:70} {words}" for name, words in shown.items()))
    different = sum(not same for same, _ in rows.values())
    print(
        f"{len(rows)} arrays and figures of {len(chosen)} cases: {different} differ, {len(shown) - different} rounded"
    )
    print(json.dumps({"benchmark": "same_numbers", "compared": len(rows), "different": different, "cases": chosen}))
    return int(different > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
