"""What a device of each kind has: memory, operations and bytes a second, by nominal figures."""

from __future__ import annotations

import math
from typing import NamedTuple

from wanjax.errors import InputError
from wanjax.report.cycles import CHIPS
from wanjax.report.topology import GPUS

GIB = 2**30
ACCEPTED = (
    "accepted: v6e:2x4, v5p:4x4x4, tpu7x:2x2x1 and the like, of v4, v5e, v5p, v6e, tpu7x; h100:8 and the like, of "
    + ", ".join(GPUS)
)


class Device(NamedTuple):
    """Nominal figures, dense.

    memory: bytes that a program may have.
    flops: bfloat16 operations a second.
    flops_8_bit: in the 8 bits that it multiplies fastest; as `flops` where it has no units for them.
    format: "fp8" or "int8", which these are.
    bandwidth: bytes a second of its memory.
    links: bytes a second that it sends to its neighbours.
    """

    memory: int
    flops: float
    flops_8_bit: float
    format: str
    bandwidth: float
    links: float


# TPUs' memory is what libtpu lets a program have. Rates: cloud.google.com/tpu/docs.
_TPU_GIB = {"v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
_TPUS = {
    "v4": Device(int(31.75 * GIB), 275e12, 275e12, "int8", 1228e9, 150e9),
    "v5e": Device(int(15.75 * GIB), 197e12, 394e12, "int8", 819e9, 100e9),
} | {
    name: Device(
        int(gib * GIB),
        CHIPS[name].flops,
        2 * CHIPS[name].flops,
        "fp8" if name == "tpu7x" else "int8",
        CHIPS[name].memory,
        CHIPS[name].links / 2,
    )
    for name, gib in _TPU_GIB.items()
}
# bfloat16 with float32 sums, 8 bits, bytes a second to other GPUs (NVLink, or PCIe): NVIDIA's data sheets and the
# whitepapers of GA102, Ada and RTX Blackwell.
_GPU_RATES = {
    "a100": (312e12, 624e12, "int8", 300e9),
    "rtx3090": (71e12, 284e12, "int8", 32e9),
    "l40s": (362e12, 733e12, "fp8", 32e9),
    "h100": (989e12, 1979e12, "fp8", 450e9),
    "b200": (2250e12, 4500e12, "fp8", 900e9),
    "rtx5090": (209.5e12, 419e12, "fp8", 64e9),
}
DRIVER_BYTES = GIB
"""Of a GPU's memory that CUDA, cuBLAS and cuDNN take for themselves, about."""


def device(target: str) -> Device:
    """A device of a target such as v6e:2x4 or h100:8.

    Raises:
      InputError: no figures of it are known.
    """
    name = target.partition(":")[0]
    if name in _TPUS:
        return _TPUS[name]
    if name in GPUS:
        flops, flops_8_bit, format, links = _GPU_RATES[name]
        memory = GPUS[name].memory_gib * GIB - DRIVER_BYTES
        return Device(memory, flops, flops_8_bit, format, GPUS[name].bandwidth_gb * 1e9, links)
    raise InputError(f"target {target!r} is not known; {ACCEPTED}; change --target")


def count(target: str) -> int:
    """How many devices a target has; a chip of tpu7x is two.

    Raises:
      InputError: it does not say that, or is not known.
    """
    name, _, shape = target.partition(":")
    device(target)
    sizes = shape.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes) or (name in GPUS and len(sizes) > 1):
        raise InputError(f"target {target!r} does not say how many devices; {ACCEPTED}; change --target")
    return math.prod(map(int, sizes)) * (2 if name == "tpu7x" else 1)
