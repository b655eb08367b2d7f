"""A run that is stopped at any step and started again takes the steps that it would have taken, to the bit."""

import dataclasses
import functools
import json
import os
import signal

import jax
import numpy as np
import pytest
from tiny import TRAIN, on, values, write_config

import train_jax
from sharding.mesh import MeshShape
from wanjax.commands import cache
from wanjax.config import CachedData, ShapesData, TaskMix
from wanjax.training import loop
from wanjax.training import step as steps
from wanjax.training.checkpoint import TrainCheckpoints
from wanjax.training.export import rounded
from wanjax.training.objectives import make_objective
from wanjax.training.state import abstract_state
from wanjax.weights import Checkpoint

CLIPS = ShapesData("all", first_seed=0, count=5)
CONFIG = dataclasses.replace(
    TRAIN,
    checkpoint="tests/golden/diffusers",
    data=CLIPS,
    tasks=TaskMix(i2v=1.0, flf2v=1.0, caption_dropout=0.3, image_dropout=0.3, variants=2),
    batch=8,
    steps=8,
    warmup=3,
    cooldown=3,
    ema_decay=0.9,
    save_every=3,
    mesh="data=8",
)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Configuration files by kind of data."""
    folder = tmp_path_factory.mktemp("configs")
    files = {"pixels": write_config(folder / "pixels.py", CONFIG)}
    cached = dataclasses.replace(CONFIG, data=CachedData(str(folder / "clips"), CLIPS))
    files["cached"] = write_config(folder / "cached.py", cached)
    cache.main(["--config", files["cached"], "--out", str(folder / "clips"), "--batch", "8"])
    return files


@pytest.fixture(scope="module")
def compiled():
    """One step for all runs, which differ in nothing that it looks at."""
    objective = None

    @functools.cache
    def make():
        return steps.make_step(objective)

    def make_step(given):
        nonlocal objective
        objective = objective or dataclasses.replace(given, config=CONFIG)
        return make()

    return make_step


@pytest.mark.parametrize(("data", "stop"), [pytest.param("cached", 4, marks=pytest.mark.slow), ("pixels", 5)])
def test_stopped_and_started_again(configs, compiled, monkeypatch, tmp_path, data, stop):
    def no_cluster(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    monkeypatch.setattr(loop, "make_step", compiled)
    write = loop.Log.write

    def train(workdir):
        train_jax.main(["--config", configs[data], "--workdir", str(workdir)])
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [(line["loss"], line["grad_norm"]) for line in lines]

    whole = train(tmp_path / "whole")
    assert len(whole) == 8

    def terminate(log, step, values):
        write(log, step, values)
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Log, "write", terminate)
    assert len(train(tmp_path / "parts")) == stop  # returns, which is exit code 0
    assert not (tmp_path / "parts/model").exists()
    monkeypatch.setattr(loop.Log, "write", write)
    np.testing.assert_array_equal(train(tmp_path / "parts"), whole)
    assert_average_is_exported(tmp_path / "parts")


def assert_average_is_exported(workdir):
    """`model` has the averaged weights of the last checkpoint, and these are not the weights."""
    with on(MeshShape(data=8)):
        checkpoints = TrainCheckpoints(workdir)
        state, _ = checkpoints.restore(abstract_state(CONFIG, make_objective(CONFIG)))
        checkpoints.close()
    assert int(state.step) == CONFIG.steps
    exported = Checkpoint(workdir / "model")
    model = values(exported.load("dit", exported.config("dit")))
    average, last = (values(rounded(x)) for x in (state.ema, state.model))
    assert model.keys() == average.keys()
    for path, x in average.items():
        np.testing.assert_array_equal(model[path], x.astype(np.float32), err_msg=path)
    assert any(np.any(model[path] != x.astype(np.float32)) for path, x in last.items())
