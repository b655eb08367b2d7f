"""The demo's data: captioned clips of a few textured shapes that move, turn, grow, change colour and cross each other.

    clip = ProceduralClips(first_seed=0, count=1000, kind="different")[7]   # the clip of seed 7
    caption(7, "different")                                         # its caption, without drawing it

Every clip is a pure function of its seed and kind; held-out clips are those of other seeds. First frame, last frame and
caption determine the frames between; the end frames alone do not: whether a shape goes straight or in an arc, and which
way round it turns, only the caption says. Everything changes at constant speed. Lengths are fractions of the frame, y
points down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np

from wanjax.data.clip import Clip
from wanjax.errors import InputError

Kind = Literal["all", "different", "fine", "heart"]

COLOURS = {
    "red": (0.88, 0.17, 0.17),
    "orange": (0.98, 0.53, 0.12),
    "yellow": (0.98, 0.86, 0.28),
    "green": (0.24, 0.74, 0.33),
    "cyan": (0.28, 0.82, 0.88),
    "blue": (0.20, 0.42, 0.95),
    "purple": (0.58, 0.27, 0.85),
    "pink": (0.98, 0.55, 0.75),
    "white": (0.94, 0.94, 0.92),
}
BACKGROUNDS = {
    "grey": (0.40, 0.42, 0.45),
    "slate": (0.25, 0.31, 0.39),
    "navy": (0.11, 0.15, 0.29),
    "teal": (0.12, 0.30, 0.32),
    "olive": (0.31, 0.34, 0.19),
    "brown": (0.34, 0.25, 0.19),
    "plum": (0.29, 0.17, 0.30),
}
TURNS = {-1: "turns anticlockwise", 1: "turns clockwise"}  # by a quarter
SIZES = {-1: "shrinks", 1: "grows"}
_PATHS = {  # axis of the motion -> bend -> words
    0: {-1: "in an arc up", 0: "straight", 1: "in an arc down"},
    1: {-1: "in an arc left", 0: "straight", 1: "in an arc right"},
}
_WAYS = {  # axis, sign -> words
    (0, 1): "from left to right",
    (0, -1): "from right to left",
    (1, 1): "from top to bottom",
    (1, -1): "from bottom to top",
}

_TAG = 0x5A9E5  # keeps these random numbers apart from others drawn from the same seeds
_STILL = 0.35  # share of the clips of kind "all" whose end frames are nearly equal
_ARC = 0.32  # height of an arc / way along the main axis
_GROWTH = 1.3
_BEAT = 0.5
_MARGIN = 0.13  # centres keep away from the border
_EDGE = 2.5  # softness of edges, pixels
_SAMPLES = {"all": 1, "different": 1, "fine": 2, "heart": 1}  # per pixel and side


class Figure(NamedTuple):
    """One shape and what happens to it.

    shape: a key of `SHAPES` or of `NEW_SHAPES`.
    striped: striped, or shaded from one side to the other.
    colours: names at the first and the last frame.
    verb: "moves" (far), "drifts" (a little) or "stays".
    start, end: centre (x, y) at the first and the last frame.
    bend: the way between: 0 straight; -1 an arc up (of a vertical way: left); 1 down (right).
    radius: of the circle around it, at the first frame.
    growth: -1 shrinks, 0, 1 grows.
    angle: at the first frame, radians.
    turn: quarter turns, clockwise positive: -1, 0, 1.
    beat: how much larger than otherwise it is halfway, a share of its radius; the end frames do not show it.
    """

    shape: str
    striped: bool
    colours: tuple[str, str]
    verb: str
    start: tuple[float, float]
    end: tuple[float, float]
    bend: int
    radius: float
    growth: int
    angle: float
    turn: int
    beat: float = 0.0

    @property
    def axis(self) -> int:
        """The axis it mostly moves along: 0 is x, 1 is y."""
        return int(abs(self.end[1] - self.start[1]) > abs(self.end[0] - self.start[0]))


class Scene(NamedTuple):
    """All about a clip but its size and number of frames.

    figures: from back to front.
    background: names of its two colours.
    waves: rows (cycles along x, cycles along y, phase in radians): the gradient's direction, then two of its texture.
    """

    figures: tuple[Figure, ...]
    background: tuple[str, str]
    waves: np.ndarray


class ProceduralClips:
    """`Clips` of the seeds `first_seed` to `first_seed + count - 1`.

    Args:
      first_seed: not negative.
      count: of clips.
      frames: of every clip, at least 2.
      size: height and width, a multiple of 16.
      kind: "all"; "different": first and last frames differ strongly, for the second stage; "fine": the same scenes as
        "different", drawn with 2x2 samples per pixel, for the third. About two thirds of "all" are exactly the
        "different" clips of the same seeds; in the others hardly anything moves. "heart": as "different", but every
        figure is a heart that beats, which none does in the other kinds, nor is its name in `VOCABULARY`: something new
        to adapt to.

    Raises:
      InputError: an argument is none of these.
    """

    def __init__(self, first_seed: int, count: int, frames: int = 17, size: int = 64, kind: Kind = "all"):
        if kind not in get_args(Kind):
            raise InputError(f"kind {kind!r} of shapes; accepted: {', '.join(get_args(Kind))}; choose one of them")
        if first_seed < 0 or count < 0:
            raise InputError(f"shapes from seed {first_seed}, {count} of them; accepted: 0 or more; change the seeds")
        if frames < 2 or size < 16 or size % 16:
            raise InputError(
                f"shapes of {frames} frames, size {size}; accepted: 2 frames or more, a multiple of 16; change them"
            )
        self.first_seed, self.count, self.frames, self.size = first_seed, count, frames, size
        self.kind: Kind = kind

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Clip:
        """Clip `index`, from 0: that of seed `first_seed + index`."""
        if not 0 <= index < self.count:
            raise IndexError(f"clip {index} of {self.count}")
        scene = self.scene(index)
        return Clip(self.draw(scene), describe_scene(scene), f"shapes-{self.kind}-{self.first_seed + int(index)}")

    def scene(self, index: int) -> Scene:
        """What happens in clip `index`."""
        return draw_scene(self.first_seed + int(index), self.kind)

    def draw(self, scene: Scene) -> np.ndarray:
        """Any scene as these clips are drawn: uint8 `[F, H, W, 3]`."""
        return render(scene, self.frames, self.size, _SAMPLES[self.kind])

    def shape(self, index: int) -> tuple[int, int, int]:
        """Frames, height and width, the same for every clip."""
        return self.frames, self.size, self.size

    def other_caption(self, index: int, rng: np.random.Generator) -> str:
        """A caption of clip `index` that is wrong about one thing, or gives two figures one another's."""
        return describe_scene(_changed(self.scene(index), rng))


