"""A request: what is asked of a pipeline's networks, checked and read, all of it but the weights."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
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
from wanjax.sampling import calibration
from wanjax.sampling.cache_rules import make_rules
from wanjax.sampling.given import choose_task, pictures_by_frame
from wanjax.sampling.steps import Phase, guidance_by_step, is_guided, phases, steps_of_high
from wanjax.weights import Checkpoint
from wanjax.weights.networks import Networks

SHIFTS = {"t2v": 5.0, "i2v": 5.0, "flf2v": 16.0}
"""The timestep shift by task, where neither the request nor the checkpoint says one: the official command line's."""
DISTILLED = re.compile(
    r"lightx2v|lightning|distill|4[-_ ]?step|fastwan|dmd|rcm|turbodiffusion|causvid|accvid|self[-_ ]?forcing",
    re.IGNORECASE,
)
"""In the names of few-step weights."""
T2V_EXPERTS_SHIFT = 12.0
"""The same of text to video by two experts (Wan2.2 `wan_t2v_A14B.py`)."""


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
    guidance: the scale of every step, `[n]`.
    phases: which expert takes which steps, with how many branches.
    shift: of the timesteps.
    rules: of the step caches; None: every step computes everything.
    noise: `[1, f, h, w, c]`, float32, at the schedule's first level.
    notes: lines that the user should read before the work.
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
    guidance: tuple[float, ...]
    phases: tuple[Phase, ...]
    shift: float
    rules: Rules | None
    noise: np.ndarray
    notes: tuple[str, ...] = ()


def make_request(config: SampleConfig, networks: Networks, encoders: Encoders) -> Request:
    """Check a request and read what it names.

    Args:
      config: what is asked for; of the checkpoint, numerics and mesh the pipeline's own count.
      networks, encoders: of the pipeline.

    Raises:
      InputError: anything in it that cannot be used.
    """
    dit, vae, clip, checkpoint = encoders.dit, networks.configs["vae"], encoders.clip, networks.checkpoint
    task, notes = choose_task(dit, config)
    indices = list(pictures_by_frame(config))
    f = latent_frames(config.frames, vae)
    height, width, pictures = read_pictures(config, vae, dit)
    tokens = encoders.tokenizer(choose_prompts(config, task, checkpoint.experts))
    shift = choose_shift(config, task, dit, checkpoint)
    schedule = solvers.make_schedule(
        config.solver, config.steps, shift, config.conventions, config.sigmas, config.timesteps, config.seed
    )
    config = dataclasses.replace(config, steps=len(schedule.timesteps))
    high = steps_of_high(config, schedule, checkpoint.boundary)
    guidance = guidance_by_step(config, len(schedule.timesteps), high)
    parts = phases(guidance, high)
    measured = calibration.read_for(config, checkpoint, networks.loras, task, shift)
    # CLIP sees the end frames, or the first alone; what lies between only mask and latents say.
    ends = [p for i, p in zip(indices, pictures, strict=True) if i in (0, config.frames - 1)]
    seen = ends[: encoders.image_count]
    frames = [images.video_pixels(p, height, width, config.conventions) for p in pictures]
    return Request(
        config=config,
        task=task,
        height=height,
        width=width,
        given=given_frames("interpolation", config.frames, indices=indices),
        frames=np.stack(frames) if frames else np.zeros((0, height, width, 3), np.float32),
        clip_pixels=np.stack([images.clip_pixels(p, clip.image_size, config.conventions) for p in seen])
        if clip
        else None,
        tokens=tokens,
        schedule=schedule,
        guidance=tuple(float(scale) for scale in guidance),
        phases=parts,
        shift=shift,
        rules=make_rules(config, schedule, measured, [part.first for part in parts]),
        noise=make_noise(config, (1, f, *latent_size(height, width, vae, dit.patch_size), dit.out_channels))
        * first_level(schedule),
        notes=(*notes, *distilled_notes(config, networks)),
    )


def distilled_notes(config: SampleConfig, networks: Networks) -> tuple[str, ...]:
    """A warning where few-step weights, as far as names tell them, would get steps that ruin them."""
    files = (*networks.loras.get("dit", ()), *networks.loras.get("dit_low", ()))
    names = [networks.checkpoint.path.name, *(Path(file.path).name for file in files)]
    found = [name for name in names if DISTILLED.search(name)]
    if config.sigmas is not None or config.conventions != "diffusers" or config.solver != "euler" or not found:
        return ()
    return (
        f"warning: {found[0]} looks like few-step weights, which diffusers' Euler sigmas ruin; give the list that they "
        "were made for, by --preset (lightning4, ..) or --sigmas",
    )


def choose_shift(config: SampleConfig, task: Task, dit: DiTConfig, checkpoint: Checkpoint) -> float:
    """The timestep shift: as asked, or the checkpoint's, or the official one of the task."""
    if config.shift is not None:
        return config.shift
    of = task if dit.task == "flf2v" else dit.task  # an i2v network's does not change with a last frame
    usual = SHIFTS.get(of, SHIFTS["flf2v"])
    if checkpoint.experts == 2 and dit.task == "t2v":
        usual = T2V_EXPERTS_SHIFT
    return checkpoint.flow_shift or usual


def read_pictures(config: SampleConfig, vae: VAEConfig, dit: DiTConfig) -> tuple[int, int, list[PIL.Image.Image]]:
    """Height and width of the video, and the given frames, which show the same field when stretched to that size.

    Raises:
      InputError: a picture cannot be read, or the size cannot be had.
    """
    pictures = [images.read_image(p) for p in pictures_by_frame(config).values()]
    height, width = choose_size(config, pictures, vae, dit)
    step = vae.size_multiple(dit.patch_size)
    matched = images.match_frames(pictures, height, width, step, config.conventions) if pictures else []
    return height, width, matched


def choose_prompts(config: SampleConfig, task: Task, experts: int) -> list[str]:
    """The prompt and, with guidance, what to guide away from: as given, or else the official list.

    Wan2.2's list is the same for every task.

    Raises:
      InputError: as `steps.scales`.
    """
    usual = (
        text.NEGATIVE_PROMPTS.get(task, text.NEGATIVE_PROMPTS["flf2v"])
        if experts == 1
        else text.NEGATIVE_PROMPTS["t2v"]
    )
    negative = usual if config.negative_prompt is None else config.negative_prompt
    return [config.prompt, negative] if is_guided(config) else [config.prompt]


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


def first_level(schedule: solvers.Schedule) -> np.float32:
    """What the initial noise is multiplied with: 1 but for LCM, where it is what later levels put on x0, too.

    So rCM starts (github NVlabs/rcm `rcm/inference/wan2pt1_t2v_rcm_infer.py`), whose first level is below 1.
    """
    return np.float32(1) if schedule.renoise is None else schedule.sigmas[0]


def make_noise(config: SampleConfig, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal `[1, f, h, w, c]` from the seed, or the given file, which is channels first.

    Raises:
      InputError: as `media.load_noise`.
    """
    if config.initial_noise is None:
        return np.asarray(jax.random.normal(jax.random.key(config.seed), shape, jnp.float32))
    b, f, h, w, c = shape
    return np.moveaxis(media.load_noise(config.initial_noise, (b, c, f, h, w)), 1, -1)
