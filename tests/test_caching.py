"""Caches: which steps run the network, what they reuse, and that a switch that is off leaves no trace."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    DIFFUSERS,
    GUIDANCE,
    OFFICIAL,
    SCHEDULE,
    STEPS,
    assert_close,
    flags,
    on,
    random_dit,
    random_inputs,
    refused,
)

import sample_jax
from sharding.mesh import MeshShape
from sharding.rules import shard_parameters
from wanjax.config import SampleConfig
from wanjax.diffusion import solvers
from wanjax.diffusion.caching import MAGCACHE_MAX_SKIPS, MAGCACHE_WARMUP_SHARE, Cached, magnitude_schedule
from wanjax.diffusion.denoise import Guided, denoise, start
from wanjax.errors import InputError
from wanjax.models.dit import Context, DiT
from wanjax.models.embeddings import unpatchify
from wanjax.sampling.cache_rules import cfg_start, make_rules, switches
from wanjax.sampling.calibration import Calibration

TOLERANCE = 2e-5  # of the largest latent
CALIBRATION = Calibration(
    weights="", task="flf2v", shift=5.0, solver="unipc", conventions="official", steps=STEPS, guidance=GUIDANCE,
    frames=9, height=48, width=64, prompts=1, sigmas=tuple(SCHEDULE.sigmas[:-1].tolist()),
    magnitude=tuple(np.linspace(0, 0.4, STEPS).tolist()), input_change=(0.1,) * (STEPS - 1),
    residual_change=(0.1,) * (STEPS - 1), polynomial=(1.0, 1.0, 0.01), thresholds={},
)  # fmt: skip


class ConstantResidual(DiT):
    """Its blocks add the same to any tokens, another for each branch; tokens, 64 wide, are velocity patches."""

    def run_blocks(self, x, tokens, context, remat="none"):
        return x + context.k[0, :, :1, :1]

    def velocity(self, x, tokens):
        return unpatchify(x, tokens.grid, self.config.patch_size)


def rules_of(cache="off", cfg_cache="off", calibration=CALIBRATION):
    return make_rules(SampleConfig(cache=cache, cfg_cache=cfg_cache, guidance=GUIDANCE), SCHEDULE, calibration)


def run(rules, branches=2, cls=DiT, shape=None, parts=((0, STEPS),), steps=None):
    """Latents and evaluations of a run, by the rules, or plain without any."""
    with on(shape):
        dit = jax.jit(shard_parameters)(random_dit(cls))
        noise, image_condition, text, image = random_inputs(branches)
        context = jax.jit(DiT.context)(dit, text, image)
        plain = (dit, context, image_condition, GUIDANCE)
        predictor = Guided(*plain) if rules is None else Cached(*plain, rules)
        carry = start(predictor, noise)
        for first, stop in parts:
            carry = (steps or denoise)(predictor, SCHEDULE, carry, first, stop)
        return np.asarray(carry[0].sample), float(STEPS if rules is None else carry[1].evaluations)


def reference(cache, every=1, threshold=None):
    """The same run in a loop on the host, one thing after the other: latents, evaluations, steps that ran the blocks.

    `cache`: `[n]` bool, whether the blocks must run; with `threshold`, teacache decides about the others.
    """
    dit = random_dit()
    noise, image_condition, text, image = random_inputs(2)
    context = jax.jit(DiT.context)(dit, text, image)
    parts = DiT.embed, DiT.run_blocks, DiT.modulated_input
    embed, blocks, modulated_input = (jax.jit(part) for part in parts)
    alone = Context(*(x[:, :1] for x in context))
    state, total, count, ran, since = solvers.init(noise), 0.0, 0.0, [], 0
    residual, before, difference = None, None, None
    for i in range(STEPS):
        tokens = embed(dit, jnp.concatenate([state.sample, image_condition], -1), SCHEDULE.timesteps[i][None])
        first = np.asarray(modulated_input(dit, tokens), np.float64)
        fresh = bool(cache[i])
        if threshold is not None and before is not None:
            total += max(0.0, np.polyval(CALIBRATION.polynomial, abs(first - before).sum() / abs(before).sum()))
            fresh = fresh or total >= threshold
        before, total = first, 0.0 if fresh else total
        x = jnp.repeat(tokens.x, 2, axis=0)
        if fresh and i >= 4 and since + 1 < every:  # 4 is 40% of the steps
            out = blocks(dit, tokens.x, tokens, alone)
            residual = jnp.concatenate([out - tokens.x, residual[1:]])
            positive = dit.velocity(out, tokens)
            negative, since, count = positive + difference, since + 1, count + 0.5
        elif fresh:
            residual = blocks(dit, x, tokens, context) - x
            positive, negative = jnp.split(dit.velocity(x + residual, tokens), 2)
            difference, since, count = negative - positive, 0, count + 1
        else:
            positive, negative = jnp.split(dit.velocity(x + residual, tokens), 2)
            negative = positive + difference if since else negative
        ran += [i] if fresh else []
        state = solvers.step(SCHEDULE, i, state, negative + GUIDANCE * (positive - negative))
    return np.asarray(state.sample), count, ran


@functools.cache
def plain():
    return run(None)[0]


# ---------------------------------------------------------------------------------------------------------- what is off


def test_off_is_the_plain_program():
    for cache, cfg_cache in (("off", "off"), ("fixed:1", "1"), (None, None)):
        assert rules_of(cache, cfg_cache) is None


def test_off_is_the_plain_result(tmp_path, capsys):
    latents = []
    for chosen in ({}, {"cache": "fixed:1", "cfg_cache": "1"}, {"cache": "fixed:2"}):
        sample_jax.main(flags(DIFFUSERS, steps=3, **chosen, save_latents=tmp_path / "l.npy", output=tmp_path / "v.npy"))
        latents.append(np.load(tmp_path / "l.npy"))
    np.testing.assert_array_equal(latents[1], latents[0])
    assert np.abs(latents[2] - latents[0]).max() > 1e-4
    assert capsys.readouterr().out.count("DiT evaluations: 2 of 3 (67%)") == 1


# ------------------------------------------------------------------------------------------------------ which steps run


@pytest.mark.parametrize("k", [2, 3, 20])
def test_fixed_runs_every_kth_step(k):
    rules = rules_of(f"fixed:{k}")
    assert np.flatnonzero(rules.recompute).tolist() == list(range(0, STEPS, k))
    latents, evaluations = run(rules)
    assert evaluations == math.ceil(STEPS / k)
    expected, count, _ = reference(rules.recompute)
    assert count == evaluations
    assert_close(latents, expected, TOLERANCE, least=0)
    assert np.abs(latents - plain()).max() > 1e-3 * np.abs(plain()).max()


def test_what_is_skipped_is_not_computed(monkeypatch):
    """The block stack's executions, counted where it runs."""
    executed = []

    def counted(self, x, *args):
        jax.debug.callback(lambda: executed.append(len(x)))
        return original(self, x, *args)

    original = DiT.run_blocks
    monkeypatch.setattr(DiT, "run_blocks", counted)
    steps = jax.jit(lambda *args: denoise.__wrapped__(*args))  # not traced yet
    for chosen, expected in (
        (("fixed:3", "off"), [2, 2, 2, 2]),
        (("off", "3"), [2, 2, 2, 2, 1, 1, 2, 1, 1, 2]),
        (("fixed:2", "2"), [2, 2, 1, 2, 1]),
    ):
        evaluations = run(rules_of(*chosen), steps=steps)[1]
        jax.effects_barrier()
        assert sorted(executed) == sorted(expected)
        assert evaluations == sum(expected) / 2
        executed.clear()


