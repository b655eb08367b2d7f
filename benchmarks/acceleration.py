"""What each acceleration saves and what it changes, on clips that the model never learned from.

    python benchmarks/acceleration.py [--clips 64] [--first-seed 10000000] [--checkpoint DIR] [--guidance 1]

The first and last frame of each clip of `wanjax.data.shapes` and its caption go in. Every switch denoises the same
noise under the same conditions as the plain sampler, clip by clip, in turns. teacache and magcache are first calibrated
on four other clips, to the threshold that runs the blocks in about half of the steps. Per switch: share of the plain
sampler's DiT evaluations; median over clips of its denoising time over the plain one's, of three runs the fastest; PSNR
and SSIM to the plain sampler's video; how much lower its PSNR to the true clip is than the plain one's. PSNR is that of
the mean squared error of all frames but the two given. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from wanjax import caching, pipeline
from wanjax.calibrate import calibrate
from wanjax.calibration import Calibration
from wanjax.config import SampleConfig
from wanjax.convert import Checkpoint
from wanjax.data.shapes import Kind, Shapes
from wanjax.quantize import requantized

CALIBRATED = 4  # clips
REPEATS = 3  # of a denoising; the fastest counts: the first one of a clip also looks programs up
WINDOW = 7  # of SSIM, pixels


class Measured(NamedTuple):
    """Of one clip and switch."""

    evaluations: float
    seconds: float
    video: np.ndarray  # uint8 [F, H, W, 3]


def switches(calibration: Calibration, config: SampleConfig) -> dict[str, dict[str, Any]]:
    """The settings of each row."""
    rows: dict[str, dict[str, Any]] = {"plain": {}, "fixed:2": {"cache": "fixed:2"}, "fixed:3": {"cache": "fixed:3"}}
    rows |= {f"{kind}:{t:g}": {"cache": f"{kind}:{t}"} for kind, t in calibration.thresholds.items()}
    if config.guidance != 1:
        rows |= {f"cfg-cache {k}": {"cfg_cache": str(k)} for k in (2, 4)}
    rows |= {format: {"quantize": format} for format in ("int8", "fp8")}
    return rows | {"int8fp8 attention": {"attention": "int8fp8"}, "fast": {"fast": True}}


def requests(
    flags: argparse.Namespace, first_seed: int, clips: int, folder: Path
) -> Iterator[tuple[Any, SampleConfig]]:
    """Clips and what is asked of the sampler for each; their end frames as files in a folder."""
    shapes = Shapes(first_seed, clips, flags.frames, flags.size, flags.kind)
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
            ),
        )


def run(config: SampleConfig, calibration: Calibration, rows: dict[str, dict[str, Any]]) -> dict[str, Measured]:
    """Every row on one clip: encoded once, denoised by each."""
    plan = pipeline.prepare(config)
    measured = {}
    with pipeline.placed(plan):
        conditions, vae = pipeline.encode(plan, {})
        networks: dict[Any, Any] = {}
        for name, settings in rows.items():
            changed = dataclasses.replace(config, **settings)
            dit = dataclasses.replace(requantized(plan.dit, changed.quantize), attention=changed.attention)
            rules = caching.make_rules(changed, plan.schedule, calibration)
            changed_plan = dataclasses.replace(plan, config=changed, dit=dit, caching=rules)
            if dit not in networks:
                networks[dit] = jax.block_until_ready(pipeline.load_dit(changed_plan, conditions))
            network, context = networks[dit]
            results, seconds = [], []
            for _ in range(REPEATS):
                start = time.perf_counter()
                results.append(pipeline.denoise(changed_plan, network, context, conditions.control))
                seconds.append(time.perf_counter() - start)
            latents, evaluations = results[-1]
            measured[name] = Measured(evaluations, min(seconds), pipeline.decode(changed_plan, vae, latents))
    return measured


def squared_error(video: np.ndarray, other: np.ndarray) -> float:
    """Mean over the pixels of all frames but the two given, of values in [0, 1]."""
    return float(np.mean((video[1:-1].astype(np.float64) - other[1:-1]) ** 2)) / 255**2


def decibel(errors: list[float]) -> float:
    """PSNR of the mean of squared errors."""
    return float(-10 * np.log10(max(float(np.mean(errors)), 1e-12)))


def ssim(video: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of all frames but the two given: windows of 7x7, all alike, grey."""
    x, y = (
        sliding_window_view(v[1:-1].mean(-1, dtype=np.float64) / 255, (WINDOW, WINDOW), (1, 2)) for v in (video, other)
    )
    mx, my = x.mean((-1, -2)), y.mean((-1, -2))
    vx, vy = x.var((-1, -2)), y.var((-1, -2))
    covariance = (x * y).mean((-1, -2)) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))


