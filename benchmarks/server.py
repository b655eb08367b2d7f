"""The server under clients and kills: what was accepted is done, once and whole.

    python benchmarks/server.py                                 # 50 requests by 8 clients, 3 times kill -9 in between
    python benchmarks/server.py --requests 8 --clients 2 --kills 1

Clients post, ask again where no answer comes, with the same Idempotency-Key, and wait for their video. Exit code 1
where a request is lost, done twice, or has half a video.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np

from wanjax import demo
from wanjax.conditioning.images import read_image

ROOT = Path(__file__).parents[1]
FIRST, LAST = demo.FOLDER / "first.png", demo.FOLDER / "last.png"
PROMPT = (demo.FOLDER / "caption.txt").read_text().strip()
PATIENCE = 1800
LONGEST_PAUSE = 3.0
"""Seconds from a video to the kill after it."""


@dataclasses.dataclass
class Outcome:
    """What became of a request."""

    id: str
    state: str
    digest: str = ""
    frames: int = 0
    psnr: float = 0.0


class Server:
    """The process, which may be killed and started again at the same address."""

    def __init__(self, folder: Path, script: str | None):
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            self.port = place.getsockname()[1]
        self.address, self.process = f"http://127.0.0.1:{self.port}", None
        self.command = [sys.executable, *([script] if script else ["-m", "wanjax", "serve"])]
        self.command += ["--port", str(self.port), "--data", str(folder)]
        self.start()

    def start(self) -> None:
        """At the same address, over the same folder."""
        self.process = subprocess.Popen(self.command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})

    def kill(self) -> None:
        """With -9."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def ask(client: httpx.Client, method: str, path: str, **request: Any) -> httpx.Response:
    """An answer; asked again as long as nobody answers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return client.request(method, path, **request)
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def one_client(address: str, numbers: range, outcomes: dict[int, Outcome]) -> None:
    """Post requests, one after the other waits for its video."""
    with httpx.Client(base_url=address, timeout=60) as client:
        for number in numbers:
            pictures = {"first_frame": FIRST.read_bytes(), "last_frame": LAST.read_bytes()}
            posted = ask(
                client, "POST", "/v1/videos", data={"prompt": PROMPT, "seed": str(number)}, files=pictures,
                headers={"Idempotency-Key": f"request {number}"},
            ).raise_for_status().json()  # fmt: skip
            outcomes[number] = outcome = Outcome(posted["id"], "queued")
            while outcome.state in ("queued", "in_progress"):
                time.sleep(0.2)
                outcome.state = ask(client, "GET", f"/v1/videos/{outcome.id}").raise_for_status().json()["status"]
            if outcome.state == "completed":
                look_at(ask(client, "GET", f"/v1/videos/{outcome.id}/content").raise_for_status().content, outcome)


def look_at(content: bytes, outcome: Outcome) -> None:
    """Frames of a video, and how well the worse of its ends shows its picture, dB."""
    outcome.digest = hashlib.sha256(content).hexdigest()
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(content)
        file.flush()
        with av.open(file.name) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    ends = ((frames[0], FIRST), (frames[-1], LAST))
    errors = [np.mean((a / 255 - np.asarray(read_image(b)) / 255) ** 2) for a, b in ends]
    outcome.frames, outcome.psnr = len(frames), float(-10 * np.log10(max(errors)))


def run(requests: int, clients: int, kills: int, folder: Path, script: str | None) -> tuple[dict[int, Outcome], Server]:
    """Everything: clients at work, and the server killed whenever another share of the videos is done."""
    server, outcomes, pauses = Server(folder, script), {}, random.Random(0)
    shares = [range(i, requests, clients) for i in range(clients)]
    threads = [threading.Thread(target=one_client, args=(server.address, share, outcomes)) for share in shares]
    for thread in threads:
        thread.start()
    for i in range(kills):
        wanted = requests * (i + 1) // (kills + 1)
        while sum(bool(x.digest) for x in outcomes.values()) < wanted and any(x.is_alive() for x in threads):
            time.sleep(0.05)
        time.sleep(pauses.uniform(0, LONGEST_PAUSE))  # so that it is hit in reading, in sampling or in writing
        server.kill()
        server.start()
    for thread in threads:
        thread.join()
    return outcomes, server


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("requests", 50), ("clients", 8), ("kills", 3)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"(default: {value})")
    parser.add_argument("--script", metavar="FILE", help="in place of wanjax serve; takes --port and --data as that")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        begun = time.monotonic()
        outcomes, server = run(args.requests, args.clients, args.kills, Path(place), args.script)
        seconds = time.monotonic() - begun
        server.kill()
        with sqlite3.connect(Path(place) / "jobs.sqlite") as db:
            rows = db.execute("SELECT id, state, runs, timings FROM jobs ORDER BY number").fetchall()
        digests = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(place).glob("*.mp4")}
        theirs = {*(f"jobs.sqlite{end}" for end in ("", "-shm", "-wal")), *(f"{row[0]}.mp4" for row in rows)}
        left = sorted({path.name for path in Path(place).iterdir()} - theirs)
    return report(args, outcomes, rows, digests, left, seconds)


def report(
    args: argparse.Namespace, outcomes: dict[int, Outcome], rows: list, digests: dict, left: list[str], seconds: float
) -> int:
    """Print the table; 1 where something is not as promised."""
    done = [x for x in outcomes.values() if x.state == "completed"]
    again = sum(row[2] - 1 for row in rows)
    # A job done twice would have another row for one key, or a video that is not the one that its client got.
    twice = len(rows) - len(outcomes) + sum(digests.get(x.id) != x.digest for x in done)
    begin = sorted(json.loads(row[3]).get("before denoising", 0.0) for row in rows)
    table = {
        "requests accepted": len(outcomes),
        "videos completed": len(done),
        "accepted and lost": len(outcomes) - len(done),
        "done twice": twice,
        "kills": args.kills,
        "begun again after a kill": again,
        "files left lying about": len(left),
        "whole videos (17 frames)": sum(x.frames == 17 for x in done),
        "worse end frame, least dB": round(min((x.psnr for x in done), default=0.0), 1),
        "seconds from begin of a job to its first step, median": begin[len(begin) // 2],
        "the same, 90th percentile": begin[len(begin) * 9 // 10],
        "seconds in all": round(seconds),
    }
    for name, value in table.items():
        print(f"| {name} | {value} |")
    if left:
        print(f"left lying about: {', '.join(left)}")
    is_well = len(done) == args.requests == table["whole videos (17 frames)"] and twice == 0 and again <= args.kills
    is_well = is_well and not left
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
