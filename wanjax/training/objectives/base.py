"""What a run trains: networks, what they learn from, and how wrong they are on a batch.

A new objective is one file beside this one and one case of `wanjax.training.objectives.make_objective`.
"""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
from flax import nnx

from sharding.mesh import MeshShape
from wanjax.conditioning.encoders import Encoders
from wanjax.config import TrainConfig
from wanjax.data.batch import SampleSource
from wanjax.errors import InputError
from wanjax.training import export, optimizer, speed
from wanjax.training.state import TrainState
from wanjax.training.step import Metrics, train_step
from wanjax.weights.mapping import NetworkName

Model = TypeVar("Model")
Batch = TypeVar("Batch")
Prepared = TypeVar("Prepared")


class Data(NamedTuple):
    """Samples, and what turns a batch of them into what the objective takes; None: samples already are that."""

    source: SampleSource
    encode: Any = None


class Objective(abc.ABC, Generic[Model, Batch, Prepared]):
    """Everything of a training that is not the loop around it.

    A model is a network, or several in a tree of one's own making (a dict by name): state, checkpoints and sharding
    take any tree of `nnx` variables. An objective with several networks overrides `init_optimizer`, `step` and
    `step_operations`, and may give each an optimiser of its own and turns of its own; `wanjax.training.step` has the
    parts. What is part of the model but not trained, such as a teacher, `split` takes out of it: it is neither
    differentiated nor saved.

    config: of the run.
    unit: what is counted for the speed: tokens, frames or clips.
    name: what is trained, for messages.
    """

    config: TrainConfig
    unit: ClassVar[str]
    name: ClassVar[str]

    # ---- networks

    @abc.abstractmethod
    def make(self, rngs: nnx.Rngs) -> Model:
        """The model with random weights."""

    @abc.abstractmethod
    def load(self) -> Model:
        """The model with the weights of the checkpoint that the run starts from, on the ambient mesh.

        Raises:
          InputError: as `Checkpoint.load`.
        """

    @property
    def has_frozen(self) -> bool:
        """Whether a part of the model is not trained."""
        return False

    def split(self, model: Model) -> tuple[Any, Any]:
        """What is trained of the model, and what is not; None: nothing."""
        return model, None

    def join(self, trained: Any, frozen: Any) -> Model:
        """The model whose `split` these are."""
        return trained

    def averaged(self, trained: Any) -> Any:
        """What has a moving average of what is trained."""
        return trained

    def eval_model(self, state: TrainState) -> Any:
        """The network to validate, sample and export: its weights averaged if there is an average."""
        return self.join(state.model if state.ema is None else state.ema, state.frozen)

    # ---- a step

    @abc.abstractmethod
    def units(self, batch: Batch, /) -> int:
        """How many of `unit` a batch has."""

    @abc.abstractmethod
    def prepare(self, batch: Batch, key: jax.Array, /) -> Prepared:
        """The batch with all that is random, drawn for the whole of it: every array has a leading batch axis.

        So neither the parts it is computed in nor the mesh change what is drawn.
        """

    @abc.abstractmethod
    def loss(self, model: Model, prepared: Prepared, /) -> jax.Array:
        """Mean loss, float32, of a prepared batch or of a part of one."""

    def init_optimizer(self, trained: Any) -> Any:
        """The optimiser's state before the first step."""
        return optimizer.make_optimizer(self.config).init(trained)

    def turns(self) -> dict[str, Objective]:
        """Where one of several networks learns at a step: what each one's turn is; a program is compiled for each."""
        return {"": self}

    def turn(self, step: int) -> str:
        """Whose turn the step is, counted from 0."""
        return ""

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One optimiser step, traced by JAX."""
        return train_step(self, state, batch)

    def step_operations(self, batch: Batch) -> int:
        """Operations of a step on a batch, over all devices, to tell how busy they are; looks at shapes only."""
        return 3 * speed.forward_operations(self, batch, self.loss)  # forward, and twice as much backward

    # ---- around it

    def check(self, mesh: MeshShape) -> None:
        """Whether the run can be made, as far as the objective is concerned.

        Raises:
          InputError: it cannot.
        """
        if self.config.sample_every:
            raise InputError(f"--sample-every for {self.name}; the DiT alone can be sampled; use --sample-every 0")

    @abc.abstractmethod
    def open_data(self, config: TrainConfig, encoders: Encoders | None = None) -> Data:
        """What the objective learns from.

        Args:
          config: of the run, or of the same run on other clips.
          encoders: of the clips, where they are loaded already.

        Raises:
          InputError: the objective does not learn from such data, or the data cannot be used.
        """

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """Names of the numbers that `validation_losses` gives; none where it is one number."""
        return ()

    def validation_losses(self, model: Any, batch: Batch, seed: jax.Array | int = 0) -> jax.Array:
        """Loss of a held-out batch, with the same randomness at every call: a number, or one each of `loss_parts`.

        The model is what `eval_model` gives.
        """
        return self.loss(model, self.prepare(batch, jax.random.key(seed)))

    def open_sampler(self, config: TrainConfig, encoders: Encoders | None) -> Any:
        """What samples held-out clips; see `wanjax.training.validation.Sampler`. `check` says whether there is one."""
        return None

    def open_prompts(self, config: TrainConfig, encoders: Encoders | None) -> Any:
        """What samples prompts; see `wanjax.training.prompt_samples`."""
        return None

    def validation_encoders(self, config: TrainConfig, data: Data) -> Encoders | None:
        """What encodes held-out clips; None: they need none.

        Args:
          config: of the run on the held-out clips.
          data: what the run learns from, whose encoders serve here too.
        """
        return None

    @abc.abstractmethod
    def networks(self, model: Any) -> dict[NetworkName, Any]:
        """What the exported checkpoint gets from the run, its matrices rounded."""

    def export(self, model: Any) -> Path:
        """Write the trained network into the workdir. All processes have to call this.

        Raises:
          InputError: as `wanjax.weights.save`.
        """
        return export.write_checkpoint(self.config, self.networks(model))