@pytest.mark.parametrize("threshold", [1e-6, 1.0, 100.0])
def test_teacache_adds_up_changes(threshold):
    rules = rules_of(f"teacache:{threshold}")
    latents, evaluations = run(rules)
    expected, count, ran = reference(rules.recompute, threshold=threshold)
    assert evaluations == count
    assert {1e-6: len(ran) == STEPS, 1.0: 2 < len(ran) < STEPS, 100.0: ran == [0, STEPS - 1]}[threshold]
    assert_close(latents, expected, TOLERANCE, least=0)


def test_magcache_adds_up_errors():
    steps = 20
    first = math.ceil(MAGCACHE_WARMUP_SHARE * steps)
    still = magnitude_schedule(np.ones(steps), 0.1)
    assert np.flatnonzero(still).tolist() == [
        *range(first),
        first + MAGCACHE_MAX_SKIPS,
        first + 2 * MAGCACHE_MAX_SKIPS + 1,
        first + 3 * MAGCACHE_MAX_SKIPS + 2,
    ]
    growing = magnitude_schedule(np.full(steps, 1.1), 0.35)  # errors 0.1, 0.21 and 0.331 a step: the third is too much
    assert np.flatnonzero(growing).tolist() == [*range(first), *range(first + 2, steps, 3)]
    assert magnitude_schedule(np.full(steps, 1.2), 0.1).all()
    rules = rules_of("magcache:0.1")
    latents, evaluations = run(rules)
    assert evaluations == rules.recompute.sum() < STEPS
    assert_close(latents, reference(rules.recompute)[0], TOLERANCE, least=0)


@pytest.mark.parametrize(("cache", "k"), [("off", 2), ("off", 4), ("fixed:2", 2), ("teacache:1.0", 3)])
def test_cfg_cache(cache, k):
    rules = rules_of(cache, str(k))
    latents, evaluations = run(rules)
    fresh = np.ones(STEPS, bool) if rules.recompute is None else rules.recompute
    expected, count, _ = reference(fresh, k, 1.0 if "teacache" in cache else None)
    assert evaluations == count < run(rules_of(cache))[1]
    assert_close(latents, expected, TOLERANCE, least=0)


