"""Jobs of a server outlive it: restarts, kills, several hosts."""

import contextlib
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from server_clients import FILES, ORDER, over, until
from tiny import PATIENCE, ROOT, environment

from wanjax.errors import InputError
from wanjax.serving.jobs import MOST_RUNS, FullError, Jobs


def test_what_ran_at_a_kill(tmp_path):
    """With its video it is completed, without it waits again, after so many kills it is left alone."""
    jobs = Jobs(tmp_path)
    ids = [jobs.add(ORDER)[0].id for _ in range(3)]
    assert [jobs.take().id for _ in range(2)] == ids[:2]
    jobs.video(ids[0]).write_bytes(b"whole")
    jobs.video("video_unknown").write_bytes(b"deleted, but for the file")
    for run in range(1, MOST_RUNS + 1):
        jobs.close()
        jobs = Jobs(tmp_path)
        assert jobs.get(ids[0]).state == "completed"
        assert jobs.get(ids[1]).state == ("queued" if run < MOST_RUNS else "failed")
        assert jobs.pictures(ids[2]) == ORDER.pictures
        if run < MOST_RUNS:
            assert jobs.take().id == ids[1]
    assert jobs.get(ids[2]).state == "queued"
    assert not jobs.video("video_unknown").exists()
    jobs.close()


def test_a_full_queue_and_a_file_that_is_none(tmp_path):
    jobs = Jobs(tmp_path, most_waiting=1)
    jobs.add(ORDER)
    with pytest.raises(FullError):
        jobs.add(ORDER)
    jobs.close()
    (tmp_path / "jobs.sqlite").write_bytes(b"not SQLite's" * 100)
    with pytest.raises(InputError, match="cannot be read"):
        Jobs(tmp_path)


def test_kills_lose_nothing_and_do_nothing_twice(tmp_path):
    """The benchmark in small: clients, and kill -9 in between."""
    command = [sys.executable, "benchmarks/server.py", "--script", "tests/tiny_server.py"]
    command += ["--requests", "8", "--clients", "3", "--kills", "2"]
    run = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "| videos completed | 8 |" in run.stdout


def wait_in_vain(port):
    """A client whose connection is open when the server is told to end."""
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(f"http://127.0.0.1:{port}/v1/videos/sync", files=FILES, timeout=PATIENCE)


def test_two_hosts_compute_each_job(tmp_path):
    """The first one serves, both compute, and both end when it is told to."""
    (tmp_path / "seen").mkdir()
    ports = []
    for _ in range(2):
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            ports.append(place.getsockname()[1])
    variables = environment(1, SEEN=str(tmp_path / "seen"), JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{ports[0]}")
    command = [sys.executable, "tests/tiny_server.py", "--port", str(ports[1]), "--data", str(tmp_path / "data")]
    command += ["--mesh", "ulysses=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=variables | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}, **pipes
        )
        for i in range(2)
    ]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{ports[1]}", timeout=PATIENCE) as client:
            while processes[0].poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                time.sleep(0.2)
            for seed in ("1", "2"):
                client.post("/v1/videos/sync", data={"seed": seed}, files=FILES).raise_for_status()
            id = client.post("/v1/videos", data={"steps": "100"}, files=FILES).json()["id"]
            until(client, id, lambda job: job["step"])
            client.delete(f"/v1/videos/{id}")
            assert over(client, id)["status"] == "cancelled"
            client.post("/v1/videos/sync", data={"seed": "3"}, files=FILES).raise_for_status()
            id = client.post("/v1/videos", data={"steps": "100"}, files=FILES).json()["id"]
            until(client, id, lambda job: job["step"])
            waiting = threading.Thread(target=wait_in_vain, args=(ports[1],))
            waiting.start()
            until(client, id, lambda _: len(client.get("/v1/videos").json()["data"]) == 6)
        processes[0].terminate()
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[1].returncode == 0, outputs
    waiting.join()
    jobs = Jobs(tmp_path / "data")
    assert jobs.get(id).state == "queued"  # put back: it ran when the server was told to end
    jobs.close()
    seen = {path.name for path in (tmp_path / "seen").iterdir()}
    assert seen == {f"{process}-{seed}" for process in (0, 1) for seed in (1, 2, 3)}
