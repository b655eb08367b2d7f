"""What every configuration is made of: fields with a sentence, a type and a range, checked when one is made.

    @dataclasses.dataclass(frozen=True)
    class Example(Config):
        steps: int = setting(50, "solver steps", "sampling", least=1)

`setting` is the one place for all that there is to say of a field: its flag, `--help`, the README's table and the check
are made from it and from the annotation. So no configuration exists with a value that its field does not take.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

import ml_dtypes
import numpy as np

from wanjax.errors import InputError

PATHS = ("DIR", "FILE", "PATH", "FILE[:STRENGTH]")
"""`metavar`s of fields that are places on a disk."""


ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How an address begins that is no path: gs://, s3://, https://. As a path it would be a folder of that name here."""
SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "hf": "huggingface-hub", "memory": "", "file": ""}
"""Of addresses that some places take (`setting(.., remote=True)`), and the package that each needs; see
`wanjax.remote`."""
ON_DISK = "a path on this machine's disks is accepted; mount the bucket there, or copy it"


class DType:
    """Stands for what names a dtype of floats: NumPy's, ml_dtypes' or JAX's types, or text."""


class SettingError(InputError):
    """A field of a configuration has a value that it does not take.

    detail: the same in words for a file's numbers, which its reader cannot change; empty: the message itself.
    """

    detail = ""


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    group: str | None = None,
    *,
    metavar: str | None = None,
    shown: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    empty: bool = True,
    remote: bool = False,
) -> Any:
    """A field of a configuration.

    Args:
      default: its value where nothing is said; none: it has to be said.
      help: a sentence that says what it is.
      group: heading under which its flag stands; None: it has no flag, a configuration file sets it.
      metavar: how the flag's value is called.
      shown: what help says of a default that does not speak for itself.
      least, above, most: bounds of a number, or of all numbers of a tuple; `above` itself is not accepted.
      empty: whether a text or a tuple may be empty.
      remote: whether a place may be the address of one in a bucket, see `wanjax.remote`.
    """
    metadata = {"help": help, "group": group, "metavar": metavar, "shown": shown}
    metadata |= {"least": least, "above": above, "most": most, "empty": empty, "remote": remote}
    return dataclasses.field(default=default, metadata=metadata)


class Config:
    """A base of frozen dataclasses: one that exists has only values that its fields take.

    Raises:
      SettingError: on construction: a field's value is not of its type, or out of its range; it is named.
    """

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]  # all subclasses are dataclasses
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, value := tuple(value))
            if not _takes(hints[field.name], value, field.metadata):
                raise _refused(field, hints[field.name], value)
        self.check_together()

    def check_together(self) -> None:
        """What fields must have in common, beside what each takes.

        Raises:
          SettingError: they have not.
        """


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, localns={"DTypeLike": DType})  # JAX's name, which is not imported for it


def _takes(hint: Any, value: Any, rules: typing.Mapping[str, Any]) -> bool:
    """Whether a field of this annotation and these bounds takes a value."""
    if hint is DType:
        return _is_float_type(value)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_takes(kind, value, rules) for kind in get_args(hint))
    if hint is Any:
        return not isinstance(value, (str, int, float, type(None)))  # of these the union's other parts tell
    if origin is Literal:
        return any(type(value) is type(x) and value == x for x in get_args(hint))
    if origin is tuple:
        return _takes_items(get_args(hint), value, rules)
    if origin is dict:
        names, values = get_args(hint)
        return isinstance(value, dict) and all(
            _takes(names, k, rules) and _takes(values, x, rules) for k, x in value.items()
        )
    if hint is types.NoneType:
        return value is None
    if hint is bool:
        return type(value) is bool
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and _within(value, rules)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and _within(value, rules)
    if hint is str:
        is_path = rules.get("metavar") in PATHS
        text = value if isinstance(value, str) else "\0"
        may_be_empty = rules.get("empty", True) and not is_path
        is_here = text.isprintable() and (not ADDRESS.match(text) or (rules.get("remote", False) and _is_known(text)))
        return _is_text(text) and (may_be_empty or bool(text)) and (not is_path or is_here)
    return isinstance(value, hint)


