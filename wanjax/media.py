"""Writing videos and arrays, whole or not at all; reading the noise a user gives.

    check_output(path)                 # before the hours of work
    write_video(path, video, fps)      # after them

Everything is written beside its destination under a hidden name and then renamed, so a name never holds half a video;
when writing fails or is interrupted the half is removed.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from wanjax.errors import InputError
from wanjax.files import ARRAY, check_output, replacing


def write_video(path: str | Path, video: np.ndarray, fps: float) -> None:
    """Writes a video as `.mp4` (H.264, BT.709), `.gif`, `.npy` (uint8) or a folder of `00000.png`, `00001.png`, ..

    Args:
      path: as in `check_output`.
      video: `[F, H, W, 3]`, uint8 or floats in [-1, 1].
      fps: frames a second; `.npy` and `.png` do not keep it.

    Raises:
      InputError: `path` cannot be written, or an `.mp4` is asked for with an odd height or width.
      ValueError: the video has another shape, or holds NaN or infinity.
      OSError: the disk is full or fails.
    """
    target = check_output(path)
    frames = to_uint8(video)
    write = {".mp4": _write_mp4, ".gif": _write_gif, ".npy": _write_npy, "": _write_folder}[target.suffix.lower()]
    with replacing(target) as temporary:
        write(temporary, frames, fps)


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


def load_noise(path: str | Path, shape: tuple[int, ...]) -> np.ndarray:
    """Initial noise from an `.npy` file, as float32 of `shape` (`[1, 16, f, h, w]`, channels first as torch has them).

    Raises:
      InputError: the file is missing or no `.npy`, or has another shape, no floats, or values that are not finite.
    """
    accepted = f"accepted: an .npy file of floats of shape {list(shape)}"
    try:
        noise = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"initial noise {path} does not exist; {accepted}; check the path") from error
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"initial noise {path} cannot be read ({reason}); {accepted}; save it with numpy.save"
        ) from error
    if not isinstance(noise, np.ndarray):  # an .npz opens as an archive
        noise.close()
        raise InputError(f"initial noise {path} is an .npz archive; {accepted}; save one array with numpy.save")
    if noise.shape != tuple(shape) or not np.issubdtype(noise.dtype, np.floating):
        given = f"has shape {list(noise.shape)} and dtype {noise.dtype}"
        raise InputError(
            f"initial noise {path} {given}; {accepted}; make it for this height, width and number of frames"
        )
    if not np.isfinite(noise).all():
        raise InputError(f"initial noise {path} holds NaN or infinity; {accepted}; make it anew")
    return noise.astype(np.float32)  # the solver's dtype


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise InputError(
            f"an .mp4 of {height}x{width} (height x width); accepted: even sizes, since colour is stored at half the "
            "resolution; choose even sizes, or write .gif, .npy or .png"
        )
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
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
