"""A server of videos: `/v1/videos`, with a queue that survives restarts.

    wanjax serve                                                              # the small demo model
    wanjax serve --config configs/flf2v_14b_720p.py --checkpoint Wan2.1-FLF2V-14B-720P-diffusers --warm 720p,480p
    curl -F prompt="..." -F first_frame=@a.png -F last_frame=@b.png http://localhost:8000/v1/videos

With WANJAX_API_KEY set, requests must bring it as `Authorization: Bearer`. Sampling flags are defaults of requests.
On several hosts run it on each, as wanjax sample: the first one serves, all compute. docs/server.md tells more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from wanjax import demo
from wanjax.cli import Parser, add_settings, flag_fields, given_settings, printable
from wanjax.config import SampleConfig, load_config
from wanjax.config.serving import ServeConfig
from wanjax.errors import InputError
from wanjax.untrusted import reason

if TYPE_CHECKING:
    from wanjax.serving.api import Server
    from wanjax.serving.worker import Worker

REQUESTS_OWN = (
    *("first_frame", "last_frame", "keyframe", "continue_", "prompt"),
    *("output", "save_latents", "initial_noise", "preview"),
)
"""Fields of `SampleConfig` that only requests have, or none."""
CLOSE_SECONDS = 3
"""How long open connections may go on when the server is told to end: a page that is open has one all the time."""
NAMES = tuple(field.name for field in flag_fields(SampleConfig) if field.name not in REQUESTS_OWN)


def make_parser(name: str = "wanjax serve", description: str | None = __doc__) -> Parser:
    """The command's flags."""
    parser = Parser(name, description=description)
    parser.add_argument(
        "--config", type=printable, metavar="FILE", help="configs/*.py with get_config() -> SampleConfig"
    )
    add_settings(parser, ServeConfig)
    add_settings(parser, SampleConfig, NAMES)
    return parser


def parse(parser: Parser, argv: list[str] | None) -> tuple[ServeConfig, SampleConfig]:
    """Flags over configuration file over defaults."""
    flags = parser.parse_args(argv)
    given = given_settings(flags, SampleConfig, NAMES)
    default = SampleConfig if {"checkpoint", "dit"} & given.keys() else demo.get_config
    config = load_config(flags.config, SampleConfig) if flags.config else default()
    if "preset" in given:
        from wanjax.sampling import presets

        config = presets.apply(config, given.pop("preset"))
    config = dataclasses.replace(config, **given | {"first_frame": None, "last_frame": None, "keyframe": ()})
    return ServeConfig(**given_settings(flags, ServeConfig)), config


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    run(*parse(make_parser(), argv), with_page=False)


def run(serving: ServeConfig, config: SampleConfig, with_page: bool) -> None:
    """Serve until a signal ends it; on hosts but the first, compute what that one takes.

    Args:
      serving: where, and within which limits.
      config: what, and the defaults of requests.
      with_page: whether `/` is the page of `wanjax app`.
    """
    check_installed(with_page)

    from sharding import distributed  # here: --help and bad flags need none of these
    from sharding.xla_options import TPU_OPTIONS, TPU_OPTIONS_8_BIT, use_tpu_options
    from wanjax.files import hold
    from wanjax.sampling import compile_cache
    from wanjax.sampling.extend_prompt import make_extend
    from wanjax.sampling.pipeline import Pipeline
    from wanjax.serving.warm import check, make_warm
    from wanjax.serving.worker import Worker
    from wanjax.weights import quantize

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # which other hosts learn of; killed, they would be lost
    use_tpu_options(TPU_OPTIONS_8_BIT if quantize.is_quantized(config) else TPU_OPTIONS)
    distributed.initialize(saves_on_sigterm=False)
    compile_cache.use_persistent_cache(compile_cache.cache_folder(config.compile_cache))
    warm = make_warm(serving.warm) if serving.warm else None
    with distributed.ending_together():
        if not distributed.is_main():
            Worker(Pipeline(dataclasses.replace(config, extend_prompt=None)), None, warm=warm).follow()
            return
        check_folder(serving)
        with hold(serving.data, "--data"), bound(serving) as place:
            from wanjax.serving.jobs import Jobs

            with contextlib.closing(Jobs(serving.data, serving.max_queue)) as jobs:
                extend = make_extend(config.extend_prompt, config.extend_model) if config.extend_prompt else None
                config = dataclasses.replace(config, extend_prompt=None)  # requests say whether, the server by whom
                worker = Worker(Pipeline(config), jobs, extend, serving.max_kept, warm)
                check(worker.pipe, serving.warm, serving.max_pixels)
                listen(place, make_server(serving, config, worker), with_page)


def check_installed(with_page: bool) -> None:
    """Raises `InputError` where what serves is not installed."""
    import importlib.util

    needed = ["fastapi", "uvicorn", "prometheus_client", "python_multipart", *(["gradio"] if with_page else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extra = "app" if with_page else "serve"
        raise InputError(f"{missing[0]} is not installed; the extra {extra} is needed; pip install 'wanjax[{extra}]'")


def make_server(serving: ServeConfig, config: SampleConfig, worker: Worker) -> Server:
    """The application over a worker."""
    from wanjax.serving.api import Server
    from wanjax.serving.requests import Reader

    assert worker.jobs is not None
    model = "demo" if config.checkpoint == str(demo.FOLDER) else Path(config.checkpoint or config.dit or "").name
    return Server(Reader(worker.pipe, serving, model, worker.extend is not None), worker.jobs, worker)


def check_folder(serving: ServeConfig) -> None:
    """Raises `InputError` where the folder of adapters is none."""
    if serving.lora_dir is not None and not os.path.isdir(serving.lora_dir):
        raise InputError(f"--lora-dir {serving.lora_dir} is no folder; one with adapters is accepted; give it, or none")


@contextlib.contextmanager
def bound(serving: ServeConfig) -> Iterator[socket.socket]:
    """The socket to listen with, at its address: nobody else gets that while networks are looked at.

    Raises:
      InputError: there is no such address here, or it is taken.
    """
    with socket.socket(socket.AF_INET6 if ":" in serving.host else socket.AF_INET) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((serving.host, serving.port))
            place.listen()
        except (OSError, UnicodeError) as error:  # a name longer than names are is the latter
            raise InputError(
                f"--host {serving.host} --port {serving.port} cannot be listened at ({reason(error)}); an address of "
                "this machine and a free port are accepted; choose another, or --port 0 for any"
            ) from error
        yield place


def listen(place: socket.socket, server: Server, with_page: bool) -> None:
    """Answer requests until a signal ends it."""
    import uvicorn

    if with_page:
        from wanjax.page import page

        page.mount(server)
    host, port = place.getsockname()[:2]
    address = f"http://{f'[{host}]' if place.family == socket.AF_INET6 else host}:{port}"
    print(f"listening at {address}  ({'page: /, ' if with_page else ''}API: /docs)", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(server.app, log_level="warning", timeout_graceful_shutdown=CLOSE_SECONDS)).run(
        [place]
    )
