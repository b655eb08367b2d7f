"""Several hosts, one queue: the first one takes jobs and tells the others, and all compute each together.

What is told goes through the service by which JAX's processes find each other, so that a host that waits for the next
job, for hours, waits in no collective, which would time out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sharding import distributed

PART = 2**20
"""Characters of a message that the service takes at once."""
WAIT_MS = 60_000


class Hosts:
    """What one host says to the others, and what all agree on."""

    def __init__(self):
        self.count, self._numbers = jax.process_count(), itertools.count()

    def send(self, message: Any) -> None:
        """From the first host to all others: what JSON can say."""
        if self.count == 1:
            return
        client, number = distributed.service(), next(self._numbers)
        text = json.dumps(message)
        parts = [text[i : i + PART] for i in range(0, len(text), PART)]
        for i, part in enumerate(parts):
            client.key_value_set(f"wanjax/job/{number}/{i}", part)
        client.key_value_set(f"wanjax/job/{number}/parts", str(len(parts)))
        if number >= 2:  # all have read what came before the last one
            client.key_value_delete(f"wanjax/job/{number - 2}/")

    def receive(self) -> Iterator[Any]:
        """On another host: one message after the other, without end."""
        client = distributed.service()
        for number in itertools.count():
            while True:
                try:
                    parts = int(client.blocking_key_value_get(f"wanjax/job/{number}/parts", WAIT_MS))
                    break
                except jax.errors.JaxRuntimeError as error:
                    if "DEADLINE_EXCEEDED" not in str(error):
                        raise
            text = "".join(client.blocking_key_value_get(f"wanjax/job/{number}/{i}", WAIT_MS) for i in range(parts))
            yield json.loads(text)

    def any(self, flag: bool) -> bool:
        """Whether one host says so; all learn it, at the same point of their work."""
        if self.count == 1:
            return flag
        return bool(multihost_utils.process_allgather(np.array(flag)).any())
