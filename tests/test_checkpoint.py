"""TrainCheckpoints: restored on any mesh, whole or not at all, refused where they do not fit."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from tiny import DIT, on

from sharding.mesh import MeshShape
from wanjax.config import TrainConfig
from wanjax.errors import InputError
from wanjax.training.checkpoint import TrainCheckpoints
from wanjax.training.objectives.flow_matching import FlowMatching
from wanjax.training.state import abstract_state

CONFIG = TrainConfig(dit=DIT)
OBJECTIVE = FlowMatching(CONFIG, DIT)
SHAPE = MeshShape(fsdp=2, ring=2, ulysses=2)


def state_of(step):
    """A state of random numbers on the ambient mesh."""
    rng = np.random.default_rng(step)

    def draw(leaf):
        values = rng.standard_normal(leaf.shape) if leaf.ndim else np.full((), step)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, abstract_state(CONFIG, OBJECTIVE))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder after steps 1, 2 and 3, saved from eight devices."""
    path = tmp_path_factory.mktemp("run")
    with on(SHAPE):
        checkpoints = TrainCheckpoints(path, keep=2)
        for step in (1, 2, 3):
            checkpoints.save(state_of(step), 10 * step)
        checkpoints.close()
    return path


def test_keeps_the_newest(saved):
    assert sorted(p.name for p in (saved / "checkpoints").iterdir() if p.is_dir()) == ["2", "3"]


@pytest.mark.parametrize(
    "shape", [MeshShape(), MeshShape(data=2, ring=2), MeshShape(fsdp=8), MeshShape(data=2, ulysses=4)], ids=str
)
def test_restores_on_any_mesh(saved, shape):
    with on(SHAPE):
        expected = jax.device_get(state_of(3))
    with on(shape):
        abstract = abstract_state(CONFIG, OBJECTIVE)
        state, position = TrainCheckpoints(saved).restore(abstract)
        assert position == 30
        for ours, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert ours.sharding == wanted.sharding
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)


def test_what_was_half_written_does_not_count(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    shutil.copytree(tmp_path / "run/checkpoints/3", tmp_path / "run/checkpoints/4.orbax-checkpoint-tmp")
    with on(SHAPE):
        checkpoints = TrainCheckpoints(tmp_path / "run")
        assert checkpoints.latest == 3
        checkpoints.save(state_of(4), 40)
        checkpoints.wait()
        assert checkpoints.latest == 4
        assert checkpoints.restore(abstract_state(CONFIG, OBJECTIVE))[1] == 40
        checkpoints.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn_dim": 128}, r"fc_in.bias is \(2, 96\) there and \(2, 128\) here"),
        ({"image_dim": None}, "is of another model"),
        ({"num_layers": 3}, "is of another model"),
    ],
)
def test_another_model_is_refused(saved, change, message):
    with on(SHAPE), pytest.raises(InputError, match=message) as error:
        TrainCheckpoints(saved).restore(
            abstract_state(CONFIG, FlowMatching(CONFIG, dataclasses.replace(DIT, **change)))
        )
    assert "\n" not in str(error.value)


def test_damage_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run/checkpoints/3/state/_METADATA").write_text("{")
    with on(SHAPE), pytest.raises(InputError, match="cannot be read") as error:
        TrainCheckpoints(tmp_path / "run").restore(abstract_state(CONFIG, OBJECTIVE))
    assert "\n" not in str(error.value)
