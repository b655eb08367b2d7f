"""Held-out clips during training: their loss, and for the DiT what sampling makes of a few of them.

The clips, noises and noise levels are the same every time, so that the figures of a run can be compared.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from sharding.distributed import is_main
from wanjax.conditioning.encoders import Encoders
from wanjax.conditioning.samples import PixelSample
from wanjax.config import DiTConfig, TaskMix, TrainConfig
from wanjax.data.batch import host_rows, make_batch, shard_batch
from wanjax.diffusion import solvers
from wanjax.media import write_video
from wanjax.sampling.batch import sample_latents
from wanjax.sampling.decoding import decode_batch
from wanjax.training import metrics
from wanjax.training.data import open_clips, task_samples
from wanjax.training.log import Log

if TYPE_CHECKING:
    from wanjax.training.objectives.base import Data, Objective


FPS = 16
SHEET_FRAMES, SHEET_WIDTH = 9, 192
"""Of a clip in a contact sheet: frames, and their width in pixels at most."""


def open_validation(config: TrainConfig, objective: Objective, data: Data) -> Validation | None:
    """What the run asks of held-out clips; None: nothing.

    Args:
      config: of the run.
      objective: what it trains.
      data: what it learns from, whose encoders serve here too.

    Raises:
      InputError: the held-out clips cannot be used, or encoders are missing.
    """
    if not (config.validate_every or config.sample_every):
        return None
    assert config.validation is not None  # see wanjax.training.checks
    tasks = dataclasses.replace(config.tasks, caption_dropout=0.0, image_dropout=0.0)
    config = dataclasses.replace(config, data=config.validation, tasks=tasks)
    encoders = objective.validation_encoders(config, data)
    losses = Losses(config, objective, encoders) if config.validate_every else None
    sampler = objective.open_sampler(config, encoders) if config.sample_every else None
    return Validation(config, losses, sampler)


@dataclasses.dataclass(frozen=True)
class Validation:
    """Validates at the steps that the configuration says; losses or samples are None where it never asks for them."""

    config: TrainConfig
    losses: Losses | None
    sampler: Sampler | None

    def __call__(self, step: int, model: Any, log: Log) -> dict[str, float]:
        """Figures of a network after a step, by name; pictures go to the log. All processes have to call this."""
        figures: dict[str, float] = {}
        if self.losses is not None and step % self.config.validate_every == 0:
            figures |= self.losses(model)
        if self.sampler is not None and step % self.config.sample_every == 0:
            videos = self.sampler.sample(model)
            figures |= self.sampler.figures(videos)
            if is_main():
                self.sampler.write(videos, step, log)
        return figures


class Losses:
    """Losses of fixed batches, which are encoded once.

    Args:
      config: of the run on the held-out clips.
      objective: what is trained.
      encoders: for clips in pixels.
    """

    def __init__(self, config: TrainConfig, objective: Objective, encoders: Encoders | None):
        self.objective, size = objective, config.batch // config.accumulate
        config = dataclasses.replace(config, batch=size)
        data = objective.open_data(config, encoders)
        batches = [make_batch(data.source, i * size, size) for i in range(config.validation_batches)]
        self.batches = [data.encode(batch) if data.encode else batch for batch in batches]
        self._losses = jax.jit(objective.validation_losses)

    def __call__(self, model: Any) -> dict[str, float]:
        """Mean over the batches, of everything and at each noise level."""
        losses = [jax.device_get(self._losses(model, batch, seed)) for seed, batch in enumerate(self.batches)]
        mean = np.mean(losses, axis=0)
        parts = zip(self.objective.loss_parts, np.ravel(mean), strict=bool(self.objective.loss_parts))
        return {"validation/loss": float(np.mean(mean))} | {f"validation/{name}": float(x) for name, x in parts}


class Sampler:
    """Samples a few clips with the frames, captions and images that the network was built for.

    Of the encoders only the VAE is kept.

    Args:
      config: of the run on the held-out clips; of a cache, those that it was made from are sampled.
      dit: of the network that is trained.
      encoders: for the clips.
    """

    def __init__(self, config: TrainConfig, dit: DiTConfig, encoders: Encoders):
        tasks = dataclasses.replace(TaskMix(caption_dropout=0.0), **{dit.task: 1.0})
        self.config = config = dataclasses.replace(config, tasks=tasks, batch=config.sample_clips)
        source = task_samples(config, encoders, open_clips(config))
        numbers = [source.order[i] for i in range(config.sample_clips)]
        pixels: list[PixelSample] = [source.sample(number, 0) for number in numbers]
        self.truth, self.given = np.stack([x.video for x in pixels]), pixels[0].given
        self.batch = encoders(shard_batch([pixels[row] for row in host_rows(len(pixels))], len(pixels)))
        self.vae, self.empty_text = encoders.networks["vae"], jnp.asarray(encoders.empty_text())
        self.noise = metrics.noise_of(numbers, self.batch.latents.shape[1:])
        self.schedule = solvers.make_schedule("unipc", config.sample_steps, config.shift, "official")

    def sample(self, model: Any) -> np.ndarray:
        """Videos uint8 `[b, F, H, W, 3]`, on every process."""
        latents = sample_latents(model, self.batch, self.empty_text, self.noise, self.schedule, self.config.guidance)
        return np.asarray(decode_batch(self.vae, latents))

    def figures(self, videos: np.ndarray) -> dict[str, float]:
        """Likeness to the true clips: of the given end frames, and of those between if both ends are given."""
        if not self.given.any():  # any video that fits the caption will do
            return {}
        pairs = list(zip(videos, self.truth, strict=True))
        ends = [(video[self.given], truth[self.given]) for video, truth in pairs]
        figures = {
            "samples/end_frame_psnr": np.mean([metrics.psnr(*pair) for pair in ends]),
            "samples/end_frame_ssim": np.mean([metrics.ssim(*pair) for pair in ends]),
        }
        if self.given[-1]:
            between = [(video[~self.given], truth[~self.given]) for video, truth in pairs]
            figures["samples/between_psnr"] = np.mean([metrics.psnr(*pair) for pair in between])
        return {name: float(x) for name, x in figures.items()}

    def write(self, videos: np.ndarray, step: int, log: Log) -> None:
        """`WORKDIR/samples/STEP.mp4`, on the left the true clips; and a contact sheet for TensorBoard."""
        path = Path(self.config.workdir or ".") / "samples" / f"{step:06d}.mp4"
        both = np.stack([self.truth, videos])  # [2, b, F, H, W, 3]
        write_video(path, einops.rearrange(both, "k b F H W c -> F (b H) (k W) c"), FPS)
        log.show(step, "samples/true_and_sampled", contact_sheet(both))


def contact_sheet(videos: np.ndarray) -> np.ndarray:
    """Of pairs of videos `[2, b, F, H, W, 3]`: a row of small frames for each, pairs together; uint8 `[H, W, 3]`."""
    frames, width = videos.shape[2], videos.shape[4]
    times = np.linspace(0, frames - 1, min(frames, SHEET_FRAMES)).round().astype(int)
    step = -(-width // SHEET_WIDTH)
    return einops.rearrange(videos[:, :, times, ::step, ::step], "k b F H W c -> (b k H) (F W) c")
