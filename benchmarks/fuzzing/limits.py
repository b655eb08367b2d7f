"""A limit of time for what may wait for ever."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import NoReturn

SLOWEST = 10
"""Seconds of a processor that an input may take."""
LONGEST = 120
"""Seconds that it may take on a machine that has much else to do; or it waits for what never comes."""


class TooSlow(BaseException):  # no handler of errors shall take it for one
    """It took longer."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends the block after `LONGEST`; only in the main thread.

    Raises:
      TooSlow: in the block.
    """

    def end(*_: object) -> NoReturn:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
