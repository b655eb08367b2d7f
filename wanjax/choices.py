"""What a request leaves open: task, size, mesh and noise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sharding.mesh import make_mesh, parse_mesh, sampling_mesh
from sharding.ulysses import check_heads
from wanjax import caching, conditioning, images, media
from wanjax.config import DiTConfig, SampleConfig
from wanjax.errors import InputError


def choose_task(dit: DiTConfig, config: SampleConfig) -> conditioning.Task:
    """The task that the given frames ask for, if the network can do it.

    An flf2v network also takes a first frame alone, as it learned in its first training stage.

    Raises:
      InputError: it cannot.
    """
    given = tuple(
        name for name, path in (("first", config.first_frame), ("last", config.last_frame)) if path is not None
    )
    tasks: dict[tuple[str, ...], conditioning.Task] = {(): "t2v", ("first",): "i2v", ("first", "last"): "flf2v"}
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
    conditioning.latent_size(height, width)
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
    """Standard normal `[1, f, h, w, c]` from the seed, or the given file, which is channels first."""
    if config.initial_noise is None:
        return np.asarray(jax.random.normal(jax.random.key(config.seed), shape, jnp.float32))
    b, f, h, w, c = shape
    return np.moveaxis(media.load_noise(config.initial_noise, (b, c, f, h, w)), 1, -1)
