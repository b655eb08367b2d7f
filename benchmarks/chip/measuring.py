"""Time, operations and the count beforehand of a jitted function on one device, as rows of a table."""

from __future__ import annotations

import dataclasses
import inspect
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sharding.mesh import MeshShape, make_mesh
from sharding.xla_options import TPU_OPTIONS
from wanjax.report.cycles import CHIPS, Count
from wanjax.report.hlo import read
from wanjax.report.topology import GPUS, topology_mesh
from wanjax.training.speed import operations, peak

SECONDS, MOST = 0.5, 20
"""A function is called until so much time is over, so often at most."""
TPUS = {"v6e": "v6 lite", "v5e": "v5 lite", "v5p": "v5", "tpu7x": "7x", "v4": "v4"}
"""What a device's kind contains; the first that fits."""


@dataclasses.dataclass
class Row:
    """A line of the table.

    Attributes:
      part, shape: what was done to what.
      error, plain: distance from float64 by norm, relative; that of JAX without a kernel, in the same format.
      seconds: of one call.
      tera: operations, in 10^12, of the mathematics.
      share: of the chip's bf16 peak.
      count: seconds by the static count (TPUs), or by peak and nominal memory speed, whichever is longer (GPUs).
      why: there are no figures.
    """

    part: str
    shape: str = ""
    error: float | None = None
    plain: float | None = None
    seconds: float | None = None
    tera: float | None = None
    share: float | None = None
    count: float | None = None
    why: str = ""


class Chip:
    """One device of this machine, or of a topology that is only compiled for.

    Attributes:
      runs: whether it is there.
      device, kind, platform: JAX's.
      mesh: of it alone.
      peak: bf16 operations a second; None where not known.
      memory: bytes; None where not known.
      bundles: folder that libtpu writes them to; None: it does not.
    """

    def __init__(self, bundles: Path | None = None, target: str | None = None):
        self.runs = target is None
        self.mesh: Mesh = topology_mesh(target, "data=1") if target else make_mesh(MeshShape(), jax.devices()[:1])
        self.device = self.mesh.devices.flat[0]
        self.kind, self.platform = self.device.device_kind, self.device.platform
        self.peak = peak(self.kind)
        self.memory = (self.device.memory_stats() or {}).get("bytes_limit") if self.runs else None
        self.bundles = bundles if self.platform == "tpu" else None

    def compile(self, function: Any, arguments: tuple) -> tuple[Any, float | None]:
        """The compiled function, and seconds that a call takes by the count."""
        options = TPU_OPTIONS if self.platform == "tpu" else {}
        compiled = function.lower(*arguments).compile(compiler_options=options)
        if self.bundles is not None:
            return compiled, self.static_seconds(compiled.as_text())
        return compiled, self.least_seconds(compiled, function, arguments)

    def static_seconds(self, text: str) -> float | None:
        """By the bundles that this compilation has left."""
        target = next((name for name, words in TPUS.items() if words in self.kind), "")
        assert self.bundles is not None
        own = Path(tempfile.mkdtemp(dir=self.bundles))
        for path in self.bundles.glob("*-final_bundles.txt"):
            path.rename(own / path.name)
        if target not in CHIPS or not any(own.iterdir()):
            return None
        count = Count(text, own, target)
        return sum(count.totals().values()) / count.chip.clock

    def least_seconds(self, compiled: Any, function: Any, arguments: tuple) -> float | None:
        """Operations at the peak, or arguments and results through memory once."""
        gpu = next((gpu for name, gpu in GPUS.items() if name.upper() in self.kind.upper()), None)
        if self.peak is None or gpu is None:
            return None
        moved = size((arguments, compiled.out_info))
        return max(work(function, arguments) / self.peak, moved / gpu.bandwidth_gb / 1e9)

    def measure(self, part: str, shape: str, function: Any, arguments: tuple, tera: float | None = None) -> Row:
        """Time of `function`, jitted, with random arguments of these shapes; other arguments are given as they are.

        Args:
          part, shape, tera: of the row; None: counted.
          function, arguments: what is called.
        """
        row = Row(part, shape, tera=tera)
        try:
            with jax.set_mesh(self.mesh):
                row.tera = work(function, arguments) / 1e12 if tera is None else tera
                self.check_memory(size(arguments))
                compiled, row.count = self.compile(function, arguments)
                self.check_memory(read(compiled).peak)
                if self.runs:
                    self.clock(row, partial(timed, compiled, arguments))
        except Exception as error:  # a part that fails is a row that says so
            row.why = reason(error)
        return row

    def check_memory(self, needed: float) -> None:
        """Raises `MemoryError` where that is more than there is."""
        if self.memory is not None and needed > self.memory:
            have = self.memory / 2**30
            raise MemoryError(f"{needed / 2**30:.1f} GiB are needed, the device has {have:.1f}")

    def clock(self, row: Row, seconds: Callable[[], float]) -> None:
        """Fill in what a row says of time."""
        row.seconds = seconds()
        if self.peak and row.tera:
            row.share = row.tera * 1e12 / row.seconds / self.peak


