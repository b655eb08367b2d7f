"""Frames a second from mp4 files to clips of 256x256: decoding, resampling to 16 fps, scaling, cutting.

    python benchmarks/decoding.py [--clips 6] [--seconds 5]

Encodes its own H.264 files first (moving texture, 30 frames a second). Counted are the frames handed out, for which
nearly twice as many have to be decoded. "full quality" is `wanjax.data.videos.Videos`; "decoding alone" is PyAV reading
the same files and making no pictures; the others scale with what loaders commonly take. Clips are read side by side on
all cores, as a loader does. "CPU" is what one core would do alone: frames by processor time, which other programs on
the machine hardly change. Medians of several rounds, the ways taking turns; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image

from wanjax.data.manifest import Row
from wanjax.data.videos import Videos

SOURCES = {"640x360": (360, 640), "1280x720": (720, 1280), "1920x1080": (1080, 1920)}
SIZE = 256
RATE = 30


def encode(path: Path, height: int, width: int, frames: int, seed: int) -> None:
    """A texture that moves, with grain, as a camera gives it."""
    rng = np.random.default_rng(seed)
    grid = PIL.Image.fromarray(rng.integers(0, 256, (18, 32, 3), np.uint8))
    picture = np.asarray(grid.resize((width + 2 * frames, height + frames), PIL.Image.Resampling.BICUBIC))
    grain = rng.integers(0, 8, (height, width, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "23", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for k in range(frames):
            pixels = picture[k : k + height, 2 * k : 2 * k + width] // 32 * 31 + np.roll(grain, 5 * k, axis=1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def decoding_alone(clips: Videos, index: int) -> None:
    with av.open(str(clips.rows[index].path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for _ in container.decode(stream):
            pass


def scaled(name: str) -> Callable[[Videos, int], None]:
    """Frames on the 16 fps grid, scaled by swscale's filter of that name without the precise flags."""

    def read(clips: Videos, index: int) -> None:
        with av.open(str(clips.rows[index].path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            width = round(SIZE * stream.width / stream.height)
            left, taken = (width - SIZE) // 2, 0
            for k, frame in enumerate(container.decode(stream)):
                if (k + 1) / RATE > taken / clips.fps:
                    pixels = frame.to_ndarray(format="rgb24", width=width, height=SIZE, interpolation=name)
                    np.ascontiguousarray(pixels[:, left : left + SIZE])
                    taken += 1

    return read


def full_quality(clips: Videos, index: int) -> None:
    clips[index]


WAYS: dict[str, Callable[[Videos, int], None]] = {
    "full quality": full_quality,
    "bicubic": scaled("BICUBIC"),
    "bilinear": scaled("BILINEAR"),
    "decoding alone": decoding_alone,
}


def measure(clips: Videos, way: Callable[[Videos, int], None], threads: int) -> tuple[float, float]:
    """Frames a second of all clips together, and by processor time."""
    frames = sum(clips.shape(i)[0] for i in range(len(clips)))
    with ThreadPoolExecutor(threads) as pool:
        start, used = time.perf_counter(), time.process_time()
        list(pool.map(lambda index: way(clips, index), range(len(clips))))
        return frames / (time.perf_counter() - start), frames / (time.process_time() - used)


def bench(folder: Path, source: str, count: int, seconds: float, rounds: int, threads: int) -> list[dict[str, Any]]:
    paths = [folder / f"{source}-{k}.mp4" for k in range(count)]
    for k, path in enumerate(paths):
        encode(path, *SOURCES[source], round(seconds * RATE), k)
    frames = int(seconds * 16 - 1) // 4 * 4 + 1
    clips = Videos([Row(p, p.name, "") for p in paths], frames=frames, area=SIZE**2, ratios=(1,))
    runs = [{name: measure(clips, way, threads) for name, way in WAYS.items()} for _ in range(rounds)]

    def row(name: str) -> dict[str, Any]:
        wall, cpu = (statistics.median(run[name][i] for run in runs) for i in range(2))
        ratio = statistics.median(run[name][1] / run["decoding alone"][1] for run in runs)
        return {"source": source, "way": name, "frames_s": wall, "frames_cpu_s": cpu, "of_decoding_alone": ratio}

    return [row(name) for name in WAYS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in args.sources:
            rows += bench(Path(folder), source, args.clips, args.seconds, args.rounds, args.threads)
    print(f"{'source':12s}{'way':18s}{'frames/s':>10s}{'CPU':>10s}{'of decoding alone':>20s}")
    for row in rows:
        figures = f"{row['frames_s']:10.1f}{row['frames_cpu_s']:10.1f}{row['of_decoding_alone']:20.2f}"
        print(f"{row['source']:12s}{row['way']:18s}{figures}")
    print(json.dumps({"size": SIZE, "threads": args.threads, "cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
