"""A page in the browser: two pictures, a prompt, and the video that comes out.

    wanjax app                                                                # the small demo model
    wanjax app --config configs/flf2v_14b_720p.py --checkpoint Wan2.1-FLF2V-14B-720P-diffusers --warm 720p

It is `wanjax serve` with a page at `/`: the page and `/v1/videos` share one queue. With WANJAX_API_KEY set, the page
asks for it. Sampling flags are what the page begins with. docs/app.md tells more.
"""

from __future__ import annotations

from wanjax.cli import Parser
from wanjax.commands import serve


def make_parser() -> Parser:
    """The command's flags."""
    return serve.make_parser("wanjax app", __doc__)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    serve.run(*serve.parse(make_parser(), argv), with_page=True)
