"""Optimisers: AdamW and Muon, with the learning rate's way."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx

from wanjax.config import TrainConfig


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW or Muon, with a linear warm-up and, if wished, a linear fall to zero; the gradients are clipped before.

    Muon (Jordan et al. 2024, `optax.contrib.muon`) makes every kernel's update orthogonal, for which learning rates of
    0.02 are usual; what is no kernel learns by Adam, at a tenth of the rate.
    """
    rate = learning_rate(config)
    if config.optimizer == "muon":
        return optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            weight_decay_mask=_kernels,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_learning_rate=learning_rate(dataclasses.replace(config, learning_rate=0.1 * config.learning_rate)),
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


def learning_rate(config: TrainConfig) -> Any:
    """The rate at each step: a linear rise, level, and, if wished, a linear fall to zero."""
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
