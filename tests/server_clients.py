"""What tests of the server ask it for, and how they wait."""

import time

from tiny import PATIENCE

from wanjax import demo
from wanjax.serving.jobs import Order

FIRST, LAST = ((demo.FOLDER / f"{name}.png").read_bytes() for name in ("first", "last"))
FILES = {"first_frame": FIRST, "last_frame": LAST}
ORDER = Order({"prompt": "x", "fps": 16, "height": 64, "width": 64, "frames": 17}, (("first", FIRST),))


def over(client, id):
    """The job when it is over."""
    return until(client, id, lambda job: job["status"] in ("completed", "failed", "cancelled"))


def until(client, id, is_so):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        job = client.get(f"/v1/videos/{id}").json()
        if is_so(job):
            return job
        time.sleep(0.02)
    raise AssertionError(job)
