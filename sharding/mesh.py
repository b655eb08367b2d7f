"""One mesh for everything: data x fsdp x ring x ulysses.

`data` copies of the model see different samples (or the two branches of guidance); `fsdp` splits samples and weights;
`ring` and `ulysses` split the tokens of one sample, and weights too. Neighbours along the last axis are the closest
devices: Ulysses exchanges everything with everyone, the ring only with the next, `data` hardly at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from wanjax.errors import InputError


class MeshShape(NamedTuple):
    """Sizes of the mesh's axes, slowest first."""

    data: int = 1
    fsdp: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sequence(self) -> int:
        """Parts that the tokens of a sample are split into."""
        return self.ring * self.ulysses

    @property
    def batch(self) -> int:
        """Parts that a batch is split into."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        """As `parse_mesh` takes it."""
        return ",".join(f"{name}={size}" for name, size in self._asdict().items())


AXES = MeshShape._fields


def parse_mesh(text: str, num_devices: int) -> MeshShape:
    """`data=1,fsdp=2,ring=2,ulysses=2` as a shape; axes not named are 1, and one may be -1: what is left.

    Raises:
      InputError: an unknown axis, a size that is no whole number, or a product that is not the number of devices.
    """
    accepted = "accepted: NAME=SIZE pairs of " + ", ".join(AXES)
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (x.strip() for x in part.partition("="))
        is_count = size.isdecimal() and len(size) < 8 and int(size) > 0  # there are not as many devices
        if name not in AXES or name in sizes or not (size == "-1" or is_count):
            raise InputError(f"mesh {text!r}: cannot read {part!r}; {accepted}; for example data=1,fsdp=-1")
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise InputError(f"mesh {text!r}: more than one -1; {accepted}, one -1 at most; give the other sizes")
    known = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values() and num_devices % known == 0:
        sizes = {name: num_devices // known if size == -1 else size for name, size in sizes.items()}
    shape = MeshShape(**sizes)
    if math.prod(shape) != num_devices or min(shape) < 1:
        rest = {name: size for name, size in sizes.items() if name != "fsdp" and size > 0}
        left = num_devices // math.prod(rest.values())
        fits = left * math.prod(rest.values()) == num_devices and left > 0
        suggestion = MeshShape(**rest, fsdp=left) if fits else MeshShape(fsdp=num_devices)
        raise InputError(
            f"mesh {text!r} is {known} devices (but for a -1), there are {num_devices}; "
            f"the product of the axes must be {num_devices}; use {suggestion}"
        )
    return shape


def sampling_mesh(num_devices: int, num_heads: int, guided: bool) -> MeshShape:
    """A good mesh for one video: the branches of guidance apart, the tokens split over the rest.

    Args:
      num_devices: how many there are.
      num_heads: of the DiT; Ulysses takes their largest divisor, the ring what is left.
      guided: whether there are two branches.
    """
    data = 2 if guided and num_devices % 2 == 0 else 1
    ulysses = math.gcd(num_devices // data, num_heads)
    return MeshShape(data=data, ring=num_devices // data // ulysses, ulysses=ulysses)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh, laid out by topology: `ulysses` on the closest devices, `data` across slices.

    Args:
      shape: sizes of the axes; their product is the number of devices.
      devices: all of this run's devices by default; or those of a topology that only a compiler sees.

    Raises:
      InputError: there are several slices and `data` is not a multiple of their number.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(tuple(shape), devices, allow_split_physical_axes=True)
    else:
        if shape.data % slices:
            raise InputError(
                f"data={shape.data} on {slices} slices; data must be a multiple of {slices}, as only it may cross the "
                f"slow network between slices; use data={slices}"
            )
        inner = shape._replace(data=shape.data // slices)
        outer = MeshShape(data=slices)
        grid = mesh_utils.create_hybrid_device_mesh(tuple(inner), tuple(outer), devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def current_shape() -> MeshShape:
    """Shape of the mesh that `jax.set_mesh` put in place; all ones without one."""
    return MeshShape(**dict(jax.sharding.get_abstract_mesh().shape))
