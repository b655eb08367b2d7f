"""How well the demo model fills in between two frames of clips that it never learned from, seen as people see it.

    python benchmarks/demo_quality.py [--clips 64] [--checkpoint DIR]... [--sheet FILE.png] [--animation FILE.webp]

By clip, and their means over all clips and over those of a kind of motion (`wanjax.demo.likeness` says what they are):

    PSNR        in dB, of the frames between; over fading from the first frame to the last, over holding the nearer one
    IoU         of the drawn shapes with the true ones, in the frames between
    edges       likeness of their outlines, at most 1
    corners     likeness of their corners, at most 1, of the clips that have some
    turn        share of clips whose figures turn as the caption says, of those where that can be seen
    end PSNR    of the first and the last frame, and end IoU

`fade` is the cross-fade, `VAE` what the VAE alone makes of the true clips: nothing in its latents can be better. Give
--checkpoint several times to compare stages, and --preset or --lora for a student. Held-out clips are for reports:
whatever is chosen, be it steps, shift or a stage, choose it with --choose, on clips of other seeds. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sharding.mesh import MeshShape, make_mesh
from sharding.rules import parameter_sharding
from wanjax.cli import exit_codes
from wanjax.conditioning.encoders import open_encoders
from wanjax.conditioning.frames import to_pixels
from wanjax.config import SampleConfig, ShapesData, TaskMix, TrainConfig
from wanjax.data.batch import shard_batch
from wanjax.data.buckets import Order
from wanjax.data.samples import TaskSamples
from wanjax.demo import get_config, likeness
from wanjax.demo.shapes import Kind, ProceduralClips
from wanjax.diffusion import solvers
from wanjax.sampling import presets
from wanjax.sampling.batch import sample_latents
from wanjax.sampling.decoding import decode_batch
from wanjax.training import metrics
from wanjax.weights import Checkpoint, lora

HELD_OUT_SEED, CHOOSING_SEED = 10_000_000, 20_000_000
"""Of the first clip to report on, and of the first to choose with. Trainings take seeds below 10,000,000."""
SHOWN = 4
COLUMNS = {
    "PSNR": "{:6.2f}",
    "over fade": "{:+6.2f}",
    "over near": "{:+6.2f}",
    "IoU": "{:6.3f}",
    "edges": "{:6.3f}",
    "corners": "{:6.3f}",
    "turn": "{:6.1%}",
    "end PSNR": "{:6.2f}",
    "end IoU": "{:6.3f}",
}
Figures = dict[str, float]
"""Of a video by name; nan: there is nothing to measure."""


class WrongCaptions:
    """The clips of another set, each with a caption that is wrong about one thing."""

    def __init__(self, clips: ProceduralClips):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int):
        caption = self.clips.other_caption(index, np.random.default_rng(index))
        return self.clips[index]._replace(caption=caption)

    def shape(self, index: int) -> tuple[int, int, int]:
        """As the other set's."""
        return self.clips.shape(index)


class Demo:
    """A checkpoint, ready to fill in clips."""

    def __init__(self, checkpoint: str, flags: argparse.Namespace, how: SampleConfig):
        files, self.how = Checkpoint(checkpoint), how
        dit = files.config("dit", dtype=jnp.float32, param_dtype=jnp.float32)
        self.config = TrainConfig(
            encoders=checkpoint,
            dit=dit,
            data=ShapesData(flags.kind, flags.first_seed, flags.clips),
            tasks=TaskMix(flf2v=1.0, caption_dropout=0.0),
            frames=flags.frames,
            height=flags.size,
            width=flags.size,
            dtype="float32",
        )
        self.encoders = open_encoders(self.config, dit)
        self.dit = lora.load(files, dit, lora.parse(flags.lora or []), True, parameter_sharding)
        assert how.shift is not None
        self.schedule = solvers.make_schedule(
            how.solver, how.steps, how.shift, how.conventions, how.sigmas, how.timesteps
        )
        self.empty, self.first_seed = jnp.asarray(self.encoders.empty_text()), flags.first_seed

    def fill_in(self, clips, numbers: list[int]) -> np.ndarray:
        """Videos uint8 `[b, F, H, W, 3]` from the end frames of clips."""
        assert self.encoders.clip is not None
        assert isinstance(self.how.guidance, float)
        order = Order({clips.shape(0): np.arange(len(clips))}, len(numbers))
        samples = TaskSamples(clips, order, self.config, self.encoders.tokenizer, 2, self.encoders.clip.image_size)
        batch = self.encoders(shard_batch([samples.sample(i, 0) for i in numbers], len(numbers)))
        noise = metrics.noise_of([self.first_seed + i for i in numbers], batch.latents.shape[1:])
        latents = sample_latents(self.dit, batch, self.empty, noise, self.schedule, self.how.guidance)
        return np.asarray(decode_batch(self.encoders.networks["vae"], latents))

    def through_vae(self, videos: np.ndarray) -> np.ndarray:
        """What the VAE alone makes of the true clips."""
        return np.asarray(_through_vae(self.encoders.networks["vae"], videos))


