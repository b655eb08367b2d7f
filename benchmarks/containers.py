"""Every container with every codec that PyAV's wheel encodes: is each frame the one that a player shows?

    python benchmarks/containers.py                          # all cells, and how many are right
    python benchmarks/containers.py --containers avi flv --codecs libx264 --variants bframes

A cell is a file: a container, a codec and a variant. Its pictures carry their numbers, drawn into them; a clip of it
must show the numbers that a player shows, from the file's beginning and from the middle on, and be as long. Where no
such file can be made (no encoder, or the container does not take the codec) there is no cell. Exit code 1 if a cell is
neither right nor refused by name; of files that are whole none may be refused either.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.codec.codec import UnknownCodecError

from wanjax.data.clip import UnusableClip
from wanjax.data.manifest import Row
from wanjax.data.videos import Videos

RATE = 25  # frames a second: exact in the hundredths of seconds of GIF, the milliseconds of Matroska and MPEG's ticks
COUNT = 33  # pictures of a file
HEIGHT, WIDTH, BITS = 64, 96, 6
MIDDLE = 13  # frames, where the second clip starts: behind a keyframe, before the next
TRIMMED = 5  # pictures that an edit list hides at each end

CONTAINERS = {
    "mp4": ("mp4", {"movflags": "faststart"}),
    "fmp4": ("mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "mov": ("mov", {}),
    "mkv": ("matroska", {}),
    "webm": ("webm", {}),
    "avi": ("avi", {}),
    "flv": ("flv", {}),
    "ts": ("mpegts", {}),
    "mpg": ("mpeg", {}),
    "wmv": ("asf", {}),
    "ogv": ("ogg", {}),
    "gif": ("gif", {}),
    "webp": ("webp", {"loop": "0"}),
}
CODECS = (
    *("libx264", "libx265", "libsvtav1", "libvpx", "libvpx-vp9", "mpeg4", "mpeg2video", "mpeg1video", "msmpeg4"),
    *("wmv2", "flv", "h263p", "mjpeg", "prores_ks", "ffv1", "huffyuv", "utvideo", "rawvideo", "qtrle", "png"),
    *("flashsv2", "snow", "dirac", "gif", "libwebp_anim"),
)
ONLY = {
    "ts": ("libx264", "libx265", "mpeg4", "mpeg2video", "mpeg1video"),
    "mpg": ("mpeg2video", "mpeg1video"),
    "ogv": ("libvpx", "dirac"),
    "gif": ("gif",),
    "webp": ("libwebp_anim",),
}
"""Codecs of containers whose writers would take others too, and write what is no such file."""
VARIANTS = (
    "plain",
    "bframes",
    "vfr",
    "bframes vfr",
    "offset",
    "edit list",
    "rotated",
    "odd",
    "no duration",
    "truncated",
)
REORDERING = {
    "libx264": {"bf": "3", "x264-params": "b-adapt=0:open-gop=1"},
    "libx265": {"x265-params": "log-level=none:bframes=3:b-adapt=0:keyint=12:min-keyint=12"},
    "mpeg4": {"bf": "2"},
    "mpeg2video": {"bf": "2"},
    "mpeg1video": {"bf": "2"},
}
OPTIONS = {
    "libx264": {"bf": "0", "preset": "ultrafast", "crf": "10"},
    "libx265": {"x265-params": "log-level=none:bframes=0:keyint=12:min-keyint=12", "preset": "ultrafast", "crf": "10"},
    "libsvtav1": {"preset": "12", "crf": "20", "svtav1-params": "keyint=12"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0", "crf": "4"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "8", "crf": "10"},
    "snow": {"strict": "-2"},
    "mjpeg": {"strict": "-1"},  # else of full range alone, which frames made here are not
}
FORMATS = ("yuv420p", "yuvj420p", "yuv422p", "yuv422p10le", "yuv444p", "rgb24", "bgr24", "gbrp", "bgra", "rgb8")
ODD_FORMATS = ("yuv444p", "yuvj444p", "yuv444p10le", "rgb24", "bgr24", "gbrp", "bgra", *FORMATS)


class Cell(NamedTuple):
    """A file to make."""

    container: str
    codec: str
    variant: str


class Truth(NamedTuple):
    """What a player shows: at frame k of the file's rate `numbers[k]`, and nothing behind the last."""

    numbers: list[int]


