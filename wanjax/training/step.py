"""One optimiser step of any objective.

    grads  = d objective.loss(model, objective.prepare(batch, key of the step))
    state' = AdamW(state, clip(grads)),  ema' = decay ema + (1 - decay) model'

`train_step` is the whole of it for one network and one optimiser. An objective with several networks writes its own
step of the same parts: `learn` once for each network whose turn it is, then `average`, then `keep_finite`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sharding.rules import split_batch
from wanjax.config import TrainConfig
from wanjax.training.offload import fetched, put_away
from wanjax.training.optimizer import make_optimizer, rate_at
from wanjax.training.state import TrainState

if TYPE_CHECKING:
    from wanjax.training.objectives.base import Objective


class Metrics(NamedTuple):
    """Scalars of a step. `finite` says whether loss and gradients were; if not, the state was left as it was.

    parts: further ones by name, the learning rate among them; nan: there is none at this step.
    """

    loss: jax.Array
    grad_norm: jax.Array
    finite: jax.Array
    parts: Any = None


class Learned(NamedTuple):
    """Weights and optimiser's state after an update, the loss before it, and the norm of its gradients, unclipped."""

    weights: Any
    optimizer: Any
    loss: jax.Array
    grad_norm: jax.Array


def make_step(objective: Objective) -> Any:
    """The compiled step `(state, batch) -> (state, metrics)`; it takes the state's memory for the new one."""
    # A function of its own, as JAX would hash the objective with all that a configuration holds.
    return jax.jit(lambda state, batch: objective.step(state, batch), donate_argnums=0)


def train_step(objective: Objective, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
    """One step on a whole batch."""
    config, state = objective.config, fetched(state)
    prepared = objective.prepare(batch, state.key())

    def loss(weights: Any, part: Any) -> jax.Array:
        return objective.loss(objective.join(weights, state.frozen), part)

    learned = learn(config, make_optimizer(config), loss, state.model, state.optimizer, prepared)
    ema = average(config, state, learned.weights)
    new = TrainState(state.step + 1, state.seed, learned.weights, learned.optimizer, ema, state.frozen)
    kept, metrics = keep_finite(state, new, learned.loss, learned.grad_norm)
    parts = {"learning_rate": rate_at(config, state.step)}
    return put_away(config, kept), metrics._replace(parts=parts)


def learn(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    loss: Callable[[Any, Any], jax.Array],
    weights: Any,
    state: Any,
    prepared: Any,
) -> Learned:
    """One update of a network: loss and gradients, clipped; the optimiser.

    Args:
      config: of the run; `accumulate` and `clip_norm` are used.
      optimizer: the network's.
      loss: mean loss, float32, as a function of the weights and of a batch or of a part of one.
      weights: what is differentiated and updated.
      state: the optimiser's.
      prepared: the batch; every array has a leading batch axis.
    """
    value, grads = gradients(loss, weights, prepared, config.accumulate)
    norm = optax.global_norm(grads)
    clip = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))
    grads = jax.tree.map(lambda g: clip * g, grads)
    updates, state = optimizer.update(grads, state, weights)
    return Learned(optax.apply_updates(weights, updates), state, value, norm)


def average(config: TrainConfig, state: TrainState, model: Any) -> Any:
    """The moving average of the weights after the step; it forgets faster in the beginning, when all is random.

    None where there is none.
    """
    if state.ema is None:
        return None
    assert config.ema_decay is not None
    decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, model)


def keep_finite(old: TrainState, new: TrainState, loss: jax.Array, grad_norm: jax.Array) -> tuple[TrainState, Metrics]:
    """The new state with the step's metrics; the old state where loss or gradients are not finite. All or nothing."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    changing = (dataclasses.replace(state, frozen=None) for state in (new, old))
    kept = jax.tree.map(functools.partial(jnp.where, finite), *changing)
    return dataclasses.replace(kept, frozen=old.frozen), Metrics(loss, grad_norm, finite)


def gradients(
    loss: Callable[[Any, Any], jax.Array], weights: Any, prepared: Any, accumulate: int = 1
) -> tuple[jax.Array, Any]:
    """Mean loss of the batch and its gradient by the weights: float32, and sharded as they are.

    With `accumulate` the batch's parts are computed one after the other, and only the sum is kept.
    """
    differentiate = jax.value_and_grad(loss)
    if accumulate == 1:
        return differentiate(weights, prepared)

    def add(sofar: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sofar, differentiate(weights, part)), None

    parts = jax.tree.map(lambda x: split_batch(x, accumulate), prepared)  # [parts, b, ..] each
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / accumulate, total)
