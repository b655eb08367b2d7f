"""From picture files to what the VAE and CLIP see (Wan2.1 `wan/first_last_frame2video.py`, `wan/modules/clip.py`).

    picture = read_image(path)
    height, width = choose_size(picture, area, 16)           # or the user's own
    frames = match_frames([first, last], height, width, 16)  # both show the same field
    video_pixels(frame, height, width)                       # [H, W, 3] for the VAE
    clip_pixels(frame, 224)                                  # [224, 224, 3] for CLIP

Two conventions: "official" is what the model was trained with, "diffusers" is what that library does instead. They
differ in how pictures are resized, which is visible in the video.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps

from wanjax.errors import InputError
from wanjax.untrusted import open_file, reason

Picture = PIL.Image.Image | np.ndarray
Conventions = Literal["official", "diffusers"]

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's names of those that are opened. It knows others, and runs programs for some: Ghostscript for PostScript."""
MOST_PIXELS = 2**27
"""Of a picture that is unpacked: half a GB of memory, whatever the few bytes of its file are."""
_TOO_LARGE = f"too large a picture; up to {MOST_PIXELS:,} pixels are accepted; make it smaller"
ACCEPTED = "accepted: PNG, JPEG, WebP, BMP, GIF or TIFF with 8 or 16 bits a channel"


@contextlib.contextmanager
def _silent_pillow() -> Iterator[None]:
    """Without what it says of damage beside the pixels, and of sizes, which have a limit here."""
    log = logging.getLogger("PIL")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def read_image(path: str | Path | BinaryIO | Picture) -> PIL.Image.Image:
    """The picture in a file, open or to be opened, or one that is there already, upright, as 8-bit RGB.

    EXIF orientation is applied, unless EXIF is damaged; colours of an embedded profile (a phone's Display P3) become
    sRGB; transparency is laid on white, 16-bit gray scaled to 8 bits; of an animation the first picture is taken.

    Raises:
      InputError: the file is missing, is not a picture of `FORMATS`, is damaged, or has more than `MOST_PIXELS`.
    """
    if isinstance(path, PIL.Image.Image):
        return as_rgb(in_srgb(upright(path)))
    if isinstance(path, np.ndarray):
        return as_rgb(path)
    try:
        opened = open_file(path) if isinstance(path, (str, Path)) else contextlib.nullcontext(path)
        with opened as file, _silent_pillow():
            return _unpacked(file)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"image {path} does not exist; {ACCEPTED}; check the path") from error
    except PIL.UnidentifiedImageError as error:
        raise InputError(f"{path} is not a picture; {ACCEPTED}; convert or replace it") from error
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"{path}: {_TOO_LARGE}") from error
    # What the many readers make of damage has no common base.
    except Exception as error:
        raise InputError(f"image {path} cannot be read ({reason(error)}); {ACCEPTED}; convert or replace it") from error


