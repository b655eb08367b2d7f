"""Solvers against the official ones, those of diffusers and the exact solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GOLDEN, golden_arrays

from wanjax.diffusion import solvers
from wanjax.errors import InputError

OFFICIAL = golden_arrays("official")
DIFFUSERS = np.load(GOLDEN / "solvers.npz")
DIFFUSERS_CASES = [(1, 5.0), (2, 5.0), (3, 0.5), (8, 3.0), (14, 5.0), (15, 5.0), (50, 16.0), (100, 16.0), (1000, 1.0)]
SOLVERS = ("unipc", "dpmpp", "euler")


@jax.jit
def replay(schedule, x, velocities):
    """The sample after every step, fed made-up velocities."""

    def body(state, inputs):
        state = solvers.step(schedule, inputs[0], state, inputs[1])
        return state, state.sample

    return jax.lax.scan(body, solvers.init(x), (jnp.arange(len(velocities)), velocities))[1]


def assert_each_close(actual, expected, tolerance):
    error = np.abs(np.asarray(actual) - expected) / np.maximum(1, np.abs(expected))
    assert error.max() <= tolerance


@pytest.mark.parametrize(("steps", "shift"), [(50, 16), (40, 5), (8, 3), (8, 16)])
@pytest.mark.parametrize(("solver", "name"), [("unipc", "unipc"), ("dpmpp", "dpm")])
def test_official(solver, name, steps, shift):
    schedule = solvers.make_schedule(solver, steps, float(shift))
    golden = {k: OFFICIAL[f"sched_{name}_{steps}_{shift}_{k}"] for k in ("timesteps", "sigmas", "samples")}
    np.testing.assert_array_equal(schedule.timesteps, golden["timesteps"])
    np.testing.assert_array_equal(schedule.sigmas, golden["sigmas"])
    samples = replay(schedule, OFFICIAL[f"sched_{steps}_{shift}_x"], OFFICIAL[f"sched_{steps}_{shift}_v"])
    assert_each_close(samples, golden["samples"], 3e-6)


@pytest.mark.parametrize(("steps", "shift"), DIFFUSERS_CASES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_diffusers(solver, steps, shift):
    schedule = solvers.make_schedule(solver, steps, shift, "diffusers")
    case = f"{steps}_{shift:g}"
    np.testing.assert_array_equal(schedule.timesteps, DIFFUSERS[f"{solver}_{case}_timesteps"])
    np.testing.assert_array_equal(schedule.sigmas, DIFFUSERS[f"{solver}_{case}_sigmas"])
    samples = replay(schedule, DIFFUSERS[f"{case}_x"], DIFFUSERS[f"{case}_v"])
    assert_each_close(samples, DIFFUSERS[f"{solver}_{case}_samples"], 5e-6)


def test_timesteps_are_truncated():
    timesteps = solvers.make_schedule("unipc", 50, 16.0).timesteps
    assert timesteps.dtype == np.float32
    np.testing.assert_array_equal(timesteps, np.trunc(timesteps))
    assert timesteps[0] == 999
    assert solvers.make_schedule("dpmpp", 50, 16.0).timesteps[0] == 1000
    assert solvers.make_schedule("euler", 50, 16.0).timesteps[0] == 1000


MEAN, STD = jnp.array([1.5, -0.5, 0.0]), jnp.array([0.5, 0.8, 2.0])


def gaussian_std(sigma):
    return jnp.sqrt((1 - sigma) ** 2 * STD**2 + sigma**2)


def gaussian_velocity(x, sigma):
    """E[noise - x0 | x] where x0 is normal with MEAN and STD; its paths are (1 - sigma) MEAN + gaussian_std z."""
    z = (x - (1 - sigma) * MEAN) / gaussian_std(sigma)
    return -MEAN + (sigma - (1 - sigma) * STD**2) / gaussian_std(sigma) * z


@jax.jit
def integrate(schedule, x):
    def body(i, state):
        return solvers.step(schedule, i, state, gaussian_velocity(state.sample, jnp.asarray(schedule.sigmas)[i]))

    return jax.lax.fori_loop(0, len(schedule.timesteps), body, solvers.init(x)).sample


def endpoint_error(solver, steps, shift, conventions="official", exact_start=True):
    schedule = solvers.make_schedule(solver, steps, shift, conventions)
    z = np.array([0.7, -1.3, 0.4], np.float32)
    sigma = schedule.sigmas[0]
    x = (1 - sigma) * MEAN + gaussian_std(sigma) * z if exact_start else z
    return float(jnp.abs(integrate(schedule, x) - (MEAN + STD * z)).max())


@pytest.mark.parametrize("conventions", ["official", "diffusers"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpmpp", 2), ("unipc", 2)])
def test_order_of_accuracy(solver, order, conventions):
    errors = np.array([endpoint_error(solver, steps, 1.0, conventions) for steps in (40, 80, 160)])
    orders = np.log2(errors[:-1] / errors[1:])
    assert errors[-1] < (1e-2 if order == 1 else 3e-4)
    assert np.all(orders > order - 0.3)  # 2M loses a logarithm: lambda runs from -infinity to infinity
    assert order == 2 or np.all(orders < 1.1)


@pytest.mark.parametrize("conventions", ["official", "diffusers"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("solver", SOLVERS)
def test_straight_paths_are_exact(solver, steps, conventions):
    schedule = solvers.make_schedule(solver, steps, 5.0, conventions)
    data, noise = np.array([0.3, -2.0], np.float32), np.array([1.1, 0.6], np.float32)
    sigma = schedule.sigmas[0]
    samples = replay(schedule, (1 - sigma) * data + sigma * noise, np.tile(noise - data, (steps, 1)))
    np.testing.assert_allclose(samples[-1], data, atol=1e-6)


@pytest.mark.parametrize("steps", [67, 68, 100, 1000])
def test_equal_first_timesteps(steps):
    """From 68 steps on at shift 16 the official UniPC fails, because its first two timesteps are the same integer."""
    schedule = solvers.make_schedule("unipc", steps, 16.0)
    assert (schedule.timesteps[0] == schedule.timesteps[1]) == (steps >= 68)
    assert np.all(np.diff(schedule.sigmas) < 0)
    assert endpoint_error("unipc", steps, 16.0, exact_start=False) < 150 / steps**2 + 5e-4


@pytest.mark.parametrize("conventions", ["official", "diffusers"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_schedule_is_finite(solver, conventions):
    for steps in (1, 2, 3, 4, 5, 67, 999, 1000):
        for shift in (0.01, 0.5, 1.0, 5.0, 16.0, 100.0):
            schedule = solvers.make_schedule(solver, steps, shift, conventions)
            assert [x.shape for x in schedule[:4]] == [(steps,), (steps + 1,), (steps, 5), (steps, 3)]
            assert all(np.all(np.isfinite(x)) and x.dtype == np.float32 for x in schedule[:4])
            assert schedule.sigmas[-1] == 0
            assert schedule.sigmas[0] <= 1
            # The weights are those of an average: a constant x = x0 stays what it is.
            np.testing.assert_allclose(schedule.predict.sum(1), 1, atol=1e-5)
            np.testing.assert_allclose(schedule.correct.sum(1), 1, atol=1e-5)


def test_starting_at_pure_noise():
    """DPM++ starts at sigma 1, where lambda is -infinity: its first two steps are of first order."""
    schedule = solvers.make_schedule("dpmpp", 5, 3.0)
    assert schedule.sigmas[0] == 1
    np.testing.assert_array_equal(schedule.predict[:2, 2], 0)
    assert np.all(schedule.predict[2:4, 2] < 0)
    np.testing.assert_array_equal(schedule.predict[-1], [0, 1, 0])


def test_float32_whatever_comes_in():
    schedule = solvers.make_schedule("unipc", 3, 5.0)
    state = solvers.init(jnp.ones((2, 3), jnp.bfloat16))
    state = solvers.step(schedule, 0, state, jnp.ones((2, 3), jnp.bfloat16))
    assert {x.dtype for x in state} == {jnp.dtype("float32")}
    assert {x.shape for x in state} == {(2, 3)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "heun"}, "unipc, dpm"),
        ({"conventions": "other"}, "official, diffusers"),
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": -3}, "from 1 to 1000"),
        ({"steps": 1001}, "from 1 to 1000"),
        ({"steps": 2.5}, "whole numbers"),
        ({"shift": 0.0}, "above 0"),
        ({"shift": -1.0}, "above 0"),
        ({"shift": float("nan")}, "above 0"),
        ({"shift": float("inf")}, "above 0"),
        ({"shift": 1e9}, "equal in float32"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        solvers.make_schedule(**arguments)
    assert "\n" not in str(error.value)
