"""How much memory there is, and whether a checkpoint's networks can stay in it."""

from __future__ import annotations

import os
from typing import Any

from jax.sharding import Mesh

from wanjax.errors import InputError
from wanjax.weights.networks import Keep, Networks

SHARE = 0.5
"""Of the memory that weights may take to stay: the rest is for what the networks compute."""


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


def memory_bytes(devices: list[Any]) -> int:
    """Bytes that these devices have together; CPU devices share the host's. 0 where it is not known."""
    if devices[0].platform == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # Windows has neither
            return 0
    stats = next((d.memory_stats() for d in devices if d.process_index == d.client.process_index()), None)
    return len(devices) * int((stats or {}).get("bytes_limit", 0))
