"""Samples of a user's own prompts and pictures while a run trains, with the same noise every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from sharding.distributed import is_main
from sharding.stalls import tick
from wanjax.conditioning import images
from wanjax.conditioning.encoders import Encoders
from wanjax.conditioning.frames import given_frames
from wanjax.conditioning.samples import PixelSample
from wanjax.config import DiTConfig, TrainConfig
from wanjax.data.batch import host_rows, shard_batch
from wanjax.data.prompts import Prompt, read_prompts
from wanjax.diffusion import solvers
from wanjax.errors import InputError
from wanjax.media import write_video
from wanjax.sampling.batch import sample_latents
from wanjax.sampling.decoding import decode_batch
from wanjax.training.log import Log


def check_prompts(config: TrainConfig, dit: DiTConfig) -> list[Prompt]:
    """The prompts of a run, if its network can be asked for them.

    Raises:
      InputError: it cannot; or as `read_prompts`.
    """
    assert config.sample_prompts is not None
    prompts = read_prompts(config.sample_prompts)
    for number, prompt in enumerate(prompts, 1):
        if prompt.task not in dit.tasks:
            given = [name for name, x in (("first_frame", prompt.first), ("last_frame", prompt.last)) if x is not None]
            raise InputError(
                f"{config.sample_prompts}: prompt {number} gives {' and '.join(given) or 'no frame'}, for which the "
                f"network is not built; it takes {', '.join(dit.tasks)}; change the prompt's pictures"
            )
    return prompts


Phases = Callable[[Any, solvers.Schedule], Any]


class PromptSampler:
    """Samples prompts, a few at a time; of the encoders only the VAE is kept.

    Args:
      config: of the run; size, steps and guidance are used.
      dit: of the network.
      encoders: for prompts and pictures.
      schedule: of the solver.
      phases: as `wanjax.training.validation.Sampler` takes it.
    """

    def __init__(
        self,
        config: TrainConfig,
        dit: DiTConfig,
        encoders: Encoders,
        schedule: solvers.Schedule,
        phases: Phases | None = None,
    ):
        self.config, self.schedule, self.phases = config, schedule, phases
        self.prompts = check_prompts(config, dit)
        size = min(config.sample_clips, len(self.prompts))
        samples = [_sample(config, encoders, prompt) for prompt in self.prompts]
        self._parts = []
        for start in range(0, len(samples), size):
            rows = [min(start + row, len(samples) - 1) for row in range(size)]  # the last part is filled up
            batch = encoders(shard_batch([samples[rows[row]] for row in host_rows(size)], size))
            noise = [_noise(self.prompts[row].seed, batch.latents.shape[1:]) for row in rows]
            self._parts.append((batch, jnp.stack(noise)))
        self.vae, self.empty_text = encoders.networks["vae"], jnp.asarray(encoders.empty_text())

    def sample(self, model: Any, steps: int | None = None) -> np.ndarray:
        """Videos uint8 `[prompts, F, H, W, 3]`, on every process; `steps`: of the solver, None: all."""
        videos, model = [], model if self.phases is None else self.phases(model, self.schedule)
        for batch, noise in self._parts:
            tick()
            latents = sample_latents(model, batch, self.empty_text, noise, self.schedule, self.config.guidance, steps)
            videos.append(np.asarray(decode_batch(self.vae, latents)))
        return np.concatenate(videos)[: len(self.prompts)]

    def __call__(self, step: int, model: Any, log: Log) -> None:
        """Sample all, and write `WORKDIR/samples/STEP-prompt-N.mp4` each. All processes have to call this."""
        videos = self.sample(model)
        if not is_main():
            return
        for number, video in enumerate(videos, 1):
            path = Path(self.config.workdir or ".") / "samples" / f"{step:06d}-prompt-{number}.mp4"
            write_video(path, video, self.config.fps)
            log.play(step, f"samples/prompt-{number}", path)
        log.show(step, "samples/prompts", sheet(videos))


def sheet(videos: np.ndarray, frames: int = 9, width: int = 192) -> np.ndarray:
    """A row of small frames for each video `[b, F, H, W, 3]`; uint8 `[H, W, 3]`."""
    times = np.linspace(0, videos.shape[1] - 1, min(videos.shape[1], frames)).round().astype(int)
    step = math.ceil(videos.shape[3] / width)
    return np.concatenate([np.concatenate([*video[times, ::step, ::step]], axis=1) for video in videos])


def _sample(config: TrainConfig, encoders: Encoders, prompt: Prompt) -> PixelSample:
    """What a network is asked, with frames as training cuts them: covering the size, from the middle."""
    video = np.zeros((config.frames, config.height, config.width, 3), np.uint8)
    for i, path in ((0, prompt.first), (-1, prompt.last)):
        if path is not None:
            picture = images.crop_to_aspect(images.read_image(path), config.width, config.height)
            video[i] = np.asarray(picture.resize((config.width, config.height), PIL.Image.Resampling.BICUBIC))
    given = given_frames(prompt.task, config.frames)
    ids, mask = encoders.tokenizer([prompt.text])
    ends: Sequence[int] = (0, -1)[: encoders.image_count]
    clip = None
    if encoders.clip is not None:
        clip = np.stack([images.clip_pixels(video[i], encoders.clip.image_size, "official") for i in ends])
    return PixelSample(video, given, ids[0], mask[0], clip, np.array([given[i] for i in ends], bool))


def _noise(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)
