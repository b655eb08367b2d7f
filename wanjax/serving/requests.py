"""What a client may ask for, and how it is read: JSON or a form goes in, a checked `Order` comes out.

Settings are fields of `SampleConfig` by their own names or by those that other servers of `/v1/videos` use (`ALIASES`).
Nothing in a request is a path or an address: pictures come inside of it, adapters by their names in a folder that the
server was told of.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import re
import threading
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanjax import cli
from wanjax.conditioning.images import read_image
from wanjax.config import SampleConfig
from wanjax.config.serving import ServeConfig
from wanjax.errors import InputError
from wanjax.sampling import presets, recorded
from wanjax.sampling.choices import choose_dit
from wanjax.sampling.pipeline import Pipeline
from wanjax.sampling.request import Request
from wanjax.serving.jobs import Order

ALIASES = {
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "guidance_scale_2": "guidance_low",
    "flow_shift": "shift",
    "boundary_ratio": "boundary",
}
"""Names of other servers for fields of `SampleConfig`."""
OTHERS = ("model", "size", "seconds", "frame_images", "extend_prompt", "lora", "keyframe_at", "user")
FILES = ("input_reference", "first_frame", "last_frame", "keyframe")
"""Parts of a form that are pictures; `input_reference` is the first one."""
FRAME_TYPES = ("first_frame", "last_frame", "keyframe")
ANNOTATIONS = typing.get_type_hints(SampleConfig)
MOST_PICTURES = 32
SUFFIXES = (".safetensors", ".gguf")


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads and checks requests for a pipeline.

    pipe: that will run them.
    limits: what one may ask for, and the folder of adapters.
    model: the name that the checkpoint is served by.
    can_extend: whether there is a language model to write prompts out.
    """

    pipe: Pipeline
    limits: ServeConfig
    model: str
    can_extend: bool = False
    _one_at_a_time: Any = dataclasses.field(default_factory=threading.Lock)  # pictures take memory while they are read

    def read(self, body: Mapping[str, Any], files: Mapping[str, list[bytes]], key: str | None = None) -> Order:
        """The order that a body and uploaded pictures make.

        Args:
          body: a JSON object; values of a form are texts.
          files: by the names of `FILES`.
          key: see `Order`.

        Raises:
          InputError: whatever is wrong with it, in the words of HTTP's fields.
        """
        try:
            settings = self.settings(body)
            extend = as_bool("extend_prompt", body.get("extend_prompt") or False)
            if extend and not self.can_extend:
                raise InputError(
                    "extend_prompt true; this server has no language model; leave it out, or start the server with "
                    "--extend-prompt URL"
                )
            pictures = read_pictures(body, files)
            loras = self.loras(body.get("lora"))
            request = self.check(settings, pictures, loras)
        except InputError as error:
            raise InputError(spoken(str(error))) from error
        return Order(recorded.settings(request), pictures, loras, extend, key)

    def settings(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `SampleConfig` that the body sets."""
        accepted = (*recorded.FIELDS, *ALIASES, *OTHERS)
        if unknown := [name for name in body if name not in accepted]:
            raise InputError(f"{unknown[0]!r}; accepted: {', '.join(sorted(accepted))}; change it, or leave it out")
        if body.get("model") not in (None, "", self.model):
            raise InputError(f"model {body['model']!r}; {self.model!r} is served here; give that, or leave it out")
        settings: dict[str, Any] = {}
        for name, value in body.items():
            field = ALIASES.get(name, name)
            if name in OTHERS or value is None:
                continue
            if field in settings:
                raise InputError(f"{name} beside another name of {field}; one is accepted; leave one out")
            settings[field] = from_text(field, value) if isinstance(value, str) else value
        if settings.get("preset") is not None and settings["preset"] not in presets.names():
            raise InputError(f"preset {settings['preset']!r}; accepted: {', '.join(presets.names())}; choose one")
        settings |= self.size(body, settings) | self.length(body, settings)
        return settings

    def size(self, body: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, int]:
        """Height and width from `size`."""
        size = body.get("size")
        if size is None:
            return {}
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size) if isinstance(size, str) else None
        if found is None:
            raise InputError(f"size {size!r}; WIDTHxHEIGHT is accepted, such as 1280x720; change it")
        if {"height", "width"} & settings.keys():
            raise InputError(f"size {size} beside height or width; one way is accepted; leave one out")
        return {"width": int(found[1]), "height": int(found[2])}

    def length(self, body: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, int]:
        """Frames from `seconds`, 4n + 1."""
        seconds = body.get("seconds")
        if seconds is None:
            return {}
        fps = settings.get("fps", self.pipe.config.fps)
        try:
            frames = 4 * round(float(seconds) * fps / 4) + 1
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"seconds {seconds!r}; a number is accepted, such as 5; change it") from error
        if isinstance(seconds, bool) or "frames" in settings:
            raise InputError(f"seconds {seconds!r}; a number, in place of frames, is accepted; change it")
        return {"frames": frames}

    def loras(self, given: Any) -> tuple[str, ...]:
        """Adapters by name, as `--lora` takes them."""
        if given is None or given == "":
            return ()
        names = given.split(",") if isinstance(given, str) else given
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"lora {given!r}; a list of NAME[:STRENGTH] is accepted; change it")
        return tuple(self.lora(name) for name in names)

    def lora(self, given: str) -> str:
        """The path with the strength, of a name with the strength."""
        name, mark, strength = given.partition(":")
        found = adapters(self.limits.lora_dir)
        if name not in found:
            there = f"accepted: {', '.join(sorted(found))}" if found else "this server has none"
            raise InputError(f"lora {name!r}; {there}; choose another, or leave it out")
        return f"{found[name]}{mark}{strength}"

    def check(
        self, settings: Mapping[str, Any], pictures: tuple[tuple[str, bytes], ...], loras: tuple[str, ...] = ()
    ) -> Request:
        """The pipeline's request, within the limits."""
        limits, pipe = self.limits, self.pipe
        config = dataclasses.replace(pipe.config, **{k: v for k, v in settings.items() if k in ("frames", "steps")})
        check_most("frames", config.frames, limits.max_frames)
        check_most("steps", config.steps, limits.max_steps)
        for side in ("height", "width"):
            if isinstance(settings.get(side), int):
                check_most(side, settings[side], limits.max_pixels)
        if isinstance(settings.get("height"), int) and isinstance(settings.get("width"), int):
            check_most("height x width", settings["height"] * settings["width"], limits.max_pixels)
        if loras:
            choose_dit(dataclasses.replace(pipe.config, lora=loras), pipe.networks.checkpoint)
        with self._one_at_a_time:
            request = pipe.prepare(**dict(settings) | as_settings(pictures))
        check_most("steps", request.config.steps, limits.max_steps)
        check_most("height x width", request.height * request.width, limits.max_pixels)
        return request


class Upload(io.BytesIO):
    """An uploaded picture, which has no path to be named by."""

    def __str__(self) -> str:
        return "the picture"


def as_settings(pictures: tuple[tuple[str, bytes], ...]) -> dict[str, Any]:
    """Pictures as fields of `SampleConfig`; those that are not there are said not to be.

    Raises:
      InputError: one is none.
    """
    found = {place: read_image(Upload(data)) for place, data in pictures}
    keyframes = tuple((place, picture) for place, picture in found.items() if place not in ("first", "last"))
    return {"first_frame": found.get("first"), "last_frame": found.get("last"), "keyframe": keyframes}


def adapters(folder: str | None) -> dict[str, Path]:
    """Files of a folder that may be adapters, by name without suffix."""
    return {} if folder is None else {x.stem: x for x in sorted(Path(folder).glob("*")) if x.suffix in SUFFIXES}


def check_most(what: str, value: int, most: int) -> None:
    """Raises `InputError` where a value is over the server's limit."""
    if value > most:
        raise InputError(f"{what} {value}; up to {most} is accepted by this server; choose less")


def from_text(name: str, value: str) -> Any:
    """A field's value from a form, or from JSON where others write numbers as texts; what it is not stays text."""
    convert = cli.options(ANNOTATIONS[name], recorded.FIELDS[name])
    if "action" in convert:
        return as_bool(name, value)
    return convert.get("type", str)(value)


def as_bool(name: str, value: Any) -> bool:
    """Of JSON or a form."""
    found = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False, "": False}.get(
        value.lower() if isinstance(value, str) else str(value).lower()
    )
    if found is None:
        raise InputError(f"{name} {value!r}; true or false is accepted; change it")
    return found