def _is_known(address: str) -> bool:
    return address.partition("://")[0].lower() in SCHEMES


def _is_text(text: str) -> bool:
    """Whether it can be written: no NUL, and no half of a character, as which Python reads bytes that are no text."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _takes_items(kinds: tuple[Any, ...], value: Any, rules: typing.Mapping[str, Any]) -> bool:
    if not isinstance(value, tuple) or not (value or rules.get("empty", True)):
        return False
    kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
    return len(kinds) == len(value) and all(_takes(k, x, rules) for k, x in zip(kinds, value, strict=True))


def _within(number: Any, rules: typing.Mapping[str, Any]) -> bool:
    least, above, most = (rules.get(name) for name in ("least", "above", "most"))
    try:
        finite = math.isfinite(number)
    except OverflowError:  # a whole number beyond all floats
        finite = True
    return (
        finite
        and (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
    )


def _is_float_type(value: Any) -> bool:
    try:
        ml_dtypes.finfo(np.dtype(value))
    except (TypeError, ValueError):
        return False
    return value is not None  # which NumPy takes for float64


def _refused(field: dataclasses.Field, hint: Any, value: Any) -> SettingError:
    """What was given, what is accepted, what to do."""
    name = f"--{field.name.replace('_', '-').rstrip('-')}" if field.metadata.get("group") else field.name
    default, advice = field.default, "change it, or leave it out" if _is_optional(hint) else "change it"
    if isinstance(default, (bool, int, float, str)) and default != "":
        advice = f"use {name} {default:g}" if isinstance(default, float) else f"use {name} {default}"
    given = str(value) if isinstance(value, (int, float)) else repr(value)
    addresses = [
        x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, str) and ADDRESS.match(x)
    ]
    if addresses and field.metadata.get("metavar") in PATHS:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        accepted = (
            f"a path, or an address of {known}, is accepted; copy it there" if field.metadata.get("remote") else ON_DISK
        )
        error = SettingError(f"{name} {addresses[0]!r}; {accepted}")
        error.detail = str(error)
        return error
    error = SettingError(f"{name} {given[:200]}; {_accepted(hint, field.metadata)}; {advice}")
    error.detail = f"{name} is {given[:200]}; {_accepted(hint, field.metadata)}"
    return error


def _is_optional(hint: Any) -> bool:
    return types.NoneType in get_args(hint)


def _accepted(hint: Any, rules: typing.Mapping[str, Any]) -> str:
    """What a field takes, in words."""
    if hint is DType:
        return "a type of floats is accepted"
    kinds = [kind for kind in (get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint])]
    words = [_words(kind, rules) for kind in kinds if kind not in (types.NoneType, Any)]
    plural = " or ".join(dict.fromkeys(words))
    return f"{plural} {'are' if plural.startswith('whole numbers') else 'is'} accepted"


def _words(kind: Any, rules: typing.Mapping[str, Any]) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        items = get_args(kind)
        many = "" if items[1:] == (...,) else f"{len(items)} "
        item = _words(items[0], rules).removeprefix("a ")
        return f"a tuple of {many}{item.replace('path', 'paths').replace('number ', 'numbers ')}"
    if kind is int:
        return f"whole numbers{_range(rules)}"
    if kind is float:
        return f"a {'' if _range(rules) else 'finite '}number{_range(rules)}"
    if kind is str:
        return "a path" if rules.get("metavar") in PATHS else "text" if rules.get("empty", True) else "text, not none,"
    return {bool: "True or False"}.get(kind, getattr(kind, "__name__", str(kind)))


def _range(rules: typing.Mapping[str, Any]) -> str:
    least, above, most = (rules.get(name) for name in ("least", "above", "most"))
    words = f" above {above:g}" if above is not None else "" if least is None else f" from {_number(least)}"
    return words + ("" if most is None else f" to {_number(most)}" if words else f" up to {_number(most)}")


def _number(x: float) -> str:
    return str(x) if isinstance(x, int) else f"{x:g}"
