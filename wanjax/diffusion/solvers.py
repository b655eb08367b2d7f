"""UniPC, DPM++ 2M, Euler and LCM for dx / d sigma = velocity(x, sigma), as one linear recurrence under one jitted loop.

With x0 = x - sigma velocity, lambda = log((1 - sigma) / sigma) and, for the step from sigma to sigma',
r = sigma' / sigma, h = lambda' - lambda, k = h / (h of the step before), all three solvers PREDICT

    x' = r x + (1 - r) (x0 + k/2 (x0 - x0_1))                                   x0_1: x0 one step ago, x0_2: two

Euler is k = 0 (the straight line x + (sigma' - sigma) velocity, written with x0). DPM++ 2M and UniPC (B2, order 2)
use k, but 0 at the first and the last step: there is no x0_1 yet, and lambda ends at infinity. UniPC also CORRECTS:
once the velocity at x is known, x is computed again from the corrected x_1 one step ago, with r, h, k of that step:

    x  = r x_1 + (1 - r) (x0_1 + rho_1 k (x0_1 - x0_2) + rho_2 (x0 - x0_1))
    rho_1 + rho_2 = b_1 = 1/(1 - e^-h) - 1/h,    rho_2 - rho_1 / k = b_2 = 1/(1 - e^-h) - 2 b_1/h,
    rho_2 = 1/2 where that step was of first order.

LCM (arXiv 2310.04378), for networks that say x0 in few steps, puts fresh noise on it, by `Schedule.renoise`:

    x' = (1 - sigma') x0 + sigma' noise

The weights depend on the sigmas only. `make_schedule` computes them on the host in float64; `step` is then a few
multiply-adds in float32 without a branch:

    def denoise(schedule, noise):  # jitted, with schedule = make_schedule("unipc", steps=50, shift=16.0)
        def body(i, state):
            return step(schedule, i, state, velocity(state.sample, schedule.timesteps[i]))
        return jax.lax.fori_loop(0, 50, body, init(noise)).sample

Sources: UniPC (arXiv 2302.04867), DPM-Solver++ (arXiv 2211.01095). The sigmas, one set per convention, are those of
Wan2.1 `wan/utils/fm_solvers{,_unipc}.py` and of diffusers 0.42 `UniPCMultistepScheduler`, `DPMSolverMultistepScheduler`
(both with flow sigmas) and `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from wanjax.diffusion.flow import NUM_TIMESTEPS, shift_sigma
from wanjax.errors import InputError

Solver = Literal["unipc", "dpmpp", "euler", "lcm"]
Conventions = Literal["official", "diffusers"]
Timesteps = Literal["exact", "truncated"]


class Schedule(NamedTuple):
    """What `n` steps need, as float32 host arrays, the same on every process. A jitted loop takes it as an argument."""

    timesteps: np.ndarray
    """`[n]`: what the network is told: whole numbers, or 1000 sigma where `make_schedule` says so."""
    sigmas: np.ndarray
    """`[n + 1]`, strictly falling, the last is 0."""
    correct: np.ndarray
    """`[n, 5]`: weights of (x, x_1, x0, x0_1, x0_2) in the corrected x."""
    predict: np.ndarray
    """`[n, 3]`: weights of (corrected x, x0, x0_1) in the next x."""
    renoise: np.ndarray | None = None
    """`[n]`: weight of fresh noise in the next x; None: there is none."""
    key: np.ndarray | None = None
    """Of that noise: data of a PRNG key."""


class SolverState(NamedTuple):
    """Float32 arrays, all of the shape of the latents."""

    sample: jax.Array
    """The latents at the current sigma; after the last step the result."""
    corrected: jax.Array
    """x_1 of the module's docstring."""
    x0: jax.Array
    """x0_1"""
    x0_older: jax.Array
    """x0_2"""


