"""What a server is told: where it listens, what it keeps, what a request may ask for."""

from __future__ import annotations

import dataclasses

from wanjax.settings import Config, setting


@dataclasses.dataclass(frozen=True)
class ServeConfig(Config):
    """Everything that serving needs beside `SampleConfig`; `wanjax serve`'s flags are these fields, and `wanjax app`'s.

    The key that requests must bring is no setting, so that no list of processes shows it: `WANJAX_API_KEY`.
    """

    host: str = setting(
        "127.0.0.1", "address to listen at; 0.0.0.0: all of this machine's", "server", metavar="ADDRESS", empty=False
    )
    port: int = setting(8000, "to listen at", "server", least=0, most=65535)
    data: str = setting(
        "out/server", "folder of jobs.sqlite and of the videos; a later start goes on with it", "server", metavar="DIR"
    )
    warm: str = setting(
        "",
        "sizes to compile before the first request: 720p, 480p, WIDTHxHEIGHT, with commas",
        "server",
        metavar="SIZES",
    )
    lora_dir: str | None = setting(None, "folder of adapters that requests may name", "server", metavar="DIR")
    max_queue: int = setting(
        100, "requests that may wait; further ones are told to come again", "limits", least=1, most=10**6
    )
    max_pixels: int = setting(1280 * 720, "of a frame", "limits", least=1, most=2**28)
    max_frames: int = setting(161, "of a video", "limits", least=1, most=2**16)
    max_steps: int = setting(100, "of the solver", "limits", least=1, most=10_000)
    max_upload: int = setting(32, "MB of a request", "limits", metavar="MB", least=1, most=1024)
    max_kept: int = setting(
        1000, "finished videos that are kept; older ones are deleted", "limits", least=1, most=10**6
    )