@jax.jit
def _through_vae(vae, videos):
    return decode_batch(vae, vae.encode(to_pixels(videos)))


def measure(video: np.ndarray, clips: ProceduralClips, index: int) -> Figures:
    """All figures of a video that is to be clip `index`."""
    scene, truth = clips.scene(index), clips[index].video
    background = clips.draw(scene._replace(figures=()))
    ours, true = (likeness.silhouette(x, background) for x in (video, truth))
    between, ends = slice(1, -1), [0, -1]
    psnr = metrics.psnr(video[between], truth[between])
    turns = likeness.turns_right(video, clips, index)
    return {
        "PSNR": psnr,
        "over fade": psnr - metrics.psnr(metrics.crossfade(truth)[between], truth[between]),
        "over near": psnr - metrics.psnr(metrics.nearest(truth)[between], truth[between]),
        "IoU": likeness.iou(ours[between], true[between]),
        "edges": likeness.edges(ours[between], true[between]),
        "corners": likeness.corners(ours[between], true[between]) if likeness.has_corners(scene) else np.nan,
        "turn": np.nan if turns is None else float(turns),
        "end PSNR": metrics.psnr(video[ends], truth[ends]),
        "end IoU": likeness.iou(ours[ends], true[ends]),
    }


def videos(demo: Demo, clips: ProceduralClips, size: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Of every clip its number, and what is compared with it: ours, with a wrong caption, cross-fade, VAE alone."""
    for start in range(0, len(clips), size):
        numbers = [min(start + i, len(clips) - 1) for i in range(size)]  # of one size, which is compiled once
        truth = np.stack([clips[i].video for i in numbers])
        ours, wrong = demo.fill_in(clips, numbers), demo.fill_in(WrongCaptions(clips), numbers)
        vae = demo.through_vae(truth)
        for i, number in enumerate(numbers[: len(clips) - start]):
            fade = np.round(metrics.crossfade(truth[i])).astype(np.uint8)
            yield number, {"ours": ours[i], "wrong caption": wrong[i], "fade": fade, "VAE": vae[i]}


def mean(rows: list[Figures]) -> Figures:
    """Over the clips where there is something to measure; nan where there is none."""
    columns = {name: np.array([row[name] for row in rows]) for name in COLUMNS}
    return {name: float(np.nanmean(x)) if np.any(~np.isnan(x)) else np.nan for name, x in columns.items()}


def print_table(rows: dict[str, tuple[int, Figures]]) -> None:
    """Rows of figures by title, each with its number of clips."""
    width = max(map(len, rows))
    print(" ".join([" " * width, "clips", *(f"{name:>9}" for name in COLUMNS)]))
    for title, (count, row) in rows.items():
        cells = ("-" if np.isnan(row[name]) else form.format(row[name]) for name, form in COLUMNS.items())
        print(" ".join([f"{title:{width}}", f"{count:5}", *(f"{cell:>9}" for cell in cells)]), flush=True)


def draw_sheet(shown: list[np.ndarray], path: str) -> None:
    """Clips `[3, F, H, W, 3]` one below the other; in each truth, ours and cross-fade, nine frames left to right."""
    rows: list[np.ndarray] = []
    for clip in shown:
        times = np.linspace(0, clip.shape[1] - 1, 9).round().astype(int)
        for video in clip[:, times]:
            rows.append(np.concatenate([np.pad(f, ((1, 1), (1, 1), (0, 0)), constant_values=255) for f in video], 1))
        rows.append(np.full((6, rows[-1].shape[1], 3), 255, np.uint8))
    _enlarged(np.concatenate(rows[:-1])).save(path, optimize=True)


def draw_animation(shown: list[np.ndarray], path: str) -> None:
    """Clips from left to right, each with truth, ours and cross-fade below one another; it stands at its ends."""
    padded = np.stack([np.pad(clip, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255) for clip in shown])
    n, kinds, frames, height, width, _ = padded.shape
    whole = padded.transpose(2, 1, 3, 0, 4, 5).reshape(frames, kinds * height, n * width, 3)
    first, *others = [_enlarged(frame) for frame in whole]
    times = [600, *[90] * (frames - 2), 600]  # milliseconds
    lossy: dict[str, Any] = {"quality": 85, "method": 6} if path.endswith(".webp") else {}
    first.save(path, save_all=True, append_images=others, duration=times, loop=0, **lossy)


def _enlarged(frame: np.ndarray) -> Image.Image:
    picture = Image.fromarray(frame)
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)


def evaluate(
    checkpoint: str, flags: argparse.Namespace, how: SampleConfig
) -> tuple[dict[str, dict[str, Figures]], list[np.ndarray]]:
    """Means by what is measured and kind of motion, printed; and of the first clips truth, ours and cross-fade."""
    clips = ProceduralClips(flags.first_seed, flags.clips, flags.frames, flags.size, flags.kind)
    figures: dict[str, list[Figures]] = {}
    shown: list[np.ndarray] = []
    for number, compared in videos(Demo(checkpoint, flags, how), clips, min(flags.batch, flags.clips)):
        for name, video in compared.items():
            figures.setdefault(name, []).append(measure(video, clips, number))
        if len(shown) < SHOWN:
            shown.append(np.stack([clips[number].video, compared["ours"], compared["fade"]]))
    kinds = {kind: [is_so(clips.scene(i)) for i in range(len(clips))] for kind, is_so in likeness.KINDS.items()}
    kinds = {"all": [True] * len(clips), **{kind: chosen for kind, chosen in kinds.items() if any(chosen)}}
    means = {
        name: {kind: mean(list(itertools.compress(rows, chosen))) for kind, chosen in kinds.items()}
        for name, rows in figures.items()
    }
    print(f"\n{checkpoint}")
    others = {name: (len(clips), means[name]["all"]) for name in ("wrong caption", "fade", "VAE")}
    print_table({kind: (sum(chosen), means["ours"][kind]) for kind, chosen in kinds.items()} | others)
    return means, shown


def read_flags() -> tuple[argparse.Namespace, SampleConfig]:
    """Flags; and how to sample: what is given over a preset over what `make sample` does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--choose", action="store_true", help="on the clips that are for choosing")
    parser.add_argument("--kind", choices=Kind.__args__, default="different")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--checkpoint", action="append", help="a stage; several times to compare (default: the demo)")
    parser.add_argument("--lora", action="append", help="adapters, as `wanjax sample --lora` takes them")
    parser.add_argument("--preset", help="as `wanjax sample --preset` takes it")
    for name, kind in (("steps", int), ("solver", str), ("shift", float), ("guidance", float)):
        parser.add_argument(f"--{name}", type=kind, help="(default: that of `make sample`)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sheet", metavar="FILE.png", help="four clips of the last checkpoint")
    parser.add_argument("--animation", metavar="FILE.webp", help="the same, moving")
    flags = parser.parse_args()
    flags.first_seed = CHOOSING_SEED if flags.choose else HELD_OUT_SEED
    flags.checkpoint = flags.checkpoint or ["wanjax/demo"]
    how = get_config()
    how = presets.apply(how, flags.preset) if flags.preset else how
    said: dict[str, Any] = {name: getattr(flags, name) for name in ("steps", "solver", "shift", "guidance")}
    return flags, dataclasses.replace(how, **{name: value for name, value in said.items() if value is not None})


def summary(means: dict[str, dict[str, Figures]]) -> dict[str, float | None]:
    """For JSON."""
    ours, wrong = means["ours"]["all"], means["wrong caption"]["all"]
    named = {name.lower().replace(" ", "_"): value for name, value in ours.items()}
    named |= {"lost_by_wrong_caption": ours["PSNR"] - wrong["PSNR"], "vae_psnr": means["VAE"]["all"]["PSNR"]}
    return {name: None if np.isnan(value) else round(value, 4) for name, value in named.items()}


def main() -> None:
    flags, how = read_flags()
    start, shown, stages = time.perf_counter(), [], {}
    steps = how.steps if how.sigmas is None else len(how.sigmas)
    print(f"{flags.clips} {flags.kind} clips from seed {flags.first_seed}; {steps} {how.solver} steps", end="")
    print(f", shift {how.shift}, guidance {how.guidance}" if how.sigmas is None else f", preset {flags.preset}")
    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        for checkpoint in flags.checkpoint:
            means, shown = evaluate(checkpoint, flags, how)
            stages[checkpoint] = summary(means)
    if flags.sheet:
        draw_sheet(shown, flags.sheet)
    if flags.animation:
        draw_animation(shown, flags.animation)
    print()
    result = {"clips": flags.clips, "first_seed": flags.first_seed, "steps": steps, "stages": stages}
    print(json.dumps(result | {"seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    with exit_codes():
        main()
