"""What each acceleration saves and what it changes, on clips that the model never learned from.

    python benchmarks/acceleration.py [--clips 64] [--first-seed 10000000] [--checkpoint DIR] [--guidance 1]
    python benchmarks/acceleration.py --clips 16 --settings fixed:2,teacache:0.3,magcache:0.1+fp8    # candidates
    python benchmarks/acceleration.py --guidance 4 --settings fixed:2+cfg:2,fixed:2+cfg:2@0.2

The first and last frame of each clip of `wanjax.demo.shapes` and its caption go in. Every row denoises the same noise
under the same conditions as the plain sampler, clip by clip, in turns. teacache and magcache are first calibrated on
four other clips, and without --settings measured at the threshold that runs the blocks in about half of the steps. Per
row: share of the plain sampler's DiT evaluations; median over clips of its denoising time over the plain one's; PSNR
and SSIM to the plain sampler's video; how much lower its PSNR to the true clip is than the plain one's. PSNR is that of
the mean squared error of all frames but the two given. `plain` is float32; the row `bfloat16`, its DiT in that, is what
the loss of `int8` and `fp8` is to be compared with. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from wanjax import demo
from wanjax.cli import exit_codes
from wanjax.config import NETWORK_FIELDS, SampleConfig
from wanjax.demo.shapes import Kind, ProceduralClips
from wanjax.errors import InputError
from wanjax.sampling import cache_rules
from wanjax.sampling.calibrate import calibrate
from wanjax.sampling.calibration import Calibration
from wanjax.sampling.pipeline import Pipeline
from wanjax.sampling.request import Request
from wanjax.training.metrics import ssim
from wanjax.weights import Checkpoint

CALIBRATED = 4  # clips
SETTINGS = """rows to measure beside plain and fast, separated by commas; of a row, joined by +: fixed:K, teacache:T,
magcache:T, cfg:K or cfg:K@SHARE (of the first steps, that always run both branches; without it, by the calibration),
int8, fp8, bfloat16, float32, attention:KERNEL"""


class Measured(NamedTuple):
    """Of one clip and switch."""

    evaluations: float
    seconds: float
    video: np.ndarray  # uint8 [F, H, W, 3]


class Row(NamedTuple):
    """Settings that differ from the plain ones, and the share of the first steps without CFG cache, or None."""

    settings: dict[str, Any]
    guided: float | None = None


def parse(text: str) -> dict[str, Row]:
    """The rows of --settings, by their names.

    Raises:
      InputError: one is not understood.
    """
    return {name: parse_row(name) for name in text.split(",")}


def parse_row(name: str) -> Row:
    settings: dict[str, Any] = {}
    guided = None
    for part in name.split("+"):
        kind, _, value = part.partition(":")
        if kind in ("fixed", "teacache", "magcache"):
            settings["cache"] = part
        elif kind == "cfg":
            settings["cfg_cache"], _, share = value.partition("@")
            try:
                guided = float(share) if share else None
            except ValueError as error:
                raise InputError(f"--settings {name!r}: {share!r} is no share of the steps; give cfg:2@0.4") from error
        elif kind == "attention" and value in ("reference", "flash", "int8fp8"):
            settings["attention"] = value
        elif part in ("int8", "fp8"):
            settings["quantize"] = part
        elif part in ("bfloat16", "float32"):
            settings["dtype"] = part
        else:
            raise InputError(f"--settings {name!r}: {part!r} is not understood; see --help")
    return Row(settings, guided)


def every_switch(calibration: Calibration, guidance: float) -> str:
    """--settings where none are given."""
    calibrated = [f"{kind}:{threshold:g}" for kind, threshold in calibration.thresholds.items()]
    both_branches = ["cfg:2", "cfg:4"] if guidance != 1 else []
    formats = ["bfloat16", "int8", "fp8", "attention:int8fp8"]
    return ",".join(["fixed:2", "fixed:3", *calibrated, *both_branches, *formats])


def requests(
    flags: argparse.Namespace, first_seed: int, clips: int, folder: Path
) -> Iterator[tuple[Any, SampleConfig]]:
    """Clips and what is asked of the sampler for each; their end frames as files in a folder."""
    shapes = ProceduralClips(first_seed, clips, flags.frames, flags.size, flags.kind)
    for i in range(clips):
        clip = shapes[i]
        for name, frame in (("first", clip.video[0]), ("last", clip.video[-1])):
            Image.fromarray(frame).save(folder / f"{first_seed + i}-{name}.png")
        yield (
            clip,
            SampleConfig(
                checkpoint=flags.checkpoint,
                first_frame=str(folder / f"{first_seed + i}-first.png"),
                last_frame=str(folder / f"{first_seed + i}-last.png"),
                prompt=clip.caption,
                negative_prompt="",
                height=flags.size,
                width=flags.size,
                frames=flags.frames,
                steps=flags.steps,
                solver=flags.solver,
                shift=flags.shift,
                guidance=flags.guidance,
                seed=first_seed + i,
                dtype="float32",
                compile_cache="off",  # JAX keeps what it compiled from clip to clip
            ),
        )


class Sampler:
    """The pipelines that the rows need: one for each kind of network, which stays."""

    def __init__(self, calibration: str, rows: dict[str, Row]):
        self.calibration, self.rows = calibration, rows
        self.pipes: dict[tuple, Pipeline] = {}
        self.compiled: set[str] = set()

    def __call__(self, config: SampleConfig) -> dict[str, Measured]:
        """Every row on one clip, each compiled before it is timed."""
        measured = {}
        for name, row in self.rows.items():
            pipe, request = self.prepared(config, row)
            if name not in self.compiled:
                pipe(request, progress=False)
                self.compiled.add(name)
            result = pipe(request, progress=False)
            measured[name] = Measured(result.evaluations, result.seconds["denoise"], result.video)
        return measured

    def prepared(self, config: SampleConfig, row: Row) -> tuple[Pipeline, Request]:
        """A row's pipeline and request."""
        changed = dataclasses.replace(config, calibration=self.calibration, **row.settings)
        networks = tuple(getattr(changed, name) for name in NETWORK_FIELDS)
        if networks not in self.pipes:
            self.pipes[networks] = Pipeline(changed, keep="all")
        pipe = self.pipes[networks]
        asked = {name: value for name, value in vars(changed).items() if name not in NETWORK_FIELDS}
        request = pipe.prepare(**asked)
        if row.guided is not None and request.rules is not None and request.rules.may_skip_uncond is not None:
            skips = np.arange(changed.steps) >= math.ceil(row.guided * changed.steps)
            request = dataclasses.replace(request, rules=request.rules._replace(may_skip_uncond=skips))
        return pipe, request


