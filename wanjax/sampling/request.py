"""A request: what is asked of a pipeline's networks, checked and read, all of it but the weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from wanjax import media
from wanjax.conditioning import images, text
from wanjax.conditioning.encoders import Encoders
from wanjax.conditioning.frames import Task, given_frames, latent_frames, latent_size
from wanjax.config import DiTConfig, SampleConfig, VAEConfig
from wanjax.diffusion import solvers
from wanjax.diffusion.caching import Rules
from wanjax.errors import InputError
from wanjax.sampling import calibration
from wanjax.sampling.cache_rules import make_rules
from wanjax.weights.networks import Networks

SHIFTS = {"t2v": 5.0, "i2v": 5.0, "flf2v": 16.0}
"""The timestep shift by task, where neither the request nor the checkpoint says one: the official command line's."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request. Arrays are numpy's, on the host.

    config: what was asked for.
    task: which frames are given.
    height, width: of the video, pixels.
    given: bool `[F]`, which frames.
    frames: the given ones as the VAE takes them, float32 `[k, H, W, 3]`.
    clip_pixels: the same as CLIP takes them, float32 `[k, s, s, 3]`; None for a network without images.
    tokens: ids and mask `[b, l]` of the prompt and, with guidance, of the negative prompt.
    schedule: of the solver.
    shift: of the timesteps.
    rules: of the step caches; None: every step computes everything.
    noise: `[1, f, h, w, c]`, float32.
    """

    config: SampleConfig
    task: Task
    height: int
    width: int
    given: np.ndarray
    frames: np.ndarray
    clip_pixels: np.ndarray | None
    tokens: tuple[np.ndarray, np.ndarray]
    schedule: solvers.Schedule
    shift: float
    rules: Rules | None
    noise: np.ndarray


def make_request(config: SampleConfig, networks: Networks, encoders: Encoders) -> Request:
    """Check a request and read what it names.

    Args:
      config: what is asked for; of the checkpoint, numerics and mesh the pipeline's own count.
      networks, encoders: of the pipeline.

    Raises:
      InputError: anything in it that cannot be used.
    """
    dit, vae, clip, checkpoint = encoders.dit, networks.configs["vae"], encoders.clip, networks.checkpoint
    task = choose_task(dit, config)
    f = choose_length(config, vae)
    height, width, pictures = read_pictures(config, vae, dit)
    tokens = encoders.tokenizer(choose_prompts(config, task))
    usual = SHIFTS[task if dit.task == "flf2v" else dit.task]  # an i2v network's does not change with a last frame
    shift = (checkpoint.flow_shift or usual) if config.shift is None else config.shift
    schedule = solvers.make_schedule(config.solver, config.steps, shift, config.conventions)
    measured = calibration.read_for(config, checkpoint, networks.loras, task, shift)
    frames = [images.video_pixels(p, height, width, config.conventions) for p in pictures]
    return Request(
        config=config,
        task=task,
        height=height,
        width=width,
        given=given_frames(task, config.frames),
        frames=np.stack(frames) if frames else np.zeros((0, height, width, 3), np.float32),
        clip_pixels=np.stack([images.clip_pixels(p, clip.image_size, config.conventions) for p in pictures])
        if clip
        else None,
        tokens=tokens,
        schedule=schedule,
        shift=shift,
        rules=make_rules(config, schedule, measured),
        noise=make_noise(config, (1, f, *latent_size(height, width, vae, dit.patch_size), dit.out_channels)),
    )


def read_pictures(config: SampleConfig, vae: VAEConfig, dit: DiTConfig) -> tuple[int, int, list[PIL.Image.Image]]:
    """Height and width of the video, and the given frames, which show the same field when stretched to that size.

    Raises:
      InputError: a picture cannot be read, or the size cannot be had.
    """
    pictures = [images.read_image(p) for p in (config.first_frame, config.last_frame) if p is not None]
    height, width = choose_size(config, pictures, vae, dit)
    step = vae.size_multiple(dit.patch_size)
    matched = images.match_frames(pictures, height, width, step, config.conventions) if pictures else []
    return height, width, matched


def choose_task(dit: DiTConfig, config: SampleConfig) -> Task:
    """The task that the given frames ask for, if the network can do it.

    See `DiTConfig.tasks`.

    Raises:
      InputError: it cannot.
    """
    given = tuple(
        name for name, path in (("first", config.first_frame), ("last", config.last_frame)) if path is not None
    )
    tasks: dict[tuple[str, ...], Task] = {(): "t2v", ("first",): "i2v", ("first", "last"): "flf2v"}
    asked = tasks.get(given)
    if asked is None or asked not in dit.tasks:
        flags = {
            ("t2v",): "no frames",
            ("i2v",): "--first-frame alone",
            ("i2v", "flf2v"): "--first-frame with or without --last-frame",
        }
        frames = " and ".join(f"--{name}-frame" for name in given) or "no frame"
        raise InputError(
            f"{frames} given to a {dit.task} checkpoint, which takes {flags[dit.tasks]}; "
            "change the frames or give another --checkpoint"
        )
    return asked


def choose_prompts(config: SampleConfig, task: Task) -> list[str]:
    """The prompt and, with guidance, what to guide away from: as given, or else the official list.

    Raises:
      InputError: the guidance is no finite number.
    """
    if not math.isfinite(config.guidance):
        raise InputError(f"guidance {config.guidance}; a finite number is accepted; use 5, or 1 for none")
    negative = text.NEGATIVE_PROMPTS[task] if config.negative_prompt is None else config.negative_prompt
    return [config.prompt] if config.guidance == 1 else [config.prompt, negative]


def choose_length(config: SampleConfig, vae: VAEConfig) -> int:
    """Latent frames of the video.

    Raises:
      InputError: unless the frames are 4 n + 1, and more than 0 a second.
    """
    if not 0 < config.fps < math.inf:
        raise InputError(f"fps {config.fps}; a number above 0 is accepted; 16 is what the model was trained with")
    return latent_frames(config.frames, vae)


def choose_size(config: SampleConfig, pictures: list[Any], vae: VAEConfig, dit: DiTConfig) -> tuple[int, int]:
    """Height and width in pixels: as given, or else with the first picture's aspect ratio at the configured area."""
    step = vae.size_multiple(dit.patch_size)
    if config.height is not None and config.width is not None:
        height, width = config.height, config.width
    else:
        first = pictures[0] if pictures else np.zeros((9, 16, 3), np.uint8)
        height, width = images.choose_size(first, config.area, step)
        if config.height is not None:
            height, width = config.height, max(step, round(config.height * width / height / step) * step)
        elif config.width is not None:
            height, width = max(step, round(config.width * height / width / step) * step), config.width
    latent_size(height, width, vae, dit.patch_size)
    return height, width


def make_noise(config: SampleConfig, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal `[1, f, h, w, c]` from the seed, or the given file, which is channels first.

    Raises:
      InputError: the seed is out of range; or as `media.load_noise`.
    """
    if not -(2**63) <= config.seed < 2**63:
        raise InputError(f"seed {config.seed}; whole numbers of 64 bits with sign are accepted; use 0")
    if config.initial_noise is None:
        return np.asarray(jax.random.normal(jax.random.key(config.seed), shape, jnp.float32))
    b, f, h, w, c = shape
    return np.moveaxis(media.load_noise(config.initial_noise, (b, c, f, h, w)), 1, -1)
