"""Every program of sampling and training with the shapes, not the values, of what goes in: to check, count or compile
full-size networks on any mesh without memory for one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.mesh import AXES, MeshShape
from sharding.rules import activation_spec, parameter_sharding
from wanjax.conditioning.encoders import encode_chunk, image_features, text_features
from wanjax.conditioning.frames import latent_frames, latent_size
from wanjax.conditioning.samples import Encoded
from wanjax.config import WAN_VAE, CLIPConfig, DiTConfig, SampleConfig, TrainConfig, UMT5Config, VAEConfig
from wanjax.diffusion import solvers
from wanjax.diffusion.caching import Cached
from wanjax.diffusion.denoise import Guided, denoise
from wanjax.models.clip import CLIPVision
from wanjax.models.dit import DiT
from wanjax.models.umt5 import UMT5Encoder
from wanjax.models.vae import VAE
from wanjax.sampling.cache_rules import make_rules
from wanjax.sampling.decoding import decode_chunk
from wanjax.sampling.pipeline import make_context
from wanjax.sampling.request import choose_size
from wanjax.sampling.steps import is_guided, scales
from wanjax.training.objectives import dit_objective
from wanjax.training.objectives.flow_matching import in_dtypes
from wanjax.training.offload import put_away
from wanjax.training.speed import operations_by_type
from wanjax.training.state import TrainState, new_state
from wanjax.training.step import make_step


class Stage(NamedTuple):
    """A jitted function and what it takes; every array a `ShapeDtypeStruct` with its sharding."""

    function: Any
    arguments: tuple

    def lower(self) -> Any:
        """The stage, ready to be compiled. Call it under `jax.set_mesh`."""
        return self.function.lower(*self.arguments)

    def check(self) -> Any:
        """Shapes and shardings of the result; fails where the program does not fit together."""
        return jax.eval_shape(self.function, *self.arguments)

    def parts(self) -> dict[str, Any]:
        """The arguments by what they are: "weights", "optimiser", "context" (of cross-attention), "step cache" and
        "inputs".
        """
        first, *rest = self.arguments
        if isinstance(first, (Guided, Cached)):
            state, memory = self.arguments[2]
            inputs = (first.image_condition, state)
            return {"weights": first.dit, "context": first.context, "step cache": memory, "inputs": inputs}
        if isinstance(first, TrainState):
            averages = (first.optimizer, first.ema)
            return {"weights": (first.model, first.frozen), "optimiser": averages, "inputs": rest}
        return {"weights": first, "inputs": rest}


MakeStage = Callable[[], Stage]


@functools.cache
def parameter_shapes(build: Callable[..., Any], *config: Any) -> Any:
    """The network `build(*config, rngs)`, its parameters shapes: no mesh changes them, a large one takes a second."""
    return jax.eval_shape(lambda: build(*config, nnx.Rngs(0)))


class AbstractInputs:
    """Makes shapes on a mesh; use it under that mesh.

    Args:
      mesh: real, of a topology or abstract.
    """

    def __init__(self, mesh: Mesh | AbstractMesh):
        self.mesh = mesh

    def array(self, shape: tuple[int, ...], dtype: Any = jnp.float32, *axes: str | None) -> Any:
        """An array split by the logical axes given; whole without any."""
        spec = activation_spec(shape, *(axes or (None,) * len(shape)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def network(self, build: Callable[..., Any], *config: Any) -> Any:
        """The parameters of the network `build(*config, rngs)`, split by the rules."""
        return self.like(parameter_shapes(build, *config))

    def like(self, tree: Any) -> Any:
        """Shapes with shardings: parameters (and what is like them) by the rules, the rest as it is or whole."""

        def place(leaf: Any) -> Any:
            if isinstance(leaf, nnx.Variable):
                sharding = parameter_sharding((), leaf, self.mesh)
                return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))
            spec = getattr(leaf.sharding, "spec", None) or PartitionSpec()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec))

        return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def latent_shape(config: SampleConfig | TrainConfig) -> tuple[int, int, int]:
    """Latent frames, height and width with the published VAE; 16:9 where a configuration names an area only."""
    height, width = config.height, config.width
    if height is None or width is None:
        assert isinstance(config, SampleConfig)
        height, width = choose_size(config, [], WAN_VAE, DiTConfig())
    return latent_frames(config.frames, WAN_VAE), *latent_size(height, width, WAN_VAE, DiTConfig().patch_size)


def features(inputs: AbstractInputs, dit: DiTConfig, batch: int) -> tuple[Any, Any]:
    """Text and image features `[b, l, ..]`."""
    text = inputs.array((batch, dit.text_len, dit.text_dim), jnp.float32, "batch", None, None)
    if dit.image_dim is None:
        return text, None
    length = dit.image_positions or CLIPConfig().num_tokens
    return text, inputs.array((batch, length, dit.image_dim), jnp.float32, "batch", None, None)


def context(config: SampleConfig, dit: DiTConfig, inputs: AbstractInputs) -> Stage:
    """Cross-attention keys and values, once per video."""
    text, image = features(inputs, dit, 2 if is_guided(config) else 1)
    return Stage(make_context, (inputs.network(DiT, dit), text, image))


def denoise_step(config: SampleConfig, dit: DiTConfig, inputs: AbstractInputs) -> Stage:
    """One step of the solver, both branches of guidance in it."""
    before = context(config, dit, inputs)
    size = latent_shape(config)
    latents = jax.eval_shape(lambda: jnp.zeros((1, *size, dit.out_channels)))
    state = inputs.like(jax.eval_shape(solvers.init, latents))
    channels = dit.in_channels - dit.out_channels
    image_condition = inputs.array((1, *size, channels)) if channels else None
    schedule = solvers.make_schedule(
        config.solver, config.steps, config.shift or 16.0, config.conventions, config.sigmas, config.timesteps
    )
    network = before.arguments[0].without_context()
    plain = (network, inputs.like(before.check()), image_condition, scales(config)[0])
    if (rules := make_rules(config, schedule)) is None:
        return Stage(denoise, (Guided(*plain), schedule, (state, None), 0, 1))
    predictor = Cached(*plain, rules)
    memory = inputs.like(jax.eval_shape(lambda predictor, sample: predictor.init(sample), predictor, state.sample))
    return Stage(denoise, (predictor, schedule, (state, memory), 0, 1))


def encode_text(config: SampleConfig, inputs: AbstractInputs) -> Stage:
    """umT5-XXL on the prompt and the negative prompt."""
    dtype = jnp.dtype(config.dtype)
    network = inputs.network(UMT5Encoder, UMT5Config(dtype=dtype, param_dtype=dtype))
    shape = (2 if is_guided(config) else 1, DiTConfig().text_len)
    return Stage(text_features, (network, inputs.array(shape, jnp.int32), inputs.array(shape, jnp.bool_)))


def encode_images(config: SampleConfig, inputs: AbstractInputs) -> Stage:
    """CLIP ViT-H on the first and the last frame."""
    dtype = jnp.dtype(config.dtype)
    clip = CLIPConfig(dtype=dtype, param_dtype=dtype)
    network = inputs.network(CLIPVision, clip)
    pixels = inputs.array((2, clip.image_size, clip.image_size, 3))
    return Stage(image_features, (network, pixels))


def vae_chunks(config: SampleConfig, inputs: AbstractInputs, vae: VAEConfig = WAN_VAE) -> tuple[Stage, Stage]:
    """The VAE's encoding and decoding of a chunk in the middle of a clip: four frames, one latent frame."""
    network = inputs.network(VAE, vae)
    _, h, w = latent_shape(config)

    def frames(count: int) -> Any:
        return inputs.array((1, count, h * vae.spatial_factor, w * vae.spatial_factor, 3))

    latents = inputs.array((1, 1, h, w, vae.z_dim))
    _, encoding = Stage(encode_chunk, (network, frames(1), None)).check()
    _, decoding = Stage(decode_chunk, (network, latents, None)).check()
    return (
        Stage(encode_chunk, (network, frames(vae.temporal_factor), inputs.like(encoding))),
        Stage(decode_chunk, (network, latents, inputs.like(decoding))),
    )


