"""What all commands share: flags made from the fields of a configuration, and one line for what cannot be used."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from wanjax.errors import InputError, one_line
from wanjax.settings import ADDRESS, ON_DISK, PATHS

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
_PLACES = (*PATHS, "SRC", "DST", "LATENTS")
"""`metavar`s of flags that are places on a disk."""
BROKEN_PIPE = 141
"""Exit code where the reader of what is printed has gone, as shells have it."""


MOST_COUNT = 10**6
"""Of what flags count: processes, clips at a time, seconds."""


class Parser(argparse.ArgumentParser):
    """Flags that raise `InputError` where they cannot be read; a description that keeps its lines."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Where argparse turns a word into a value: `Path` would make a local folder of an address."""
        is_path = action.type in (Path, printable_path) or action.metavar in _PLACES
        if is_path and not getattr(action, "remote", False) and ADDRESS.match(arg_string):
            name = "/".join(action.option_strings) or action.dest
            raise InputError(f"{name} {arg_string!r}; {ON_DISK}")
        return super()._get_value(action, arg_string)

    def error(self, message: str):
        """Raise instead of printing the usage."""
        raise InputError(f"{message}; see --help")


def flag(name: str) -> str:
    """A field's flag; `continue` itself is a word of Python's, and `TrainConfig.dit` is no file."""
    return "--" + name.removesuffix("_file").replace("_", "-").rstrip("-")


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
        takes = options(annotations[field.name], field)
        action = groups[heading].add_argument(flag(field.name), dest=field.name, help=described(field), **takes)
        action.remote = field.metadata["remote"]  # pyright: ignore[reportAttributeAccessIssue]  # for `Parser`


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
    if tuple[float, ...] in kinds:
        return {"type": as_text_unless(number_or_numbers if kind is float else numbers), "metavar": metavar or "X"}
    if tuple[int, ...] in kinds:
        return {"type": as_text_unless(whole_numbers), "metavar": metavar or "N"}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        return {"action": "append", "metavar": metavar}
    return {"type": as_text_unless(kind), "metavar": metavar or {int: "N", float: "X", str: "TEXT"}[kind]}


def as_text_unless(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Parses, or leaves as text what cannot be parsed: the configuration refuses that, in the words of its field."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError:
            return text

    return read


def whole_number(text: str) -> int:
    """The value of a flag that is no setting's."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}; whole numbers are accepted") from error


def number(text: str) -> float:
    """Likewise; what its bounds are is the command's business."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}; numbers are accepted") from error


def several(parse: Callable[[str], tuple[Any, ...]]) -> Callable[[str], tuple[Any, ...]]:
    """Likewise, for flags of several."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return parse(text)
        except ValueError as error:
            kind = "whole numbers" if parse is whole_numbers else "numbers"
            raise argparse.ArgumentTypeError(f"{text[:40]!r}; {kind} with commas between them are accepted") from error

    return read


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    return tuple(float(part) for part in text.split(","))


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    return tuple(int(part) for part in text.split(","))


def number_or_numbers(text: str) -> float | tuple[float, ...]:
    """A number, or several with commas between them."""
    return numbers(text) if "," in text else float(text)


def given_settings(flags: argparse.Namespace, kind: type, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The fields that flags set."""
    values = {field.name: getattr(flags, field.name) for field in flag_fields(kind, names)}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items() if x is not None}


def printable(text: str) -> str:
    """A path, or another name, of a flag that is no setting's."""
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text[:40]!r}; text of printable letters is accepted")
    return text


def printable_path(text: str) -> Path:
    """Likewise, as a path."""
    return Path(printable(text))


def check_counts(**counts: int) -> None:
    """Flags that count something, by their names.

    Raises:
      InputError: one is below 1, or above `MOST_COUNT`.
    """
    for name, count in counts.items():
        if not 1 <= count <= MOST_COUNT:
            raise InputError(
                f"{flag(name)} {count}; whole numbers from 1 to {MOST_COUNT} are accepted; use {flag(name)} 1"
            )


@contextlib.contextmanager
def second_interrupt_ends() -> Iterator[None]:
    """While the block runs, a second Ctrl-C ends the process at once.

    Python runs handlers of signals when the main thread comes back to it, which it does not while it waits for devices,
    and an exception out of a handler can be lost in somebody's callback. The system's own handler says at once that a
    signal came, and another thread reads it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        interrupts = 0
        while numbers := os.read(reading, 1):
            interrupts += numbers[0] == signal.SIGINT
            if interrupts == 2:
                os._exit(INTERRUPTED)
        os.close(reading)

    threading.Thread(target=watch, daemon=True, name="second Ctrl-C").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


def open_streams() -> None:
    """Standard streams that there are, and that take any text.

    Where one was closed (`>&-`), the next file that is opened would be it, and whatever is printed go into that. What a
    terminal's encoding cannot spell must end no work.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # as long as the process lives
        elif hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def check_environment() -> None:
    """Raises `InputError` where a variable asks JAX for other numbers than all here is made of."""
    wide = os.environ.get("JAX_ENABLE_X64", "")
    if wide.lower() in ("1", "true", "t", "yes", "y", "on"):
        raise InputError(f"JAX_ENABLE_X64={wide}; numbers of 32 bits and fewer are accepted; unset it")


def lack(error: Exception) -> str | None:
    """What this machine lacks that the work needs, as one line; None: the error says nothing of the kind."""
    said = one_line(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:
        return (
            f"this needs more memory than there is ({said or 'no more said'}); less is accepted; ask for a smaller one"
        )
    if isinstance(error, RuntimeError) and said.startswith("Unable to initialize backend"):
        return f"JAX finds no devices ({said}); those that are installed are accepted; set JAX_PLATFORMS, or unset it"
    if isinstance(error, ValueError) and re.search(r"\bJAX flag jax_|environment 'JAX_", said):
        return (
            f"a variable of the environment that JAX reads ({said}); what its documentation says is accepted; unset it"
        )
    return None


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Ends the process: with one line and 2 for input that cannot be used, with 130 where it is interrupted.

    A second Ctrl-C does so at once, wherever the first one went.
    """
    open_streams()
    is_main_thread = threading.current_thread() is threading.main_thread()
    try:
        check_environment()
        with second_interrupt_ends() if is_main_thread else contextlib.nullcontext():
            yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read what is printed has enough; nothing more can be said to them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except OSError as error:  # of a place that the command was told of, or of a disk that is full or fails
        where = f"{error.filename}: " if error.filename else ""
        line = f"{where}{error.strerror or error}; a place that can be read and written is needed; check it"
        print(f"error: {one_line(line)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError, ValueError) as error:
        if (line := lack(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
