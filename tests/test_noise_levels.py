"""Which noise levels training draws and how much each counts, by name; the way of the learning rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import DIT, TRAIN, on

from wanjax.data.batch import make_batch
from wanjax.data.synthetic import Synthetic
from wanjax.diffusion import flow, noise_levels
from wanjax.diffusion.noise_levels import NoiseLevels
from wanjax.training.objectives import make_objective
from wanjax.training.optimizer import rate_at

DENSITIES = {
    "logit_normal": NoiseLevels("logit_normal", 0.3, 0.8, shift=3.0),
    "uniform": NoiseLevels("uniform", shift=3.0),
    "mode": NoiseLevels("mode", shift=3.0),
}
MANY = 400_000


def as_diffusers(name):
    """Levels drawn by the formulas of diffusers' `compute_density_for_timestep_sampling`, and shifted."""
    u = np.random.default_rng(0).random(MANY)
    drawn = {
        "logit_normal": 1 / (1 + np.exp(-np.random.default_rng(0).normal(0.3, 0.8, MANY))),
        "uniform": u,
        "mode": 1 - u - 1.29 * (np.cos(np.pi * u / 2) ** 2 - 1 + u),
    }
    return {name: 3 * x / (1 + 2 * x) for name, x in drawn.items()}[name]


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("stratified", [False, True])
def test_densities_are_those_of_diffusers(name, stratified):
    levels = dataclasses.replace(DENSITIES[name], stratified=stratified)
    sigma = np.sort(levels.draw(jax.random.key(1), MANY))
    assert 0 <= sigma[0] <= sigma[-1] <= 1
    places = np.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(np.quantile(sigma, places), np.quantile(as_diffusers(name), places), atol=0.01)


@pytest.mark.parametrize("name", DENSITIES)
def test_a_span_keeps_the_densitys_shape(name):
    levels, span = DENSITIES[name], (0.6, 0.875)
    sigma = np.sort(levels.draw(jax.random.key(1), MANY, span))
    everywhere = np.sort(levels.draw(jax.random.key(2), MANY))
    inside = everywhere[(everywhere >= span[0]) & (everywhere <= span[1])]
    share = levels.share_below(span[1]) - levels.share_below(span[0])
    assert share == pytest.approx(len(inside) / MANY, abs=0.01)
    assert span[0] <= sigma[0] <= sigma[-1] <= span[1]
    places = np.linspace(0, 1, 101)
    np.testing.assert_allclose(np.quantile(sigma, places), np.quantile(inside, places), atol=0.01)


@pytest.mark.parametrize("name", DENSITIES)
def test_stratified_has_one_in_each_part(name):
    levels = dataclasses.replace(DENSITIES[name], stratified=True)
    sigma = np.asarray(levels.draw(jax.random.key(0), 16))
    parts = [int(16 * levels.share_below(float(x))) for x in sigma]
    assert sorted(parts) == list(range(16))
    assert parts != sorted(parts)  # no sample's place in the batch says what it gets


def test_the_usual_density_is_drawn_as_ever():
    drawn = NoiseLevels("logit_normal", 0.3, 0.8, shift=3.0).draw(jax.random.key(5), 8)
    np.testing.assert_array_equal(drawn, flow.sample_sigmas(jax.random.key(5), 8, mean=0.3, std=0.8, shift=3.0))


def test_the_shift_grows_with_the_root_of_the_tokens():
    config = dataclasses.replace(TRAIN, shift=3.0, shift_tokens=1000)
    assert [noise_levels.shift(config, n) for n in (250, 1000, 4000)] == [1.5, 3.0, 6.0]
    assert noise_levels.shift(TRAIN, 17) == TRAIN.shift


def test_weights_are_those_of_diffusers():
    sigma = jnp.asarray([0.1, 0.5, 0.9])
    assert noise_levels.weight(sigma, "none") is None
    np.testing.assert_allclose(noise_levels.weight(sigma, "sigma_sqrt"), [100, 4, 1 / 0.81], rtol=1e-6)
    cosmap = 2 / (np.pi * (1 - 2 * np.asarray(sigma) + 2 * np.asarray(sigma) ** 2))
    np.testing.assert_allclose(noise_levels.weight(sigma, "cosmap"), cosmap, rtol=1e-6)
    assert np.isfinite(noise_levels.weight(jnp.zeros(1), "sigma_sqrt"))


def test_training_draws_and_weighs_as_it_is_told():
    config = dataclasses.replace(
        TRAIN, dit=DIT, timesteps="uniform", stratified=True, weighting="cosmap", shift_tokens=3, shift=1.0, batch=4
    )
    with on():
        objective = make_objective(config)
        batch = make_batch(Synthetic(config, DIT), 0, 4)
        prepared = objective.prepare(batch, jax.random.key(0))
        tokens = objective.units(batch) // 4
        levels = NoiseLevels("uniform", shift=(tokens / 3) ** 0.5, stratified=True)
        assert sorted(int(4 * levels.share_below(float(x))) for x in np.asarray(prepared.sigma)) == [0, 1, 2, 3]
        model = objective.make(nnx.Rngs(0))
        losses = objective.losses(model, prepared)
        weighed = jnp.mean(noise_levels.weight(prepared.sigma, "cosmap") * losses)
        assert float(objective.loss(model, prepared)) == pytest.approx(float(weighed), rel=1e-6)
        plain = dataclasses.replace(objective, config=dataclasses.replace(config, weighting="none"))
        np.testing.assert_array_equal(
            plain.validation_losses(model, batch), objective.validation_losses(model, batch)
        )  # held-out losses are comparable


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 0.5, 0]),
        ("linear", [0, 0.5, 1, 0.85, 0.7, 0.55, 0.4, 0.2, 0]),
        ("cosine", [0, 0.5, 1, 0.4 + 0.3 * (1 + 2**-0.5), 0.7, 0.4 + 0.3 * (1 - 2**-0.5), 0.4, 0.2, 0]),
    ],
)
def test_the_rate_rises_runs_and_falls(scheduler, rates):
    config = dataclasses.replace(
        TRAIN, learning_rate=1.0, lr_scheduler=scheduler, min_lr_ratio=0.4, warmup=2, cooldown=2, steps=8
    )
    np.testing.assert_allclose([rate_at(config, jnp.asarray(i)) for i in range(9)], rates, atol=1e-6)


def test_without_warm_up_a_fall_begins_at_once():
    config = dataclasses.replace(TRAIN, learning_rate=1.0, lr_scheduler="linear", warmup=0, steps=4)
    np.testing.assert_allclose([rate_at(config, jnp.asarray(i)) for i in range(5)], [1, 0.75, 0.5, 0.25, 0], atol=1e-6)