def figures(name: str, clips: list[tuple[np.ndarray, dict[str, Measured]]], steps: int) -> dict[str, float]:
    """One row, over all clips; each is its true video and its measurements."""
    return {
        "dit_work": float(np.mean([rows[name].evaluations for _, rows in clips])) / steps,
        "wall_ratio": float(np.median([rows[name].seconds / rows["plain"].seconds for _, rows in clips])),
        "psnr_to_plain_db": decibel([squared_error(rows[name].video, rows["plain"].video) for _, rows in clips]),
        "ssim_to_plain": float(np.mean([ssim(rows[name].video, rows["plain"].video) for _, rows in clips])),
        "truth_psnr_db": decibel([squared_error(rows[name].video, truth) for truth, rows in clips]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--first-seed", type=int, default=10_000_000, help="trainings take seeds below 1,000,000")
    parser.add_argument("--kind", choices=Kind.__args__, default="different")
    parser.add_argument("--checkpoint", default=str(Path(pipeline.__file__).parent / "demo"))
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=64, help="height and width")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--solver", default="unipc")
    parser.add_argument("--shift", type=float, default=3.0)
    parser.add_argument("--guidance", type=float, default=1.0, help="1: none, and no CFG cache to measure")
    parser.add_argument("--only", nargs="*", help="rows to measure beside plain and fast")
    flags = parser.parse_args()
    Checkpoint(flags.checkpoint)  # or one line says what is wrong with it
    with tempfile.TemporaryDirectory() as folder:
        others = requests(flags, flags.first_seed + flags.clips, CALIBRATED, Path(folder))
        calibration = calibrate([config for _, config in others])
        clips = []
        for clip, config in requests(flags, flags.first_seed, flags.clips, Path(folder)):
            rows = switches(calibration, config)
            if flags.only is not None:
                rows = {name: x for name, x in rows.items() if name in ("plain", "fast", *flags.only)}
            clips.append((clip.video, run(config, calibration, rows)))

    table = {name: figures(name, clips, flags.steps) for name in clips[0][1]}
    print(f"{flags.clips} clips, {flags.steps} steps, guidance {flags.guidance:g}, fast: {caching.FAST}")
    print(f"{'':20} {'DiT work':>8} {'time':>6} {'PSNR to plain':>13} {'SSIM':>6} {'PSNR to truth':>13} {'loss':>6}")
    for name, row in table.items():
        row["truth_psnr_loss_db"] = table["plain"]["truth_psnr_db"] - row["truth_psnr_db"]
        print(
            f"{name:20} {row['dit_work']:8.1%} {row['wall_ratio']:6.2f} {row['psnr_to_plain_db']:13.2f} "
            f"{row['ssim_to_plain']:6.4f} {row['truth_psnr_db']:13.2f} {row['truth_psnr_loss_db']:6.3f}"
        )
    rounded = {name: {key: round(value, 4) for key, value in row.items()} for name, row in table.items()}
    result = {"benchmark": "acceleration", "device": jax.devices()[0].device_kind, "clips": flags.clips}
    print(json.dumps({**result, "rows": rounded, "fast": rounded["fast"]}))


if __name__ == "__main__":
    main()