def make_schedule(
    solver: Solver = "unipc",
    steps: int = 50,
    shift: float = 16.0,
    conventions: Conventions = "official",
    sigmas: Sequence[float] | None = None,
    timesteps: Timesteps | None = None,
    seed: int = 0,
) -> Schedule:
    """Sigmas, timesteps and weights of a solver, computed on the host.

    Args:
      solver: "unipc", "dpmpp", "euler" or "lcm".
      steps: how often the network is asked, 1 to 1000.
      shift: positive; 16 for 720p, 3 to 5 for 480p.
      conventions: whose sigmas and timesteps, "official" or "diffusers". The official code has no Euler; it gets the
        sigmas of the official DPM++, which start at 1, where the noise is exact. LCM has Euler's.
      sigmas: falling, at most 1, in place of `steps` sigmas of the conventions: taken as they are, whatever the shift.
        The final 0 may be left out.
      timesteps: "exact" is 1000 sigma, "truncated" without its fraction; None: exact for a list of sigmas and for Euler
        and LCM under diffusers' conventions.
      seed: of LCM's noise.

    Raises:
      InputError: unknown name, steps, shift or sigmas out of range, or a shift so large that float32 sigmas coincide.
    """
    _check(solver, steps, shift, conventions, timesteps)
    exact = _sigmas(solver, steps, shift, conventions) if sigmas is None else _listed(sigmas)  # [n]
    if timesteps is None:
        float_sigmas = conventions == "diffusers" and solver in ("euler", "lcm")
        timesteps = "truncated" if sigmas is None and not float_sigmas else "exact"
    levels = np.append(exact, 0.0).astype(np.float32)  # [n + 1]
    if not np.all(np.diff(levels) < 0):
        raise InputError(
            f"shift {shift} with {steps} steps: neighbouring sigmas are equal in float32; use a shift from 0.01 to 100"
        )
    if timesteps == "exact":
        told = levels[:-1] * np.float32(NUM_TIMESTEPS)
    else:
        told = np.trunc(exact * NUM_TIMESTEPS).astype(np.float32)
    # The weights belong to the rounded sigmas, as in both references: near sigma 1 rounding moves lambda by up to 1e-2.
    predict, correct = _weights(solver, levels.astype(np.float64))
    schedule = Schedule(told, levels, correct.astype(np.float32), predict.astype(np.float32))
    if solver != "lcm":
        return schedule
    key = jax.random.fold_in(jax.random.key(seed), 1)  # the initial noise is drawn with the seed's own key
    return schedule._replace(renoise=levels[1:], key=np.asarray(jax.random.key_data(key)))


def init(noise: jax.Array) -> SolverState:
    """The state before the first step. `noise`: standard normal, any shape and dtype."""
    noise = noise.astype(jnp.float32)  # solvers are float32
    # Three arrays, not one thrice: a jitted loop may be given the state to overwrite.
    corrected, x0, x0_older = (jnp.zeros_like(noise) for _ in range(3))
    return SolverState(noise, corrected, x0, x0_older)


def step(schedule: Schedule, i: jax.Array | int, state: SolverState, velocity: jax.Array) -> SolverState:
    """One step, from `sigmas[i]` to `sigmas[i + 1]`.

    Args:
      schedule: from `make_schedule`.
      i: which step, 0 to n - 1; may be traced.
      state: from `init` or the step before.
      velocity: what the network says of `state.sample` at `schedule.timesteps[i]`, guidance included; the same shape.
    """
    sigma, correct, predict = (jnp.asarray(x)[i] for x in (schedule.sigmas, schedule.correct, schedule.predict))
    x0 = state.sample - sigma * velocity.astype(jnp.float32)  # solvers are float32
    corrected = _combine(correct, (state.sample, state.corrected, x0, state.x0, state.x0_older))
    sample = _combine(predict, (corrected, x0, state.x0))
    if schedule.renoise is not None and schedule.key is not None:
        key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(schedule.key)), i)
        noise = jax.random.normal(key, sample.shape, jnp.float32)
        sample = sample + jnp.asarray(schedule.renoise)[i] * noise
    return SolverState(sample=sample, corrected=corrected, x0=x0, x0_older=state.x0)


def _combine(weights: jax.Array, terms: tuple[jax.Array, ...]) -> jax.Array:
    total = weights[0] * terms[0]
    for j, term in enumerate(terms[1:], start=1):
        total += weights[j] * term
    return total


