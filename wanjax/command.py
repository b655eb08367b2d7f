"""What every command does with bad flags: one line, not the usage."""

from __future__ import annotations

import argparse

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