def _unpacked(file: BinaryIO) -> PIL.Image.Image:
    """The picture in an open file."""
    with PIL.Image.open(file, formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise InputError(f"{width}x{height} pixels: {_TOO_LARGE}")
        picture.load()
        return as_rgb(in_srgb(upright(picture)))


def upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as its EXIF turns it; as it is where that is damaged, as browsers show it."""
    try:
        return PIL.ImageOps.exif_transpose(picture)
    except Exception:  # what the reader makes of damage has no common base
        return picture


def in_srgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture with its embedded colour profile applied; as it is where it has none, or a damaged one.

    diffusers takes the numbers as they are: this is a difference to what it makes of such a picture.
    """
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    try:
        given = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = "RGBA" if picture.has_transparency_data else "RGB"
        source = picture.convert(mode) if mode == "RGBA" or picture.mode == "P" else picture
        converted = PIL.ImageCms.profileToProfile(source, given, PIL.ImageCms.createProfile("sRGB"), outputMode=mode)
    except (PIL.ImageCms.PyCMSError, OSError, ValueError):  # damaged, or of other channels
        return picture
    if converted is None or (source.mode == mode and _nearly_same(source, converted)):
        return picture  # it is sRGB, whose numbers would only be rounded anew
    return converted


def _nearly_same(a: PIL.Image.Image, b: PIL.Image.Image) -> bool:
    return int(np.abs(np.asarray(a).astype(np.int16) - np.asarray(b)).max(initial=0)) <= 2  # of 255


def as_rgb(picture: Picture) -> PIL.Image.Image:
    """`picture` as an 8-bit RGB image: a PIL image of any mode, or a uint8 array `[H, W, 3]`.

    Raises:
      InputError: an array of another kind, or a mode without a fixed range (32-bit integers, floats).
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
            raise InputError(f"array {picture.dtype} {list(picture.shape)}; accepted: uint8 [H, W, 3]; convert it")
        return PIL.Image.fromarray(picture)
    if picture.mode.startswith("I;16"):  # Pillow itself would clip everything above 255 to white
        gray = np.asarray(picture).astype(np.float32) / 257
        return PIL.Image.fromarray(gray.round().astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise InputError(f"pixels of Pillow mode {picture.mode} have no fixed range; {ACCEPTED}; convert it")
    if picture.has_transparency_data:  # dropping alpha would bring out whatever colour hides behind it
        rgba = picture.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


def choose_size(first: Picture, area: int, step: int) -> tuple[int, int]:
    """Height and width of a video of about `area` pixels with the first frame's aspect ratio: the official choice.

    Each side is rounded down to a multiple of `step`, the pixels of one DiT token. As in the official code the square
    root may fall a hair short of a whole step and lose it: 832x480 at an area of 480*832 gives 832x464.

    Raises:
      InputError: a side would be shorter than one step.
    """
    width, height = as_rgb(first).size
    aspect = height / width
    size = tuple(int(math.sqrt(x) // step) * step for x in (area * aspect, area / aspect))
    if min(size) < step:
        raise InputError(
            f"first frame {width}x{height} at an area of {area} pixels gives a side under {step} pixels; "
            "accepted: larger areas or less narrow pictures; set height and width, or crop the picture"
        )
    return size[0], size[1]


def match_frames(
    frames: Sequence[Picture], height: int, width: int, step: int, conventions: Conventions = "official"
) -> list[PIL.Image.Image]:
    """Cut the given frames, first one first, so that all show the same field when stretched to the video's size.

    The first frame is kept whole if scaling it to cover the video leaves at most one size step over on a side: the
    official size choice leaves that much, and the official preprocessing squeezes it in. Otherwise it is cut to the
    video's aspect ratio. The others are cut to what the first one then has; a frame of the same aspect ratio is left
    as it is. (The official code means to do this with the last frame, but swaps the axes and never scales. Cutting
    first and scaling later is scaling to cover and cutting then, with one resampling less.)

    diffusers stretches every frame instead, so under its conventions nothing is cut.
    """
    pictures = [as_rgb(frame) for frame in frames]
    if conventions == "diffusers":
        return pictures
    w, h = pictures[0].size
    # What is left over at each side after covering, times the picture's side: integers, because the limit is met often.
    over_h, over_w = h * width - w * height, w * height - h * width
    whole = over_h <= step * w and over_w <= step * h
    field = (w, h) if whole else (width, height)
    return [crop_to_aspect(picture, *field) for picture in pictures]


def crop_to_aspect(picture: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """The largest centred part of `picture` with the aspect ratio `width / height`, to the nearest pixel."""
    w, h = picture.size
    new_w = max(1, min(w, round(h * width / height)))
    new_h = max(1, min(h, round(w * height / width)))
    if (new_w, new_h) == (w, h):
        return picture
    left, top = (w - new_w) // 2, (h - new_h) // 2
    return picture.crop((left, top, left + new_w, top + new_h))


def video_pixels(picture: Picture, height: int, width: int, conventions: Conventions = "official") -> np.ndarray:
    """A frame as the VAE sees it: float32 `[H, W, 3]`, stretched to the video's size.

    Black is -1 and white 1; the official bicubic overshoots these at edges and is not clamped.
    """
    image = as_rgb(picture)
    if conventions == "diffusers":
        return _unit(image.resize((width, height), PIL.Image.Resampling.LANCZOS)) * 2 - 1
    return resize_bicubic(_signed(image), height, width)


def clip_pixels(picture: Picture, size: int, conventions: Conventions = "official") -> np.ndarray:
    """A frame as CLIP sees it: float32 `[size, size, 3]`, normalised with CLIP's mean and deviation.

    Official: the whole picture, at its own resolution, squeezed to a square. diffusers: the shorter side scaled to
    `size` with an antialiased filter, the middle cut out.
    """
    image = as_rgb(picture)
    if conventions == "diffusers":
        short = min(image.size)
        scaled_w, scaled_h = (size * side // short for side in image.size)
        image = image.resize((scaled_w, scaled_h), PIL.Image.Resampling.BICUBIC)
        left, top = (scaled_w - size) // 2, (scaled_h - size) // 2
        pixels = _unit(image.crop((left, top, left + size, top + size)))
    else:
        pixels = resize_bicubic(_signed(image), size, size) * np.float32(0.5) + np.float32(0.5)
    return (pixels - CLIP_MEAN) / CLIP_STD


def _unit(image: PIL.Image.Image) -> np.ndarray:
    """8-bit RGB to float32 `[H, W, 3]` in [0, 1]."""
    return np.asarray(image).astype(np.float32) / np.float32(255)


def _signed(image: PIL.Image.Image) -> np.ndarray:
    """8-bit RGB to float32 `[H, W, 3]` in [-1, 1]."""
    return (_unit(image) - np.float32(0.5)) / np.float32(0.5)


def resize_bicubic(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic resize without antialiasing of float32 `[h, w, c]` to `[height, width, c]`.

    Equals torch's `interpolate(mode="bicubic", align_corners=False)`: kernel parameter -0.75, pixel centres aligned,
    edges repeated, no clamp.
    """
    pixels = _resize_rows(pixels.swapaxes(0, 1), width)  # [width, h, c]
    return _resize_rows(pixels.swapaxes(0, 1), height)  # [height, width, c]


def _resize_rows(pixels: np.ndarray, new_size: int) -> np.ndarray:
    """`[size, ..]` -> `[new_size, ..]`: each new row is a weighted sum of the four rows around its position."""
    size = len(pixels)
    # Rounded to float32 where torch rounds: the scale, then once more after a fused multiply-add. At coordinate 2000
    # that rounding already shows in the fourth digit of the weights.
    scale = np.float64(np.float32(size) / np.float32(new_size))
    position = (scale * (np.arange(new_size) + 0.5) - 0.5).astype(np.float32)
    left = np.floor(position)
    taps = np.arange(-1, 3, dtype=np.float32)
    distance = np.abs((position - left)[:, None] - taps)  # [new_size, 4]
    a = np.float32(-0.75)
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1  # within one pixel
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a  # within two
    weight = np.where(distance <= 1, near, far)
    index = np.clip(left[:, None] + taps, 0, size - 1).astype(np.int32)  # [new_size, 4]
    return np.einsum("nk,nk...->n...", weight, pixels[index])  # [new_size, ..]
