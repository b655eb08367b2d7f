"""Distillation: losses and gradients of its formulas where the optimum is known, and a run on networks."""

import dataclasses
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import DIFFUSERS, TRAIN, VAE, assert_same_model, normal, on

from sharding.mesh import MeshShape
from wanjax.conditioning.samples import Encoded
from wanjax.config import DistillationConfig, DiTConfig, LoRAConfig, ShapesData
from wanjax.data.batch import Batches, make_batch
from wanjax.data.synthetic import Synthetic
from wanjax.diffusion import flow
from wanjax.errors import InputError
from wanjax.sampling import presets
from wanjax.settings import SettingError
from wanjax.training import checks, loop
from wanjax.training.checkpoint import TrainCheckpoints
from wanjax.training.objectives import make_objective
from wanjax.training.objectives.distillation import Distillation, DistillationBatch
from wanjax.training.state import abstract_state, init_state, resumed
from wanjax.training.step import make_step
from wanjax.training.validation import open_validation
from wanjax.weights import Checkpoint, lora

MEAN, STD = 1.5, 0.5
"""Of the teacher's data, in every number of its latents."""
SHAPE = (1, 2, 2, 4)


class Normal(nnx.Module):
    """The exact velocity of data that are N(mean, std^2); a text adds its mean to the data's."""

    def __init__(self, mean, std):
        self.mean, self.std = nnx.Param(jnp.float32(mean)), nnx.Param(jnp.float32(std))

    def context(self, text, image, remat) -> Any:
        return text.mean((1, 2))[:, None, None, None, None]

    def __call__(self, x, timestep, context, remat):
        t = (timestep / flow.NUM_TIMESTEPS)[:, None, None, None, None]
        mean, variance = self.mean[...] + context, (1 - t) ** 2 * self.std[...] ** 2 + t * t
        off = x - (1 - t) * mean
        return t / variance * off - (mean + (1 - t) * self.std[...] ** 2 / variance * off)


class Linear(nnx.Module):
    """A student whose x0 is scale x + shift, whatever the noise level."""

    def __init__(self, scale, shift):
        self.scale, self.shift = nnx.Param(jnp.float32(scale)), nnx.Param(jnp.float32(shift))

    def context(self, text, image, remat) -> Any:
        return text

    def __call__(self, x, timestep, context, remat):
        sigma = (timestep / flow.NUM_TIMESTEPS)[:, None, None, None, None]
        return (x - (self.scale[...] * x + self.shift[...])) / sigma


def toy(sigmas=(1.0,), guidance=1.0):
    distillation = DistillationConfig(sigmas=sigmas, guidance=guidance)
    return Distillation(dataclasses.replace(TRAIN, distillation=distillation, remat="none"), DiTConfig())


def drawn(count, text=0.0, steps=1):
    batch = Encoded(normal(1, count, *SHAPE), jnp.full((count, 2, 3), text, jnp.float32), None, None)
    sigma = np.random.default_rng(3).uniform(0.05, 0.95, count).astype(np.float32)
    return DistillationBatch(batch, normal(0, count, steps, *SHAPE), normal(2, count, *SHAPE), sigma)


def model_of(student, critic=None):
    """With a critic that is exact for a student of one step, if none is given."""
    critic = critic or Normal(student.shift[...], student.scale[...])
    return {"student": student, "critic": critic, "teacher": Normal(MEAN, STD), "empty_text": jnp.zeros((2, 3))}


def score(x, t, mean, std):
    """Of noised data."""
    return -(x - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)


