"""Two processes of four devices each: the same losses as one of eight, to the bit again after one was killed."""

import dataclasses
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny import DIT, PATIENCE, ROOT, TRAIN, environment, write_config

from sharding.distributed import Processes, initialize, read_processes
from wanjax.errors import InputError

STEPS = 9
ENDLESS = 10**9  # however late the test looks, the run goes on
T2V = dataclasses.replace(DIT, num_layers=1, in_channels=16, image_dim=None, image_positions=0)
CONFIG = dataclasses.replace(TRAIN, dit=T2V, width=48, frames=9, batch=2, warmup=5, save_every=3)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Runs:
    """Starts training runs that share compiled programs, and ends those that a failed test leaves behind."""

    def __init__(self, cache):
        self.cache = cache
        self.config = write_config(cache / "config.py", CONFIG)
        self.started = []

    def start(self, workdir, steps, processes, script=("train_jax.py",)):
        """The processes of a run."""
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        variables = environment(8 // processes, **cache)
        command = [sys.executable, *script, "--config", self.config, "--workdir", str(workdir)]
        command += ["--mesh", "fsdp=2,ring=2,ulysses=2", "--steps", str(steps)]
        if processes > 1:
            command += ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes), "--process-id"]
        commands = [[*command, str(i)] if processes > 1 else command for i in range(processes)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        run = [subprocess.Popen(c, cwd=ROOT, env=variables, **pipes) for c in commands]
        self.started += run
        return run

    def end(self):
        for process in self.started:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def silence():
    """Seconds after which a silent process is lost to those that are to lose one: ten, or many on a busy machine."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import jax"], check=True)
    return max(10, int(10 * (time.monotonic() - begun)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("cache"))
    yield runs
    runs.end()


def finish(run):
    """Outputs of a run that must end well."""
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in run]
    assert [process.returncode for process in run] == [0] * len(run), outputs
    return outputs


def losses(workdir):
    """By step, the exact float32."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line["loss"] for line in lines])


def await_steps(workdir, run, steps):
    """Until the run has written so many lines."""
    file, deadline = workdir / "metrics.jsonl", time.monotonic() + PATIENCE
    while not (file.exists() and file.read_text().count("\n") >= steps):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in run), [p.communicate()[0] for p in run if p.poll() is not None]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted_run(runs, tmp_path_factory):
    """Folder of a two-process run."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    outputs = finish(runs.start(workdir, STEPS, 2))
    assert f"step {STEPS} in" in outputs[0]
    assert f"step {STEPS} in" not in outputs[1]  # printed once
    return workdir


@pytest.fixture(scope="module")
def uninterrupted(uninterrupted_run):
    """Its losses."""
    return losses(uninterrupted_run)


def test_two_processes_equal_one(runs, uninterrupted, tmp_path):
    finish(runs.start(tmp_path, 5, 1))
    np.testing.assert_allclose(losses(tmp_path), uninterrupted[:5], rtol=1e-6, atol=0)


def test_what_two_processes_saved_goes_on_in_one(runs, uninterrupted_run, tmp_path):
    shutil.copytree(uninterrupted_run, tmp_path / "run")
    shutil.rmtree(tmp_path / f"run/checkpoints/{STEPS}")
    finish(runs.start(tmp_path / "run", STEPS, 1))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(uninterrupted_run), rtol=1e-6, atol=0)


# The same script; who is left of a run that lost a process need not wait a minute to be sure.
IMPATIENT = """
import functools, runpy
from sharding import distributed
distributed.initialize = functools.partial(distributed.initialize, heartbeat_seconds={})
runpy.run_path("train_jax.py", run_name="__main__")
"""


@pytest.mark.slow
def test_killed_and_restarted_continues_to_the_bit(runs, uninterrupted, silence, tmp_path):
    run = runs.start(tmp_path, ENDLESS, 2, ("-c", IMPATIENT.format(silence)))
    await_steps(tmp_path, run, 5)
    run[1].kill()
    output = run[0].communicate(timeout=PATIENCE)[0]
    assert run[0].returncode == 1
    assert output.splitlines()[-1].startswith("error: process 0 of 2 lost another one")
    assert "Traceback" not in output

    run = runs.start(tmp_path, ENDLESS, 2)
    await_steps(tmp_path, run, STEPS + 1)
    run[1].send_signal(signal.SIGTERM)  # one is told, both save and end well
    outputs = finish(run)
    assert "stopped by SIGTERM" in outputs[0]
    np.testing.assert_array_equal(losses(tmp_path)[:STEPS], uninterrupted)
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()]
    assert max(steps) == len(losses(tmp_path))


HANGS = """
import sys
from sharding.distributed import initialize, notice_lost_hosts

