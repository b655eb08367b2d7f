"""What people see of a drawn clip and PSNR does not: whether shapes are whole, have their corners, and turn as told.

A silhouette is how far a pixel is from the background, which the clip's scene without figures is: 0, or 1 from `CLEAR`
on; so neither stripes nor colours count, only outlines.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from wanjax.demo.shapes import Figure, ProceduralClips, Scene

DIFFERS = 40
"""A pixel is a figure's if it differs from the background by more, of 255, in one of its colours."""
CLEAR = 2 * DIFFERS
ROUND = ("circle", "ring")
"""Shapes without corners, whose outline does not show that they turn."""

KINDS: dict[str, Callable[[Scene], bool]] = {
    "straight": lambda scene: not any(figure.bend for figure in scene.figures),
    "arc": lambda scene: any(figure.bend for figure in scene.figures),
    "turning": lambda scene: any(figure.turn for figure in scene.figures),
    "growing": lambda scene: any(figure.growth for figure in scene.figures),
    "colour change": lambda scene: any(figure.colours[0] != figure.colours[1] for figure in scene.figures),
    "one figure": lambda scene: len(scene.figures) == 1,
    "several figures": lambda scene: len(scene.figures) > 1,
}
"""Kinds of motion, which overlap: a clip is of a kind if one of its figures is, "straight" if all are."""


def silhouette(video: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Videos `[F, H, W, 3]` in [0, 255] to float32 `[F, H, W]` in [0, 1]."""
    return np.clip(np.abs(video.astype(np.float32) - background).max(-1) / CLEAR, 0, 1)


def iou(ours: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two silhouettes `[F, H, W]`: mean over frames; 1 where neither has a figure."""
    a, b = ours > DIFFERS / CLEAR, truth > DIFFERS / CLEAR
    both, either = ((a & b).sum((1, 2)), (a | b).sum((1, 2)))  # [F] each
    return float(np.mean(np.where(either, both / np.maximum(either, 1), 1.0)))


def edges(ours: np.ndarray, truth: np.ndarray) -> float:
    """Likeness of the outlines of two silhouettes, at most 1: of their gradients; a soft or displaced one is unlike."""
    return _dice(np.stack(_gradients(ours)), np.stack(_gradients(truth)))


def corners(ours: np.ndarray, truth: np.ndarray) -> float:
    """Likeness of the corners of two silhouettes, at most 1: a round shape has hardly any, a soft one is weak."""
    return _dice(_cornerness(ours), _cornerness(truth))


def has_corners(scene: Scene) -> bool:
    """Whether `corners` has something to compare."""
    return any(figure.shape not in ROUND for figure in scene.figures)


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * np.sum(a * b) / max(np.sum(a * a) + np.sum(b * b), 1e-9))


def _gradients(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    dy, dx = np.gradient(x, axis=(1, 2))
    return dy, dx


def _cornerness(x: np.ndarray) -> np.ndarray:
    """Root of the smaller eigenvalue of the structure tensor (Shi and Tomasi 1994), `[F, H, W]`."""
    dy, dx = _gradients(x)
    yy, yx, xx = (_blur(product) for product in (dy * dy, dy * dx, dx * dx))
    smaller = (yy + xx) / 2 - np.sqrt(((yy - xx) / 2) ** 2 + yx * yx)
    return np.sqrt(np.maximum(smaller, 0))


def _blur(x: np.ndarray, deviation: float = 1.2) -> np.ndarray:
    """A Gaussian over height and width."""
    offsets = np.arange(-4, 5)
    window = np.exp(-(offsets**2) / (2 * deviation**2))
    window /= window.sum()
    for axis in (1, 2):
        widths = [(0, 0)] * 3
        widths[axis] = (4, 4)
        x = np.lib.stride_tricks.sliding_window_view(np.pad(x, widths, mode="edge"), len(window), axis) @ window
    return x


def turns_right(video: np.ndarray, clips: ProceduralClips, index: int) -> bool | None:
    """Whether every figure with corners that turns in clip `index` turns in `video` as its caption says.

    The video is nearer to the clip than to any in which the figure turns the other way or does not turn: from the first
    frame on, up to the last, or, as both end frames are given, the one up to the middle and then the other. None:
    nothing with corners turns.
    """
    scene, right = clips.scene(index), []
    truth = clips.draw(scene)
    for i, figure in enumerate(scene.figures):
        if figure.turn and figure.shape not in ROUND:
            others = [other for turn in (-figure.turn, 0) for other in _turning(clips, scene, i, turn)]
            right.append(_distance(video, truth) < min(_distance(video, other) for other in others))
    return all(right) if right else None


def _turning(clips: ProceduralClips, scene: Scene, i: int, turn: int) -> list[np.ndarray]:
    """The clip in which figure `i` turns so: from the first frame on, up to the last, and both."""
    figure, middle = scene.figures[i], clips.frames // 2
    final = figure.angle + figure.turn * np.pi / 2
    from_first, to_last = (
        clips.draw(_with(scene, i, figure._replace(turn=turn, angle=angle)))
        for angle in (figure.angle, final - turn * np.pi / 2)
    )
    return [from_first, to_last, np.concatenate([from_first[:middle], to_last[middle:]])]


def _with(scene: Scene, i: int, figure: Figure) -> Scene:
    return scene._replace(figures=(*scene.figures[:i], figure, *scene.figures[i + 1 :]))


def _distance(video: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean((video[1:-1].astype(np.float32) - other[1:-1]) ** 2))