def caption(seed: int, kind: Kind = "all") -> str:
    """The caption of a seed's clip, without drawing it."""
    return describe_scene(draw_scene(seed, kind))


# ---------------------------------------------------------------------------------------------------- scene from seed


def draw_scene(seed: int, kind: Kind = "all") -> Scene:
    """The scene of a seed: which shapes, and what happens to them."""
    rng = np.random.default_rng((_TAG, seed))
    far = rng.random() >= _STILL or kind != "all"
    names = [str(name) for name in rng.permutation(list(COLOURS))]  # no two shapes alike
    background = tuple(str(name) for name in rng.permutation(list(BACKGROUNDS))[:2])
    waves = rng.uniform(
        [[-1, -1, 0], [-2, -2, 0], [-2, -2, 0]], [[1, 1, 2 * np.pi], [2, 2, 2 * np.pi], [2, 2, 2 * np.pi]]
    )
    figures: list[Figure] = []
    for i in range(int(rng.choice([1, 2, 3], p=[0.35, 0.45, 0.2]))):
        verb = "drifts" if not far else "stays" if i and rng.random() < 0.15 else "moves"
        drawn = [_draw_figure(rng, verb, (names[i], names[i + 3])) for _ in range(4)]
        # Of some, the one that is best seen in the end frames.
        figures.append(max(drawn, key=lambda figure: _clearance(figure, figures)))
    if kind in NEW_SHAPES:
        figures = [figure._replace(shape=kind, beat=_BEAT) for figure in figures]
    return Scene(tuple(figures), (background[0], background[1]), waves)


