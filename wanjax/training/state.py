"""All that a training step changes, and how it comes to be: sharded from its first moment."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sharding.rules import parameter_sharding
from wanjax.config import DiTConfig, TrainConfig
from wanjax.convert import Checkpoint
from wanjax.models.dit import DiT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What is saved, restored and donated.

    step: int32, optimiser steps taken.
    seed: int32; all randomness of step n comes from the seed and n, so a resumed run draws what it would have drawn.
    model: the network; its weights float32, whatever it computes in.
    optimizer: optax's state, its moments sharded as the weights.
    """

    step: jax.Array
    seed: jax.Array
    model: DiT
    optimizer: Any

    def key(self) -> jax.Array:
        """The PRNG key of the coming step."""
        return jax.random.fold_in(jax.random.key(self.seed), self.step)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with a linear warm-up; the gradients are clipped before."""
    rate = optax.warmup_constant_schedule(0.0, config.learning_rate, config.warmup) if config.warmup else None
    return optax.adamw(
        config.learning_rate if rate is None else rate,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=_kernels,
    )


def _kernels(model: Any) -> Any:
    """Which leaves decay: weight matrices, as opposed to biases, norms, modulation and position tables."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in str(path), model)


def abstract_state(config: TrainConfig, dit: DiTConfig) -> TrainState:
    """Shapes, dtypes and shardings of the state on the ambient mesh."""
    state = jax.eval_shape(lambda: _make(config, DiT(dit, nnx.Rngs(0))))

    def place(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            sharding = parameter_sharding((), leaf)
            return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))
        whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def init_state(config: TrainConfig, dit: DiTConfig) -> TrainState:
    """The state of step 0 on the ambient mesh, with the checkpoint's weights or random ones.

    No device and no host ever holds more than its part, but for a tensor at a time.

    Raises:
      InputError: as `Checkpoint.load`.
    """
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, abstract_state(config, dit))
    if config.checkpoint is not None:
        model = Checkpoint(config.checkpoint).load("dit", dit, parameter_sharding)
        make = _sharded(functools.partial(_make, config), specs)
        return jax.jit(make, donate_argnums=0)(model)
    make = _sharded(lambda key: _make(config, DiT(dit, nnx.Rngs(params=key))), specs)
    return jax.jit(make)(jax.random.key(config.seed))


def _sharded(make: Any, specs: Any) -> Any:
    """`make` as a program whose inner shardings XLA derives from those of its result.

    Under explicit sharding whatever is made from nothing would first be made whole.
    """
    return jax.sharding.auto_axes(make, out_sharding=specs)


def _make(config: TrainConfig, model: Any) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(config.seed, jnp.int32),
        model=model,
        optimizer=make_optimizer(config).init(model),
    )
