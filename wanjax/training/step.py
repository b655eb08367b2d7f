"""One optimiser step of flow matching.

    sigma ~ shifted logit-normal,  noise ~ N(0, 1)
    x_t    = (1 - sigma) latents + sigma noise
    loss   = mean (DiT([x_t, control], 1000 sigma, text, image) - (noise - latents))^2
    state' = AdamW(state, clip(d loss))

Source: Wan (arXiv 2503.20314, section 4.2); see `wanjax.flow`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sharding.rules import activation_spec, constrain, split_batch
from wanjax import flow
from wanjax.config import TrainConfig
from wanjax.data.batch import Batch
from wanjax.models.dit import DiT
from wanjax.training.state import TrainState, make_optimizer


class Metrics(NamedTuple):
    """Scalars of a step. `finite` says whether loss and gradients were; if not, the state was left as it was."""

    loss: jax.Array
    grad_norm: jax.Array
    finite: jax.Array


class Noised(NamedTuple):
    """A batch, or a part of one, with its noise; `sigma` is `[b]`."""

    batch: Batch
    noise: jax.Array
    sigma: jax.Array


def make_step(config: TrainConfig) -> Any:
    """The compiled step `(state, batch) -> (state, metrics)`; it takes the state's memory for the new one."""
    return jax.jit(functools.partial(train_step, config), donate_argnums=0)


def train_step(config: TrainConfig, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One step on a whole batch."""
    loss, grads = gradients(config, state.model, add_noise(config, batch, state.key()))
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    clip = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))
    grads = jax.tree.map(lambda g: clip * g, grads)
    model: Any = state.model  # optax's types do not know modules
    updates, optimizer = make_optimizer(config).update(grads, state.optimizer, model)
    model = optax.apply_updates(model, updates)
    new = TrainState(state.step + 1, state.seed, model, optimizer)
    return jax.tree.map(functools.partial(jnp.where, finite), new, state), Metrics(loss, norm, finite)


def add_noise(config: TrainConfig, batch: Batch, key: jax.Array) -> Noised:
    """Draw noise and noise levels for the whole batch, so that they depend neither on its parts nor on the mesh."""
    key_sigma, key_noise = jax.random.split(key)
    shape = batch.latents.shape
    noise = jax.random.normal(
        key_noise, shape, jnp.float32, out_sharding=activation_spec(shape, "batch", None, None, None, None)
    )
    sigma = flow.sample_sigmas(key_sigma, shape[0], mean=config.sigma_mean, std=config.sigma_std, shift=config.shift)
    return Noised(batch, noise, constrain(sigma, "batch"))


def gradients(config: TrainConfig, model: DiT, noised: Noised) -> tuple[jax.Array, DiT]:
    """Mean loss of the batch and its gradient: float32, and sharded as the weights.

    With `config.accumulate` the batch's parts are computed one after the other, and only the sum is kept.
    """
    differentiate = jax.value_and_grad(functools.partial(loss, config))
    if config.accumulate == 1:
        return differentiate(model, noised)

    def add(sofar: Any, part: Noised) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sofar, differentiate(model, part)), None

    parts = jax.tree.map(lambda x: split_batch(x, config.accumulate), noised)  # [parts, b, ..] each
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, model))
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / config.accumulate, total)


def loss(config: TrainConfig, model: DiT, noised: Noised) -> jax.Array:
    """Mean flow-matching loss of a batch, float32."""
    batch, noise, sigma = noised
    x = flow.interpolate(batch.latents, noise, sigma)  # [b, f, h, w, c]
    if batch.control is not None:
        x = jnp.concatenate([x, batch.control.astype(x.dtype)], axis=-1)  # [b, f, h, w, c_in]
    context = model.context(batch.text, batch.image, config.remat)
    velocity = model(x, flow.timestep(sigma), context, config.remat)  # [b, f, h, w, c]
    return jnp.mean(flow.loss(velocity, flow.velocity(batch.latents, noise)))
