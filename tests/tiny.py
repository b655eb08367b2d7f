"""What the tests share: golden data, tiny configurations, meshes of fake devices, the command line, comparisons."""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import sample_jax
from sharding.mesh import MeshShape, make_mesh
from wanjax.config import DiTConfig, TrainConfig, VAEConfig
from wanjax.diffusion import solvers
from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.weights import Checkpoint
from wanjax.weights.load import parameters

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden"
DIFFUSERS, OFFICIAL = GOLDEN / "diffusers", GOLDEN / "official"
LAYOUTS = ("diffusers", "official")
PATIENCE = 1200
"""Seconds that a test waits for what must come: a machine may have much else to do."""

# Heads for eight devices; as many tokens from text and from images as no mesh divides.
DIT = DiTConfig(
    dim=64, ffn_dim=96, num_heads=8, num_layers=2, freq_dim=16, text_dim=16, text_len=8, image_dim=16, image_positions=6
)
VAE = VAEConfig(
    dim=4, z_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4
)
TRAIN = TrainConfig(workdir="unused", frames=5, height=32, width=32, batch=4, warmup=0, dtype="float32")


def on(shape=None):
    """The mesh, by default of one device, on as many of the eight fake devices as it needs; a context manager."""
    shape = shape or MeshShape()
    return jax.set_mesh(make_mesh(shape, jax.devices()[: math.prod(shape)]))


def environment(devices=8, **variables):
    """Of a process of its own with so many fake devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")  # as tests/conftest.py sets it
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | variables


def write_config(path, config):
    """A configuration file whose `get_config` gives `config`; its path as text."""

    def source(x):
        if not dataclasses.is_dataclass(x):
            return repr(x)
        changed = [field.name for field in dataclasses.fields(x) if getattr(x, field.name) != field.default]
        return f"{type(x).__name__}({', '.join(f'{name}={source(getattr(x, name))}' for name in changed)})"

    path.write_text(f"from wanjax.config import *\ndef get_config():\n    return {source(config)}\n")
    return str(path)


# ------------------------------------------------------------------------------------------------------ golden networks


def load(folder, network, **dtypes):
    checkpoint = Checkpoint(folder)
    return checkpoint.load(network, checkpoint.config(network, **dtypes))


@functools.cache
def golden(layout, network):
    """The golden network in float32, loaded once."""
    return load(GOLDEN / layout, network)


@functools.cache
def golden_arrays(layout):
    """The arrays of the reference implementation, by name (tests/golden/README.md), loaded once."""
    with np.load(GOLDEN / layout / "expected.npz") as file:
        arrays = dict(file)
    for x in arrays.values():
        x.setflags(write=False)
    return arrays


def channels_last(x):
    return np.moveaxis(x, 1, -1)


def pad_text(x, length=512):
    return np.pad(x[:length], ((0, max(0, length - len(x))), (0, 0)))[None]


def diffusers_inputs():
    """Latents with condition, text and image features of the golden step of diffusers' DiT."""
    expected = golden_arrays("diffusers")
    latents = np.concatenate([expected["init_noise"], expected["condition"]], axis=1)
    clip = expected["clip_features"]
    return channels_last(latents), expected["prompt_embeds"], clip.reshape(1, -1, clip.shape[-1])


def official_inputs(text="prompt_context"):
    """The same of the official DiT."""
    expected = golden_arrays("official")
    latents = np.concatenate([expected["init_noise"], expected["y"]], axis=0)[None]
    clip = expected["clip_features"]
    return channels_last(latents), pad_text(expected[text]), clip.reshape(1, -1, clip.shape[-1])


@jax.jit
def velocity(dit, latents, timestep, text, image):
    return dit(latents, timestep, dit.context(text, image))


def official_velocity(dit):
    """What a DiT of the official golden shape gives at the golden step."""
    latents, text, image = official_inputs()
    return np.asarray(velocity(dit, latents, golden_arrays("official")["dit_t"].astype(np.float32), text, image))


# ------------------------------------------------------------------------------------------------------ random networks


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def random_like(abstract, seed=0):
    """Random weights, biases and scales included, that keep the size of the activations; on the host."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1
        values = rng.normal(size=leaf.shape) * spread + ("scale" in jax.tree_util.keystr(path))
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract)


# A run of the sampler on random networks and inputs: two branches of guidance, 9 frames of 48 x 64.
STEPS, GUIDANCE, LATENTS = 10, 4.0, (1, 3, 6, 8, 16)
SCHEDULE = solvers.make_schedule("unipc", STEPS, shift=5.0)


def random_dit(cls=DiT):
    """`DIT` with no parameter at zero, which is what a new one's head is; on the host."""
    return random_like(jax.eval_shape(lambda: cls(DIT, nnx.Rngs(0))), seed=1)


def random_inputs(branches):
    """Noise, image condition, text and image features for `random_dit`; on the host."""
    text, image = (branches, DIT.text_len, DIT.text_dim), (1, DIT.image_positions, DIT.image_dim)
    shapes = LATENTS, (*LATENTS[:-1], 20), text, image
    noise, image_condition, text, image = (normal(seed, *shape) for seed, shape in enumerate(shapes))
    return noise, image_condition, text, np.repeat(image, branches, axis=0)


# --------------------------------------------------------------------------------------------------------- command line


def flags(layout, **changes):
    """The golden case of a layout as flags; None drops one."""
    case = json.loads((layout / "case.json").read_text())
    named = {name: case[name] for name in ("prompt", "negative_prompt", "height", "width", "frames", "steps", "shift")}
    named |= {
        "guidance": case["guidance"],
        "checkpoint": layout,
        "first_frame": layout / "first.png",
        "last_frame": layout / "last.png",
        "dtype": "float32",
        "conventions": layout.name,
    } | changes
    return [
        x for name, value in named.items() if value is not None for x in (f"--{name.replace('_', '-')}", str(value))
    ]


def refused(argv, words):
    """The command line is refused in one line with these words."""
    with pytest.raises(InputError) as caught:
        sample_jax.main(argv)
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line


# ---------------------------------------------------------------------------------------------------------- comparisons


def assert_close(ours, expected, tolerance=1e-4, least=1.0):
    """The largest difference is within `tolerance` of the largest expected value, which counts as at least `least`."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    assert np.isfinite(expected).all()
    difference, largest = np.abs(ours - expected).max(), np.abs(expected).max()
    assert difference <= tolerance * max(least, largest), f"{difference:.1e} apart, largest value {largest:.1e}"


def relative_error(ours, expected):
    """Norm of the difference over that of what is expected."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


def values(model):
    """Arrays of a network by path."""
    return {path: np.asarray(leaf[...]) for path, leaf in parameters(model).items()}


def assert_same_model(a, b):
    a, b = values(a), values(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
