"""What a full-size run takes of every device, without one: `wanjax report --config configs/X.py`.

Every program is traced on every mesh that the configuration names (`MESHES`), with abstract devices: what does not fit
together fails here, in seconds and on any machine. Parameters, optimiser state and inputs are counted exactly,
activations are estimated. With --compile each program is compiled for the real TPU or GPU instead (the extras `aot` and
`aot-gpu`, up to minutes a program) and the compiler's own figures are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import runpy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from sharding.mesh import AXES, MeshShape, parse_mesh
from sharding.xla_options import GPU_OPTIONS, TPU_OPTIONS, TPU_OPTIONS_8_BIT
from wanjax.config import DiTConfig, SampleConfig, TrainConfig
from wanjax.errors import InputError
from wanjax.report import programs
from wanjax.report.hlo import KINDS, read
from wanjax.report.topology import topology_mesh
from wanjax.weights.quantize import requantized

GIB = 2**30
KEPT = {"block": 1.0, "attention": 4.0, "offload": 0.0, "dots": 12.0, "none": 40.0}
"""Arrays `[tokens, dim]` that each block keeps for the backward pass, by `TrainConfig.remat`."""
Row = dict[str, float]


def bytes_per_device(tree: Any) -> int:
    """Bytes of a device's part of a tree of shapes."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding: Any = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if isinstance(sharding, NamedSharding) else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def tokens_per_device(size: tuple[int, int, int], dit: DiTConfig, mesh: MeshShape) -> int:
    """Tokens of one sample on one device, padding included."""
    tokens = math.prod(n // p for n, p in zip(size, dit.patch_size, strict=True))
    return -(-tokens // mesh.sequence)


def working_bytes(tokens: int, dit: DiTConfig, samples: int = 1) -> int:
    """Estimate of what a block needs at its worst moment: ten times its tokens, its two largest weights whole."""
    return 2 * (10 * samples * tokens * dit.dim + 2 * dit.dim * dit.ffn_dim)


def sampling(config: SampleConfig, dit: DiTConfig, shape: MeshShape, mesh: AbstractMesh) -> Row:
    """Bytes per device of the largest stage, the DiT's steps."""
    inputs = programs.AbstractInputs(mesh)
    step = programs.denoise_step(config, dit, inputs)
    step.check()
    predictor, _, (state, _), *_ = step.arguments
    loaded = bytes_per_device(programs.context(config, dit, inputs).arguments[0])
    branches = 1 if config.guidance == 1 else 2
    tokens = tokens_per_device(programs.latent_shape(config), dit, shape)
    row = {
        "weights": bytes_per_device(predictor.dit),
        "context": bytes_per_device(predictor.context),
        "latents": bytes_per_device((state, predictor.control)),
        "activations~": working_bytes(tokens, dit, -(-branches // shape.batch)),
    }
    return {**row, "step~": sum(row.values()), "all weights": loaded}


def training(config: TrainConfig, dit: DiTConfig, shape: MeshShape, mesh: AbstractMesh) -> Row:
    """Bytes per device of the training step, for one sample in every part of the batch's axes."""
    config = dataclasses.replace(config, batch=shape.batch, accumulate=1)
    step = programs.train_step(config, dit, programs.AbstractInputs(mesh))
    step.check()
    state, batch = step.arguments
    tokens = tokens_per_device(programs.latent_shape(config), dit, shape)
    trained = bytes_per_device(state.model)
    row = {
        "weights": trained + bytes_per_device(state.frozen),
        "optimiser": bytes_per_device(state.optimizer),
        "gradients": trained,
        "batch": bytes_per_device(batch),
        "kept~": int(KEPT[config.remat] * dit.num_layers * tokens * dit.dim * 2),
        "activations~": 2 * working_bytes(tokens, dit),
    }
    return {**row, "step~": sum(row.values())}


def programs_of(
    config: SampleConfig | TrainConfig, dit: DiTConfig, mesh: Mesh
) -> dict[str, Callable[[], programs.Stage]]:
    """What a run compiles, by name."""
    inputs = programs.AbstractInputs(mesh)
    if isinstance(config, TrainConfig):
        batch = mesh.shape["data"] * mesh.shape["fsdp"]
        one_each = dataclasses.replace(config, batch=batch, accumulate=1)
        return {"training step": lambda: programs.train_step(one_each, dit, inputs)}
    return {
        "DiT step": lambda: programs.denoise_step(config, dit, inputs),
        "umT5": lambda: programs.encode_text(config, inputs),
        "CLIP": lambda: programs.encode_images(config, inputs),
        "VAE encode": lambda: programs.vae_chunks(config, inputs)[0],
        "VAE decode": lambda: programs.vae_chunks(config, inputs)[1],
    }


def compiled(
    config: SampleConfig | TrainConfig, dit: DiTConfig, topology: str, mesh: str, only: Sequence[str] | None = None
) -> Iterator[tuple[str, Row]]:
    """The compiler's figures, program by program: memory, payload of every kind of collective, and how much of that
    is exposed: nothing is computed meanwhile."""
    real, options = topology_mesh(topology, mesh), GPU_OPTIONS
    if real.devices.flat[0].platform == "tpu":
        options = TPU_OPTIONS if dit.quantize == "off" else TPU_OPTIONS_8_BIT
    with jax.set_mesh(real):
        for name, make in programs_of(config, dit, real).items():
            if only is not None and name not in only:
                continue
            # Optimised even where the environment says otherwise, as the tests' does for CPUs.
            program = read(make().lower().compile(compiler_options={**options, "xla_backend_optimization_level": 3}))
            moved = {kind: program.payload(kind) for kind in KINDS}
            waited = sum(program.payload(kind, asynchronous=False) for kind in KINDS)
            yield name, {"arguments": program.arguments, "peak": program.peak, **moved, "exposed": waited}


def table(rows: dict[str, Row]) -> str:
    """Rows of bytes as GiB, columns aligned."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max(map(len, rows))
    lines = [" ".join([" " * width, *(f"{name:>18}" for name in columns)])]
    for title, row in rows.items():
        cells = (f"{row[name] / GIB:18.2f}" if name in row else " " * 18 for name in columns)
        lines.append(" ".join([f"{title:{width}}", *cells]))
    return "\n".join(lines)


def load(path: str) -> tuple[SampleConfig | TrainConfig, DiTConfig, dict[str, str]]:
    """A configuration, its network and its meshes.

    Raises:
      InputError: the file cannot be read or names no network.
    """
    try:
        names = runpy.run_path(path)
        config = names["get_config"]()
    except Exception as error:  # the file is the user's code
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"config {path} cannot be read ({reason}); give a file such as those of configs/") from error
    dit = getattr(config, "dit", None) or names.get("NETWORK")
    if dit is None:
        raise InputError(f"config {path} does not say which network; it needs NETWORK = DiTConfig(..); see configs/")
    dtype = jnp.dtype(config.dtype)
    return config, dataclasses.replace(dit, dtype=dtype, param_dtype=dtype), names.get("MESHES", {})


def abstract_shape(text: str) -> MeshShape:
    """A mesh of as many devices as it says."""
    sizes = [part.partition("=")[2].strip() for part in text.split(",")]
    if "-1" in sizes:
        raise InputError(f"mesh {text!r} has -1; there are no devices to fill in here; give every size")
    return parse_mesh(text, math.prod(int(size) for size in sizes if size.isdecimal()))


def report(args: argparse.Namespace) -> None:
    """Print what the flags of `wanjax report` ask for.

    Raises:
      InputError: the configuration cannot be used, or does not fit the flags.
    """
    config, dit, meshes = load(args.config)
    if args.quantize is not None and isinstance(config, TrainConfig):
        raise InputError(f"--quantize {args.quantize} with {args.config}, a training; give a config for sampling")
    dit = requantized(dit, args.quantize)
    if args.compile:
        if args.mesh is None and args.compile not in meshes:
            raise InputError(f"no mesh for {args.compile} in {args.config}, which has {list(meshes)}; give --mesh")
        mesh = args.mesh or meshes[args.compile]
        print(f"{args.config} on {args.compile}, {mesh}: GiB per device, as compiled")
        for name, row in compiled(config, dit, args.compile, mesh, args.only):
            print(table({f"{name:13}": row}), flush=True)
        return
    if args.mesh is not None:
        meshes = {"": args.mesh}
    elif not meshes:
        raise InputError(f"config {args.config} names no mesh; it needs MESHES = {{topology: mesh}}; or give --mesh")
    rows = {}
    for topology, text in meshes.items():
        shape = abstract_shape(text)
        mesh = AbstractMesh(tuple(shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
        with jax.sharding.use_abstract_mesh(mesh):
            if isinstance(config, TrainConfig):
                row = training(config, dit, shape, mesh)
            else:
                row = sampling(config, dit, shape, mesh)
            rows[f"{text} {topology}".strip()] = row
    print(f"{args.config}: GiB per device; ~ estimated")
    print(table(rows))