def size(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape") and hasattr(x, "dtype")]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def work(function: Any, arguments: tuple) -> float:
    """Operations of a call."""
    return operations(jax.make_jaxpr(inspect.unwrap(function))(*arguments).jaxpr)


def timed(compiled: Any, shapes: tuple) -> float:
    """Seconds of a call; arguments that a call uses up are made anew."""
    given = jax.tree.map(fill, shapes)

    def call() -> float:
        nonlocal given
        given = jax.tree.map(lambda x, shape: fill(shape) if gone(x) else x, given, shapes)
        jax.block_until_ready(given)
        start = time.perf_counter()
        jax.block_until_ready(compiled(*given))
        return time.perf_counter() - start

    first = call()
    return min(call() for _ in range(1 if first > SECONDS else min(MOST, math.ceil(SECONDS / first))))


def gone(x: Any) -> bool:
    """Whether a call has taken an array's memory."""
    return isinstance(x, jax.Array) and x.is_deleted()


def fill(shape: Any) -> Any:
    """Small random numbers of a shape, the same ones every time; what is no shape stays."""
    if not isinstance(shape, jax.ShapeDtypeStruct):
        return shape
    if shape.ndim == 0 or not (jnp.issubdtype(shape.dtype, jnp.floating) or shape.dtype == jnp.int8):
        return jnp.ones(shape.shape, shape.dtype, device=shape.sharding)
    return jax.jit(random_numbers, static_argnums=(0, 1), out_shardings=shape.sharding)(shape.shape, shape.dtype)


def random_numbers(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Cheap ones, by a hash of the place: between -0.1 and 0.1, or all of int8."""
    bits = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        here = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        bits = (bits ^ here) * jnp.uint32(2654435761)
        bits = bits ^ (bits >> 15)
    if dtype == jnp.int8:
        return (bits >> 24).astype(jnp.uint8).astype(jnp.int8)
    return ((bits >> 8).astype(jnp.float32) * (0.2 / 2**24) - 0.1).astype(dtype)


def distance(got: Any, wanted: Any) -> float:
    """By norm, relative, of the array of a tree that is farthest off."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    parts = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in parts)


def compared(part: str, shape: str, run: Any, given: Sequence[Any], wanted: Any, plain: Any = None) -> Row:
    """The row of a function's error, and of that of `plain`, another one."""
    row = Row(part, shape)
    try:
        row.error = distance(jax.jit(inspect.unwrap(run))(*given), wanted)
        row.plain = None if plain is None else distance(jax.jit(inspect.unwrap(plain))(*given), wanted)
    except Exception as error:
        row.why = reason(error)
    return row


def reason(error: Exception) -> str:
    """What a chip, a driver or another library has to say, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
