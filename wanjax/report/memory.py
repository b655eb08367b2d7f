"""What a full-size run takes of every device, counted in seconds and on any machine.

Programs are traced on a mesh of abstract devices: what does not fit together fails here. Parameters, optimiser state
and inputs are counted exactly, activations are estimated; `wanjax.report.compiled` has the compilers' own figures.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from sharding.mesh import AXES, MeshShape, parse_mesh
from wanjax.config import DiTConfig, SampleConfig, TrainConfig, read_config
from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.report import programs
from wanjax.sampling.memory import working_bytes
from wanjax.sampling.steps import is_guided

GIB = 2**30
KEPT = {"block": 1.0, "attention": 4.0, "offload": 0.0, "dots": 12.0, "none": 40.0}
"""Arrays `[tokens, dim]` that each block keeps for the backward pass, by `TrainConfig.remat`."""
Row = dict[str, float]


def bytes_per_device(tree: Any) -> int:
    """Bytes of a device's part of a tree of shapes, without what lies in the hosts' memory."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding: Any = getattr(leaf, "sharding", None)
        if getattr(sharding, "memory_kind", None) == "pinned_host":
            continue
        shape = sharding.shard_shape(leaf.shape) if isinstance(sharding, NamedSharding) else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def tokens_per_device(size: tuple[int, int, int], dit: DiTConfig, mesh: MeshShape) -> int:
    """Tokens of one sample on one device, padding included."""
    tokens = math.prod(n // p for n, p in zip(size, dit.patch_size, strict=True))
    return -(-tokens // mesh.sequence)


def sampling(config: SampleConfig, dit: DiTConfig, shape: MeshShape, mesh: AbstractMesh, experts: int = 1) -> Row:
    """Bytes per device of the largest stage, the DiT's steps; of two experts one at a time, and both resident."""
    inputs = programs.AbstractInputs(mesh)
    step = programs.denoise_step(config, dit, inputs)
    step.check()
    predictor, _, (state, _), *_ = step.arguments
    loaded = bytes_per_device(inputs.network(DiT, dit))
    branches = 2 if is_guided(config) else 1
    tokens = tokens_per_device(programs.latent_shape(config), dit, shape)
    row = {
        "weights": bytes_per_device(predictor.dit),
        "context": bytes_per_device(predictor.context),
        "latents": bytes_per_device((state, predictor.image_condition)),
        "activations~": working_bytes(tokens, dit, -(-branches // shape.batch)),
    }
    both = {"both experts~": sum(row.values()) + row["weights"] + row["context"]} if experts == 2 else {}
    return {**row, "step~": sum(row.values()), **both, "all weights": loaded}


def training(config: TrainConfig, dit: DiTConfig, shape: MeshShape, mesh: AbstractMesh) -> Row:
    """Bytes per device of the training step, for one sample in every part of the batch's axes."""
    config = dataclasses.replace(config, batch=shape.batch, accumulate=1)
    sizes = training_arguments(dataclasses.replace(config, remat="none"), dit, mesh)
    tokens = tokens_per_device(programs.latent_shape(config), dit, shape)
    row = {
        **sizes,
        "kept~": int(KEPT[config.remat] * dit.num_layers * tokens * dit.dim * 2),
        "activations~": 2 * working_bytes(tokens, dit),
    }
    return {**row, "step~": sum(row.values())}


@functools.cache
def training_arguments(config: TrainConfig, dit: DiTConfig, mesh: AbstractMesh) -> Row:
    """Bytes per device that recomputation does not change; fails where the step does not fit together on the mesh."""
    step = programs.train_step(config, dit, programs.AbstractInputs(mesh))
    step.check()
    state, batch = step.arguments
    trained = bytes_per_device(state.model)
    return {
        "weights": trained + bytes_per_device(state.frozen),
        "optimiser": bytes_per_device(state.optimizer),
        "gradients": trained,
        "batch": bytes_per_device(batch),
    }


def count(config: SampleConfig | TrainConfig, dit: DiTConfig, shape: MeshShape, experts: int = 1) -> Row:
    """Bytes per device on a mesh of abstract devices; what does not fit together fails here.

    Raises:
      InputError: the network cannot be split so.
    """
    mesh = AbstractMesh(tuple(shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    none = AbstractMesh((), ())  # JAX changes a mesh's size only by way of none
    with jax.sharding.use_abstract_mesh(none), jax.sharding.use_abstract_mesh(mesh):
        if isinstance(config, TrainConfig):
            return training(config, dit, shape, mesh)
        return sampling(config, dit, shape, mesh, experts)


def table(rows: dict[str, Row]) -> str:
    """Rows of bytes as GiB, columns aligned."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max(map(len, rows))
    lines = [" ".join([" " * width, *(f"{name:>18}" for name in columns)])]
    for title, row in rows.items():
        cells = (f"{row[name] / GIB:18.2f}" if name in row else " " * 18 for name in columns)
        lines.append(" ".join([f"{title:{width}}", *cells]))
    return "\n".join(lines)


def load(path: str) -> tuple[SampleConfig | TrainConfig, DiTConfig, dict[str, str], int]:
    """A configuration, its network, its meshes, and how many experts of that shape there are.

    Raises:
      InputError: the file cannot be read or names no network.
    """
    config, names = read_config(path, (SampleConfig, TrainConfig))
    dit = (config.dit if isinstance(config, TrainConfig) else None) or names.get("NETWORK")
    if dit is None:
        raise InputError(f"config {path} does not say which network; it needs NETWORK = DiTConfig(..); see configs/")
    dtype = jnp.dtype(config.dtype)
    return (
        config,
        dataclasses.replace(dit, dtype=dtype, param_dtype=dtype),
        names.get("MESHES", {}),
        names.get("EXPERTS", 1),
    )


def abstract_shape(text: str) -> MeshShape:
    """A mesh of as many devices as it says.

    Raises:
      InputError: it has a -1; or as `parse_mesh`.
    """
    sizes = [part.partition("=")[2].strip() for part in text.split(",")]
    if "-1" in sizes:
        raise InputError(f"mesh {text!r} has -1; there are no devices to fill in here; give every size")
    return parse_mesh(text, math.prod(int(size) for size in sizes if size.isdecimal() and len(size) < 8))