def test_the_students_gradient_is_the_difference_of_scores():
    objective, prepared, scale, shift = toy(), drawn(64), 0.8, -0.3

    def loss(student):
        return objective.student_loss(model_of(Linear(scale, shift)) | {"student": student}, prepared, 0)

    grads = jax.grad(loss)(Linear(scale, shift))
    noise, eps, t = (np.asarray(x, np.float64) for x in (prepared.steps[:, 0], prepared.noise, prepared.sigma))
    t = t[:, None, None, None, None]
    x0 = scale * noise + shift
    x = (1 - t) * x0 + t * eps
    difference = t**2 / (1 - t) * (score(x, t, shift, scale) - score(x, t, MEAN, STD))
    real = (x + t**2 * score(x, t, MEAN, STD)) / (1 - t)
    gradient = difference / np.abs(x0 - real).mean((1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(grads.scale[...], np.mean(gradient * noise), rtol=1e-4)
    np.testing.assert_allclose(grads.shift[...], np.mean(gradient), rtol=1e-4)
    np.testing.assert_allclose(loss(Linear(scale, shift)), 0.5 * np.mean(gradient**2), rtol=1e-4)


def test_the_student_ends_at_the_teachers_distribution():
    objective = toy()

    @jax.jit
    def descend(student, key):
        noise, eps = jax.random.normal(key, (2, 256, 1, *SHAPE))
        prepared = drawn(256)._replace(steps=noise, noise=eps[:, 0])
        fixed = model_of(student)
        grads = jax.grad(lambda s: objective.student_loss(fixed | {"student": s}, prepared, 0))(student)
        return jax.tree.map(lambda w, g: w - 0.05 * g, student, grads)

    student = Linear(1.2, -0.5)
    for i in range(400):
        student = descend(student, jax.random.key(i))
    np.testing.assert_allclose(student.shift[...], MEAN, atol=0.05)
    np.testing.assert_allclose(abs(student.scale[...]), STD, atol=0.05)


def test_the_critic_learns_what_the_student_makes():
    """Its loss is flow matching on that, has its least where it is exact, and teaches the student nothing."""
    objective, prepared = toy(), drawn(4096)
    student, exact = Linear(0.8, -0.3), Normal(-0.3, 0.8)

    def loss(model):
        return objective.critic_loss(model, prepared, 0)

    grads = jax.grad(loss)(model_of(student))
    assert not any(np.any(x) for name in ("student", "teacher") for x in jax.tree.leaves(grads[name]))
    near = max(abs(float(x)) for x in jax.tree.leaves(grads["critic"]))
    far = jax.grad(loss)(model_of(student, Normal(0.3, 0.8)))["critic"].mean[...]
    assert near < 0.03
    assert far > 0.3
    x0 = 0.8 * prepared.steps[:, 0] - 0.3
    x = flow.interpolate(x0, prepared.noise, prepared.sigma)
    context = jnp.zeros((4096, 1, 1, 1, 1))
    error = exact(x, 1000 * prepared.sigma, context, "none") - (prepared.noise - x0)
    np.testing.assert_allclose(loss(model_of(student)), np.mean(error**2), rtol=1e-5)


def test_a_later_step_begins_where_the_student_arrives():
    sigmas = (1.0, 0.8, 0.4)
    objective, prepared, student = toy(sigmas), drawn(8, steps=3), Linear(0.8, -0.3)
    x = prepared.steps[:, 0]
    for i in (1, 2):
        x = (1 - sigmas[i]) * (0.8 * x - 0.3) + sigmas[i] * prepared.steps[:, i]
    generate = jax.jit(objective.generate)
    np.testing.assert_allclose(generate(student, prepared, 2), 0.8 * x - 0.3, atol=1e-5)
    # Of the steps before, none has a gradient.
    grads = jax.grad(lambda s: objective.generate(s, prepared, jnp.int32(2)).mean())(student)
    np.testing.assert_allclose(grads.scale[...], x.mean(), atol=1e-5)
    np.testing.assert_allclose(grads.shift[...], 1, atol=1e-5)


def test_guidance_leads_the_teacher_away_from_the_empty_text():
    """Where a text moves the data's mean by d, guidance g moves it by g d."""
    prepared, student = drawn(8, text=0.2), Linear(0.8, -0.3)
    x0 = 0.8 * prepared.steps[:, 0] - 0.3

    def gradient(guidance, mean):
        model = model_of(student) | {"teacher": Normal(mean, STD)}
        return toy(guidance=guidance).student_gradient(model, prepared, x0)

    np.testing.assert_allclose(gradient(3.0, MEAN), gradient(1.0, MEAN + 2 * 0.2), rtol=1e-3, atol=1e-4)
    assert np.abs(gradient(3.0, MEAN) - gradient(1.0, MEAN)).max() > 0.01


# ---- a run


CONFIG = dataclasses.replace(
    TRAIN,
    checkpoint=str(DIFFUSERS),
    distillation=DistillationConfig(sigmas=(1.0, 0.7, 0.4), guidance=3.0, student_every=2, critic_learning_rate=2e-3),
    batch=8,
    steps=4,
    ema_decay=0.9,
    learning_rate=1e-3,
)


@pytest.fixture(scope="module")
def run():
    """On eight devices: objective, compiled step, batches, and the states of steps 0 to 4 with their metrics."""
    with on(MeshShape(fsdp=2, ring=2, ulysses=2)):
        objective = make_objective(CONFIG)
        step = make_step(objective)
        batches = [make_batch(Synthetic(CONFIG, objective.dit), i * 8, 8) for i in range(4)]
        state = init_state(CONFIG, objective)
        states, metrics = [jax.device_get(state)], []
        for batch in batches:
            state, values = step(state, batch)
            states.append(jax.device_get(state))
            metrics.append(jax.device_get(values))
        yield objective, step, batches, states, metrics


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_student_and_critic_take_turns(run):
    *_, states, metrics = run
    start = states[0]
    assert same(start.model["student"], start.model["critic"])
    assert same(start.model["student"], start.ema)
    assert [same(a.model["critic"], b.model["critic"]) for a, b in itertools.pairwise(states)] == [False] * 4
    moved = [not same(a.model["student"], b.model["student"]) for a, b in itertools.pairwise(states)]
    assert moved == [False, True, False, True]
    assert [not same(a.ema, b.ema) for a, b in itertools.pairwise(states)] == moved
    assert all(same(state.frozen, start.frozen) for state in states)
    assert [bool(np.isfinite(x.parts["student_loss"])) for x in metrics] == moved
    assert all(np.isfinite(x.parts["critic_loss"]) and x.finite for x in metrics)


def test_resumes_to_the_bit(run, tmp_path):
    objective, step, batches, states, _ = run
    with on(MeshShape(fsdp=2, ring=2, ulysses=2)):
        state = init_state(CONFIG, objective)
        for batch in batches[:2]:
            state, _ = step(state, batch)
        checkpoints = TrainCheckpoints(tmp_path)
        checkpoints.save(state, 2)
        checkpoints.wait()
        assert "teacher" not in (tmp_path / "checkpoints/2/state/_METADATA").read_text()
        state, _ = checkpoints.restore(abstract_state(CONFIG, objective))
        checkpoints.close()
        state = resumed(CONFIG, objective, state)
        for batch in batches[2:]:
            state, _ = step(state, batch)
        assert same(jax.device_get(state), states[4])


@pytest.mark.slow
def test_one_device_takes_the_steps_of_eight(run):
    *_, states, metrics = run
    with on():
        objective = make_objective(CONFIG)
        step, state = make_step(objective), init_state(CONFIG, objective)
        for i in range(2):
            state, values = step(state, make_batch(Synthetic(CONFIG, objective.dit), i * 8, 8))
            np.testing.assert_allclose(values.parts["critic_loss"], metrics[i].parts["critic_loss"], rtol=1e-5)
            np.testing.assert_allclose(values.grad_norm, metrics[i].grad_norm, rtol=1e-4)
        np.testing.assert_allclose(values.parts["student_loss"], metrics[1].parts["student_loss"], rtol=1e-4)
        for ours, theirs in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(states[2].optimizer), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-5)


@pytest.mark.slow
def test_adapters_of_a_student(tmp_path):
    """Trained by the loop: both losses and samples are in the log, the teacher stays, a file and a preset are left."""
    config = dataclasses.replace(
        CONFIG,
        lora=LoRAConfig(rank=4),
        workdir=str(tmp_path),
        steps=2,
        batch=2,
        ema_decay=None,
        sample_every=2,
        validate_every=2,
        validation=ShapesData("different", 0, 2),
        validation_batches=1,
        sample_clips=2,
    )
    with on():
        objective = make_objective(config)
        checks.check(config, objective, MeshShape())
        teacher = Checkpoint(config.checkpoint).load("dit", objective.dit)
        data, checkpoints = objective.open_data(config), TrainCheckpoints(tmp_path)
        batches, held_out = Batches(data.source, config.batch), open_validation(config, objective, data)
        assert held_out.sampler.schedule.renoise is not None  # as the student is sampled
        state, finished = loop.train(config, objective, init_state(config, objective), batches, checkpoints, held_out)
        checkpoints.close()
        assert finished
        model = objective.join(state.model, state.frozen)
        assert_same_model(objective.network(model, "teacher"), teacher)
        assert not same(state.model["student"], state.model["critic"])
        path = objective.export(objective.eval_model(state))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["student_loss" in line for line in lines] == [False, True]
    assert all(line["critic_loss"] > 0 for line in lines)
    assert all(np.isfinite(lines[1][name]) for name in ("validation/loss", "samples/between_psnr"))
    (file,) = lora.parse([str(path)])
    assert file.terms(objective.dit)
    assert presets.read(str(tmp_path / "preset.json")) == {
        "solver": "lcm",
        "sigmas": (1.0, 0.7, 0.4),
        "timesteps": "exact",
        "guidance": 1.0,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": None}, "distillation without a checkpoint"),
        ({"vae": VAE}, "distillation with the network vae"),
    ],
)
def test_refused(change, message):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(InputError, match=message):
        checks.check(config, make_objective(config), MeshShape())


@pytest.mark.parametrize("sigmas", [(0.9, 0.5), (1.0, 0.5, 0.5)])
def test_steps_fall_from_one(sigmas):
    with pytest.raises(SettingError, match="fall from 1"):
        DistillationConfig(sigmas=sigmas)
