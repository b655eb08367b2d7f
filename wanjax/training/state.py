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
from wanjax.config import TrainConfig
from wanjax.training.objectives.base import Objective
from wanjax.weights import lora


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What is saved, restored and donated.

    step: int32, optimiser steps taken.
    seed: int32; all randomness of step n comes from the seed and n, so a resumed run draws what it would have drawn.
    model: the network, or only its adapters; weights float32, whatever it computes in.
    optimizer: optax's state, its moments sharded as the weights.
    ema: the model with the moving average of its weights; None without.
    frozen: the network without the adapters that are trained, see `wanjax.weights.lora`; else None. Not saved: it
      is the checkpoint's.
    """

    step: jax.Array
    seed: jax.Array
    model: Any
    optimizer: Any
    ema: Any = None
    frozen: Any = None

    @property
    def best(self) -> Any:
        """The network to use, its weights averaged if there is an average."""
        return whole(self.model if self.ema is None else self.ema, self.frozen)

    def key(self) -> jax.Array:
        """The PRNG key of the coming step."""
        return jax.random.fold_in(jax.random.key(self.seed), self.step)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW or Muon, with a linear warm-up and, if wished, a linear fall to zero; the gradients are clipped before.

    Muon (Jordan et al. 2024, `optax.contrib.muon`) makes every kernel's update orthogonal, for which learning rates of
    0.02 are usual; what is no kernel learns by Adam, at a tenth of the rate.
    """
    rate = _learning_rate(config)
    if config.optimizer == "muon":
        return optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            weight_decay_mask=_kernels,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_learning_rate=_learning_rate(dataclasses.replace(config, learning_rate=0.1 * config.learning_rate)),
            muon_weight_dimension_numbers=_matrices,
        )
    return optax.adamw(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=_kernels)


def _matrices(model: Any) -> Any:
    """Which axes of which leaves are a matrix for Muon: of kernels, all but the last against the last."""

    def read(path: Any, leaf: Any) -> Any:
        if "kernel" not in str(path):
            return None
        named = len(leaf.get_metadata()["axes"])
        axes = range(leaf.ndim - named, leaf.ndim)  # the axes before are layers
        return optax.contrib.MuonDimensionNumbers(tuple(axes[:-1]), axes[-1])

    # Of a module's variables the values: the tree that optax walks.
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.replace(read(path, leaf)), model, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def _learning_rate(config: TrainConfig) -> Any:
    if not config.warmup and not config.cooldown:
        return config.learning_rate
    parts: list[Any] = [
        optax.linear_schedule(0.0, config.learning_rate, config.warmup),
        optax.constant_schedule(config.learning_rate),
        optax.linear_schedule(config.learning_rate, 0.0, config.cooldown),
    ]
    if not config.warmup:
        parts[0] = parts[1]
    if not config.cooldown:
        parts[2] = parts[1]
    return optax.join_schedules(parts, [config.warmup, config.steps - config.cooldown])


def _kernels(model: Any) -> Any:
    """Which leaves decay: weight matrices and adapters, as opposed to biases, norms, modulation, position tables."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in str(path) or "lora" in str(path), model)


def abstract_state(config: TrainConfig, objective: Objective) -> TrainState:
    """Shapes, dtypes and shardings of the state on the ambient mesh."""
    state = jax.eval_shape(lambda: new_state(config, objective.make(nnx.Rngs(0))))

    def place(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            if not jax.tree.leaves(leaf):  # of a moment that the optimiser does not keep
                return leaf
            sharding = parameter_sharding((), leaf)
            return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))
        whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def init_state(config: TrainConfig, objective: Objective) -> TrainState:
    """The state of step 0 on the ambient mesh, with the checkpoint's weights or random ones.

    No device and no host ever holds more than its part, but for a tensor at a time.

    Raises:
      InputError: as `Objective.load`.
    """
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, abstract_state(config, objective))
    if config.checkpoint is not None:
        model = objective.load()
        make = _sharded(functools.partial(new_state, config), specs)
        return jax.jit(make, donate_argnums=0)(model)
    make = _sharded(lambda key: new_state(config, objective.make(nnx.Rngs(params=key))), specs)
    return jax.jit(make)(jax.random.key(config.seed))


def whole(model: Any, frozen: Any) -> Any:
    """The network, from what is trained of it and what is not, if there is any."""
    return model if frozen is None else lora.join(model, frozen)


def resumed(config: TrainConfig, objective: Objective, state: TrainState) -> TrainState:
    """A state as it was saved, and what is not saved of it."""
    if config.lora is None:
        return state
    return dataclasses.replace(state, frozen=init_state(config, objective).frozen)


def _sharded(make: Any, specs: Any) -> Any:
    """`make` as a program whose inner shardings XLA derives from those of its result.

    Under explicit sharding whatever is made from nothing would first be made whole.
    """
    return jax.sharding.auto_axes(make, out_sharding=specs)


def new_state(config: TrainConfig, model: Any) -> TrainState:
    """The state of step 0 around a network."""
    frozen = None
    if config.lora is not None:
        model, frozen = lora.split(model)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(config.seed, jnp.int32),
        model=model,
        optimizer=make_optimizer(config).init(model),
        # A copy: the step takes the memory of both.
        ema=None if config.ema_decay is None else jax.tree.map(jnp.copy, model),
        frozen=frozen,
    )