@pytest.mark.parametrize(
    ("cache", "k", "changes", "first"),
    [
        ("off", 2, (0.05, 0.01, 0.04, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01), 4),  # times guidance - 1, at most 0.1
        ("off", 4, (0.05, 0.01, 0.04, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01), 8),  # three steps' changes together
        ("fixed:2", 2, (0.05, 0.01, 0.04, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01), 5),  # two steps'; 4 is the last harmful
        ("off", 2, (0.0,) * 9, 1),  # nothing to restore from at the first step
        ("off", 2, (0.0,) * 8 + (0.05,), STEPS),
    ],
)
def test_cfg_cache_starts_where_it_does_no_harm(cache, k, changes, first):
    rules = rules_of(cache, str(k), dataclasses.replace(CALIBRATION, difference_change=changes))
    assert np.flatnonzero(rules.may_skip_uncond).tolist() == list(range(first, STEPS))
    if k == 4:
        assert run(rules)[1] == 8 + 2 * 0.5
    # Twice as many steps, half the changes between them; and guidance decides.
    calibration = dataclasses.replace(CALIBRATION, difference_change=changes)
    sigmas = np.interp(np.arange(2 * STEPS - 1) / 2, np.arange(STEPS), CALIBRATION.sigmas)
    if (cache, k) == ("off", 2):
        assert cfg_start(calibration, sigmas, 2 * GUIDANCE - 1, k) == 2 * first - 1
    assert cfg_start(calibration, sigmas, 1.001, k) == 1


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("chosen", [("fixed:4", "off"), ("off", "3"), ("fixed:2", "2"), ("teacache:1", "2")])
def test_what_does_not_change_may_be_reused(chosen):
    """With a residual that is the same at every step, the caches change nothing but the last bits."""
    expected = run(None, cls=ConstantResidual)[0]
    latents, evaluations = run(rules_of(*chosen), cls=ConstantResidual)
    assert evaluations < STEPS
    assert_close(latents, expected, TOLERANCE, least=0)


def test_parts_of_a_run_are_the_run():
    rules = rules_of("teacache:1.0", "2")
    whole = run(rules)
    parts = run(rules, parts=[(i, i + 1) for i in range(STEPS)])
    np.testing.assert_array_equal(whole[0], parts[0])
    assert whole[1] == parts[1]


def test_without_guidance():
    rules = make_rules(SampleConfig(cache="fixed:2", guidance=1, fast=True), SCHEDULE)
    assert rules.may_skip_uncond is None
    latents, evaluations = run(rules, branches=1)
    assert evaluations == 5
    assert np.isfinite(latents).all()


@pytest.mark.parametrize(
    ("chosen", "shape"),
    [
        (("fixed:2", "off"), MeshShape(data=2, ring=2, ulysses=2)),
        (("teacache:1.0", "2"), MeshShape(ring=2, ulysses=4)),
        (("off", "3"), MeshShape(data=4, ulysses=2)),
    ],
)
def test_sharded_equals_unsharded(chosen, shape):
    expected, evaluations = run(rules_of(*chosen))
    latents, sharded_evaluations = run(rules_of(*chosen), shape=shape)
    assert sharded_evaluations == evaluations
    assert_close(latents, expected, TOLERANCE, least=0)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"cache": "fixed:0"}, ["cache 'fixed:0'", "fixed:K", "--cache fixed:2"]),
        ({"cache": "fixed:1.5"}, ["fixed:1.5", "accepted"]),
        ({"cache": "teacache"}, ["'teacache'", "teacache:T"]),
        ({"cache": "magcache:nan"}, ["magcache:nan"]),
        ({"cache": "often"}, ["often", "accepted: off"]),
        (
            {"cache": "teacache:0.1"},
            ["teacache needs measurements", "--calibration", "wanjax calibrate"],
        ),
        (
            {"cache": "magcache:0.1"},
            ["magcache needs measurements", "--calibration", "wanjax calibrate"],
        ),
        ({"cfg_cache": "0"}, ["cfg-cache '0'", "--cfg-cache 2"]),
        ({"cfg_cache": "2", "guidance": 1}, ["cfg-cache 2 with guidance 1", "leave --cfg-cache out"]),
        ({"cfg_cache": "2", "mesh": "data=2,ulysses=4"}, ["cfg-cache 2 on mesh data=2", "ring or ulysses"]),
        ({"calibration": "nowhere.json"}, ["nowhere.json", "cannot be read", "wanjax calibrate"]),
    ],
)
def test_bad_switches(tmp_path, switches, words):
    refused(flags(OFFICIAL, **switches, output=tmp_path / "v.npy"), words)
    assert list(tmp_path.iterdir()) == []


def test_flags_override_the_preset():
    assert switches(SampleConfig(fast=True, cache="off", cfg_cache="off")) == ("off", 0.0, 1)
    assert switches(SampleConfig(fast=True)) != ("off", 0.0, 1)
    with pytest.raises(InputError):
        switches(SampleConfig(fast=True, cache="x"))
