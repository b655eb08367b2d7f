"""One optimiser step of any objective.

grads  = d objective.loss(model, objective.prepare(batch, key of the step))
state' = AdamW(state, clip(grads)),  ema' = decay ema + (1 - decay) model'
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sharding.rules import split_batch
from wanjax.config import TrainConfig
from wanjax.training.optimizer import make_optimizer
from wanjax.training.state import TrainState

if TYPE_CHECKING:
    from wanjax.training.objectives.base import Objective


class Metrics(NamedTuple):
    """Scalars of a step. `finite` says whether loss and gradients were; if not, the state was left as it was."""

    loss: jax.Array
    grad_norm: jax.Array
    finite: jax.Array


def make_step(objective: Objective) -> Any:
    """The compiled step `(state, batch) -> (state, metrics)`; it takes the state's memory for the new one."""
    return jax.jit(functools.partial(objective.step), donate_argnums=0)


def train_step(objective: Objective, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
    """One step on a whole batch: loss and gradients, clipped; the optimiser; the average. All or nothing."""
    config = objective.config
    prepared = objective.prepare(batch, state.key())
    loss, grads = gradients(objective, state.model, prepared, state.frozen)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    clip = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))
    grads = jax.tree.map(lambda g: clip * g, grads)
    updates, optimizer = optimizer_update(config, grads, state)
    model = optax.apply_updates(state.model, updates)
    ema = None if state.ema is None else average(config, state, model)
    old = dataclasses.replace(state, frozen=None)
    new = TrainState(state.step + 1, state.seed, model, optimizer, ema)
    new = jax.tree.map(functools.partial(jnp.where, finite), new, old)
    return dataclasses.replace(new, frozen=state.frozen), Metrics(loss, norm, finite)


def optimizer_update(config: TrainConfig, grads: Any, state: TrainState) -> tuple[Any, Any]:
    """Optax's update and the optimiser's next state."""
    update: Any = make_optimizer(config).update
    if config.optimizer == "muon":  # multiplies kernels with themselves, for which XLA is to choose the shardings
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (state.model, state.optimizer))
        update = jax.sharding.auto_axes(update, out_sharding=specs)
    return update(grads, state.optimizer, state.model)


def average(config: TrainConfig, state: TrainState, model: Any) -> Any:
    """The moving average of the weights after the step; it forgets faster in the beginning, when all is random."""
    assert config.ema_decay is not None
    decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, model)


def gradients(objective: Objective, trained: Any, prepared: Any, frozen: Any = None) -> tuple[jax.Array, Any]:
    """Mean loss of the batch and its gradient by what is trained: float32, and sharded as that is.

    With `TrainConfig.accumulate` the batch's parts are computed one after the other, and only the sum is kept.
    """
    accumulate = objective.config.accumulate
    differentiate = jax.value_and_grad(lambda trained, part: objective.loss(objective.join(trained, frozen), part))
    if accumulate == 1:
        return differentiate(trained, prepared)

    def add(sofar: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sofar, differentiate(trained, part)), None

    parts = jax.tree.map(lambda x: split_batch(x, accumulate), prepared)  # [parts, b, ..] each
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / accumulate, total)