def squared_error(video: np.ndarray, other: np.ndarray) -> float:
    """Mean over the pixels of all frames but the two given, of values in [0, 1]."""
    return float(np.mean((video[1:-1].astype(np.float64) - other[1:-1]) ** 2)) / 255**2


def decibel(errors: list[float]) -> float:
    """PSNR of the mean of squared errors."""
    return float(-10 * np.log10(max(float(np.mean(errors)), 1e-12)))


def figures(name: str, clips: list[tuple[np.ndarray, dict[str, Measured]]], steps: int) -> dict[str, float]:
    """One row, over all clips; each is its true video and its measurements."""
    return {
        "dit_work": float(np.mean([rows[name].evaluations for _, rows in clips])) / steps,
        "wall_ratio": float(np.median([rows[name].seconds / rows["plain"].seconds for _, rows in clips])),
        "psnr_to_plain_db": decibel([squared_error(rows[name].video, rows["plain"].video) for _, rows in clips]),
        "ssim_to_plain": float(np.mean([ssim(rows[name].video[1:-1], rows["plain"].video[1:-1]) for _, rows in clips])),
        "truth_psnr_db": decibel([squared_error(rows[name].video, truth) for truth, rows in clips]),
    }


def check(flags: argparse.Namespace, rows: dict[str, Row]) -> dict[str, Row]:
    """The rows, if they can be used.

    Raises:
      InputError: one cannot.
    """
    for row in rows.values():
        cache_rules.switches(dataclasses.replace(SampleConfig(guidance=flags.guidance), **row.settings))
    return rows


def print_table(table: dict[str, dict[str, float]]) -> None:
    print(f"{'':20} {'DiT work':>8} {'time':>6} {'PSNR to plain':>13} {'SSIM':>6} {'PSNR to truth':>13} {'loss':>6}")
    for name, row in table.items():
        print(
            f"{name:20} {row['dit_work']:8.1%} {row['wall_ratio']:6.2f} {row['psnr_to_plain_db']:13.2f} "
            f"{row['ssim_to_plain']:6.4f} {row['truth_psnr_db']:13.2f} {row['truth_psnr_loss_db']:6.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--first-seed", type=int, default=10_000_000, help="trainings take seeds below 1,000,000")
    parser.add_argument("--kind", choices=Kind.__args__, default="different")
    parser.add_argument("--checkpoint", default=str(demo.FOLDER))
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=64, help="height and width")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--solver", default="unipc")
    parser.add_argument("--shift", type=float, default=8.0)
    parser.add_argument("--guidance", type=float, default=1.0, help="1: none, and no CFG cache to measure")
    parser.add_argument("--settings", help=f"{SETTINGS} (default: every switch by itself)")
    flags = parser.parse_args()
    start = time.perf_counter()
    Checkpoint(flags.checkpoint)  # or one line says what is wrong with it
    rows = check(flags, parse(flags.settings)) if flags.settings else {}
    with tempfile.TemporaryDirectory() as folder:
        others = requests(flags, flags.first_seed + flags.clips, CALIBRATED, Path(folder))
        configs = [config for _, config in others]
        varied = ("prompt", "first_frame", "last_frame", "seed")
        calibration = calibrate(configs[0], [{name: getattr(c, name) for name in varied} for c in configs])
        calibration.write(str(Path(folder) / "calibration.json"))
        rows = rows or parse(every_switch(calibration, flags.guidance))
        sample = Sampler(
            str(Path(folder) / "calibration.json"), {"plain": Row({}), **rows, "fast": Row({"fast": True})}
        )
        held_out = requests(flags, flags.first_seed, flags.clips, Path(folder))
        clips = [(clip.video, sample(config)) for clip, config in held_out]

    table = {name: figures(name, clips, flags.steps) for name in clips[0][1]}
    for row in table.values():
        row["truth_psnr_loss_db"] = table["plain"]["truth_psnr_db"] - row["truth_psnr_db"]
    print(f"{flags.clips} clips, {flags.steps} steps, guidance {flags.guidance:g}, fast: {cache_rules.FAST}")
    print_table(table)
    rounded = {name: {key: round(value, 4) for key, value in row.items()} for name, row in table.items()}
    result: dict[str, Any] = {"benchmark": "acceleration", "device": jax.devices()[0].device_kind, "clips": flags.clips}
    result |= {"seconds": round(time.perf_counter() - start, 1), "rows": rounded, "fast": rounded["fast"]}
    print(json.dumps(result))


if __name__ == "__main__":
    with exit_codes():
        main()
