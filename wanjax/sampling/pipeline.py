"""From two pictures and a sentence to a video: check everything, then encode, denoise, decode.

    plan = prepare(config)        # reads settings, pictures and tensor names; every bad input is found here
    result = sample(plan)         # loads each network when its turn comes and lets it go afterwards

Each stage is one jitted function that a loop on the host calls: once a chunk of frames for the VAE, once a step for the
DiT. So a stage compiles once, can show how far it is, and holds only one chunk of frames on the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.sharding import Mesh
from tqdm import tqdm

from sharding.distributed import is_main
from sharding.rules import parameter_sharding, replicate
from wanjax.conditioning import images, text
from wanjax.conditioning.frames import TEMPORAL_FACTOR, Task, control_branch, given_frames, latent_mask, latent_size
from wanjax.config import CLIPConfig, DiTConfig, SampleConfig, UMT5Config, VAEConfig
from wanjax.diffusion import caching, solvers
from wanjax.errors import InputError
from wanjax.models.clip import CLIPVision
from wanjax.models.dit import Context, DiT
from wanjax.models.umt5 import UMT5Encoder
from wanjax.models.vae import VAE
from wanjax.models.vae_blocks import Cache
from wanjax.sampling import calibration
from wanjax.sampling.compile_cache import Programs, cache_folder
from wanjax.sampling.request import (
    choose_checkpoint,
    choose_dit,
    choose_encoders,
    choose_length,
    choose_mesh,
    choose_prompts,
    choose_size,
    choose_task,
    make_noise,
)
from wanjax.weights import Checkpoint, lora
from wanjax.weights.lora_files import LoRAFile
from wanjax.weights.mapping import NetworkName

Pixels = np.ndarray
SHIFTS = {"t2v": 5.0, "i2v": 5.0, "flf2v": 16.0}  # the official command line's


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked request: settings of every network, conditioning pictures, schedule and noise."""

    config: SampleConfig
    checkpoint: Checkpoint
    dit: DiTConfig
    vae: VAEConfig
    umt5: UMT5Config
    clip: CLIPConfig | None
    task: Task
    height: int
    width: int
    video_pixels: Pixels | None  # [k, H, W, 3], what the VAE sees of the given frames
    clip_pixels: Pixels | None  # [k, s, s, 3], what CLIP sees of them
    loras: tuple[LoRAFile, ...]
    lora_merged: bool  # into the weights, or beside them
    tokens: tuple[np.ndarray, np.ndarray]  # ids and mask [b, l], of the prompt and, with guidance, the negative prompt
    schedule: solvers.Schedule
    noise: np.ndarray  # [1, f, h, w, c] float32
    mesh: Mesh
    shift: float
    caching: caching.Rules | None = None  # None: every step does everything
    programs: Programs = dataclasses.field(default_factory=Programs)  # calls the jitted functions


@dataclasses.dataclass(frozen=True)
class Result:
    """`latents` [1, f, h, w, c] float32, normalised; `video` uint8 `[F, H, W, 3]`; seconds by stage; `evaluations` of
    the DiT, of one of two branches half.
    """

    latents: np.ndarray
    video: np.ndarray
    seconds: dict[str, float]
    evaluations: float


