"""The loop on a network of one number: what it writes, what it measures, and what ends it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tensorboardX.proto.event_pb2 import Event
from tiny import PATIENCE, on

from wanjax.config import TrainConfig
from wanjax.data.batch import Batches
from wanjax.data.buckets import Order
from wanjax.training import loop
from wanjax.training.checkpoint import TrainCheckpoints
from wanjax.training.log import Log
from wanjax.training.objectives import Data, Objective
from wanjax.training.state import abstract_state, init_state

CONFIG = TrainConfig(batch=2, steps=6, warmup=0, learning_rate=0.1, save_every=2)


class Number(NamedTuple):
    value: np.ndarray


class Numbers:
    """Sample i is i; `bad` is none."""

    def __init__(self, bad=None):
        self.bad = bad

    def __getitem__(self, index):
        return Number(np.float32([np.nan if index == self.bad else index]))

    def name(self, index):
        return f"clip-{index}"


class Guess(nnx.Module):
    def __init__(self):
        self.guess = nnx.Param(jnp.zeros(1), axes=(None,))


class Guessing(Objective):
    """Learns the mean of all samples."""

    unit = "numbers"
    name = "a guess"

    def __init__(self, config=CONFIG):
        self.config = config

    def load(self):
        raise AssertionError("it starts from nothing")

    def open_data(self, config, encoders=None):
        return Data(Numbers())

    def networks(self, model):
        return {}

    def units(self, batch):
        return batch.value.size

    def make(self, rngs):
        return Guess()

    def prepare(self, batch, key):
        return batch

    def loss(self, model, batch):
        return jnp.mean((batch.value - model.guess[...]) ** 2)


class Validating:
    def __init__(self, function):
        self.function = function

    def compile(self, model):
        pass

    def __call__(self, step, model, log):
        return self.function(step, model, log)


@pytest.fixture
def mesh():
    with on() as mesh:
        yield mesh


def run(workdir, source, validation=None, **change):
    """A run, new or gone on with, and what it wrote."""
    config = dataclasses.replace(CONFIG, workdir=str(workdir), **change)
    objective = Guessing(config)
    checkpoints = TrainCheckpoints(workdir, config.keep)
    if checkpoints.latest is None:
        state, position = init_state(config, objective), 0
    else:
        state, position = checkpoints.restore(abstract_state(config, objective))
    try:
        batches = Batches(source, config.batch, position)
        state, finished = loop.train(config, objective, state, batches, checkpoints, validation)
    finally:
        checkpoints.close()
    return state, finished


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """Tags by step of all event files, in the order they were written."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, value.tag) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_every_step_is_written(mesh, tmp_path):
    def validate(step, model, log):
        log.show(step, "samples/picture", np.zeros((4, 6, 3), np.uint8))
        return {"validation/loss": float(model.guess[...][0])} if step == 4 else {}

    state, finished = run(tmp_path, Numbers(), Validating(validate), warmup=2)
    assert finished
    assert int(state.step) == 6
    written = lines(tmp_path)
    names = {"step", "loss", "grad_norm", "learning_rate", "seconds", "numbers_per_second", "tflops", "data_wait"}
    assert [line["step"] for line in written] == list(range(1, 7))
    assert all(set(line) - {"validation/loss"} == names for line in written)
    assert [line["step"] for line in written if "validation/loss" in line] == [4]
    assert written[3]["validation/loss"] == pytest.approx(0.25, abs=0.01)  # Adam's steps are of the rate
    assert [line["learning_rate"] for line in written] == pytest.approx([0, 0.05, 0.1, 0.1, 0.1, 0.1])
    assert written[0]["loss"] == 0.5  # of 0 and 1
    assert all(0 <= line["data_wait"] <= 1 for line in written)
    found = events(tmp_path)
    assert {(6, "train/loss"), (6, "train/data_wait"), (4, "validation/loss"), (1, "samples/picture")} <= set(found)


