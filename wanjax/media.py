"""Writing videos and arrays, whole or not at all; reading the noise a user gives.

    check_output(path)                 # before the hours of work
    write_video(path, video, fps)      # after them

Everything is written beside its destination under a hidden name and then renamed, so a name never holds half a video;
when writing fails or is interrupted the half is removed.
"""

from __future__ import annotations

import functools
import math
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from wanjax.errors import InputError
from wanjax.files import ARRAY, Output, check_output, replacing
from wanjax.untrusted import check_file, open_file, reason


def write_video(path: str | Path, video: np.ndarray, fps: float, comment: str = "") -> None:
    """Writes a video as `.mp4` (H.264, BT.709), `.gif`, `.npy` (uint8) or a folder of `00000.png`, `00001.png`, ..

    Args:
      path: as in `check_output`.
      video: `[F, H, W, 3]`, uint8 or floats in [-1, 1].
      fps: frames a second; `.npy` and `.png` do not keep it.
      comment: text that an `.mp4` keeps beside the pictures.

    Raises:
      InputError: `path` cannot be written, or an `.mp4` is asked for with an odd height or width; or as `check_fps`.
      ValueError: the video has another shape, or holds NaN or infinity.
      OSError: the disk is full or fails.
    """
    target = check_output(path)
    check_fps(path, fps)
    frames = to_uint8(video)
    mp4 = functools.partial(_write_mp4, comment=comment)
    write = {".mp4": mp4, ".gif": _write_gif, ".npy": _write_npy, "": _write_folder}[target.suffix.lower()]
    with replacing(target) as temporary:
        write(temporary, frames, fps)


def read_comment(path: str | Path) -> str:
    """The text that `write_video` put beside the pictures of an `.mp4`; empty, if there is none.

    Raises:
      InputError: the file is missing or no video.
    """
    try:
        with av.open(str(check_file(path))) as container:
            return container.metadata.get("comment", "")
    except (OSError, ValueError, av.FFmpegError) as error:
        raise InputError(f"video {path} cannot be read ({reason(error)}); an .mp4 is needed; give another") from error


def video_output(path: str | Path, video: np.ndarray, fps: float, comment: str = "") -> Output:
    """What `wanjax.files.write_all` takes of a video; arguments as those of `write_video`."""
    return Output(
        "video",
        path,
        lambda place: write_video(place, video, fps, comment),
        lambda place: save_array(place, video),
    )


def check_fps(path: str | Path, fps: float) -> None:
    """Whether a file of this kind can keep such a frame rate.

    Raises:
      InputError: it cannot.
    """
    slowest, fastest = {".mp4": (0.01, 1000.0), ".gif": (0.01, 100.0)}.get(Path(path).suffix.lower(), (0.0, math.inf))
    if not slowest <= fps <= fastest:
        raise InputError(
            f"fps {fps:g} in {path}; {slowest:g} to {fastest:g} frames a second are accepted in such a file; "
            "16 is what the model was trained with"
        )


def to_uint8(video: np.ndarray) -> np.ndarray:
    """`[F, H, W, 3]` floats in [-1, 1], clamped, to the nearest uint8; uint8 as it is.

    Raises:
      ValueError: another shape, or a value that is not finite.
    """
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"a video is [F, H, W, 3] and not empty, this is {list(video.shape)}")
    if video.dtype == np.uint8:
        return video
    video = video.astype(np.float32)  # bfloat16 has too few digits for 256 levels
    if not np.isfinite(video).all():
        raise ValueError("the video holds NaN or infinity")
    return np.round((np.clip(video, -1, 1) + 1) * 127.5).astype(np.uint8)


def save_array(path: str | Path, array: np.ndarray) -> None:
    """Writes an array as `.npy`; bfloat16, which that format does not know, as float32.

    Raises:
      InputError: `path` cannot be written.
      OSError: the disk is full or fails.
    """
    target = check_output(path, ARRAY)
    array = np.asarray(array)
    with replacing(target) as temporary:
        np.save(temporary, array.astype(np.float32) if array.dtype.name == "bfloat16" else array, allow_pickle=False)


def load_latents(path: str | Path, channels: int) -> np.ndarray:
    """Latents `[1, c, f, h, w]` of an `.npy` file that sampling wrote, as float32 `[1, f, h, w, c]`.

    Raises:
      InputError: the file is missing or no such array.
    """
    accepted = f"accepted: an .npy file of floats [1, {channels}, f, h, w]; give what --save-latents wrote"
    try:
        latents = read_array(path)
    except (OSError, ValueError) as error:
        raise InputError(f"latents {path} cannot be read ({reason(error)}); {accepted}") from error
    is_shape = latents.ndim == 5 and latents.shape[:2] == (1, channels) and latents.size > 0
    if not is_shape or not np.issubdtype(latents.dtype, np.floating):
        raise InputError(f"latents {path} are {latents.dtype} {list(latents.shape)}; {accepted}")
    if not np.isfinite(latents).all():
        raise InputError(f"latents {path} hold NaN or infinity; {accepted}")
    return np.moveaxis(latents, 1, -1).astype(np.float32)


