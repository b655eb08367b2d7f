"""The loop around the step: what is measured, written, saved, and what ends it."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from sharding.distributed import is_main
from sharding.stalls import tick
from wanjax.cli import second_interrupt_ends
from wanjax.config import TrainConfig
from wanjax.data.batch import Batches
from wanjax.training import speed
from wanjax.training.ahead import compile_ahead
from wanjax.training.checkpoint import TrainCheckpoints
from wanjax.training.log import Log
from wanjax.training.state import TrainState
from wanjax.training.step import Metrics, make_step
from wanjax.training.trackers import Trackers
from wanjax.training.validation import Validation

if TYPE_CHECKING:
    from wanjax.training.objectives.base import Objective


class NonFiniteError(RuntimeError):
    """Loss or gradients of a step were infinite or not a number; one line, as `InputError`'s."""


def train(
    config: TrainConfig,
    objective: Objective,
    state: TrainState,
    batches: Batches,
    checkpoints: TrainCheckpoints,
    validation: Validation | None = None,
) -> tuple[TrainState, bool]:
    """Train until the last step, SIGTERM or Ctrl-C: the state, which is on disk then, and whether it was the last step.

    Args:
      config, objective, checkpoints: of the run.
      state, batches: to go on from, at the same position; the state's memory is reused.
      validation: on held-out clips, from time to time; None: never.

    Raises:
      NonFiniteError: loss or gradients are not finite; checkpoints stay as they were.
    """
    step, position = int(state.step), batches.position
    steps = {name: make_step(turn) for name, turn in objective.turns().items()}
    meter, log = Meter(objective), Log(Path(config.workdir or "."), step, Trackers(config) if is_main() else None)
    if step < config.steps:  # before SIGTERM is listened to: there is nothing to save yet
        compile_ahead(steps.values(), state, batches, meter)
        if validation is not None:
            validation.compile(objective.eval_model(state))
    bar = tqdm(total=config.steps, initial=step, unit="step", dynamic_ncols=True, disable=not is_main())
    with bar, log, meter, stop_requested() as stop:
        if step == 0 and validation is not None and config.validate_first:
            log.write(0, validation(0, objective.eval_model(state), log))
        coming = itertools.islice(batches, max(config.steps - step, 0))
        batch = next(coming, None)
        while step < config.steps and not stop(step):
            train_step = steps[objective.turn(step)]
            position, step = batches.position, step + 1  # before the next batch is made
            state, values, measured, batch = _measured_step(train_step, meter, state, batch, coming)
            if not values.finite:
                raise NonFiniteError(_non_finite(step, values, checkpoints.latest, batches.names(position - 1)))
            bar.set_postfix_str(f"loss {values.loss:.4f}, {meter}")
            bar.update()
            measured |= validation(step, objective.eval_model(state), log) if validation else {}
            parts = {name: x for name, x in (values.parts or {}).items() if x == x}  # nan is not equal to itself
            log.write(step, {"loss": values.loss, "grad_norm": values.grad_norm} | parts | measured)
            if step % config.save_every == 0:
                checkpoints.save(state, position)
        checkpoints.save(state, position)
        checkpoints.wait()
    return state, step >= config.steps


def _measured_step(
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    meter: Meter,
    state: TrainState,
    batch: Any,
    coming: Iterator[Any],
) -> tuple[TrainState, Any, dict[str, float], Any]:
    """A step on `batch`: state, metrics on the host, what was measured, and the next of the coming batches, if any."""
    tick()
    meter.start(batch)
    state, metrics = train_step(state, batch)
    meter.computing(metrics)
    batch = next(coming, None)  # while the devices compute
    meter.fetched()
    values = jax.device_get(metrics)
    return state, values, meter.stop(), batch


def _non_finite(step: int, values: Any, saved: int | None, names: list[str]) -> str:
    kept = f"the checkpoint of step {saved} is whole" if saved is not None else "there is no checkpoint yet"
    return (
        f"step {step}: loss {values.loss}, gradient norm {values.grad_norm}; both must be finite; {kept}: "
        f"lower the learning rate, or look at the clips of this step: {', '.join(names)}"
    )


class Meter:
    """Times the steps; a context manager. `str()` of it is the last step in words.

    A step waits for data from when the devices have done it until the next batch is there. That the loop itself waits
    for a batch while they compute costs nothing.
    """

    def __init__(self, objective: Objective):
        self.objective = objective
        self.peak = speed.peak(jax.devices()[0].device_kind)
        self._operations: dict[Any, int] = {}  # by the batch's shapes, of which there are a few
        self._watcher = ThreadPoolExecutor(1)
        self._text = ""

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self._watcher.shutdown()

    def __str__(self) -> str:
        return self._text

    def start(self, batch: Any) -> None:
        """A step on this batch begins."""
        self._units, self._now = self.objective.units(batch), self.operations(batch)
        self._start = time.perf_counter()

    def operations(self, batch: Any) -> int:
        """Of a step on a batch of these shapes; counted once."""
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in self._operations:
            self._operations[shapes] = self.objective.step_operations(batch)
        return self._operations[shapes]

    def computing(self, metrics: Metrics) -> None:
        """The step has been given to the devices."""
        self._done = self._watcher.submit(lambda: (jax.block_until_ready(metrics), time.perf_counter())[1])

    def fetched(self) -> None:
        """The next batch is there."""
        self._fetched = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """The step is over; what was measured, by name."""
        done = self._done.result()
        seconds = max(done, self._fetched) - self._start
        rate, waited = self._units / seconds, max(0.0, self._fetched - done) / seconds
        flops = self._now / seconds
        measured = {
            "seconds": seconds,
            f"{self.objective.unit}_per_second": rate,
            "tflops": flops / 1e12,
            "data_wait": waited,
        }
        share = f"{flops / 1e12:.3g} TFLOP/s"
        if self.peak is not None:
            measured["utilisation"] = flops / (self.peak * jax.device_count())
            share = f"{100 * measured['utilisation']:.1f}% MFU"
        self._text = (
            f"{seconds:.2f} s/step, {rate:,.0f} {self.objective.unit}/s, {share}, {100 * waited:.0f}% data wait"
        )
        return measured


@contextmanager
def stop_requested() -> Iterator[Any]:
    """Gives a function of the step: whether to stop, the same answer on every process for the same step.

    SIGTERM and Ctrl-C ask for it; a second Ctrl-C ends the process at once, whatever it is waiting for.
    """
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        came.append(number)
        if number == signal.SIGINT and several:  # JAX listens for the other signal, and tells the other processes
            os.kill(os.getpid(), signal.SIGTERM)
        if number == signal.SIGINT:
            os.write(2, b"\nsaving after this step; once more ends at once\n")

    several = jax.process_count() > 1
    signals = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in signals}
    try:
        with second_interrupt_ends():
            yield multihost_utils.reached_preemption_sync_point if several else lambda step: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