def _listed(sigmas: Sequence[float]) -> np.ndarray:
    """Float64 sigmas of a list without the final 0.

    Raises:
      InputError: they do not fall from at most 1 to above 0.
    """
    given = np.asarray(sigmas, np.float64)
    given = given[:-1] if given[-1:].tolist() == [0] else given
    falls = np.all(np.diff(given) < 0) and np.all((given > 0) & (given <= 1))
    if not (1 <= len(given) <= NUM_TIMESTEPS and falls):
        text = ",".join(f"{x:g}" for x in sigmas)
        raise InputError(
            f"sigmas {text or 'without a number'}: accepted are numbers that fall, from at most 1 to above 0 (the "
            "final 0 is implied); use 1,0.9375,0.8333,0.625"
        )
    return given


def _sigmas(solver: Solver, steps: int, shift: float, conventions: Conventions) -> np.ndarray:
    """Float64 sigmas without the final 0. The order of operations is the references': it decides what truncates."""
    last = 1 / NUM_TIMESTEPS
    if conventions == "official":
        start = float(np.float32(1 - last)) if solver == "unipc" else 1.0
        return shift_sigma(np.linspace(start, 0, steps + 1)[:-1], shift)  # [n]
    if solver == "unipc":
        sigmas = shift_sigma(np.linspace(1, last, steps + 1)[:-1], shift)  # [n]
        sigmas[0] -= 1e-6  # diffusers keeps lambda finite this way
        return sigmas
    if solver == "dpmpp":
        return shift_sigma((1 - np.linspace(1, last, steps + 1))[:0:-1], shift)  # [n]
    # FlowMatchEulerDiscreteScheduler ends at the shifted last sigma and then shifts every sigma, that one for the
    # second time; it takes the first shift in float32.
    end = float(shift_sigma(np.float32(last), shift)) * NUM_TIMESTEPS
    return shift_sigma(np.linspace(NUM_TIMESTEPS, end, steps) / NUM_TIMESTEPS, shift)  # [n]


def _weights(solver: Solver, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`predict` [n, 3] and `correct` [n, 5] for sigmas [n + 1] from at most 1 to 0, all float64."""
    n = len(sigmas) - 1
    with np.errstate(divide="ignore"):  # lambda is -inf at sigma 1 and +inf at sigma 0
        h = np.diff(np.log(1 - sigmas) - np.log(sigmas))  # [n]
    r = sigmas[1:] / sigmas[:-1]  # [n]
    k = np.zeros(n)  # [n]
    if solver in ("unipc", "dpmpp"):
        k[1:-1] = h[1:-1] / h[:-2]  # 0 after a step from sigma 1: its h is infinite
    predict = np.stack([r, (1 - r) * (1 + k / 2), -(1 - r) * k / 2], axis=1)  # [n, 3]
    if solver == "lcm":  # of x nothing stays
        predict = np.stack([np.zeros(n), 1 - sigmas[1:], np.zeros(n)], axis=1)

    correct = np.zeros((n, 5))
    correct[:, 0] = 1  # keep x
    if solver == "unipc" and n > 1:
        r, k, h = r[:-1], k[:-1], h[:-1]  # [n - 1]: the step that led to x
        b1 = -1 / np.expm1(-h) - 1 / h
        b2 = -1 / np.expm1(-h) - 2 * b1 / h
        rho1 = k / (1 + k) * (b1 - b2)
        rho2 = b1 - rho1
        rho2[0] = 0.5
        weights = [np.zeros(n - 1), r, (1 - r) * rho2, (1 - r) * (1 + rho1 * k - rho2), -(1 - r) * rho1 * k]
        correct[1:] = np.stack(weights, axis=1)  # [n - 1, 5]
    return predict, correct


def _check(solver: str, steps: int, shift: float, conventions: str, timesteps: str | None) -> None:
    choices = (("solver", solver, Solver), ("conventions", conventions, Conventions))
    for name, value, accepted in (*choices, ("timesteps", timesteps or "exact", Timesteps)):
        if value not in get_args(accepted):
            raise InputError(f"{name} {value!r}: accepted are {', '.join(get_args(accepted))}; choose one of these")
    if not (isinstance(steps, int) and 1 <= steps <= NUM_TIMESTEPS):
        raise InputError(f"{steps} steps: accepted are whole numbers from 1 to {NUM_TIMESTEPS}; 50 is the default")
    if not (math.isfinite(shift) and shift > 0):
        raise InputError(f"shift {shift}: accepted are numbers above 0; use 16 for 720p, 3 for 480p")
