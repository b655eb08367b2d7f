"""Components of the page made from the fields of `SampleConfig`, and settings made of what they hold.

A component that is left empty leaves its setting to the server, whose default stands in it as a placeholder.
"""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

import gradio as gr

from wanjax.config import SampleConfig
from wanjax.sampling import recorded
from wanjax.serving.requests import ANNOTATIONS, spoken

MAIN = ("prompt", "frames", "steps", "seed", "width", "height")
"""Fields that stand outside of the fold."""
LEFT_OUT = ("preset",)
"""Fields whose work the page does itself."""
ADVANCED = tuple(name for name in recorded.FIELDS if name not in (*MAIN, *LEFT_OUT))
HEADINGS = {"inputs": "Prompt", "output": "File", "video": "Video", "sampling": "Sampling", "speed": "Speed"}
LABELS = {"fps": "Frames a second", "cfg_cache": "CFG cache"}
"""Where a field's name is no words."""
AUTO = "auto"
"""In place of no choice."""


def by_heading() -> dict[str, list[str]]:
    """The fields of the fold under their headings."""
    groups: dict[str, list[str]] = {}
    for name in ADVANCED:
        heading = str(recorded.FIELDS[name].metadata["group"])
        groups.setdefault(HEADINGS.get(heading, heading.capitalize()), []).append(name)
    return groups


def component(name: str, config: SampleConfig, min_width: int = 220) -> Any:
    """The component of a field, holding the server's default."""
    field, value = recorded.FIELDS[name], show(name, getattr(config, name))
    label = LABELS.get(name, name.replace("_", " ").capitalize())
    info, kinds = sentence(field.metadata), kinds_of(name)
    options = {"label": label, "info": info, "elem_id": f"setting-{name}", "value": value, "min_width": min_width}
    if kinds[0] is bool:
        return gr.Checkbox(**options)
    if get_origin(kinds[0]) is Literal:
        choices = list(get_args(kinds[0]))
        return gr.Dropdown(choices=[AUTO, *choices] if types.NoneType in kinds else choices, **options)
    if is_number(name):
        rules = field.metadata
        precision = 0 if kinds[0] is int else None
        return gr.Number(precision=precision, minimum=rules["least"], maximum=rules["most"], **options)
    lines = 2 if name == "negative_prompt" else 1
    return gr.Textbox(placeholder=spoken(field.metadata["shown"] or ""), lines=lines, **options)


def sentence(rules: typing.Mapping[str, Any]) -> str:
    """A field's sentence, as one."""
    words = spoken(rules["help"])
    return words[:1].upper() + words[1:] + "."


def kinds_of(name: str) -> tuple[Any, ...]:
    """The types that a field takes."""
    hint = ANNOTATIONS[name]
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_list(name: str) -> bool:
    """Whether a field may be several numbers."""
    return any(get_origin(kind) is tuple for kind in kinds_of(name))


def is_number(name: str) -> bool:
    """Whether a field is always one number; one that may be none, or several, is text on the page."""
    return kinds_of(name) in ((int,), (float,))


def show(name: str, value: Any) -> Any:
    """A field's value as its component holds it."""
    kind = kinds_of(name)[0]
    if kind is bool or is_number(name):
        return value
    if value is None:
        return AUTO if get_origin(kind) is Literal else ""
    if isinstance(value, (list, tuple)):
        return ", ".join(f"{x:.10g}" for x in value)
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def read(name: str, value: Any, config: SampleConfig) -> Any:
    """What a component holds as a request says it; None: what the server has."""
    if name == "negative_prompt" and not value:
        return "" if config.negative_prompt == "" else None
    if value is None or value == AUTO or (isinstance(value, str) and not value.strip()):
        return None
    return value.replace(" ", "") if is_list(name) else value


def changed(kept: list[dict], i: int, **values: Any) -> list[dict]:
    """A list of the page's state, with other values in its row `i`."""
    return [row | values if j == i else row for j, row in enumerate(kept)]


def without(kept: list[dict], i: int) -> list[dict]:
    """The same without row `i`."""
    return kept[:i] + kept[i + 1 :]
