"""Which mesh axes split which logical axes: the whole sharding of the models, as data.

Activations: a batch is split over `data` and `fsdp`, tokens over `ring` and `ulysses` (ring first, so that a ring
member holds neighbouring tokens); the VAE's pictures, in height and width, over `ring` and `ulysses` in whichever way
makes the most parts. Parameters and optimiser state: every one but the vectors is split over `fsdp`, `ring` and
`ulysses` together, along the axis it calls "embed" or, if that does not divide, another; each device stores 1/N of the
model and gathers a layer's weights when it needs them.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from sharding.mesh import current_shape

ACTIVATIONS: dict[str, tuple[str, ...]] = {"batch": ("data", "fsdp"), "tokens": ("ring", "ulysses")}
PARAMETERS: tuple[str, ...] = ("fsdp", "ring", "ulysses")
TILE_ROWS = 128
"""A multiple of the rows of a memory tile, whatever the chip and the dtype."""
PREFERRED = ("embed", "mlp", "heads", "vocab")
"""Logical parameter axes, in the order in which they are tried."""


def activation_spec(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """How the ambient mesh splits an array: one logical name, or None for whole, per axis.

    An axis whose size the mesh does not divide stays whole.
    """
    sizes = current_shape()._asdict()
    spec = []
    for size, name in zip(shape, axes, strict=True):
        mesh_axes = ACTIVATIONS[name] if name else ()
        fits = size % math.prod(sizes[a] for a in mesh_axes) == 0
        spec.append(mesh_axes if mesh_axes and fits else None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by `activation_spec`. Without a mesh, `x` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.sharding.reshard(x, activation_spec(x.shape, *axes))


def token_padding(length: int) -> int:
    """Tokens that are added to `length` so that the mesh divides them.

    Many are padded to whole rows of memory tiles on every device as well. On TPUs all of a sequence is then the parts
    of its devices one behind the other; with any rest, putting them together is a copy.
    """
    parts = current_shape().sequence
    multiple = TILE_ROWS if parts > 1 and length >= 16 * TILE_ROWS * parts else 1
    return -length % (parts * multiple)


def pictures_spec(shape: tuple[int, ...], cells: tuple[int, int]) -> PartitionSpec:
    """How the ambient mesh splits pictures `[b, f, h, w, c]`: the batch as ever, tokens' axes over height and width.

    Args:
      shape: of the pictures.
      cells: height and width of the coarsest grid that the pictures become or come from. A part is of whole cells, so
        that every grid between is split in the same way. Of the ways to give each mesh axis to the height, the width or
        neither, that with the most parts counts, the first of equals: 90x160 over 8 is split into 8 of 90x20; 90x90
        over 8 is not split, as the mesh axis divides neither, and every device does all of it.
    """
    sizes = current_shape()._asdict()
    mesh_axes = [a for a in ACTIVATIONS["tokens"] if sizes[a] > 1]
    best: tuple[int, tuple, tuple] = (0, (), ())
    for places in itertools.product((0, 1, None), repeat=len(mesh_axes)):
        height, width = (tuple(a for a, place in zip(mesh_axes, places, strict=True) if place == i) for i in (0, 1))
        rows, columns = (math.prod(sizes[a] for a in names) for names in (height, width))
        if cells[0] % rows == cells[1] % columns == 0 and rows * columns > best[0]:
            best = rows * columns, height, width
    return PartitionSpec(activation_spec(shape[:1], "batch")[0], None, best[1] or None, best[2] or None, None)


def split_pictures(x: jax.Array, cells: tuple[int, int]) -> jax.Array:
    """`x` `[b, f, h, w, c]` laid out by `pictures_spec`. Without a mesh, `x` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.sharding.reshard(x, pictures_spec(x.shape, cells))


def replicate(x: jax.Array) -> jax.Array:
    """All of `x` on every device."""
    return constrain(x, *(None,) * x.ndim)


