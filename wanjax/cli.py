"""What all commands share: flags made from the fields of a configuration, and one line for what cannot be used."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Union, get_args, get_origin

from wanjax.errors import InputError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class Parser(argparse.ArgumentParser):
    """Flags that raise `InputError` where they cannot be read; a description that keeps its lines."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str):
        """Raise instead of printing the usage."""
        raise InputError(f"{message}; see --help")


def flag(name: str) -> str:
    """A field's flag."""
    return "--" + name.replace("_", "-")


def flag_fields(kind: type, names: Iterable[str] | None = None) -> list[dataclasses.Field]:
    """The fields of a configuration that have a flag, or those of them that are named."""
    fields = [field for field in dataclasses.fields(kind) if field.metadata.get("group")]
    return fields if names is None else [field for field in fields if field.name in set(names)]


def add_settings(parser: argparse.ArgumentParser, kind: type, names: Iterable[str] | None = None) -> None:
    """A flag for every field of a configuration that has one, under the headings that the fields name.

    Args:
      parser: to add them to.
      kind: a dataclass whose fields are `wanjax.config.setting`s.
      names: of the fields; None: all.
    """
    annotations, groups = typing.get_type_hints(kind), {}
    for field in flag_fields(kind, names):
        heading = field.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        groups[heading].add_argument(flag(field.name), help=described(field), **options(annotations[field.name], field))


def described(field: dataclasses.Field) -> str:
    """A field's sentence with its default, for argparse."""
    help, shown = field.metadata["help"], field.metadata["shown"]
    if not shown and not isinstance(field.default, (bool, type(None))) and field.default not in ("", ()):
        shown = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
    return (f"{help} (default: {shown})" if shown else help).replace("%", "%%")


def options(annotation: Any, field: dataclasses.Field) -> dict[str, Any]:
    """What argparse wants to know of a field, by its annotation: the flag's type, choices and action."""
    kinds = [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
    kind, metavar = kinds[0], field.metadata["metavar"]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        return {"action": "append", "metavar": metavar}
    return {"type": kind, "metavar": metavar or {int: "N", float: "X", str: "TEXT"}[kind]}


def given_settings(flags: argparse.Namespace, kind: type, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The fields that flags set."""
    values = {field.name: getattr(flags, field.name) for field in flag_fields(kind, names)}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items() if x is not None}


def check_counts(**counts: int) -> None:
    """Flags that count something, by their names.

    Raises:
      InputError: one is below 1.
    """
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{flag(name)} {count}; whole numbers from 1 are accepted; use {flag(name)} 1")


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Ends the process: with one line and 2 for input that cannot be used, with 130 where it is interrupted."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