def draw(number: int, height: int, width: int) -> np.ndarray:
    """A picture uint8 `[H, W, 3]` of a number: black and white blocks on gray that moves a little."""
    picture = np.full((height, width, 3), 90 + number, np.uint8)
    for bit in range(BITS):
        left, right = (round(width * (bit + x) / BITS) for x in (0.15, 0.85))
        picture[height // 4 : -(height // 4), left:right] = 235 if number >> bit & 1 else 20
    return picture


def read(picture: np.ndarray) -> int:
    """The number of a picture."""
    height, width, _ = picture.shape
    places = [round(width * (bit + 0.5) / BITS) for bit in range(BITS)]
    levels = [picture[height // 2 - 3 : height // 2 + 3, x - 2 : x + 2].mean() for x in places]
    return sum(int(level > 128) << bit for bit, level in enumerate(levels))


class Pipe:
    """A file that cannot be gone back in, so that no header can say how long the video became."""

    def __init__(self, path: Path):
        self._file = path.open("wb")

    def write(self, data: bytes) -> int:
        """Append."""
        return self._file.write(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def impossible(cell: Cell) -> str | None:
    """Why there is no such file, where libav would write something."""
    container, codec, variant = cell
    if codec not in ONLY.get(container, CODECS) or (
        codec in ("gif", "libwebp_anim") and container not in ("gif", "webp")
    ):
        return "the container does not take it"
    if codec == "rawvideo" and container == "mov":
        return "mov takes it, but not of planes"
    if variant == "edit list" and (container not in ("mp4", "mov") or codec == "mpeg1video"):
        return "no edit lists; of MPEG-1, libav hides other frames than the list says"
    if variant == "rotated" and container not in ("mp4", "fmp4", "mov", "mkv"):
        return "no rotation"
    if variant == "offset" and container in ("avi", "gif", "webp"):
        return "no start but 0"
    if "bframes" in variant and codec not in REORDERING:
        return "no B-frames"
    if "vfr" in variant and container in ("mpg", "ogv"):
        return "not every picture has a time"
    return None


def make(path: Path, cell: Cell) -> Truth:
    """Write a cell's file.

    Raises:
      ValueError: there is no such file.
    """
    name, options = CONTAINERS[cell.container]
    if why := impossible(cell):
        raise ValueError(why)
    if cell.variant == "no duration" and name in ("mp4", "mov"):
        options = CONTAINERS["fmp4"][1]
    numbers = [k for k in range(COUNT) if "vfr" not in cell.variant or k % 7 not in (2, 3, 5)]
    target = Pipe(path) if cell.variant == "no duration" else str(path)
    try:
        with av.open(target, "w", format=name, options=options) as container:
            _encode(container, cell, numbers)
    except (av.FFmpegError, UnknownCodecError) as error:
        raise ValueError(str(error)) from error
    finally:
        if isinstance(target, Pipe):
            target.close()
    if cell.variant == "truncated":
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 6 // 10])
    if cell.variant == "edit list":
        trim(path)
        return Truth(list(range(TRIMMED, COUNT - TRIMMED)))
    return Truth([max(n for n in numbers if n <= k) for k in range(COUNT)])


def _encode(container: Any, cell: Cell, numbers: Sequence[int]) -> None:
    height, width = (HEIGHT + 1, WIDTH + 1) if cell.variant == "odd" else (HEIGHT, WIDTH)
    options = {"g": "12"} | OPTIONS.get(cell.codec, {})
    options |= REORDERING.get(cell.codec, {}) if "bframes" in cell.variant or cell.variant == "edit list" else {}
    stream = container.add_stream(cell.codec, rate=RATE, options=options)
    known = [f.name for f in av.Codec(cell.codec, "w").video_formats or ()]
    wanted = ODD_FORMATS if cell.variant == "odd" else FORMATS
    stream.pix_fmt = next((f for f in wanted if f in known), known[0] if known else "yuv420p")
    turn = cell.variant == "rotated"
    stream.height, stream.width = (width, height) if turn else (height, width)
    if cell.codec != "libsvtav1":  # which takes a quality or a rate
        stream.bit_rate = 3_000_000
    stream.codec_context.time_base = stream.time_base = Fraction(1, RATE)
    if turn:
        stream.set_display_rotation(90)
    first = 2 * RATE if cell.variant == "offset" else 0
    for number in numbers:
        pixels = draw(number, height, width)
        pixels = np.rot90(pixels, -1) if turn else pixels
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base, frame.duration = first + number, Fraction(1, RATE), 1
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def trim(path: Path) -> None:
    """Change an mp4's edit list: the first and last pictures are not to be shown."""
    data = bytearray(path.read_bytes())

    def number(place: int) -> int:
        return int.from_bytes(data[place : place + 4], "big")

    movie, track, edits = (data.find(name) + 4 for name in (b"mvhd", b"mdhd", b"elst"))
    if edits < 4 or number(edits + 4) != 1:
        raise ValueError("no edit list of one entry")
    shown, media = Fraction(COUNT - 2 * TRIMMED, RATE), Fraction(TRIMMED, RATE)
    data[edits + 8 : edits + 12] = int(shown * number(movie + 12)).to_bytes(4, "big")
    start = number(edits + 12) + int(media * number(track + 12))
    data[edits + 12 : edits + 16] = start.to_bytes(4, "big")
    path.write_bytes(data)


def check(path: Path, cell: Cell, truth: Truth) -> str:
    """What becomes of a cell: "right", "refused: WHY", or what is wrong."""
    lengths = tuple(range(5, COUNT + 1, 4))
    rows = [Row(path, path.name, ""), Row(path, "middle", "", MIDDLE / RATE)]
    clips = Videos(rows, COUNT, HEIGHT * WIDTH, RATE, lengths, ratios=(WIDTH / HEIGHT,))
    cut = cell.variant == "truncated"
    for index, first in enumerate((0, MIDDLE)):
        try:
            seconds, video = clips.facts(index).seconds, clips[index].video
        except UnusableClip as error:
            return f"refused: {error.reason}" if not index else "right" if cut else f"middle: {error.reason}"
        shown = [read(picture) for picture in video]
        expected = truth.numbers[first:]
        if cut and shown[-2:-1] == shown[-1:]:
            shown.pop()  # a clip of whole seconds shows its last picture once more, see `Videos`
        if shown != (expected + expected[-1:])[: len(shown)]:
            return f"from frame {first}: {shown} instead of {expected}"
        if is_long_as_stored(cell) and abs(seconds * RATE - len(expected)) > 0.51:
            return f"from frame {first}: {seconds * RATE:.2f} frames long instead of {len(expected)}"
    return "right"


def is_long_as_stored(cell: Cell) -> bool:
    """Whether the file knows how long it is: AVI and ASF do not store when the last of reordered
    frames are shown, and libav gives WebP's last one another duration."""
    return cell.variant != "truncated" and not (cell.container in ("avi", "wmv", "webp") and "vfr" in cell.variant)


def cells(containers: Sequence[str], codecs: Sequence[str], variants: Sequence[str]) -> list[Cell]:
    """All of some containers, codecs and variants."""
    return [Cell(*x) for x in ((a, b, c) for a in containers for b in codecs for c in variants)]


def run(chosen: Sequence[Cell], folder: Path) -> dict[Cell, str]:
    """What becomes of each cell of which there is a file."""
    found = {}
    for cell in chosen:
        suffix = "mp4" if cell.container == "fmp4" else cell.container
        path = folder / f"{cell.container} {cell.codec} {cell.variant}.{suffix}"
        try:
            truth = make(path, cell)
        except ValueError:
            continue
        finally:
            if not path.exists():
                path.touch()
        found[cell] = check(path, cell, truth)
        path.unlink()
    return found


def is_good(cell: Cell, result: str) -> bool:
    """Whether a cell is right, or may be refused and is."""
    return result == "right" or (cell.variant == "truncated" and result.startswith("refused: "))


def summary(found: dict[Cell, str]) -> str:
    """How many cells there are, and how many of them are what."""
    kinds = Counter(
        "right" if x == "right" else "refused" if x.startswith("refused") else "wrong" for x in found.values()
    )
    return f"{len(found)} cells: " + ", ".join(f"{kinds[kind]} {kind}" for kind in ("right", "refused", "wrong"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, choices in (("containers", CONTAINERS), ("codecs", CODECS), ("variants", VARIANTS)):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=list(choices), metavar="NAME")
    args = parser.parse_args()
    av.logging.set_level(None)
    with tempfile.TemporaryDirectory() as folder:
        found = run(cells(args.containers, args.codecs, args.variants), Path(folder))
    for cell, result in found.items():
        if result != "right":
            print(f"{' '.join(cell):40s}{result}")
    for container in args.containers:
        print(f"{container:6s}{summary({cell: x for cell, x in found.items() if cell.container == container})}")
    print(summary(found))
    sys.exit(not all(is_good(cell, result) for cell, result in found.items()))


if __name__ == "__main__":
    main()
