"""Many hosts, one program: how the processes of a run find each other, and what they do when one is lost.

Every process runs the same script. On TPU pods, under Slurm and under MPI that is all: JAX asks the cluster. Elsewhere
each is told where process 0 listens, how many there are and which it is, by flags or by the environment variables
`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from sharding.stalls import Stalls
from wanjax.errors import InputError, one_line

CONNECT_SECONDS = 300
"""How long the processes wait for each other at the start."""
HEARTBEAT_SECONDS = 60
"""A process that is silent for so long is lost, and JAX ends the others."""
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
"""In what JAX raises when a process is gone in the middle of a collective."""

POLL_SECONDS = 0.5
"""How often a process looks whether another one has failed."""
TELL_SECONDS = 5
"""How long a process that fails waits for the others to have read why."""
MOST_TEXT = 2**16
STALL_SECONDS = 600
"""How long a process that lives may be behind the others without coming on."""
FAILED, READ, SETTINGS = "wanjax/failed/", "wanjax/read/", "wanjax/settings/"

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
    are_counts = all(x.isdecimal() and len(x) < 10 for x in (port, total, which))
    if not (are_counts and int(which) < int(total)):
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
    try:
        jax.distributed.initialize(*place, **settings)
    except RuntimeError as error:
        raise InputError(
            f"not all of {place.processes} processes joined within {connect_seconds} s ({one_line(error)[:200]}); "
            f"{ADVICE}"
        ) from error
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


# ---- all end together


@contextlib.contextmanager
def ending_together(stall_seconds: float = STALL_SECONDS) -> Iterator[None]:
    """While the block runs, a failure of one process ends all of them within seconds, each with its reason.

    A process that fails says why where all can read it; in each, a thread looks for that, as the main thread may be
    waiting for the one that failed. Alone, a process just fails.

    Args:
      stall_seconds: after which a process fails that lives, but is behind the others and stands still, see
        `sharding.stalls`.
    """
    if jax.process_count() == 1:
        yield
        return
    done = threading.Event()
    arguments = (service(), done, Stalls(service(), jax.process_index(), stall_seconds))
    watcher = threading.Thread(target=_watch, args=arguments, daemon=True, name="other processes")
    watcher.start()
    try:
        yield
    except Exception as error:
        done.set()
        watcher.join(POLL_SECONDS + 1)
        if not isinstance(error, InputError | OSError) and (found := _failures(service())):  # it follows from that
            _end_with(service(), *found)
        _tell(error)
        code = 2 if isinstance(error, InputError | OSError) else 1
        print(f"error: process {jax.process_index()}: {one_line(error)}", file=sys.stderr)
        exit_immediately(code)
    finally:
        done.set()


def fail_together(error: Exception, coordinator: str | None, count: int | None, index: int | None) -> None:
    """Tell the other processes of a failure before this one joined them: it joins, and says why it goes.

    Args:
      error: why.
      coordinator, count, index: as `initialize` takes them; where they say nothing, nobody can be told.
    """
    with contextlib.suppress(Exception):  # the failure itself is what the user is to read
        place = read_processes(coordinator, count, index)
        if place is not None and place.processes > 1:
            initialize(*place, connect_seconds=TELL_SECONDS)
            _tell(error)
            print(f"error: process {jax.process_index()}: {one_line(error)}", file=sys.stderr)
            exit_immediately(2)  # the usual way out would wait for the others


def check_same(**settings: Any) -> None:
    """Whether all processes were started with the same settings and the same code.

    Args:
      settings: by name; their `repr` is compared.

    Raises:
      InputError: one differs from process 0's.
    """
    if jax.process_count() == 1:
        return
    client, mine = service(), {name: repr(value) for name, value in settings.items()}
    client.key_value_set(f"{SETTINGS}{jax.process_index()}", json.dumps(mine))
    first = json.loads(client.blocking_key_value_get(f"{SETTINGS}0", 1000 * CONNECT_SECONDS))
    for index in range(1, jax.process_count()):
        other = json.loads(client.blocking_key_value_get(f"{SETTINGS}{index}", 1000 * CONNECT_SECONDS))
        names = [name for name in first if first[name] != other.get(name)]
        if names:
            name = names[0]
            raise InputError(
                f"process {index} has {name} {_short(other.get(name))}, process 0 has {_short(first[name])}; the same "
                "command, configuration and version on all are needed; start all of them with the same"
            )


def _short(text: object) -> str:
    return str(text) if len(str(text)) < 200 else f"{str(text)[:200]}.."


def same_text(text: str) -> str:
    """The first process's text, on all; up to `MOST_TEXT` bytes of UTF-8. All call it at the same point."""
    if jax.process_count() == 1:
        return text
    data = text.encode()[:MOST_TEXT]
    padded = np.zeros(MOST_TEXT, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode(errors="ignore")


def service() -> Any:
    """The client of the service by which JAX's processes find each other: it keeps names and values for all."""
    from jax._src import distributed

    return distributed.global_state.client


def _watch(client: Any, done: threading.Event, stalls: Stalls) -> None:
    """Ends this process when another one has said that it failed, or stands still."""
    while not done.wait(POLL_SECONDS):
        try:
            if stall := stalls.look():
                client.key_value_set(f"{FAILED}{stall.process}", f"{stall.line}; {ADVICE}", allow_overwrite=True)
            found = client.key_value_dir_get(FAILED)
        except Exception:  # the service is gone: JAX says that itself
            return
        if found and not done.is_set():
            _end_with(client, *min(found))


def _failures(client: Any) -> tuple[str, str] | None:
    """Name and line of a process that has said that it failed."""
    with contextlib.suppress(Exception):
        return min(client.key_value_dir_get(FAILED), default=None)
    return None


def _end_with(client: Any, name: str, line: str) -> NoReturn:
    """End this process for the failure of another."""
    _leave(client)
    line = f"error: process {name.rpartition('/')[2]}: {line}; all processes end with it"
    print(f"\n{line}", file=sys.stderr)  # the last line, and not behind half of one: the work goes on until now
    exit_immediately(2)


def _tell(error: Exception) -> None:
    """Say why this process fails, and wait until the others have read it."""
    client = service()
    with contextlib.suppress(Exception):
        client.key_value_set(f"{FAILED}{jax.process_index()}", one_line(error))
        if jax.process_index():
            _await_others(client)
        _leave(client)


def _leave(client: Any) -> None:
    """Say that this process ends. The first one is the last: with it the service goes, and what others say of that."""
    with contextlib.suppress(Exception):
        client.key_value_set(f"{READ}{jax.process_index()}", "")
        if jax.process_index() == 0:
            _await_others(client)
            time.sleep(POLL_SECONDS)


def _await_others(client: Any) -> None:
    """Until all other processes end too, or have had the time to."""
    deadline = time.monotonic() + TELL_SECONDS
    while time.monotonic() < deadline:
        left = {name.rpartition("/")[2] for name, _ in client.key_value_dir_get(READ)} - {str(jax.process_index())}
        if len(left) == jax.process_count() - 1:
            return
        time.sleep(0.1)


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
            address = os.environ.get("JAX_COORDINATOR_ADDRESS")
            if address is None:
                raise
            raise InputError(
                f"JAX_COORDINATOR_ADDRESS {address} alone ({one_line(error)}); with JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID, or in a cluster that says these, it is accepted; set them, or unset it"
            ) from error
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
