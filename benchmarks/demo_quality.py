"""How well the demo model fills in between two frames of clips that it never learned from.

    python benchmarks/demo_quality.py [--clips 64] [--first-seed 10000000] [--checkpoint DIR] [--picture FILE.png]

Beside it the two things that need no model: fading from the first frame to the last, and holding the nearer one. Also
the same clips with a caption that is wrong about one thing. PSNR in dB of all frames but the first and last, and of
those two, mean over clips. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sharding.mesh import MeshShape, make_mesh
from sharding.rules import parameter_sharding
from wanjax.conditioning.encoders import open_encoders
from wanjax.conditioning.frames import to_pixels
from wanjax.config import ShapesData, TaskMix, TrainConfig
from wanjax.data.batch import shard_batch
from wanjax.data.buckets import Order
from wanjax.data.samples import TaskSamples
from wanjax.demo.shapes import Kind, ProceduralClips
from wanjax.diffusion import solvers
from wanjax.sampling.batch import sample_latents
from wanjax.sampling.decoding import decode_batch
from wanjax.training import metrics
from wanjax.weights import Checkpoint

FRAMES, SIZE = 17, 64


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

    def __init__(self, flags: argparse.Namespace):
        self.flags, checkpoint = flags, Checkpoint(flags.checkpoint)
        dit = checkpoint.config("dit")
        clips = ShapesData(flags.kind, flags.first_seed, flags.clips)
        self.config = TrainConfig(
            encoders=flags.checkpoint,
            dit=dit,
            data=clips,
            tasks=TaskMix(flf2v=1.0, caption_dropout=0.0),
            frames=FRAMES,
            height=SIZE,
            width=SIZE,
            dtype="float32",
        )
        self.encoders = open_encoders(self.config, dit)
        self.dit = checkpoint.load("dit", dit, parameter_sharding)
        self.schedule = solvers.make_schedule(flags.solver, flags.steps, flags.shift, "official")
        self.empty = jnp.asarray(self.encoders.empty_text())

    def fill_in(self, clips, numbers: list[int]) -> np.ndarray:
        """Videos uint8 `[b, F, H, W, 3]` from the end frames of clips."""
        assert self.encoders.clip is not None
        order = Order({clips.shape(0): np.arange(len(clips))}, len(numbers))
        samples = TaskSamples(clips, order, self.config, self.encoders.tokenizer, 2, self.encoders.clip.image_size)
        batch = self.encoders(shard_batch([samples.sample(i, 0) for i in numbers], len(numbers)))
        noise = metrics.noise_of([self.flags.first_seed + i for i in numbers], batch.latents.shape[1:])
        latents = sample_latents(self.dit, batch, self.empty, noise, self.schedule, self.flags.guidance)
        return np.asarray(decode_batch(self.encoders.networks["vae"], latents))

    def through_vae(self, videos: np.ndarray) -> np.ndarray:
        """What the VAE alone makes of the true clips: nothing in its latents can be better."""
        return np.asarray(_through_vae(self.encoders.networks["vae"], videos))


@jax.jit
def _through_vae(vae, videos):
    return decode_batch(vae, vae.encode(to_pixels(videos)))


def measure(demo: Demo, clips: ProceduralClips) -> tuple[dict[str, list[float]], list[np.ndarray]]:
    """Figures by clip, and for the first four their videos: truth, ours, cross-fade."""
    figures: dict[str, list[float]] = {}
    shown: list[np.ndarray] = []
    for start in range(0, len(clips), demo.flags.batch):
        numbers = [min(start + i, len(clips) - 1) for i in range(demo.flags.batch)]
        truth = np.stack([clips[i].video for i in numbers])
        ours, wrong = demo.fill_in(clips, numbers), demo.fill_in(WrongCaptions(clips), numbers)
        vae = demo.through_vae(truth)
        for i in range(min(demo.flags.batch, len(clips) - start)):
            fade, near = metrics.crossfade(truth[i]), metrics.nearest(truth[i])
            row = {
                "ours": metrics.psnr(ours[i, 1:-1], truth[i, 1:-1]),
                "wrong caption": metrics.psnr(wrong[i, 1:-1], truth[i, 1:-1]),
                "cross-fade": metrics.psnr(fade[1:-1], truth[i, 1:-1]),
                "nearest frame": metrics.psnr(near[1:-1], truth[i, 1:-1]),
                "VAE alone": metrics.psnr(vae[i, 1:-1], truth[i, 1:-1]),
                "end frames": metrics.psnr(ours[i, [0, -1]], truth[i, [0, -1]]),
                "end frames, VAE alone": metrics.psnr(vae[i, [0, -1]], truth[i, [0, -1]]),
            }
            for name, value in row.items():
                figures.setdefault(name, []).append(value)
            if len(shown) < 4:
                shown.append(np.stack([truth[i], ours[i], np.round(fade).astype(np.uint8)]))
    return figures, shown


def draw(shown: list[np.ndarray], path: str) -> None:
    """Clips one below the other; in each truth, ours and cross-fade, nine frames from left to right."""
    rows = []
    for clip in shown:
        for video in clip:
            rows.append(
                np.concatenate([np.pad(f, ((1, 1), (1, 1), (0, 0)), constant_values=255) for f in video[::2]], 1)
            )
        rows.append(np.full((6, rows[-1].shape[1], 3), 255, np.uint8))
    picture = Image.fromarray(np.concatenate(rows[:-1]))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--first-seed", type=int, default=10_000_000, help="trainings take seeds below 1,000,000")
    parser.add_argument("--kind", choices=Kind.__args__, default="different")
    parser.add_argument("--checkpoint", default="wanjax/demo")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--solver", default="unipc")
    parser.add_argument("--shift", type=float, default=40.0)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--picture", help="PNG of the first four clips")
    flags = parser.parse_args()
    flags.batch = min(flags.batch, flags.clips)
    start = time.perf_counter()
    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        demo = Demo(flags)
        figures, shown = measure(demo, ProceduralClips(flags.first_seed, flags.clips, FRAMES, SIZE, flags.kind))
    if flags.picture:
        draw(shown, flags.picture)
    mean = {name: float(np.mean(values)) for name, values in figures.items()}
    print(f"{flags.clips} {flags.kind} clips from seed {flags.first_seed}; {flags.steps} {flags.solver} steps")
    for name, values in figures.items():
        print(f"{name:24s} {np.mean(values):6.2f} dB   {np.min(values):6.2f} .. {np.max(values):6.2f}")
    result = {
        "clips": flags.clips,
        "gain_over_crossfade_db": round(mean["ours"] - mean["cross-fade"], 2),
        "gain_over_nearest_db": round(mean["ours"] - mean["nearest frame"], 2),
        "end_frame_psnr_db": round(mean["end frames"], 2),
        "loss_by_wrong_caption_db": round(mean["ours"] - mean["wrong caption"], 2),
        "between_psnr_db": round(mean["ours"], 2),
        "vae_psnr_db": round(mean["VAE alone"], 2),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