def prepare(config: SampleConfig) -> Plan:
    """Check a request and read all of it but the weights.

    Raises:
      InputError: anything in it that cannot be used.
    """
    checkpoint = choose_checkpoint(config)
    dit, loras, lora_merged = choose_dit(config, checkpoint)
    umt5, vae, clip = choose_encoders(config, checkpoint, dit)
    task = choose_task(dit, config)
    check_weights(checkpoint, {"dit": dit, "umt5": umt5, "vae": vae, "clip": clip})
    f = choose_length(config)
    height, width, pictures = read_pictures(config)
    tokens = text.Tokenizer(checkpoint.tokenizer_dir, dit.text_len)(choose_prompts(config, task))
    shift = (checkpoint.flow_shift or SHIFTS[task]) if config.shift is None else config.shift
    schedule = solvers.make_schedule(config.solver, config.steps, shift, config.conventions)
    measured = calibration.read_for(config, checkpoint, loras, task, shift)
    return Plan(
        config=config,
        checkpoint=checkpoint,
        dit=dit,
        vae=vae,
        umt5=umt5,
        clip=clip,
        task=task,
        height=height,
        width=width,
        video_pixels=_stack([images.video_pixels(p, height, width, config.conventions) for p in pictures]),
        clip_pixels=_stack([images.clip_pixels(p, clip.image_size, config.conventions) for p in pictures if clip]),
        loras=loras,
        lora_merged=lora_merged,
        tokens=tokens,
        schedule=schedule,
        shift=shift,
        mesh=choose_mesh(config, dit),
        caching=caching.make_rules(config, schedule, measured),
        programs=Programs(cache_folder(config.compile_cache)),
        noise=make_noise(config, (1, f, *latent_size(height, width), dit.out_channels)),
    )


def check_weights(checkpoint: Checkpoint, networks: Mapping[NetworkName, Any]) -> None:
    """Find out whether the networks that are not None can be loaded, before the first of them is.

    Raises:
      InputError: as `Checkpoint.load`.
    """
    for network, config in networks.items():
        if config is not None:
            checkpoint.check(network, config)


def read_pictures(config: SampleConfig) -> tuple[int, int, list[PIL.Image.Image]]:
    """Height and width of the video, and the given frames, which show the same field when stretched to that size.

    Raises:
      InputError: a picture cannot be read, or the size cannot be had.
    """
    pictures = [images.read_image(p) for p in (config.first_frame, config.last_frame) if p is not None]
    height, width = choose_size(config, pictures)
    matched = images.match_frames(pictures, height, width, config.conventions) if pictures else []
    return height, width, matched


class Conditions(NamedTuple):
    """What guides the denoising: text features `[b, l, text_dim]`, CLIP features `[1, l, image_dim]` of the given
    frames, the control branch `[1, f, h, w, 20]`; None for what the network does not take.
    """

    features: jax.Array
    image: jax.Array | None
    control: jax.Array | None


def sample(plan: Plan) -> Result:
    """Run the plan, stage after stage, with a progress bar each.

    A network is on the device only while it is needed, so that the largest, not the sum, has to fit.
    """
    seconds: dict[str, float] = {}
    with placed(plan):
        conditions, vae = encode(plan, seconds)
        with _stage("denoise", plan.config.steps, seconds) as tick:
            dit, context = load_dit(plan, conditions)
            latents, evaluations = denoise(plan, dit, context, conditions.control, tick)
        if not jnp.isfinite(latents).all():
            raise InputError(
                "the latents became NaN or infinite; finite weights and noise are needed; try --dtype float32"
            )
        del dit, context
        with _stage("VAE decode", plan.noise.shape[1], seconds) as tick:
            video = decode(plan, vae, latents, tick)
    return Result(np.asarray(latents), video, seconds, evaluations)


@contextlib.contextmanager
def placed(plan: Plan) -> Iterator[None]:
    """On the plan's mesh, with the precision of matrix products that its dtype means."""
    precision = "highest" if plan.config.dtype == "float32" else None  # or accelerators multiply float32 in bf16
    with jax.set_mesh(plan.mesh), jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        yield


def encode(plan: Plan, seconds: dict[str, float]) -> tuple[Conditions, VAE]:
    """All that comes before the denoising; and the VAE, which is needed again. Times go into `seconds`."""
    with _stage("text", 1, seconds) as tick:
        features = encode_text(plan)
        tick()
    image = None
    if plan.clip_pixels is not None:
        with _stage("images", 1, seconds) as tick:
            image = encode_images(plan)
            tick()
    vae = _load(plan, "vae", plan.vae)
    with _stage("VAE encode", plan.noise.shape[1], seconds) as tick:
        control = encode_control(plan, vae, tick)
    return Conditions(features, image, control), vae


