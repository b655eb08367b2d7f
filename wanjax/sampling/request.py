"""What a request leaves open: networks, task, prompts, length, size, mesh and noise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sharding.mesh import make_mesh, parse_mesh, sampling_mesh
from sharding.ulysses import check_heads
from wanjax import media
from wanjax.conditioning import images, text
from wanjax.conditioning.frames import Task, latent_frames, latent_size
from wanjax.config import CLIPConfig, DiTConfig, SampleConfig, UMT5Config, VAEConfig
from wanjax.diffusion import caching
from wanjax.errors import InputError
from wanjax.ops.attention import check_choice
from wanjax.weights import Checkpoint, lora
from wanjax.weights.lora_files import LoRAFile
from wanjax.weights.quantize import requantized


def choose_checkpoint(config: SampleConfig) -> Checkpoint:
    """The checkpoint that is asked for.

    Raises:
      InputError: none is, or as `Checkpoint`.
    """
    if config.checkpoint is None:
        raise InputError("no checkpoint; a folder in the Diffusers or the official layout is needed; give --checkpoint")
    return Checkpoint(config.checkpoint)


def choose_dit(config: SampleConfig, checkpoint: Checkpoint) -> tuple[DiTConfig, tuple[LoRAFile, ...], bool]:
    """The DiT with the dtype, format and attention that are asked for; its adapters, and whether to merge them.

    Raises:
      InputError: the checkpoint has none, has it in another format, or there is no such attention on this device; or as
        `lora.parse` and `lora.check`.
    """
    dtype = jnp.dtype(config.dtype)
    dit = checkpoint.config("dit", dtype=dtype, param_dtype=dtype)
    in_8_bits = dit.quantize != "off"
    dit = dataclasses.replace(requantized(dit, config.quantize), attention=config.attention)
    loras = lora.parse(config.lora)
    lora_merged = lora.check(loras, dit, in_8_bits, config.lora_merge)
    check_choice(config.attention, dtype, jax.devices()[0].platform)
    return dit, loras, lora_merged


def choose_encoders(
    config: SampleConfig, checkpoint: Checkpoint, dit: DiTConfig
) -> tuple[UMT5Config, VAEConfig, CLIPConfig | None]:
    """What encodes the prompt and the given frames; no CLIP for a DiT that takes none of its features.

    Raises:
      InputError: the checkpoint lacks one.
    """
    dtype = jnp.dtype(config.dtype)
    umt5 = checkpoint.config("umt5", dtype=dtype, param_dtype=dtype)
    vae = checkpoint.config("vae")  # float32 as in the official code: the VAE is 1% of the work and shows every error
    clip = None if dit.image_dim is None else checkpoint.config("clip", dtype=dtype, param_dtype=dtype)
    return umt5, vae, clip


def choose_task(dit: DiTConfig, config: SampleConfig) -> Task:
    """The task that the given frames ask for, if the network can do it.

    An flf2v network also takes a first frame alone, as it learned in its first training stage.

    Raises:
      InputError: it cannot.
    """
    given = tuple(
        name for name, path in (("first", config.first_frame), ("last", config.last_frame)) if path is not None
    )
    tasks: dict[tuple[str, ...], Task] = {(): "t2v", ("first",): "i2v", ("first", "last"): "flf2v"}
    asked = tasks.get(given)
    accepted = {"t2v": ("t2v",), "i2v": ("i2v",), "flf2v": ("i2v", "flf2v")}[dit.task]
    if asked is None or asked not in accepted:
        flags = {
            "t2v": "no frames",
            "i2v": "--first-frame alone",
            "flf2v": "--first-frame with or without --last-frame",
        }
        frames = " and ".join(f"--{name}-frame" for name in given) or "no frame"
        raise InputError(
            f"{frames} given to a {dit.task} checkpoint, which takes {flags[dit.task]}; "
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


def choose_length(config: SampleConfig) -> int:
    """Latent frames of the video.

    Raises:
      InputError: unless the frames are 4 n + 1, and more than 0 a second.
    """
    if not 0 < config.fps < math.inf:
        raise InputError(f"fps {config.fps}; a number above 0 is accepted; 16 is what the model was trained with")
    return latent_frames(config.frames)


def choose_size(config: SampleConfig, pictures: list[Any]) -> tuple[int, int]:
    """Height and width in pixels: as given, or else with the first picture's aspect ratio at the configured area."""
    if config.height is not None and config.width is not None:
        height, width = config.height, config.width
    else:
        first = pictures[0] if pictures else np.zeros((9, 16, 3), np.uint8)
        height, width = images.choose_size(first, config.area)
        if config.height is not None:
            height, width = config.height, max(16, round(config.height * width / height / 16) * 16)
        elif config.width is not None:
            height, width = max(16, round(config.width * height / width / 16) * 16), config.width
    latent_size(height, width)
    return height, width


def choose_mesh(config: SampleConfig, dit: DiTConfig) -> Mesh:
    """The mesh that is asked for, of all devices; by default a good one, on CPUs of one device.

    Raises:
      InputError: the mesh does not fit the devices, the heads, or the CFG cache.
    """
    devices = jax.devices()
    apart = config.guidance != 1  # the branches of guidance on different devices
    _, _, every = caching.switches(config)
    if config.mesh is not None:
        shape = parse_mesh(config.mesh, len(devices))
    else:
        devices = devices[:1] if devices[0].platform == "cpu" else devices
        shape = sampling_mesh(len(devices), dit.num_heads, apart and every == 1)
    check_heads(dit.num_heads, shape.ulysses)
    if apart and every > 1 and shape.batch == 2:
        raise InputError(
            f"cfg-cache {every} on mesh {shape}, where the unconditional branch's own devices would wait; "
            "data * fsdp other than 2 is accepted; give those devices to ring or ulysses, or leave --cfg-cache out"
        )
    return make_mesh(shape, devices)


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