def read_pictures(body: Mapping[str, Any], files: Mapping[str, list[bytes]]) -> tuple[tuple[str, bytes], ...]:
    """The pictures of a request, by "first", "last" or the place of a keyframe.

    Raises:
      InputError: an item is not of the known form, or two pictures have one place.
    """
    found = [("first", data) for name in ("input_reference", "first_frame") for data in files.get(name, [])]
    found += [("last", data) for data in files.get("last_frame", [])]
    places = [x for x in re.split(r"[,\s]+", str(body.get("keyframe_at") or "")) if x]
    if len(places) != len(files.get("keyframe", [])):
        raise InputError(
            f"{len(files.get('keyframe', []))} keyframe pictures with keyframe_at {','.join(places)!r}; a place each "
            "is accepted, such as 50%,2.5s; give as many"
        )
    found += zip(places, files.get("keyframe", []), strict=True)
    items = body.get("frame_images")
    if items is not None and not isinstance(items, list):
        raise InputError("frame_images; a list is accepted; change it")
    found += [_item(item) for item in items or []]
    names = [place for place, _ in found]
    if twice := [place for place in names if names.count(place) > 1]:
        raise InputError(f"two pictures for {twice[0]}; one is accepted; leave one out")
    if len(found) > MOST_PICTURES:
        raise InputError(f"{len(found)} pictures; up to {MOST_PICTURES} are accepted; leave some out")
    return tuple(found)


def _item(item: Any) -> tuple[str, bytes]:
    """Place and bytes of an item of `frame_images`."""
    accepted = (
        '{"type": "image_url", "image_url": {"url": "data:image/png;base64,.."}, "frame_type": "first_frame"} is '
        "accepted, also last_frame, and keyframe with frame (40, 50% or 2.5s)"
    )
    try:
        url, kind = item["image_url"], item["frame_type"]
        url = url["url"] if isinstance(url, dict) else url
        if kind not in FRAME_TYPES or not isinstance(url, str):
            raise TypeError
        place = {"first_frame": "first", "last_frame": "last"}.get(kind) or str(item["frame"])
    except (TypeError, KeyError, IndexError) as error:
        raise InputError(f"frame_images has {str(item)[:80]!r}; {accepted}; change it") from error
    head, mark, data = url.partition(",")
    if not (mark and re.fullmatch(r"data:image/[a-z+.-]+;base64", head)):
        raise InputError(
            f"frame_images has the address {url[:80]!r}; this server fetches nothing: a data: address with the "
            "picture inside is accepted; or upload it as a form's first_frame or last_frame"
        )
    try:
        return place, base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"frame_images has a picture that is not base64 ({error}); {accepted}; change it") from error


def spoken(line: str) -> str:
    """A line about flags in the words of HTTP's fields: `--guidance-low` is `guidance_low`."""
    return re.sub(r"--([a-z][a-z-]*)", lambda match: match[1].replace("-", "_"), line)