def gather(parameter: jax.Array, x: jax.Array | None = None) -> jax.Array:
    """The whole of a parameter on every device. Without a mesh, the parameter itself.

    Args:
      parameter: split or whole.
      x: what it will be multiplied with by a matrix product. The parameter is marked `reduced` over the axes that split
        `x`, so that its gradient stays a partial sum until the reduce-scatter in `_scatter`, and is not all-reduced
        first.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return parameter
    split: set[str] = set()
    for names in jax.typeof(x).sharding.spec if x is not None else ():
        split |= {names} if isinstance(names, str) else set(names or ())
    return _gather(parameter, frozenset(split), jax.typeof(parameter).sharding.spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(parameter: jax.Array, split: frozenset[str], spec: PartitionSpec) -> jax.Array:
    return jax.sharding.reshard(parameter, PartitionSpec(*(None,) * parameter.ndim, reduced=split))


def _gather_forward(parameter: jax.Array, split: frozenset[str], spec: PartitionSpec) -> tuple[jax.Array, None]:
    return _gather(parameter, split, spec), None


def _scatter(split: frozenset[str], spec: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    """Reduce-scatter to the parameter's sharding, one mesh axis at a time; each gets its own leading array axis.

    XLA makes reduce-scatters of these on every TPU mesh of configs/. Of one over several mesh axes at once, or along an
    axis that memory tiles do not divide, it makes a whole sum on every device, twice the traffic, and cuts out a part.
    """
    sizes = current_shape()._asdict()
    axis, split_by = next(((i, names) for i, names in enumerate(spec) if names), (0, ()))
    names = [a for a in ((split_by,) if isinstance(split_by, str) else split_by) if sizes[a] > 1]
    if not names:
        return (jax.sharding.reshard(gradient, spec),)
    g = jnp.moveaxis(gradient, axis, 0)
    parts = g.reshape(*(sizes[a] for a in names), -1, *g.shape[1:])  # [fsdp, ring, ulysses, part, ..]
    done: set[str] = set()
    # First over the axes along which devices have the same: a cut behind a sum would be merged with the sum's own.
    for name in sorted(names, key=split.__contains__):
        done.add(name)
        cut = (a if a in done else None for a in names)
        parts = jax.sharding.reshard(parts, PartitionSpec(*cut, *(None,) * g.ndim, unreduced=split - done))
    scattered = PartitionSpec(tuple(names), *(None,) * (g.ndim - 1), unreduced=split - done)
    g = jax.lax.reshape(parts, g.shape, out_sharding=scattered)
    return (jax.sharding.reshard(jnp.moveaxis(g, 0, axis), spec),)


_gather.defvjp(_gather_forward, _scatter)


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids` `[b, l]` of an embedding table `[n, e]` that is split along e: `[b, l, e]`, split over the batch.

    Every device looks all ids up in its own columns; only the rows found travel, never the table.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return table[ids]
    ids = jax.sharding.reshard(ids, PartitionSpec(None, None))
    rows = table.at[ids].get(out_sharding=PartitionSpec(None, None, jax.typeof(table).sharding.spec[1]))
    return constrain(rows, "batch", None, None)


def reshape(x: jax.Array, shape: tuple[int, ...], like: jax.Array | None = None) -> jax.Array:
    """`x.reshape(shape)`, split as `like` or, without it, in the first axis only, which stays.

    Explicit sharding requires that to be said.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x.reshape(shape)
    batch = jax.typeof(x).sharding.spec[0]
    spec = PartitionSpec(batch, *(None,) * (len(shape) - 1)) if like is None else jax.typeof(like).sharding.spec
    return jax.lax.reshape(x, shape, out_sharding=spec)


def repeat(x: jax.Array, repeats: int, axis: int) -> jax.Array:
    """`jnp.repeat` of every device's own part (explicit sharding requires out_sharding here)."""
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.repeat(x, repeats, axis)
    return jnp.repeat(x, repeats, axis, out_sharding=jax.typeof(x).sharding)


def split_batch(x: jax.Array, parts: int) -> jax.Array:
    """`[b, ..]` -> `[parts, b / parts, ..]`, each part split over the batch's mesh axes.

    Neighbouring rows go to different parts, so that no row has to move: each device has its share of every part.
    """
    shape = (x.shape[0] // parts, parts, *x.shape[1:])
    if jax.sharding.get_abstract_mesh().empty:
        return x.reshape(shape).swapaxes(0, 1)
    spec = activation_spec(shape, "batch", *(None,) * x.ndim)
    x = jax.sharding.reshard(x, PartitionSpec(spec[0], *(None,) * (x.ndim - 1)))
    return jax.lax.reshape(x, shape, out_sharding=spec).swapaxes(0, 1)  # [parts, b / parts, ..]


def parameter_spec(shape: tuple[int, ...], axes: tuple[str | None, ...], sizes: dict[str, int]) -> PartitionSpec:
    """How a parameter is split: over as many of `PARAMETERS` as one of its axes divides by.

    Args:
      shape: the parameter's, perhaps with leading layer axes that `axes` does not name and that stay whole.
      axes: logical names of its last axes.
      sizes: of the mesh's axes.

    Vectors are whole: they weigh nothing, and each would be a collective of its own in every layer.
    """
    if len(axes) == 1:
        return PartitionSpec(*(None,) * len(shape))
    names = (None,) * (len(shape) - len(axes)) + tuple(axes)
    for count in range(len(PARAMETERS), 0, -1):
        mesh_axes = PARAMETERS[:count]
        parts = math.prod(sizes[a] for a in mesh_axes)
        for wanted in PREFERRED:
            for i, name in enumerate(names):
                if name == wanted and shape[i] % parts == 0:
                    return PartitionSpec(*(mesh_axes if i == j else None for j in range(len(shape))))
    return PartitionSpec(*(None,) * len(shape))


def parameter_sharding(path: tuple[str, ...], parameter: nnx.Variable, mesh: Any = None) -> Sharding:
    """The sharding of a parameter by its logical axes; what `Checkpoint.load` takes."""
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    axes = parameter.get_metadata().get("axes", ())
    return NamedSharding(mesh, parameter_spec(parameter.shape, axes, dict(mesh.shape)))


def shard_parameters(model: Any) -> Any:
    """Lay out a model's parameters by the rules; inside jit too."""
    if jax.sharding.get_abstract_mesh().empty:
        return model
    sizes = current_shape()._asdict()

    def place(leaf: Any) -> Any:
        spec = parameter_spec(leaf.shape, leaf.get_metadata().get("axes", ()), sizes)
        return leaf.replace(jax.sharding.reshard(leaf[...], spec))

    return jax.tree.map(place, model, is_leaf=lambda x: isinstance(x, nnx.Variable))
