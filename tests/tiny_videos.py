"""Small video files, written here."""

from fractions import Fraction

import av
import numpy as np

from wanjax.data.manifest import Row
from wanjax.data.videos import Videos


def encode(path, frames, times=None, rate=16, codec="libx264", edit=None, options=None, pix_fmt=None):
    """Writes frames [F, H, W, 3]; `times` in seconds, else one every 1/rate."""
    container_options = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=container_options) as container:
        options = {"crf": "4", "preset": "veryfast", "g": "12"} | (options or {})
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt or ("yuv444p" if codec == "libx264" else "yuv420p")
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if edit is not None:
            edit(stream)
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = round(1000 * (k / rate if times is None else times[k]))
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def gray(levels, height=48, width=64):
    return np.broadcast_to(np.asarray(levels, np.uint8)[:, None, None, None], (len(levels), height, width, 3))


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def videos(path, *, rows=None, frames=9, area=48 * 64, **options):
    rows = rows or [Row(path, path.name, "caption")]
    return Videos(rows, frames=frames, area=area, **options)