def load_noise(path: str | Path, shape: tuple[int, ...]) -> np.ndarray:
    """Initial noise from an `.npy` file, as float32 of `shape` (`[1, 16, f, h, w]`, channels first as torch has them).

    Raises:
      InputError: the file is missing or no `.npy`, or has another shape, no floats, or values that are not finite.
    """
    accepted = f"accepted: an .npy file of floats of shape {list(shape)}"
    try:
        noise = read_array(path)
    except FileNotFoundError as error:
        raise InputError(f"initial noise {path} does not exist; {accepted}; check the path") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"initial noise {path} cannot be read ({reason(error)}); {accepted}; save it with numpy.save"
        ) from error
    if noise.shape != tuple(shape) or not np.issubdtype(noise.dtype, np.floating):
        given = f"has shape {list(noise.shape)} and dtype {noise.dtype}"
        raise InputError(
            f"initial noise {path} {given}; {accepted}; make it for this height, width and number of frames"
        )
    with np.errstate(over="ignore"):  # what float32 has no number for is infinite, and told below
        noise = noise.astype(np.float32)  # the solver's dtype
    if not np.isfinite(noise).all():
        raise InputError(f"initial noise {path} holds NaN or infinity; {accepted}; make it anew")
    return noise


def read_array(path: str | Path) -> np.ndarray:
    """The array of an `.npy` file; nothing in it is executed, and no more is read than the file has.

    Raises:
      OSError: as `wanjax.untrusted.open_file`.
      ValueError: it is no such file, or is cut off.
    """
    with open_file(path) as file:
        if file.peek(2)[:2] == b"PK":  # ZIP's
            raise ValueError("an .npz archive, not one array")
        major = np.lib.format.read_magic(file)[0]
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(major)
        if read_header is None:
            raise ValueError(f"version {major} of the format; 1 and 2 are read")
        try:
            shape, fortran_order, dtype = read_header(file)
        except Exception as error:  # it is read by Python's own parser, with all that this raises
            raise ValueError(f"no header of an array ({error})") from error
        if dtype.hasobject or dtype.subdtype or dtype.names or not dtype.itemsize:
            raise ValueError(f"an array of {dtype}, not of numbers")
        size, left = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - file.tell()
        if size != left:
            raise ValueError(f"{left:,} bytes of numbers instead of {size:,} for shape {list(shape)}")
        flat = np.frombuffer(file.read(size), dtype)
        return flat.reshape(shape, order="F" if fortran_order else "C")


def _write_mp4(path: Path, frames: np.ndarray, fps: float, comment: str) -> None:
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise InputError(
            f"an .mp4 of {height}x{width} (height x width); accepted: even sizes, since colour is stored at half the "
            "resolution; choose even sizes, or write .gif, .npy or .png"
        )
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if comment:
            container.metadata["comment"] = comment
        # crf 15 is visually lossless: the model's own artefacts should not be hidden by the codec's.
        stream = container.add_stream("libx264", rate=_rate(fps), options={"crf": "15", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Untagged video is shown as BT.601 by some players and BT.709 by others.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(_to_bt709(picture)))
        container.mux(stream.encode(None))


def _to_bt709(picture: av.VideoFrame) -> av.VideoFrame:
    return picture.reformat(
        format="yuv420p", src_color_range=ColorRange.JPEG, dst_color_range=ColorRange.MPEG,
        dst_colorspace=Colorspace.ITU709, dst_color_primaries=ColorPrimaries.BT709, dst_color_trc=ColorTrc.BT709,
        interpolation="BICUBIC",
    )  # fmt: skip


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)  # 30000/1001 is the finest in use


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    # The format counts hundredths of a second: at 16 fps some frames stand 6 and some 7, so that the whole keeps time.
    ends = np.round(100 / fps * np.arange(len(frames) + 1)).astype(int)
    pictures = [PIL.Image.fromarray(frame).quantize(256) for frame in frames]
    durations = (10 * np.diff(ends)).tolist()
    pictures[0].save(path, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def _write_npy(path: Path, frames: np.ndarray, fps: float) -> None:
    np.save(path, frames, allow_pickle=False)


def _write_folder(path: Path, frames: np.ndarray, fps: float) -> None:
    path.mkdir()
    for index, frame in enumerate(frames):
        PIL.Image.fromarray(frame).save(path / f"{index:05d}.png")
