"""The optimiser's moments in the hosts' memory between its updates: a step fetches them, and puts them away again.

While the network computes forwards and backwards they are not on the devices; what the step holds then is weights,
gradients and activations. `TrainConfig.offload_optimizer` asks for it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax

from wanjax.config import TrainConfig

State = TypeVar("State")


def fetched(state: Any) -> Any:
    """The state with all of its optimiser's moments on the devices. Inside of a compiled step."""
    return _with_moments(state, lambda x: jax.device_put(x, jax.memory.Space.Device) if _is_away(x) else x)


def put_away(config: TrainConfig, state: Any) -> Any:
    """The state with its optimiser's moments in the hosts' memory, if that is asked for: arrays, inside of a compiled
    step or not, or shapes with shardings.
    """
    if not config.offload_optimizer:
        return state

    def put(x: Any) -> Any:
        if not x.ndim:  # a count
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            sharding: Any = x.sharding
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.with_memory_kind("pinned_host"))
        return jax.device_put(x, jax.memory.Space.Host)

    return _with_moments(state, put)


def _with_moments(state: Any, change: Any) -> Any:
    return dataclasses.replace(state, optimizer=jax.tree.map(change, state.optimizer))


def _is_away(x: jax.Array) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host
