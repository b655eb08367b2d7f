"""All that a training step changes, and how it comes to be: sharded from its first moment."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sharding.rules import parameter_sharding
from wanjax.config import TrainConfig
from wanjax.training.offload import put_away

if TYPE_CHECKING:
    from wanjax.training.objectives.base import Objective


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What is saved, restored and donated.

    step: int32, optimiser steps taken.
    seed: int32; all randomness of step n comes from the seed and n, so a resumed run draws what it would have drawn.
    model: what is trained: a network, adapters, or several networks in a tree; weights float32, whatever they compute
      in.
    optimizer: optax's state, or several in a tree; moments are sharded as the weights.
    ema: what is averaged of the model (`Objective.averaged`) with the moving average of its weights; None without.
    frozen: what is not trained, see `Objective.split`; else None. Not saved: it comes from the checkpoint.
    """

    step: jax.Array
    seed: jax.Array
    model: Any
    optimizer: Any
    ema: Any = None
    frozen: Any = None

    def key(self) -> jax.Array:
        """The PRNG key of the coming step."""
        return jax.random.fold_in(jax.random.key(self.seed), self.step)


def abstract_state(config: TrainConfig, objective: Objective) -> TrainState:
    """Shapes, dtypes and shardings of the state on the ambient mesh."""
    state = jax.eval_shape(lambda: new_state(objective, objective.make(nnx.Rngs(0))))

    def with_sharding(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            if not jax.tree.leaves(leaf):  # of a moment that the optimiser does not keep
                return leaf
            sharding = parameter_sharding((), leaf)
            return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))
        whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    return put_away(config, jax.tree.map(with_sharding, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def init_state(config: TrainConfig, objective: Objective) -> TrainState:
    """The state of step 0 on the ambient mesh, with the checkpoint's weights or random ones.

    No device and no host ever holds more than its part, but for a tensor at a time.

    Raises:
      InputError: as `Objective.load`.
    """
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, abstract_state(config, objective))
    if config.is_loaded:
        model = objective.load()
        make = _sharded(functools.partial(new_state, objective), specs)
        return put_away(config, jax.jit(make, donate_argnums=0)(model))
    make = _sharded(lambda key: new_state(objective, objective.make(nnx.Rngs(params=key))), specs)
    return put_away(config, jax.jit(make)(jax.random.key(config.seed)))


def resumed(config: TrainConfig, objective: Objective, state: TrainState) -> TrainState:
    """A state as it was saved, and what is not saved of it; no optimiser is made for that.

    Raises:
      InputError: as `Objective.load`.
    """
    if not objective.has_frozen:
        return state
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, abstract_state(config, objective).frozen)
    if config.is_loaded:
        _, frozen = objective.split(objective.load())
        frozen = jax.jit(_sharded(lambda x: x, specs), donate_argnums=0)(frozen)
    else:
        make = _sharded(lambda key: objective.split(objective.make(nnx.Rngs(params=key)))[1], specs)
        frozen = jax.jit(make)(jax.random.key(config.seed))
    return dataclasses.replace(state, frozen=frozen)


def _sharded(make: Any, specs: Any) -> Any:
    """`make` as a program whose inner shardings XLA derives from those of its result.

    Under explicit sharding whatever is made from nothing would first be made whole.
    """
    return jax.sharding.auto_axes(make, out_sharding=specs)


def new_state(objective: Objective, model: Any) -> TrainState:
    """The state of step 0 around a model."""
    config, (trained, frozen) = objective.config, objective.split(model)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(config.seed, jnp.int32),
        model=trained,
        optimizer=objective.init_optimizer(trained),
        # A copy: the step takes the memory of both.
        ema=None if config.ema_decay is None else jax.tree.map(jnp.copy, objective.averaged(trained)),
        frozen=frozen,
    )