index = int(sys.argv[2])
initialize("127.0.0.1:" + sys.argv[1], 2, index, heartbeat_seconds=int(sys.argv[3]))
import jax
from jax.experimental.multihost_utils import sync_global_devices

with notice_lost_hosts():
    sync_global_devices("both are here")
    print("begun", flush=True)
    while True:
        sync_global_devices("again")
"""


@pytest.fixture(scope="module")
def hung(silence):
    """By which of two processes hangs, what became of the other: exit code and output. Both at once, to wait once.

    It is stopped, not ended: no connection breaks, and the other one would wait for ever.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pairs = []
    try:
        for _ in range(2):
            command = [sys.executable, "-c", HANGS, str(free_port())]
            pairs.append(
                [subprocess.Popen([*command, i, str(silence)], cwd=ROOT, env=environment(1), **pipes) for i in "01"]
            )
        for process in itertools.chain(*pairs):
            while "begun" not in process.stdout.readline():
                assert process.poll() is None
        for silent, pair in enumerate(pairs):
            pair[silent].send_signal(signal.SIGSTOP)
        left = [pair[1 - silent] for silent, pair in enumerate(pairs)]
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in left]
    finally:
        for process in itertools.chain(*pairs):
            process.kill()
            process.wait()
            process.stdout.close()
    return [(process.returncode, output) for process, output in zip(left, outputs, strict=True)]


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_hangs_is_told_in_one_line(hung, silent):
    code, output = hung[silent]
    assert code == 1
    assert output.splitlines()[-1].startswith(f"error: process {1 - silent} of 2 lost another one")
    assert "start all of them again" in output.splitlines()[-1]


def test_lost_arrays_are_named_in_one_line(runs, uninterrupted_run, tmp_path):
    shutil.copytree(uninterrupted_run, tmp_path / "run")
    for file in (tmp_path / "run/checkpoints").rglob("d/*"):
        file.unlink()
    (run,) = runs.start(tmp_path / "run", STEPS + 1, 1)
    output = run.communicate(timeout=PATIENCE)[0]
    assert run.returncode == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "cannot be read" in line


def test_processes_from_flags_and_environment(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert read_processes(None, None, None) is None
    assert read_processes("10.0.0.1:1234", 2, 0) == Processes("10.0.0.1:1234", 2, 0)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "[::1]:1234")
    assert read_processes(None, None, None) is None  # JAX reads it itself, beside a cluster
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert read_processes(None, None, None) == Processes("[::1]:1234", 4, 3)
    assert read_processes(None, None, 1) == Processes("[::1]:1234", 4, 1)
    with pytest.raises(InputError, match="--process-id 0"):
        read_processes(None, None, 4)


def test_an_address_alone_is_one_line(monkeypatch):
    def refuse(**_):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr("jax.distributed.initialize", refuse)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "here:1")
    with pytest.raises(InputError, match=r"JAX_COORDINATOR_ADDRESS here:1 alone \(Number of .*; set them, or unset it"):
        initialize()


def test_a_coordinator_that_does_not_answer():
    with pytest.raises(InputError, match="does not answer within 0 s"):
        initialize(f"127.0.0.1:{free_port()}", 2, 1, connect_seconds=0)
