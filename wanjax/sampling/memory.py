"""How much memory there is, and whether a checkpoint's networks can stay in it."""

from __future__ import annotations

import math
import os
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from sharding.mesh import MeshShape
from wanjax.config import DiTConfig
from wanjax.errors import InputError
from wanjax.weights.mapping import NetworkName
from wanjax.weights.networks import Keep, Networks

SHARE = 0.5
"""Of the memory that weights may take to stay: the rest is for what the networks compute."""
EXPERTS_SHARE = 0.7
"""The same of two experts, which are all that is there while they sample."""


def choose_keep(choice: Keep | str, networks: Networks, mesh: Mesh) -> Keep:
    """ "one" or "all", as chosen; of "auto": all, if half of the devices' memory holds all weights.

    Raises:
      InputError: another choice.
    """
    if choice == "one" or choice == "all":
        return choice
    if choice != "auto":
        raise InputError(f"keep {choice!r}; one, all and auto are accepted; use auto")
    shape = dict(mesh.shape)
    copies = shape["data"]  # parameters are split over the other axes
    return "all" if copies * networks.bytes() <= SHARE * memory_bytes(list(mesh.devices.flat)) else "one"


def choose_resident(choice: str, networks: Networks, mesh: Mesh) -> bool:
    """Whether both of two experts stay on the devices while they sample; True where there is one DiT.

    Args:
      choice: "auto", "resident" or "swap". auto: resident if both take less than `EXPERTS_SHARE` of the memory.
      networks: of the checkpoint.
      mesh: that they lie on.

    Raises:
      InputError: a choice for two experts, and there is one DiT.
    """
    if "dit_low" not in networks.configs and choice != "auto":
        raise InputError(
            f"--experts {choice} with a checkpoint of one DiT; two experts are needed (Wan2.2-A14B); leave it out"
        )
    if "dit_low" not in networks.configs or choice == "resident" or networks.keep == "all":
        return True
    both = dict(mesh.shape)["data"] * (networks.bytes_of("dit") + networks.bytes_of("dit_low"))
    return choice == "auto" and both <= EXPERTS_SHARE * memory_bytes(list(mesh.devices.flat))


def expected_bytes(
    networks: Networks, dit: DiTConfig, noise: tuple[int, ...], branches: int, mesh: Mesh, resident: bool
) -> int:
    """An estimate of what a device holds while the DiT steps, nearly always the most: its part of the weights, the
    context, and a block's working memory. `wanjax plan` asks the compiler.

    Args:
      networks: of the checkpoint.
      dit: one of two experts, or the only one.
      noise: shape of the latents `[1, f, h, w, c]`.
      branches: of guidance that are computed, 2 or 1.
      mesh: that all lies on.
      resident: whether two experts are there together.
    """
    shape = MeshShape(**dict(mesh.shape))
    names: tuple[NetworkName, ...] = ("dit", "dit_low", "vae") if resident else ("dit", "vae")
    if networks.keep == "all":
        names = ("dit", "dit_low", "vae", "umt5", "clip")
    weights = sum(networks.bytes_of(name) for name in names if name in networks.configs) // (mesh.size // shape.data)
    tokens = math.prod(n // p for n, p in zip(noise[1:4], dit.patch_size, strict=True))
    seen = dit.text_len + (0 if dit.image_dim is None else dit.image_positions or 257)
    width = jnp.dtype(dit.dtype).itemsize
    samples = -(-branches // shape.batch)
    context = 2 * dit.num_layers * seen * dit.dim * width * samples
    return weights + context + working_bytes(-(-tokens // shape.sequence), dit, samples)


def working_bytes(tokens: int, dit: DiTConfig, samples: int = 1) -> int:
    """Estimate of what a block needs at its worst moment: ten times its tokens, its two largest weights whole."""
    return jnp.dtype(dit.dtype).itemsize * (10 * samples * tokens * dit.dim + 2 * dit.dim * dit.ffn_dim)


def memory_bytes(devices: list[Any]) -> int:
    """Bytes that these devices have together; CPU devices share the host's. 0 where it is not known."""
    if devices[0].platform == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # Windows has neither
            return 0
    stats = next((d.memory_stats() for d in devices if d.process_index == d.client.process_index()), None)
    return len(devices) * int((stats or {}).get("bytes_limit", 0))
