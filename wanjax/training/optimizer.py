"""Optimisers: AdamW, with moments of 32 or 8 bits, and Muon; with the learning rate's way."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from wanjax.config import TrainConfig
from wanjax.training.adam_8bit import scale_by_adam_8bit


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW, AdamW with moments in 8 bits, or Muon, with a linear warm-up and, if wished, a linear fall to zero.

    The gradients are clipped before.

    Muon (Jordan et al. 2024, `optax.contrib.muon`) makes every kernel's update orthogonal, for which learning rates of
    0.02 are usual; what is no kernel learns by Adam, at a tenth of the rate. Adapters' second factors may have a
    rate of their own, see `LoRAConfig.lr_ratio`.
    """
    optimizer = _optimizer(config)
    if config.lora is None or config.lora.lr_ratio == 1:
        return optimizer
    return optax.chain(optimizer, _second_factors_faster(config.lora.lr_ratio))


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    rate = learning_rate(config)
    if config.optimizer == "muon":
        muon = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            weight_decay_mask=_kernels,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_learning_rate=learning_rate(dataclasses.replace(config, learning_rate=0.1 * config.learning_rate)),
            muon_weight_dimension_numbers=_matrices,
        )
        return _sharded_by_xla(muon)
    if config.optimizer == "adamw8bit":
        adam = scale_by_adam_8bit(config.beta1, config.beta2)
        decay = optax.add_decayed_weights(config.weight_decay, _kernels)
        return _sharded_by_xla(optax.chain(adam, decay, optax.scale_by_learning_rate(rate)))
    return optax.adamw(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=_kernels)


def _sharded_by_xla(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same for an update that divides kernels, or multiplies them with themselves: XLA chooses the shardings."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (params, state))
        sharded: Any = jax.sharding.auto_axes(optimizer.update, out_sharding=specs)
        return sharded(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


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


def learning_rate(config: TrainConfig) -> Any:
    """The rate at each step: a linear rise, level or a fall, and, if wished, a linear fall to zero."""
    rate, is_level = config.learning_rate, config.lr_scheduler == "constant"
    if is_level and not config.warmup and not config.cooldown:
        return rate
    between = max(config.steps - config.warmup - config.cooldown, 1)
    last = rate if is_level else rate * config.min_lr_ratio
    main: Any = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, last, between),
        "cosine": optax.cosine_decay_schedule(rate, between, config.min_lr_ratio),
    }[config.lr_scheduler]
    parts: list[Any] = [
        optax.linear_schedule(0.0, rate, config.warmup) if config.warmup else main,
        main,
        optax.linear_schedule(last, 0.0, config.cooldown) if config.cooldown else optax.constant_schedule(last),
    ]
    return optax.join_schedules(parts, [config.warmup, config.steps - config.cooldown])


def rate_at(config: TrainConfig, count: jax.Array) -> jax.Array:
    """The rate of the update after `count` others, float32, as the optimiser takes it."""
    rate = learning_rate(config)
    return jnp.asarray(rate(count) if callable(rate) else rate, jnp.float32)


def _kernels(model: Any) -> Any:
    """Which leaves decay: weight matrices and adapters, as opposed to biases, norms, modulation, position tables."""

    def decays(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return "kernel" in name or ("lora" in name and "magnitude" not in name)  # DoRA's are lengths of whole weights

    return jax.tree_util.tree_map_with_path(decays, model)


def _second_factors_faster(ratio: float) -> optax.GradientTransformation:
    """LoRA+ (arXiv 2402.12354): updates of adapters' `b` times a ratio, which is a learning rate of their own."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def scaled(path: Any, x: Any) -> Any:
            return ratio * x if ".lora.b" in jax.tree_util.keystr(path, simple=True, separator=".") else x

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
