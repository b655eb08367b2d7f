"""Held-out clips during training: their loss, and for the DiT what sampling makes of a few of them.

The clips, noises and noise levels are the same every time, so that the figures of a run can be compared.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from sharding.distributed import is_main
from sharding.stalls import tick
from wanjax.conditioning.encoders import Encoders
from wanjax.conditioning.frames import latent_frames, latent_size
from wanjax.conditioning.samples import PixelSample
from wanjax.config import WAN_VAE, DiTConfig, TaskMix, TrainConfig
from wanjax.data.batch import host_rows, make_batch, shard_batch
from wanjax.diffusion import noise_levels, solvers
from wanjax.media import write_video
from wanjax.sampling.batch import sample_latents
from wanjax.sampling.decoding import decode_batch
from wanjax.training import metrics
from wanjax.training.data import open_clips, task_samples
from wanjax.training.log import Log
from wanjax.training.prompt_samples import Phases, PromptSampler

if TYPE_CHECKING:
    from wanjax.training.objectives.base import Data, Objective


FPS = 16
SHEET_FRAMES, SHEET_WIDTH = 9, 192
"""Of a clip in a comparison sheet: frames, and their width in pixels at most."""


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
    tasks = dataclasses.replace(config.tasks, caption_dropout=0.0, image_dropout=0.0)
    config = dataclasses.replace(config, data=config.validation or config.data, tasks=tasks)
    encoders = objective.validation_encoders(config, data)
    losses = Losses(config, objective, encoders) if config.validate_every else None
    has_samples = config.sample_every and config.validation is not None
    sampler = objective.open_sampler(config, encoders) if has_samples else None
    has_prompts = config.sample_every and config.sample_prompts is not None
    prompts = objective.open_prompts(config, encoders) if has_prompts else None
    return Validation(config, losses, sampler, prompts)


@dataclasses.dataclass(frozen=True)
class Validation:
    """Validates at the steps that the configuration says; losses or samples are None where it never asks for them."""

    config: TrainConfig
    losses: Losses | None
    sampler: Sampler | None
    prompts: PromptSampler | None = None

    def compile(self, model: Any) -> None:
        """Compile what a network is validated by, so that no step waits for that. All processes have to call this."""
        if self.losses is not None:
            self.losses.compile(model)
        if self.sampler is not None:
            self.sampler.sample(model, steps=0)
        if self.prompts is not None:
            self.prompts.sample(model, steps=0)

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
        if self.prompts is not None and step % self.config.sample_every == 0:
            self.prompts(step, model, log)
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

    def compile(self, model: Any) -> None:
        """The programs, for every shape of the batches; JAX keeps them."""
        for batch in {str(jax.tree.map(jnp.shape, batch)): batch for batch in self.batches}.values():
            tick()
            self._losses.lower(model, batch, 0).compile()

    def __call__(self, model: Any) -> dict[str, float]:
        """Mean over the batches, of everything and at each noise level."""
        losses = []
        for seed, batch in enumerate(self.batches):
            tick()
            losses.append(jax.device_get(self._losses(model, batch, seed)))
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
      schedule: of the solver.
      phases: makes of the model what `sample_latents` takes, for the schedule; None: it is that.
    """

    def __init__(
        self,
        config: TrainConfig,
        dit: DiTConfig,
        encoders: Encoders,
        schedule: solvers.Schedule,
        phases: Phases | None = None,
    ):
        weights: dict[str, Any] = {dit.task: 1.0}
        tasks = TaskMix(caption_dropout=0.0, **weights)
        self.config = config = dataclasses.replace(config, tasks=tasks, batch=config.sample_clips)
        source = task_samples(config, encoders, open_clips(config, stills=False))
        numbers = [source.order[i] for i in range(config.sample_clips)]
        pixels: list[PixelSample] = [source.sample(number, 0) for number in numbers]
        self.truth, self.given = np.stack([x.video for x in pixels]), pixels[0].given
        self.batch = encoders(shard_batch([pixels[row] for row in host_rows(len(pixels))], len(pixels)))
        self.vae, self.empty_text = encoders.networks["vae"], jnp.asarray(encoders.empty_text())
        self.noise = metrics.noise_of(numbers, self.batch.latents.shape[1:])
        self.schedule, self.phases = schedule, phases

    def sample(self, model: Any, steps: int | None = None) -> np.ndarray:
        """Videos uint8 `[b, F, H, W, 3]`, on every process.

        Args:
          model: as `phases`, or without it `sample_latents`, takes it.
          steps: of the solver; None: all.
        """
        tick()
        guidance = self.config.guidance
        model = model if self.phases is None else self.phases(model, self.schedule)
        latents = sample_latents(model, self.batch, self.empty_text, self.noise, self.schedule, guidance, steps)
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
        """`WORKDIR/samples/STEP.mp4`, on the left the true clips; and a comparison sheet for TensorBoard."""
        path = Path(self.config.workdir or ".") / "samples" / f"{step:06d}.mp4"
        both = np.stack([self.truth, videos])  # [2, b, F, H, W, 3]
        write_video(path, einops.rearrange(both, "k b F H W c -> F (b H) (k W) c"), FPS)
        log.show(step, "samples/true_and_sampled", comparison_sheet(both))
        log.play(step, "samples/clips", path)


def sample_schedule(config: TrainConfig, dit: DiTConfig) -> solvers.Schedule:
    """UniPC with the run's steps, and its shift for clips of its size."""
    vae = config.vae or WAN_VAE
    size = latent_frames(config.frames, vae), *latent_size(config.height, config.width, vae, dit.patch_size)
    tokens = math.prod(n // p for n, p in zip(size, dit.patch_size, strict=True))
    return solvers.make_schedule("unipc", config.sample_steps, noise_levels.shift(config, tokens), "official")


def comparison_sheet(videos: np.ndarray) -> np.ndarray:
    """Of pairs of videos `[2, b, F, H, W, 3]`: a row of small frames for each, pairs together; uint8 `[H, W, 3]`."""
    frames, width = videos.shape[2], videos.shape[4]
    times = np.linspace(0, frames - 1, min(frames, SHEET_FRAMES)).round().astype(int)
    step = -(-width // SHEET_WIDTH)
    return einops.rearrange(videos[:, :, times, ::step, ::step], "k b F H W c -> (b k H) (F W) c")