@contextlib.contextmanager
def _stage(name: str, total: int, seconds: dict[str, float]) -> Iterator[Callable[[], None]]:
    """A progress bar with time left; yields what moves it on, and notes the time the stage took."""
    start = time.perf_counter()
    with tqdm(total=total, desc=f"{name:10s}", dynamic_ncols=True, disable=not is_main()) as bar:
        yield lambda: (bar.update(), None)[1]
    seconds[name] = time.perf_counter() - start


def encode_text(plan: Plan) -> jax.Array:
    """Text features `[b, l, text_dim]`: the prompt's and, with guidance, the negative prompt's."""
    encoder = _load(plan, "umt5", plan.umt5)
    return jax.block_until_ready(plan.programs(_encode_text, encoder, *plan.tokens))


def encode_images(plan: Plan) -> jax.Array:
    """CLIP features of the given frames one after the other, `[1, l, image_dim]`.

    To an flf2v network a frame that is not given has features of zero, as it learned in training.
    """
    clip = _load(plan, "clip", plan.clip)
    features = plan.programs(_encode_images, clip, plan.clip_pixels)  # [k, tokens, image_dim]
    features = features.reshape(1, -1, features.shape[-1])  # [1, k tokens, image_dim]
    missing = max(plan.dit.image_positions - features.shape[1], 0)
    return jax.block_until_ready(jnp.pad(features, ((0, 0), (0, missing), (0, 0))))  # [1, l, image_dim]


def encode_control(plan: Plan, vae: VAE, tick: Callable[[], None] = lambda: None) -> jax.Array | None:
    """The control branch `[1, f, h, w, 20]`; None for a network without one."""
    h, w, c = plan.noise.shape[-3:]
    if plan.dit.in_channels == c:
        return None
    given = given_frames(plan.task, plan.config.frames)  # [F]
    pixels = iter(plan.video_pixels if plan.video_pixels is not None else ())
    latents, cache = [], None
    for start in [0, *range(1, len(given), TEMPORAL_FACTOR)]:
        chunk = given[start : start + (TEMPORAL_FACTOR if start else 1)]
        frames = np.zeros((1, len(chunk), plan.height, plan.width, 3), np.float32)
        for i in np.flatnonzero(chunk):
            frames[0, i] = next(pixels)
        chunk_latents, cache = plan.programs(_encode_chunk, vae, frames, cache)
        latents.append(chunk_latents)
        tick()
    mask = latent_mask(given[None], h, w)
    return control_branch(mask, jnp.concatenate(latents, axis=1))


def load_dit(plan: Plan, conditions: Conditions) -> tuple[DiT, Context]:
    """The network without what only the context needs, a quarter of the weights; and the context."""
    dit = lora.load(plan.checkpoint, plan.dit, plan.loras, plan.lora_merged, parameter_sharding)
    return dit.without_context(), make_context(plan, dit, conditions)


def make_context(plan: Plan, dit: DiT, conditions: Conditions) -> Context:
    """What the network's cross-attention sees of the conditions; of the whole network."""
    image = conditions.image
    if image is not None:
        image = jnp.repeat(image, len(conditions.features), axis=0)  # both branches of guidance see the frames
    return plan.programs(_context, dit, conditions.features, image)