def _draw_figure(rng: np.random.Generator, verb: str, colours: tuple[str, str]) -> Figure:
    """A figure whose path stays inside the frame whichever way it bends, so that its ends do not tell the bend."""
    low, high = {"moves": (0.42, 0.7), "drifts": (0.02, 0.08), "stays": (0.0, 0.0)}[verb]
    axis = int(rng.integers(2))
    way = np.array([rng.uniform(low, high), 0.0])  # along its axis and across
    way[1] = rng.uniform(-0.3, 0.3) * way[0]
    reach = np.array([way[0] / 2, abs(way[1]) / 2 + _ARC * way[0]])  # from the middle of the way, any bend
    room = np.maximum(0.5 - _MARGIN - reach, 0)
    middle = 0.5 + rng.uniform(-room, room)
    way[0] *= rng.choice([-1, 1])
    start, end = ((middle + sign * way / 2)[::-1] if axis else middle + sign * way / 2 for sign in (-1, 1))
    changes = verb != "drifts"  # a drifting figure's ends are to be nearly equal
    growth = int(rng.choice([-1, 0, 1])) if changes else 0
    scale = {-1: _GROWTH, 0: rng.uniform(1.0, _GROWTH), 1: 1.0}[growth]  # none is ever too small or too large
    return Figure(
        shape=str(rng.choice(list(SHAPES))),
        striped=bool(rng.random() < 0.5),
        colours=colours if changes and rng.random() < 0.35 else (colours[0], colours[0]),
        verb=verb,
        start=(float(start[0]), float(start[1])),
        end=(float(end[0]), float(end[1])),
        bend=int(rng.choice([-1, 0, 1], p=[0.25, 0.5, 0.25])) if verb != "stays" else 0,
        radius=float(scale * rng.uniform(0.15, 0.19)),
        growth=growth,
        angle=float(rng.uniform(0, 2 * np.pi)),
        turn=int(rng.choice([-1, 0, 1])) if changes else 0,
    )


def _clearance(figure: Figure, others: list[Figure]) -> float:
    """Least distance of its centre from the others', in the two end frames."""
    ends = np.array([(other.start, other.end) for other in others]).reshape(-1, 2, 2)
    return float(np.linalg.norm(ends - [figure.start, figure.end], axis=-1).min(initial=1))


def _changed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with something else happening to a figure, or with two figures' doings exchanged."""
    figures = list(scene.figures)
    i = int(rng.integers(len(figures)))
    figure, way = (
        figures[i],
        str(rng.choice(["bend", "bend", "turn", "growth", "end", "shape", "exchange", "exchange"])),
    )
    if way in ("bend", "turn", "growth") and figure.verb != "stays":
        others = [value for value in (-1, 0, 1) if value != getattr(figure, way)]
        figures[i] = figure._replace(**{way: int(rng.choice(others))})
    elif way == "end" and figure.verb != "stays":
        figures[i] = figure._replace(start=figure.end, end=figure.start)
    elif way == "exchange" and len(figures) > 1:
        j = (i + 1) % len(figures)
        other = figures[j]
        figures[i] = other._replace(shape=figure.shape, colours=figure.colours, striped=figure.striped)
        figures[j] = figure._replace(shape=other.shape, colours=other.colours, striped=other.striped)
    if describe_scene(scene._replace(figures=tuple(figures))) == describe_scene(scene):
        figures[i] = figure._replace(shape=str(rng.choice([name for name in SHAPES if name != figure.shape])))
    return scene._replace(figures=tuple(figures))


# ------------------------------------------------------------------------------------------------------------ caption


def describe_scene(scene: Scene) -> str:
    """The caption, of words of `VOCABULARY`."""
    ground = f"over {_with_article(f'{scene.background[0]} and {scene.background[1]} background')}"
    return "; ".join([*map(_describe_figure, scene.figures), ground])


def _describe_figure(figure: Figure) -> str:
    first, last = figure.colours
    subject = _with_article(f"{'striped ' if figure.striped else ''}{first} {figure.shape}")
    does = [figure.verb]
    if figure.verb != "stays":
        sign = 1 if figure.end[figure.axis] >= figure.start[figure.axis] else -1
        does = [f"{figure.verb} {_PATHS[figure.axis][figure.bend]} {_WAYS[figure.axis, sign]}"]
    does += [TURNS[figure.turn]] if figure.turn else []
    does += [SIZES[figure.growth]] if figure.growth else []
    does += [f"becomes {last}"] if last != first else []
    return f"{subject} {' and '.join(does)}"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# ------------------------------------------------------------------------------------------------------------ drawing


