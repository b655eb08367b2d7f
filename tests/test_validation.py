"""Figures on held-out clips: fixed, of the averaged weights, and equal to what they are by definition."""

import dataclasses
import itertools

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TRAIN, VAE, on

import train_jax
from sharding.mesh import MeshShape
from sharding.rules import constrain
from wanjax.conditioning.frames import to_pixels
from wanjax.config import CachedData, ShapesData, TaskMix, VAEConfig
from wanjax.data.batch import make_batch
from wanjax.demo.shapes import ProceduralClips
from wanjax.errors import InputError
from wanjax.training import checks, metrics
from wanjax.training.log import Log
from wanjax.training.objectives import Data, make_objective
from wanjax.training.objectives.flow_matching import SIGMAS, FlowMatchingBatch
from wanjax.training.validation import open_validation

CONFIG = dataclasses.replace(
    TRAIN,
    checkpoint="tests/golden/diffusers",
    data=ShapesData("all", first_seed=0, count=6),
    validation=ShapesData("different", first_seed=100, count=5),
    validate_every=2,
    validation_batches=2,
    sample_every=4,
    sample_clips=2,
    sample_steps=2,
    tasks=TaskMix(i2v=1.0, flf2v=1.0, caption_dropout=1.0, image_dropout=1.0),
    accumulate=2,
)


@pytest.fixture(scope="module")
def mesh():
    with on(MeshShape(fsdp=2, ulysses=2)) as mesh:
        yield mesh


def test_losses_and_samples_of_the_dit(mesh, tmp_path):
    config = dataclasses.replace(CONFIG, workdir=str(tmp_path))
    objective = make_objective(config)
    validation = open_validation(config, objective, objective.open_data(config))
    model = objective.load()
    with Log(tmp_path, 0) as log:
        assert validation(1, model, log) == {}
        losses, everything = validation(2, model, log), validation(4, model, log)
    assert {name: everything[name] for name in losses} == losses  # the same clips and noise
    assert len(losses) == 1 + len(SIGMAS)

    # By definition: batches of two clips, nothing dropped, noise of the batch's number.
    tasks = dataclasses.replace(config.tasks, caption_dropout=0.0, image_dropout=0.0)
    held_out = dataclasses.replace(config, data=config.validation, tasks=tasks, batch=2)
    data = objective.open_data(held_out)
    sigma = jax.jit(lambda: constrain(jnp.full(2, 0.6), "batch"))()
    loss = jax.jit(lambda model, batch, noise: objective.loss(model, FlowMatchingBatch(batch, noise, sigma)))
    found = []
    for number in (0, 1):
        batch = data.encode(make_batch(data.source, 2 * number, 2))
        noise = objective.prepare(batch, jax.random.key(number)).noise
        found.append(float(loss(model, batch, noise)))
    np.testing.assert_allclose(losses["validation/loss_at_0.6"], np.mean(found), rtol=1e-4)

    with av.open(str(tmp_path / "samples/000004.mp4")) as file:
        shown = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert np.stack(shown).shape == (5, 2 * 32, 2 * 32, 3)
    clips = ProceduralClips(100, 5, 5, 32, "different")
    truth = validation.sampler.truth[1]
    assert any(np.array_equal(truth, clips[i].video) for i in range(5))
    assert metrics.psnr(np.stack(shown)[:, 32:, :32], truth) > 20  # on the left the true clips
    ours = np.stack(shown)[:, 32:, 32:]
    assert {"samples/end_frame_psnr", "samples/end_frame_ssim", "samples/between_psnr"} < set(everything)
    assert metrics.psnr(ours[1:-1], truth[1:-1]) == pytest.approx(everything["samples/between_psnr"], abs=5)


def test_loss_of_a_vae(mesh, tmp_path):
    change = {"checkpoint": None, "vae": VAE, "snippet": (5, 16, 16), "sample_every": 0, "kl_weight": 0.0}
    config = dataclasses.replace(CONFIG, workdir=str(tmp_path), **change)
    objective = make_objective(config)

    @jax.tree_util.register_static
    class Grey:
        """A VAE that answers with nothing but grey."""

        def moments(self, video):
            return (jnp.zeros((2, 2, 2, 2, 4)), jnp.zeros((2, 2, 2, 2, 4))), None

        def reconstruct(self, latents):
            return jnp.zeros((2, 5, 16, 16, 3)), None

    validation = open_validation(config, objective, Data(None))
    figures = validation(2, Grey(), None)
    batches = validation.losses.batches
    seen = [to_pixels(np.asarray(x.video)) * np.asarray(x.given)[..., None, None, None] for x in batches]
    assert figures == {"validation/loss": pytest.approx(np.mean(np.square(seen)), rel=1e-5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": None}, "--validate-every 2 without held-out clips"),
        ({"validate_every": -1}, "--validate-every -1"),
        ({"sample_steps": 0}, "sample_steps 0"),
        ({"checkpoint": None, "vae": VAEConfig()}, "--sample-every for a VAE"),
    ],
)
def test_refused(change, message):
    def check():
        config = dataclasses.replace(CONFIG, workdir="unused", **change)
        checks.check(config, make_objective(config), MeshShape())

    with pytest.raises(InputError, match=message):
        check()


def test_samples_without_encoders_are_refused(mesh):
    objective = make_objective(CONFIG)
    held_out = CachedData("nowhere", of=CONFIG.validation)
    config = dataclasses.replace(CONFIG, checkpoint=None, dit=objective.dit, validation=held_out, validate_every=0)
    with pytest.raises(InputError, match="no encoders; a checkpoint with vae, umT5 and CLIP is needed"):
        open_validation(config, objective, Data(None))


def test_flags():
    flags = "--config configs/train_tiny.py --validate-every 5 --sample-every 7"
    config, _ = train_jax.parse(flags.split())
    assert (config.validate_every, config.sample_every) == (5, 7)


def test_structural_similarity():
    """Against its formula, one window after the other."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (2, 14, 13, 3)).astype(np.uint8)
    video = np.clip(truth + rng.normal(0, 40, truth.shape), 0, 255).astype(np.uint8)
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for f, y, x, c in itertools.product(range(2), range(14 - 10), range(13 - 10), range(3)):
        a, b = (v[f, y : y + 11, x : x + 11, c].astype(float) for v in (video, truth))
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        variance = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
        covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
        luminance = (2 * mean_a * mean_b + 2.55**2) / (mean_a**2 + mean_b**2 + 2.55**2)
        values.append(luminance * (2 * covariance + 7.65**2) / (variance + 7.65**2))
    assert metrics.ssim(video, truth) == pytest.approx(np.mean(values), rel=1e-9)
    assert metrics.ssim(truth, truth) == pytest.approx(1)
