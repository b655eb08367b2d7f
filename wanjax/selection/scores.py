"""What a clip's pictures say about its worth for training, in numbers.

    score(video, fps)                    # {"difference": 0.23, "motion": 0.1, ...}, see SCORES
    Distance(checkpoint)(video)          # distance of first and last frame to CLIP
    find_duplicates(fingerprints, 6)     # which clips are nearly others

Needs OpenCV, PySceneDetect and ImageHash: `pip install "wanjax[data]"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from wanjax.conditioning.images import clip_pixels
from wanjax.data.parts import find_cuts
from wanjax.errors import InputError
from wanjax.weights import Checkpoint

_SMALL = 96  # pixels of the shorter side: enough to see change and motion, and without the grain
_NEARLY = 8  # levels of 255 next to black and white
_PAIRS = 16  # of frames whose motion is looked at
_HASHED = 3  # frames whose fingerprints are kept: first, middle, last


def score(video: np.ndarray, fps: float) -> dict[str, float | str]:
    """Scores of a clip: those of `SCORES` that its pictures alone tell, and its `fingerprint`.

    Args:
      video: uint8 `[F, H, W, 3]`, F at least 2. Sharpness is that of this size.
      fps: frames a second.

    Raises:
      InputError: the packages for it are not installed.
    """
    require_packages()
    reduce = max(1, min(video.shape[1:3]) // _SMALL)
    small = np.stack([np.asarray(PIL.Image.fromarray(frame).reduce(reduce)) for frame in video])  # [F, h, w, 3]
    gray = small @ np.array([0.299, 0.587, 0.114], np.float32)  # [F, h, w]
    ends = small[[0, -1]].astype(np.float32)
    scores: dict[str, float | str] = {
        "difference": float(np.abs(ends[1] - ends[0]).mean() / 255),
        "motion": _motion(gray, fps),
        "sharpness": _sharpness(video),
        "exposure": float(gray.mean() / 255),
        "clipped": float(((gray < _NEARLY) | (gray > 255 - _NEARLY)).mean()),
        "cuts": len(find_cuts(small, fps)),
    }
    rounded = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in scores.items()}
    return rounded | {"fingerprint": video_fingerprint(video)}


def require_packages() -> None:
    """Raise InputError unless OpenCV, PySceneDetect and ImageHash are installed."""
    try:
        import cv2  # noqa: F401
        import imagehash  # noqa: F401
        import scenedetect  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"scores need {error.name}, which is not installed; accepted: OpenCV, PySceneDetect and ImageHash; "
            'pip install "wanjax[data]"'
        ) from error


def _motion(gray: np.ndarray, fps: float) -> float:
    """Mean length of the optical flow between neighbouring frames, for some pairs of them."""
    import cv2

    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    frames = gray.round().astype(np.uint8)  # what OpenCV takes
    pairs = np.unique(np.linspace(0, len(frames) - 2, min(_PAIRS, len(frames) - 1)).astype(int))
    empty = np.empty(0, np.float32)
    lengths = [np.linalg.norm(flow.calc(frames[i], frames[i + 1], empty), axis=-1).mean() for i in pairs]
    return float(np.mean(lengths) / gray.shape[1] * fps)


def _sharpness(video: np.ndarray) -> float:
    import cv2

    frames = (cv2.cvtColor(video[i], cv2.COLOR_RGB2GRAY) for i in _spread(len(video)))
    return float(np.median([cv2.Laplacian(frame, cv2.CV_32F).var() for frame in frames]))


class Distance:
    """Distance of a clip's first and last frame to the CLIP vision tower of a checkpoint.

    Frames are compared by the features that the model itself is given (the last block but one), normalised per token
    and averaged over the tokens.

    Raises:
      InputError: the checkpoint has no such tower, or is damaged.
    """

    def __init__(self, checkpoint: str | Path):
        source = Checkpoint(checkpoint)
        self.clip = source.load("clip", source.config("clip"))
        self._compare = jax.jit(_compare)

    def __call__(self, video: np.ndarray) -> float:
        """`[F, H, W, 3]`, uint8, to 1 - cosine."""
        size = self.clip.config.image_size
        pixels = np.stack([clip_pixels(video[i], size) for i in (0, -1)])  # [2, s, s, 3]
        return float(f"{float(self._compare(self.clip, pixels)):.5g}")


def _compare(clip, pixels: jax.Array) -> jax.Array:
    features = clip(pixels).astype(jnp.float32)  # [2, l, e], statistics in float32
    features -= features.mean(-1, keepdims=True)
    features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
    first, last = features.mean(1)  # [e] each
    return 1 - first @ last / (jnp.linalg.norm(first) * jnp.linalg.norm(last))


# ---------------------------------------------------------------------------------------------------- near duplicates


def video_fingerprint(video: np.ndarray) -> str:
    """Perceptual hashes of first, middle and last frame, 64 bits each, in hexadecimal."""
    import imagehash

    return "".join(str(imagehash.phash(PIL.Image.fromarray(video[i]))) for i in _spread(len(video)))


def find_duplicates(fingerprints: Sequence[str], bits: int) -> dict[int, int]:
    """Which clips are nearly others.

    Args:
      fingerprints: of the clips, the preferred ones first.
      bits: of 64 that may differ in each of the frames compared.

    Returns:
      Index of a clip -> index of an earlier one, itself no duplicate, that it nearly equals.
    """
    words = [int(text[i : i + 16], 16) for text in fingerprints for i in range(0, 16 * _HASHED, 16)]
    words = np.array(words, np.uint64).reshape(-1, _HASHED)  # [n, 3]
    duplicates: dict[int, int] = {}
    unique: list[int] = []
    known = np.empty(words.T.shape, np.uint64)  # [3, n]: the words of `unique`, then room
    for index, word in enumerate(words):
        near = np.flatnonzero(np.bitwise_count(known[0, : len(unique)] ^ word[0]) <= bits)  # few pass
        for frame in range(1, _HASHED):
            near = near[np.bitwise_count(known[frame, near] ^ word[frame]) <= bits]
        if len(near):
            duplicates[index] = unique[int(near[0])]
        else:
            known[:, len(unique)] = word
            unique.append(index)
    return duplicates


def _spread(frames: int) -> list[int]:
    return np.linspace(0, frames - 1, _HASHED).round().astype(int).tolist()
