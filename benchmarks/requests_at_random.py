"""Random requests against the server's own OpenAPI page, by schemathesis: none may be answered with 5xx.

    python benchmarks/requests_at_random.py [--examples 200]

Needs schemathesis, which `make server` installs; without it a line says so. The server is `wanjax serve` with the demo
model, in this process; what it accepts is cancelled at once. Exit code 1 where an answer is 5xx, or is none that the
page names.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import uvicorn
from hypothesis import HealthCheck, Phase, strategies

from wanjax import demo
from wanjax.commands.serve import make_server
from wanjax.config.serving import ServeConfig
from wanjax.sampling.pipeline import Pipeline
from wanjax.serving.jobs import Jobs
from wanjax.serving.worker import CancelledError, Worker

try:
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )
except ImportError:
    print("NOT run: schemathesis is not installed; `make server` installs it")
    sys.exit(0)

NOT_HERE = ("preset", "size", "lora", "extend_prompt", "model", "initial_noise", "cache", "cfg_cache")
"""What a request of the demo rarely gets right by chance."""
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


class Refusing(Worker):
    """Ends every job at once: here it is requests that are looked at."""

    def prepare(self) -> None:
        """Nothing."""

    def compute(self, job: Any, pictures: Any) -> Any:
        """Nothing."""
        self._cancelled[job.id] = 0
        raise CancelledError


@contextlib.contextmanager
def serving(folder: str) -> Iterator[str]:
    """The server's address while the block runs."""
    jobs, config = Jobs(folder), demo.get_config()
    app = make_server(ServeConfig(), config, Refusing(Pipeline(config, keep="one"), jobs)).app
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([place],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
    jobs.close()


def tried(found: Any, settings: Any, statuses: collections.Counter, address: str) -> str:
    """What is wrong with the answers of one path and method; nothing, if nothing is."""
    operation = found.ok()

    @settings
    @hypothesis.given(case=operation.as_strategy(), kept=strategies.integers(-1, 2))
    def check(case: Any, kept: int) -> None:
        if kept >= 0:
            mend(case, address, kept)
        response = case.call()
        statuses[operation.label, response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    try:
        check()
    except Exception as error:  # what one path gets wrong does not hide the next one's
        within = getattr(error, "exceptions", ())
        return "\n  ".join(str(x) for x in (f"{operation.label}: {error}", *within))
    return ""


def mend(case: Any, address: str, kept: int) -> None:
    """Put in what chance does not find: a picture beside so many settings, and the id of a job."""
    if isinstance(case.body, dict) and case.media_type == "application/json":
        url = f"data:image/png;base64,{base64.b64encode((demo.FOLDER / 'first.png').read_bytes()).decode()}"
        case.body = dict([x for x in case.body.items() if x[0] not in NOT_HERE][:kept])
        case.body["frame_images"] = [{"type": "image_url", "image_url": {"url": url}, "frame_type": "first_frame"}]
    if "id" in (case.path_parameters or {}):
        found = httpx.get(f"{address}/v1/videos?limit=1").json()["data"]
        case.path_parameters["id"] = found[0]["id"] if found else "none"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--examples", type=int, default=200, metavar="N", help="for each path and method (default: 200)"
    )
    examples = parser.parse_args().examples
    statuses: collections.Counter[tuple[str, int]] = collections.Counter()
    settings = hypothesis.settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=SLOW, phases=(Phase.explicit, Phase.generate),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, serving(folder) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        failures = [failure for x in schema.get_all_operations() if (failure := tried(x, settings, statuses, address))]
    for (label, status), count in sorted(statuses.items()):
        print(f"| {label} | {status} | {count} |")
    print("\n".join(failures) or "no answer of 5xx, none that the page does not name")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
