"""A file of prompts, each perhaps with pictures: what a run samples while it trains.

    prompts = read_prompts("prompts.jsonl")

One a line, as a manifest (.jsonl, .json, .csv, .parquet) with the columns `prompt`, `first_frame`, `last_frame` and
`seed`, or a .txt as musubi-tuner takes it: `a cat jumps --i first.png --ei last.png --d 7`. Pictures are as seen from
the file's folder. Size, frames, steps and guidance are the run's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from wanjax.conditioning.frames import Task
from wanjax.data.manifest import READABLE, read_values
from wanjax.errors import InputError
from wanjax.untrusted import read_lines

COLUMNS = ("prompt", "first_frame", "last_frame", "seed")
WORDS = {"i": "first_frame", "ei": "last_frame", "d": "seed"}
"""Of a line of text, what stands behind two dashes."""
MOST = 1024
"""Prompts in a file: they are sampled again and again."""


class Prompt(NamedTuple):
    """One of them.

    text: the prompt.
    first, last: pictures of these frames; None: not given.
    seed: of its noise.
    """

    text: str
    first: Path | None
    last: Path | None
    seed: int

    @property
    def task(self) -> Task:
        """What is given."""
        given = self.first is not None, self.last is not None
        return {(False, False): "t2v", (True, False): "i2v", (False, True): "last", (True, True): "flf2v"}[given]  # pyright: ignore[reportReturnType]


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file, in its order.

    Raises:
      InputError: it cannot be read, lists none, or a line is none or names a picture that is not there.
    """
    place = Path(path)
    if place.suffix.lower() not in (*READABLE, ".txt") or not place.is_file():
        raise InputError(f"prompts {path} are no file of {', '.join(READABLE)} or .txt; one is needed; check the path")
    lines = _read_text(place) if place.suffix.lower() == ".txt" else read_values(place)
    prompts = [_prompt(place, number, values) for number, values in lines]
    if not 0 < len(prompts) <= MOST:
        raise InputError(f"{path} has {len(prompts)} prompts; 1 to {MOST} are accepted; change it")
    return prompts


def _read_text(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        lines = list(read_lines(path))
    except (OSError, ValueError) as error:
        raise InputError(f"prompts {path} cannot be read ({error}); text in UTF-8 is accepted; repair it") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        text, *options = re.split(r"\s--(?=\w)", line.strip())
        values = {"prompt": text}
        for option in options:
            name, _, value = option.partition(" ")
            if name not in WORDS:
                raise InputError(
                    f"{path}, line {number}: --{name}; accepted: {', '.join('--' + x for x in WORDS)}, as all else is "
                    "the run's; leave it out"
                )
            values[WORDS[name]] = value.strip()
        yield number, values


def _prompt(path: Path, number: int, values: Mapping[str, Any]) -> Prompt:
    where, text = f"{path}, row {number}", values.get("prompt")
    unknown = [name for name in values if name not in COLUMNS]
    if unknown or not isinstance(text, str):
        what = f"{unknown[0]} is no column of prompts" if unknown else "no prompt"
        raise InputError(f"{where}: {what}; accepted: {', '.join(COLUMNS)}, of which prompt is needed; correct it")
    first, last = (_picture(where, path, name, values.get(name)) for name in ("first_frame", "last_frame"))
    return Prompt(text, first, last, _seed(where, values.get("seed")))


def _picture(where: str, path: Path, name: str, value: Any) -> Path | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or "\0" in value or not (path.parent / value).is_file():
        raise InputError(f"{where}: {name} {value!r}, which is not there; a picture's path is needed; correct it")
    return path.parent / value


def _seed(where: str, value: Any) -> int:
    try:
        seed = 0 if value is None or value == "" else int(value)
    except (TypeError, ValueError, OverflowError):
        seed = -1
    if not 0 <= seed < 2**31:
        raise InputError(f"{where}: seed {value!r}; whole numbers from 0 to {2**31 - 1} are accepted; change it")
    return seed
