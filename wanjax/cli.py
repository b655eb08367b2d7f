"""What every command does with what it cannot use: one line, not the usage, not a traceback."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from wanjax.errors import InputError


class Parser(argparse.ArgumentParser):
    """Flags that raise `InputError` where they cannot be read."""

    def error(self, message: str):
        """Raise instead of printing the usage."""
        raise InputError(f"{message}; see --help")


def check_counts(**counts: int) -> None:
    """Flags that count something, by their names.

    Raises:
      InputError: one is below 1.
    """
    for name, count in counts.items():
        if count < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {count}; whole numbers from 1 are accepted; use {flag} 1")


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Ends the process: with one line and 2 for input that cannot be used, with 130 where it is interrupted."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
