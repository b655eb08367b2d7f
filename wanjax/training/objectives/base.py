"""What a run trains: a network, and how wrong it is on a batch."""

from __future__ import annotations

from typing import Any, Protocol

import jax
from flax import nnx


class Objective(Protocol):
    """Everything of a training step that is not optimisation.

    One each in `flow_matching` (DiT), `reconstruction` (VAE) and `contrastive` (text encoder and CLIP).
    """

    @property
    def unit(self) -> str:
        """What is counted for the speed: tokens, frames or clips."""
        ...

    def units(self, batch: Any, /) -> int:
        """How many of these a batch has."""
        ...

    def make(self, rngs: nnx.Rngs) -> Any:
        """The network with random weights."""
        ...

    def load(self) -> Any:
        """The network with the weights of the checkpoint that the run starts from, on the ambient mesh.

        Raises:
          InputError: as `Checkpoint.load`.
        """
        ...

    def prepare(self, batch: Any, key: jax.Array, /) -> Any:
        """The batch with all that is random, drawn for the whole of it: every array has a leading batch axis.

        So neither the parts it is computed in nor the mesh change what is drawn.
        """
        ...

    def loss(self, model: Any, prepared: Any, /) -> jax.Array:
        """Mean loss, float32, of a prepared batch or of a part of one."""
        ...
