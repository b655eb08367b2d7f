"""The request's schema for the OpenAPI page, made from the fields of `SampleConfig`."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

from wanjax.cli import described
from wanjax.sampling import presets, recorded
from wanjax.serving.requests import ALIASES, ANNOTATIONS, FILES, FRAME_TYPES


def order_schema(form: bool) -> dict[str, Any]:
    """JSON Schema of an order: of a JSON body, or of a form, which has pictures as files."""
    properties = {name: field_schema(name) for name in recorded.FIELDS}
    for name, field in ALIASES.items():
        properties[name] = field_schema(field) | {"description": f"the same as {field}"}
    properties["preset"]["enum"] = [*presets.names(), None]
    properties |= {
        "model": {"type": ["string", "null"], "description": "the name of the served checkpoint, see /v1/models"},
        "size": {"type": "string", "pattern": r"^\d{1,5}x\d{1,5}$", "description": "WIDTHxHEIGHT"},
        "seconds": {"type": ["number", "string"], "description": "length, in place of frames"},
        "extend_prompt": {"type": "boolean", "description": "let a language model write the prompt out"},
        "lora": {
            "type": ["array", "string"],
            "items": {"type": "string"},
            "description": "adapters of the server's folder, NAME[:STRENGTH]",
        },
        "user": {"type": "string", "description": "ignored"},
    }
    if form:
        properties |= {name: {"type": "string", "format": "binary"} for name in FILES}
        properties["keyframe"] = {"type": "array", "items": {"type": "string", "format": "binary"}}
        properties["keyframe_at"] = {"type": "string", "description": "their places: 40, 50% or 2.5s, with commas"}
    else:
        properties["frame_images"] = {"type": "array", "items": FRAME_IMAGE, "description": "given frames"}
    return {"type": "object", "properties": properties, "additionalProperties": False}


FRAME_IMAGE = {
    "type": "object",
    "required": ["image_url", "frame_type"],
    "properties": {
        "type": {"const": "image_url"},
        "image_url": {
            "type": "object",
            "required": ["url"],
            "properties": {"url": {"type": "string", "pattern": "^data:image/[a-z+.-]+;base64,"}},
        },
        "frame_type": {"enum": list(FRAME_TYPES)},
        "frame": {"type": "string", "description": "of a keyframe: 40, 50% or 2.5s"},
    },
}


def field_schema(name: str) -> dict[str, Any]:
    """JSON Schema of a field: its type, range and sentence."""
    field, hint = recorded.FIELDS[name], ANNOTATIONS[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    parts = [_kind(kind, field.metadata) for kind in kinds]
    schema = parts[0] if len(parts) == 1 else {"anyOf": parts}
    return schema | {"description": described(field).replace("%%", "%")}


def _kind(kind: Any, rules: typing.Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schema of one type of a field."""
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _kind(get_args(kind)[0], rules)}
    name = {int: "integer", float: "number", str: "string", bool: "boolean", types.NoneType: "null"}[kind]
    bounds = {"least": "minimum", "above": "exclusiveMinimum", "most": "maximum"}
    found = {word: rules[rule] for rule, word in bounds.items() if rules.get(rule) is not None}
    return {"type": name} | (found if kind in (int, float) else {})
