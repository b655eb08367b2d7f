"""One clip, learned by heart: everything from its pixels to the optimiser has to work for that."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny import TRAIN, on

from wanjax.config import ShapesData, TaskMix
from wanjax.data.batch import make_batch
from wanjax.training.objectives import make_objective
from wanjax.training.state import init_state
from wanjax.training.step import train_step
from wanjax.weights import Checkpoint

STEPS = 150
CONFIG = dataclasses.replace(
    TRAIN,
    encoders="tests/golden/diffusers",
    data=ShapesData("different", first_seed=3, count=1),
    tasks=TaskMix(flf2v=1.0, caption_dropout=0.0),
    steps=STEPS,
    warmup=20,
    cooldown=75,
    learning_rate=3e-3,
    weight_decay=0.0,
    beta2=0.99,
    shift=1.0,
    remat="none",
)


@pytest.mark.slow
def test_one_clip_is_learned_by_heart():
    """The loss at fixed noise levels and noises that training never drew; every step draws its own."""
    with on():
        dit = dataclasses.replace(Checkpoint(CONFIG.encoders).config("dit"), dim=128, ffn_dim=256, num_layers=2)
        config = dataclasses.replace(CONFIG, dit=dit)
        objective = make_objective(config)
        data = objective.open_data(config)
        batch = data.encode(make_batch(data.source, 0, config.batch))
        step = jax.jit(functools.partial(train_step, objective), donate_argnums=0)
        validate = jax.jit(objective.validation_losses)
        state = init_state(config, objective)
        before = np.mean(validate(state.model, batch))
        for _ in range(STEPS):
            state, _ = step(state, batch)
        after = np.mean(validate(state.model, batch))
    assert after < before / 10, (before, after)