def denoise(
    plan: Plan, dit: DiT, context: Context, control: jax.Array | None, tick: Callable[[], None] = lambda: None
) -> tuple[jax.Array, float]:
    """Latents `[1, f, h, w, c]`, float32, from the plan's noise; and evaluations of the DiT."""
    state, rules, cache = solvers.init(jnp.asarray(plan.noise)), plan.caching, None
    if rules is not None:
        cache = caching.init(dit, rules, state.sample, control, context.k.shape[1])
    for i in range(plan.config.steps):
        inputs = (control, context, plan.config.guidance, i, i + 1)
        if cache is None:
            state = plan.programs(denoise_steps, dit, plan.schedule, state, *inputs)
        else:
            state, cache = plan.programs(caching.denoise_steps, dit, plan.schedule, rules, (state, cache), *inputs)
        jax.block_until_ready(state)  # so that the progress bar tells the truth
        tick()
    return state.sample, float(cache.evaluations) if cache is not None else float(plan.config.steps)


@functools.partial(jax.jit, donate_argnames="state")
def denoise_steps(
    dit: DiT,
    schedule: solvers.Schedule,
    state: solvers.SolverState,
    control: jax.Array | None,
    context: Context,
    guidance: jax.Array | float,
    start: jax.Array | int,
    stop: jax.Array | int,
) -> solvers.SolverState:
    """The solver's steps `start` to `stop - 1`: one compiled loop for any part of the schedule.

    Args:
      dit: the network; what only `context()` needs may be missing.
      schedule, state: from `solvers`.
      control: control branch `[1, f, h, w, 20]`, or None.
      context: from `dit.context`; a batch of two means guidance: the prompt, then the negative prompt.
      guidance: scale of the difference between the two.
      start, stop: steps.
    """
    branches = context.k.shape[1]

    def body(i: jax.Array, state: solvers.SolverState) -> solvers.SolverState:
        x = state.sample if control is None else jnp.concatenate([state.sample, control], axis=-1)
        x = jnp.repeat(x, branches, axis=0)  # [branches, f, h, w, c_in]
        timestep = jnp.broadcast_to(schedule.timesteps[i], (branches,))
        velocity = dit(x, timestep, context)  # [branches, f, h, w, c]
        velocity = replicate(velocity)  # the branches may be on different devices
        if branches == 2:
            positive, negative = jnp.split(velocity, 2)
            velocity = negative + guidance * (positive - negative)  # [1, f, h, w, c]
        return solvers.step(schedule, i, state, velocity)

    schedule = jax.tree.map(jnp.asarray, schedule)
    return jax.lax.fori_loop(start, stop, body, state)


def decode(plan: Plan, vae: VAE, latents: jax.Array, tick: Callable[[], None] = lambda: None) -> np.ndarray:
    """Latents `[1, f, h, w, c]` to uint8 frames `[F, H, W, 3]` on the host."""
    chunks, cache = [], None
    for i in range(latents.shape[1]):
        frames, cache = plan.programs(_decode_chunk, vae, latents[:, i : i + 1], cache)
        chunks.append(np.asarray(frames))
        tick()
    return np.concatenate(chunks)


def _load(plan: Plan, network: NetworkName, config: Any) -> Any:
    return plan.checkpoint.load(network, config, parameter_sharding)


@jax.jit
def _encode_text(encoder: UMT5Encoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return replicate(text.encode_text(encoder, ids, mask))


@jax.jit
def _encode_images(clip: CLIPVision, pixels: jax.Array) -> jax.Array:
    return replicate(clip(pixels))


@functools.partial(jax.jit, donate_argnames="cache")
def _encode_chunk(vae: VAE, frames: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    latents, cache = vae.encode_chunk(frames, cache)
    return replicate(latents), cache


@jax.jit
def _context(dit: DiT, features: jax.Array, image: jax.Array | None) -> Context:
    return dit.context(features, image)


@functools.partial(jax.jit, donate_argnames="cache")
def _decode_chunk(vae: VAE, latents: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    video, cache = vae.decode_chunk(latents, cache)
    frames = jnp.round((video[0].astype(jnp.float32) + 1) * 127.5).astype(jnp.uint8)  # [F, H, W, 3]
    return replicate(frames), cache


def _stack(pixels: list[Pixels]) -> Pixels | None:
    return np.stack(pixels) if pixels else None
