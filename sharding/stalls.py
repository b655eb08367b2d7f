"""Processes that live, but stand still while the others wait for them: their hearts beat, so that JAX misses nobody.

tick()                                   # wherever all processes come to the next piece of their common work
stalls = Stalls(client, 0, 600)
stalls.look()                            # now and then, in another thread: which process is behind, and how
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

TICKS = "wanjax/ticks/"
_ticks = [0]


def tick() -> None:
    """Says that this process has come to the next piece of work that all do together: a step, a batch, a chunk."""
    _ticks[0] += 1


class Stall(NamedTuple):
    """Of which process, and what is to be said of it."""

    process: str
    line: str


class Stalls:
    """Compares how far the processes are.

    Args:
      client: of the service that keeps names and values for all.
      process: which this is.
      seconds: that one may be behind without coming on.
    """

    def __init__(self, client: Any, process: int, seconds: float):
        self._client, self._process, self._seconds = client, process, seconds
        self._next = time.monotonic()
        self._since: dict[str, tuple[int, float]] = {}

    def look(self) -> Stall | None:
        """Tell the others how far this process is; one that is behind for too long, if there is any."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + self._seconds / 20  # not more often: processes can be many
        self._client.key_value_set(f"{TICKS}{self._process}", str(_ticks[0]), allow_overwrite=True)
        ticks = {key.rpartition("/")[2]: int(count) for key, count in self._client.key_value_dir_get(TICKS)}
        most = max(ticks.values())
        for process, count in ticks.items():
            if self._since.get(process, (None, 0.0))[0] != count:
                self._since[process] = count, now
            stood = now - self._since[process][1]
            if count < most and stood > self._seconds:
                where = f"at piece {count} of the work, of which others have come to {most}"
                return Stall(process, f"stands still since {stood:.0f} s {where}; look at what it waits for")
        return None
