"""How a video was made, inside of its file: written beside the pictures, and read back to make another like it.

    media.write_video(path, video, fps, recorded.to_text(settings, loras))
    settings, loras = recorded.read("video.mp4")

It holds settings alone: no pictures, no paths.
"""

from __future__ import annotations

import dataclasses
import json
import numbers
from pathlib import Path
from typing import Any

from wanjax import media
from wanjax.config import NETWORK_FIELDS, SampleConfig
from wanjax.errors import InputError
from wanjax.sampling import extend_prompt
from wanjax.sampling.request import Request
from wanjax.settings import PATHS

MARK = "wanjax"
_OTHERS = ("first_frame", "last_frame", "keyframe", *extend_prompt.FIELDS)
FIELDS = {
    field.name: field
    for field in dataclasses.fields(SampleConfig)
    if field.metadata.get("group")
    and field.metadata["metavar"] not in PATHS
    and field.name not in (*NETWORK_FIELDS, *_OTHERS)
}
"""The fields of `SampleConfig` that say how a video is made: neither what the networks are, nor pictures, nor paths."""


def settings(request: Request) -> dict[str, Any]:
    """Those of a request as plain values, with size, length and shift decided where they were left open."""
    values = {name: getattr(request.config, name) for name in FIELDS}
    values |= {"height": request.height, "width": request.width, "shift": request.shift}
    return {name: plain(name, value) for name, value in values.items()}


def plain(name: str, value: Any) -> Any:
    """A field's value as JSON has it, and always the same one for the same number."""
    if isinstance(value, tuple):
        return [plain(name, x) for x in value]
    is_whole = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if is_whole and isinstance(FIELDS[name].default, float) else value


def to_text(values: dict[str, Any], loras: tuple[str, ...] = ()) -> str:
    """What a file keeps: settings, and adapters (`FILE` or `FILE:STRENGTH`) by file name and strength."""
    return json.dumps({MARK: 1, "settings": values, "lora": [lora_name(x) for x in loras]}, ensure_ascii=False)


def lora_name(given: str) -> str:
    """An adapter's file name without suffix, and its strength."""
    path, mark, strength = given.rpartition(":") if ":" in given else (given, "", "")
    return f"{path.replace(chr(92), '/').rpartition('/')[2].rpartition('.')[0]}{mark}{strength}"


def read(path: str | Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings that a video was made with, and its adapters.

    Raises:
      InputError: it is no video, or was not made here, or its settings are none that there are.
    """
    try:
        found = json.loads(media.read_comment(path))
        values, loras = dict(found["settings"]), tuple(map(str, found["lora"]))
        if found[MARK] != 1 or not set(values) <= set(FIELDS):
            raise ValueError
        SampleConfig(**values)
    except InputError as error:
        raise InputError(f"{Path(path).name}: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"video {Path(path).name} holds no settings; one that wanjax made is needed; "
            "programs that copy videos often drop them"
        ) from error
    return values, loras