class Lengths(Numbers):
    """Batches of two lengths; those of the second are few."""

    def __init__(self):
        super().__init__()
        self.order = Order({(1, 1, 1): np.arange(10), (2, 1, 1): np.arange(10, 12)}, CONFIG.batch)

    def __getitem__(self, index):
        return Number(np.zeros(self.order.shape(index // CONFIG.batch)[0], np.float32))


def test_every_shape_is_compiled_before_the_first_step(mesh, tmp_path):
    compiled, stepped = [], []

    def note(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(len(stepped))

    source = Lengths()
    lengths = {source[i * CONFIG.batch].value.size for i in range(CONFIG.steps)}
    assert lengths == {1, 2}
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        validating = Validating(lambda step, model, log: stepped.append(step) or {})
        run(tmp_path, source, validating)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert 0 in compiled  # the listener hears
    assert not [step for step in compiled if 0 < step < CONFIG.steps]


def test_a_step_that_is_not_finite_names_its_clips(mesh, tmp_path):
    """The third batch of two; those behind it are made before it is known."""
    with pytest.raises(loop.NonFiniteError) as error:
        run(tmp_path, Numbers(bad=5))
    assert str(error.value).endswith("the clips of this step: clip-4, clip-5")
    assert str(error.value).startswith("step 3: loss nan")
    assert "the checkpoint of step 2 is whole" in str(error.value)
    assert "\n" not in str(error.value)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()) == ["2"]


def test_sigterm_saves_and_the_run_goes_on(mesh, tmp_path):
    def stop(step, model, log):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    whole, _ = run(tmp_path / "whole", Numbers())
    state, finished = run(tmp_path / "parts", Numbers(), Validating(stop))
    assert not finished
    assert int(state.step) == 3
    state, finished = run(tmp_path / "parts", Numbers())
    assert finished
    np.testing.assert_array_equal(state.model.guess[...], whole.model.guess[...])
    assert [x["loss"] for x in lines(tmp_path / "parts")] == [x["loss"] for x in lines(tmp_path / "whole")]


def test_sigterm_is_noticed_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with loop.stop_requested() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2)
    assert signal.getsignal(signal.SIGTERM) == before


def test_metrics_are_exact_and_lose_what_was_lost(tmp_path):
    values = np.random.default_rng(0).standard_normal(3).astype(np.float32)
    with Log(tmp_path, 0) as log:
        for i, x in enumerate(values):
            log.write(i + 1, {"loss": x})
    assert events(tmp_path) == [(i, "train/loss") for i in (1, 2, 3)]
    with log.path.open("a") as f:
        f.write('{"step": 4, "lo')  # killed here
    with Log(tmp_path, 2):
        pass
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert [np.float32(line["loss"]) for line in lines(tmp_path)] == list(values[:2])


def test_data_wait_is_what_the_devices_wait(mesh, monkeypatch):
    clock, watched = types.SimpleNamespace(now=10.0), threading.Event()

    def perf_counter():
        now = clock.now
        if threading.current_thread() is not threading.main_thread():
            watched.set()  # the meter's own thread has seen the devices done
        return now

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=perf_counter))
    batch = Number(jnp.zeros((2, 1)))
    with loop.Meter(Guessing()) as meter:
        for computed, fetched, waited in ((2.0, 1.0, 0.0), (1.0, 4.0, 0.75)):
            clock.now = start = 10.0
            meter.start(batch)
            events = {computed: "done", fetched: "fetched"}
            for moment in sorted(events):
                clock.now = start + moment
                if events[moment] == "done":
                    meter.computing(jnp.zeros(()))
                    assert watched.wait(PATIENCE)
                    watched.clear()
                else:
                    meter.fetched()
            measured = meter.stop()
            assert measured["data_wait"] == waited
            assert measured["seconds"] == max(computed, fetched)
            assert measured["numbers_per_second"] == 2 / max(computed, fetched)
    assert str(meter) == "4.00 s/step, 0 numbers/s, 0 TFLOP/s, 75% data wait"


INTERRUPTED_TWICE = """
import signal, threading, time
from wanjax.cli import exit_codes
ready, swallowed = threading.Event(), threading.Event()
def press():
    for event in (ready, swallowed):  # not both at once: signals that wait for Python are one
        event.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # os.kill may choose another thread
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background command has ignored
threading.Thread(target=press, daemon=True).start()
with exit_codes():
    try:
        ready.set()
        while True:
            time.sleep(0.01)  # a signal just before a wait without end would be seen after it
    except KeyboardInterrupt:  # somebody swallows it
        swallowed.set()
    while True:
        time.sleep(0.01)
"""


def test_a_second_interrupt_ends_whatever_became_of_the_first():
    ran = subprocess.run([sys.executable, "-c", INTERRUPTED_TWICE], capture_output=True, timeout=PATIENCE, check=False)
    assert ran.returncode == 130
    assert ran.stderr == b""


def test_ctrl_c_saves_as_sigterm_does():
    before = signal.getsignal(signal.SIGINT)
    with loop.stop_requested() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(2)
    assert signal.getsignal(signal.SIGINT) == before
