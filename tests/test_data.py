"""From clips to batches: draws, the cache, and that both ways to the DiT give the same loss."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import TRAIN, on, write_config

from sharding.mesh import MeshShape
from wanjax.commands import cache
from wanjax.config import CachedData, ShapesData, TaskMix
from wanjax.data.batch import Batches, make_batch
from wanjax.data.samples import draw_given, dropped
from wanjax.errors import InputError
from wanjax.training import latent_cache
from wanjax.training.objectives import make_objective

CLIPS = ShapesData("all", first_seed=0, count=6)
TASKS = TaskMix(i2v=1.0, flf2v=1.0, interpolation=1.0, caption_dropout=0.3, image_dropout=0.2, variants=2)
CONFIG = dataclasses.replace(TRAIN, checkpoint="tests/golden/diffusers", data=CLIPS, tasks=TASKS)


@pytest.fixture(scope="module")
def mesh():
    with on(MeshShape(fsdp=2)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Configuration of a run on the cache of `CONFIG`'s clips, which was written in two parts."""
    folder = tmp_path_factory.mktemp("cache")
    config = dataclasses.replace(CONFIG, data=CachedData(str(folder / "clips"), CLIPS))
    file = write_config(tmp_path_factory.mktemp("config") / "config.py", config)
    old, latent_cache.CLIPS_PER_FILE = latent_cache.CLIPS_PER_FILE, 4
    for process in (1, 0):
        share = ["--processes", "2", "--process-id", str(process)]
        cache.main(["--config", file, "--out", str(folder / "clips"), "--batch", "3", *share])
        assert (folder / "clips/index.json").exists() == (process == 0)
    latent_cache.CLIPS_PER_FILE = old
    return config


def test_both_ways_give_the_same_loss(mesh, cached):
    losses = []
    for config in (CONFIG, cached):
        objective = make_objective(config)
        data = objective.open_data(config)
        model = objective.load()
        run = jax.jit(lambda model, batch: objective.loss(model, objective.prepare(batch, jax.random.key(0))))  # noqa: B023
        batches = Batches(data.source, config.batch, 1, encode=data.encode)  # spans the second time round
        batch = [next(batches), next(batches)][1]
        names = batches.names(2)
        losses.append((float(run(model, batch)), names, jax.device_get(batch)))
    assert losses[0][1] == losses[1][1]
    for ours, theirs in zip(losses[0][2], losses[1][2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5)


def test_cache_refuses_other_settings(mesh, cached):
    objective = make_objective(CONFIG)
    for change in ({"frames": 9}, {"seed": 1}, {"tasks": dataclasses.replace(TASKS, flf2v=2.0)}):
        with pytest.raises(InputError, match=f"has {next(iter(change))} .* they must agree"):
            objective.open_data(dataclasses.replace(cached, **change))
    index = json.loads((Path(cached.data.path) / "index.json").read_text())
    assert index["buckets"] == [{"shape": [5, 32, 32], "clips": list(range(6)), "repeats": [1] * 6}]
    with pytest.raises(InputError, match=r"no index\.json"):
        objective.open_data(dataclasses.replace(cached, data=CachedData("tests", CLIPS)))


def test_tasks_are_drawn_by_weight():
    rng = np.random.default_rng(0)
    mix = TaskMix(t2v=1.0, i2v=1.0, flf2v=2.0)
    counts = {count: 0 for count in range(3)}
    for _ in range(800):
        given = draw_given(mix, 17, rng)
        counts[int(given.sum())] += 1
        assert not given[1:-1].any()
        assert given[0] or not given[-1]
    assert 150 < counts[0] < 250
    assert 150 < counts[1] < 250
    for task, most in (("continuation", 16), ("interpolation", 4)):
        sums = {int(draw_given(TaskMix(**{task: 1.0}), 17, rng).sum()) for _ in range(200)}
        assert min(sums) == 2
        assert max(sums) == most
    with pytest.raises(InputError, match="all weights are 0"):
        draw_given(TaskMix(), 17, rng)


def test_dropouts_have_their_shares():
    flags = np.array([dropped(CONFIG, i) for i in range(2000)])
    assert abs(flags[:, 0].mean() - 0.3) < 0.04
    assert abs(flags[:, 1].mean() - 0.2) < 0.04


def test_captions_are_dropped_to_the_empty_one(mesh):
    objective = make_objective(CONFIG)
    data = objective.open_data(CONFIG)
    empty, _ = data.encode.tokenizer([""])
    for index in itertools.islice((i for i in itertools.count() if dropped(CONFIG, i)[0]), 2):
        np.testing.assert_array_equal(data.source[index].ids, empty[0])
    index = next(i for i in itertools.count() if dropped(CONFIG, i)[1])
    assert not data.source[index].has_image.any()
    batch = data.encode(make_batch(data.source, index, 2))
    assert not np.asarray(batch.image)[0].any()