def train_step(config: TrainConfig, dit: DiTConfig, inputs: AbstractInputs) -> Stage:
    """One optimiser step on a whole batch."""
    dit = in_dtypes(dit, config)
    objective = dit_objective(config, dit)
    state = inputs.like(jax.eval_shape(lambda: new_state(objective, objective.make(nnx.Rngs(0)))))
    state = put_away(config, state)
    size = latent_shape(config)
    channels = dit.in_channels - dit.out_channels
    split = ("batch", None, None, None, None)
    batch = Encoded(
        inputs.array((config.batch, *size, dit.out_channels), jnp.float32, *split),
        *features(inputs, dit, config.batch),
        inputs.array((config.batch, *size, channels), jnp.float32, *split) if channels else None,
    )
    turn = next(iter(objective.turns().values()))  # of several, all are alike
    return Stage(make_step(turn), (state, batch))


def stages(config: SampleConfig | TrainConfig, dit: DiTConfig, mesh: Mesh | AbstractMesh) -> dict[str, MakeStage]:
    """What a run compiles, by name. Make them under the mesh."""
    inputs = AbstractInputs(mesh)
    if isinstance(config, TrainConfig):
        return {"training step": lambda: train_step(config, dit, inputs)}
    made: dict[str, MakeStage] = {
        "DiT step": lambda: denoise_step(config, dit, inputs),
        "DiT context": lambda: context(config, dit, inputs),
        "umT5": lambda: encode_text(config, inputs),
        "CLIP": lambda: encode_images(config, inputs),
        "VAE encode": lambda: vae_chunks(config, inputs)[0],
        "VAE decode": lambda: vae_chunks(config, inputs)[1],
    }
    needless = set() if dit.image_dim is not None else {"CLIP"}
    needless |= set() if dit.in_channels > dit.out_channels else {"VAE encode"}
    return {name: make for name, make in made.items() if name not in needless}


def one_sample_each(
    config: SampleConfig | TrainConfig, mesh: Mesh | AbstractMesh | MeshShape
) -> SampleConfig | TrainConfig:
    """A training with one sample in every part of the batch's axes; sampling as it is."""
    if isinstance(config, SampleConfig):
        return config
    shape = mesh if isinstance(mesh, MeshShape) else MeshShape(**dict(mesh.shape))
    return dataclasses.replace(config, batch=shape.batch, accumulate=1)


def operations(config: SampleConfig | TrainConfig, dit: DiTConfig, name: str) -> dict[str, int]:
    """Of a program of `stages`, by dtype, over all devices: what one would do alone, nothing twice."""
    one = AbstractMesh(tuple(MeshShape()), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    none = AbstractMesh((), ())  # JAX changes a mesh's size only by way of none
    samples = config.batch if isinstance(config, TrainConfig) else 1
    if isinstance(config, TrainConfig):
        config = dataclasses.replace(config, batch=1, accumulate=1)
    with jax.sharding.use_abstract_mesh(none), jax.sharding.use_abstract_mesh(one):
        stage = stages(config, dit, one)[name]()
        function = inspect.unwrap(stage.function)  # one with options of its own can be no part of another
        found = operations_by_type(jax.make_jaxpr(function)(*stage.arguments).jaxpr)
    return {kind: samples * number for kind, number in found.items()}