def render(scene: Scene, frames: int, size: int, samples: int = 1) -> np.ndarray:
    """Draw a scene.

    Args:
      scene: what to draw.
      frames: number of frames, evenly spaced in time, the ends included.
      size: height and width.
      samples: per pixel and side; their mean is the pixel.

    Returns:
      Video, uint8 `[F, H, W, 3]`.
    """
    n = size * samples
    grid = (np.arange(n, dtype=np.float32) + 0.5) / n  # centres of samples, [n]
    time = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None]  # [F, 1, 1]
    video = np.repeat(_draw_background(scene, grid)[:, None], frames, axis=1)  # [3, F, n, n]
    for figure in scene.figures:
        cover, light = _draw_figure_at(figure, time, grid, _EDGE / size)  # [F, n, n] each
        first, last = (np.array(COLOURS[name], np.float32)[:, None, None, None] for name in figure.colours)
        video += cover * ((first + (last - first) * time) * light - video)  # [3, F, n, n]
    video = video.reshape(3, frames, size, samples, size, samples).mean((3, 5)) if samples > 1 else video
    return np.ascontiguousarray(
        (np.clip(video, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 3, 0)
    )  # [F, H, W, 3]


def _draw_background(scene: Scene, grid: np.ndarray) -> np.ndarray:
    """A wavy gradient of two colours, `[3, n, n]`."""
    x, y = grid - 0.5, grid[:, None] - 0.5
    (dx, dy, _), *texture = scene.waves.astype(np.float32)
    slope = (dx * x + dy * y) / max(float(np.hypot(dx, dy)), 1e-3)
    waves = sum(np.sin(2 * np.pi * (fx * x + fy * y) + phase) for fx, fy, phase in texture)  # [n, n]
    weight = np.clip(0.5 + 0.8 * slope + 0.14 * waves, 0, 1)  # [n, n]
    first, last = (np.array(BACKGROUNDS[name], np.float32)[:, None, None] for name in scene.background)
    return first + (last - first) * weight + np.float32(0.02) * waves


def _draw_figure_at(figure: Figure, time: np.ndarray, grid: np.ndarray, edge: float) -> tuple[np.ndarray, np.ndarray]:
    """How much of every sample the figure covers, and how brightly it is lit there: `[F, n, n]` each."""
    centre = [a + (b - a) * time for a, b in zip(figure.start, figure.end, strict=True)]
    height = _ARC * abs(figure.end[figure.axis] - figure.start[figure.axis])
    centre[1 - figure.axis] = centre[1 - figure.axis] + figure.bend * height * 4 * time * (1 - time)
    radius = figure.radius * (1 + (_GROWTH**figure.growth - 1) * time) * (1 + figure.beat * 4 * time * (1 - time))
    angle = figure.angle + figure.turn * np.pi / 2 * time
    dx, dy = (grid - centre[0]) / radius, (grid[:, None] - centre[1]) / radius  # [F, 1, n], [F, n, 1]
    x = np.cos(angle) * dx + np.sin(angle) * dy  # [F, n, n], in the figure's own frame and units
    y = np.cos(angle) * dy - np.sin(angle) * dx
    cover = np.clip(0.5 - (SHAPES | NEW_SHAPES)[figure.shape](x, y) * (radius / edge), 0, 1)
    light = 0.9 + 0.14 * np.sin(np.float32(5.5) * x) if figure.striped else 0.9 + 0.14 * np.clip(x, -1, 1)
    return cover, light


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 0.9


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return abs(np.sqrt(x * x + y * y) - 0.7) - 0.27


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) - 0.78


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x) * 0.866 - y * 0.5, y) - 0.55


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: inside all but one of the five lines through them."""
    largest = second = np.full_like(x, -np.inf)
    for angle in 2 * np.pi / 5 * np.arange(5):
        line = x * np.float32(np.sin(angle)) + y * np.float32(np.cos(angle))
        second = np.maximum(second, np.minimum(largest, line))
        largest = np.maximum(largest, line)
    return second - 0.38


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner, and a circle on each of its two upper sides."""
    square = (abs(x) + abs(y - 0.1)) * 0.707 - 0.53
    circles = np.sqrt((abs(x) - 0.375) ** 2 + (y + 0.275) ** 2) - 0.53
    return np.minimum(square, circles)


# Distance from the outline, negative inside, in units of the radius.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "star": _star,
}
# In no clip but those of their own kind.
NEW_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"heart": _heart}

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            word
            for text in (
                "a an striped moves drifts stays over and background becomes",
                *COLOURS,
                *BACKGROUNDS,
                *SHAPES,
                *TURNS.values(),
                *SIZES.values(),
                *_WAYS.values(),
                *(words for paths in _PATHS.values() for words in paths.values()),
            )
            for word in text.split()
        }
    )
)
