"""An objective of several networks: two that learn in turns, each with its own optimiser, and one that does not."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import TRAIN, on

from sharding.mesh import MeshShape
from sharding.rules import activation_spec
from wanjax.config import TrainConfig
from wanjax.data.batch import Batches
from wanjax.models.layers import Linear
from wanjax.training import loop, speed
from wanjax.training.checkpoint import TrainCheckpoints
from wanjax.training.objectives import Data, Objective
from wanjax.training.state import TrainState, abstract_state, init_state, resumed
from wanjax.training.step import average, keep_finite, learn

CONFIG = dataclasses.replace(TRAIN, dit=None, batch=8, accumulate=2, steps=6, save_every=3, ema_decay=0.5)
TURNS = 3
"""The critic learns at every step, the student at every third."""


class Sample(NamedTuple):
    x: Any


class Noise:
    """Vectors by their number."""

    def __getitem__(self, index):
        return Sample(np.random.default_rng(index).standard_normal(8).astype(np.float32))

    def name(self, index):
        return str(index)


def linear(seed):
    return Linear(8, 8, nnx.Rngs(seed), axes=("embed", "mlp"), param_dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Imitation(Objective):
    """A student imitates a teacher, and a critic the student."""

    config: TrainConfig
    unit: ClassVar = "vectors"
    name: ClassVar = "an imitation"
    optimizers: ClassVar = {"student": optax.sgd(0.1), "critic": optax.adam(1e-2)}

    def make(self, rngs):
        return {"student": linear(0), "critic": linear(1), "teacher": linear(2)}

    def load(self):
        raise AssertionError("it starts from nothing")

    has_frozen = True

    def split(self, model):
        return {name: model[name] for name in ("student", "critic")}, {"teacher": model["teacher"]}

    def join(self, trained, frozen):
        return trained | frozen

    def units(self, batch):
        return len(batch.x)

    def prepare(self, batch, key):
        noise = jax.random.normal(key, batch.x.shape, out_sharding=activation_spec(batch.x.shape, "batch", None))
        return Sample(batch.x + 0.1 * noise)

    def loss(self, model, batch):
        return jnp.mean((model["student"](batch.x) - model["teacher"](batch.x)) ** 2)

    def critic_loss(self, model, batch):
        return jnp.mean((model["critic"](batch.x) - model["student"](batch.x)) ** 2)

    def init_optimizer(self, trained):
        return {name: optimizer.init(trained[name]) for name, optimizer in self.optimizers.items()}

    def step(self, state, batch):
        prepared = self.prepare(batch, state.key())

        def update(name, loss, trained, optimizers):
            def of(network, part):
                return loss(self.join(trained | {name: network}, state.frozen), part)

            learned = learn(self.config, self.optimizers[name], of, trained[name], optimizers[name], prepared)
            return trained | {name: learned.weights}, optimizers | {name: learned.optimizer}, learned

        trained, optimizers, critic = update("critic", self.critic_loss, state.model, state.optimizer)

        def student_turn(trained, optimizers):
            trained, optimizers, student = update("student", self.loss, trained, optimizers)
            return trained, optimizers, student.grad_norm

        def no_turn(trained, optimizers):
            return trained, optimizers, jnp.zeros(())

        turn = (state.step + 1) % TURNS == 0
        trained, optimizers, student_norm = jax.lax.cond(turn, student_turn, no_turn, trained, optimizers)
        ema = average(self.config, state, trained)
        new = TrainState(state.step + 1, state.seed, trained, optimizers, ema, state.frozen)
        return keep_finite(state, new, critic.loss, jnp.hypot(critic.grad_norm, student_norm))

    def step_operations(self, batch):
        student, critic = (speed.forward_operations(self, batch, loss) for loss in (self.loss, self.critic_loss))
        return 3 * critic + 3 * student // TURNS

    def open_data(self, config, encoders=None):
        return Data(Noise())

    def networks(self, model):
        return {}


def train(workdir, steps):
    """A run, or its continuation, to a step: losses are in its log, the state is returned on the host."""
    config = dataclasses.replace(CONFIG, workdir=str(workdir), steps=steps)
    objective = Imitation(config)
    checkpoints = TrainCheckpoints(workdir)
    position = 0
    if checkpoints.latest is None:
        state = init_state(config, objective)
    else:
        state, position = checkpoints.restore(abstract_state(config, objective))
        state = resumed(config, objective, state)
    batches = Batches(objective.open_data(config).source, config.batch, position)
    state, finished = loop.train(config, objective, state, batches, checkpoints)
    checkpoints.close()
    assert finished
    return jax.device_get(state)


@pytest.fixture(scope="module")
def mesh():
    with on(MeshShape(data=2, fsdp=2)) as mesh:
        yield mesh


def test_each_learns_in_its_turn_and_the_teacher_never(mesh, tmp_path):
    first, third = train(tmp_path / "a", 2), train(tmp_path / "b", 3)
    start = jax.device_get(init_state(CONFIG, Imitation(CONFIG)))

    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    assert same(first.model["student"], start.model["student"])
    assert not same(first.model["critic"], start.model["critic"])
    assert not same(third.model["student"], start.model["student"])
    assert same(third.frozen, start.frozen)


def test_stopped_and_started_again_to_the_bit(mesh, tmp_path):
    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 4)
    parts = train(tmp_path / "parts", 6)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(x, y)
    assert len(jax.tree.leaves(whole.optimizer)) > 2  # the moments of the critic's
