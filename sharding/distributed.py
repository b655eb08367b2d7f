"""Many hosts, one program: how the processes of a run find each other, and what they do when one is lost.

Every process runs the same script. On TPU pods, under Slurm and under MPI that is all: JAX asks the cluster. Elsewhere
each is told where process 0 listens, how many there are and which it is, by flags or by the environment variables
`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import jax

from wanjax.errors import InputError

CONNECT_SECONDS = 300
"""How long the processes wait for each other at the start."""
HEARTBEAT_SECONDS = 60
"""A process that is silent for so long is lost, and JAX ends the others."""
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
"""In what JAX raises when a process is gone in the middle of a collective."""

ADVICE = (
    "all are needed; start all of them again with the same command, and a training run goes on from its newest "
    "checkpoint"
)


class Processes(NamedTuple):
    """Where process 0 listens (host:port), how many processes there are, and which this is."""

    coordinator: str
    processes: int
    process_id: int


def read_processes(coordinator: str | None, count: int | None, index: int | None) -> Processes | None:
    """What flags say, or else environment variables; None if neither says anything.

    Raises:
      InputError: part of it is missing or out of range.
    """
    given = {
        "--coordinator": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None,
        "--processes": os.environ.get("JAX_NUM_PROCESSES") if count is None else count,
        "--process-id": os.environ.get("JAX_PROCESS_ID") if index is None else index,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if given["--coordinator"] is not None and len(missing) == 2 and coordinator is None:
        return None  # the address alone in the environment is JAX's own way to correct what a cluster says
    accepted = (
        "--coordinator HOST:PORT --processes N --process-id 0..N-1 are accepted, or the variables "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    )
    if missing:
        named = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        raise InputError(f"{named} without {', '.join(missing)}; {accepted}; give all three or none")
    address, total, which = (str(value) for value in given.values())
    _, _, port = address.rpartition(":")
    if not (port.isdecimal() and total.isdecimal() and which.isdecimal() and int(which) < int(total)):
        raise InputError(
            f"--coordinator {address} --processes {total} --process-id {which}; {accepted}; "
            "for example --coordinator 10.0.0.1:1234 --processes 2 --process-id 0"
        )
    return Processes(address, int(total), int(which))


def initialize(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    connect_seconds: int = CONNECT_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    saves_on_sigterm: bool = True,
) -> None:
    """Join the run's other processes. Once, before JAX is asked for devices; alone, it does nothing.

    Args:
      coordinator, count, index: see `read_processes`.
      connect_seconds: how long to wait for the others.
      heartbeat_seconds: after so long in silence a process is lost.
      saves_on_sigterm: leave the signal to JAX, which agrees with the other processes on a step to stop at.

    Raises:
      InputError: see `read_processes`; or process 0 does not answer.
    """
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", saves_on_sigterm)
    settings: Any = {"initialization_timeout": connect_seconds, "heartbeat_timeout_seconds": heartbeat_seconds}
    place = read_processes(coordinator, count, index)
    if place is None:
        if _join_cluster(settings):
            _install_abort_message(heartbeat_seconds)
        return
    if place.processes == 1:
        return
    if place.process_id:
        _await_coordinator(place.coordinator, connect_seconds)
    jax.distributed.initialize(*place, **settings)
    _install_abort_message(heartbeat_seconds)


class LostHostError(RuntimeError):
    """Another process of the run is gone; one line, as `InputError`'s."""


@contextlib.contextmanager
def notice_lost_hosts() -> Iterator[None]:
    """Says in one line that a collective failed because another process is gone.

    Where a collective would wait for it instead, JAX ends this process after `HEARTBEAT_SECONDS`, with the line of
    `_install_abort_message`.

    Raises:
      LostHostError: in place of what JAX raises then.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not any(sign in str(error) for sign in LOST):
            raise
        reason = " ".join(str(error).split())[:160]
        raise LostHostError(
            f"process {jax.process_index()} of {jax.process_count()} lost another one ({reason}); {ADVICE}"
        ) from error


def exit_immediately(code: int) -> NoReturn:
    """End this process at once: the usual way out waits for the others, of which one is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_main() -> bool:
    """Whether this is the process that prints and writes what is printed and written once."""
    return jax.process_index() == 0


def _join_cluster(settings: dict[str, Any]) -> bool:
    """Join the processes that a cluster manager knows of; False if there is none, and this process works alone."""
    try:
        jax.distributed.initialize(**settings)
    except ValueError as error:  # JAX found no cluster, and says so by the first thing it misses
        if "coordinator_address should be defined" not in str(error):
            raise
    except RuntimeError as error:  # devices are in use: one process has begun to work, and others cannot join it
        if "must be called before" not in str(error):
            raise
    else:
        return True
    return False


def _install_abort_message(heartbeat_seconds: int) -> None:
    """End with one line and exit code 1 where JAX would end this process by SIGABRT.

    That happens in C++, in a thread that only waits for bad news, while Python waits for a collective: neither an
    exception nor a handler of Python's would be run any more.
    """
    if jax.process_count() == 1:
        return
    line = (
        f"error: process {jax.process_index()} of {jax.process_count()} lost another one, which is gone or silent for "
        f"{heartbeat_seconds} s; {ADVICE}\n"
    ).encode()

    def end(_: int) -> None:
        os.write(2, line)
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(handler))  # for as long as the process lives
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


def _await_coordinator(address: str, seconds: int) -> None:
    """Until process 0 listens; JAX would end the process with a stack trace in C++ if it never did."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"--coordinator {address} does not answer within {seconds} s ({error}); the address of process 0 "
                    "is needed; start that process, or correct the address"
                ) from error
            time.sleep(0.2)
