"""Draws first.png and last.png: one bay, in which the boat crosses and the sun goes down.

    python docs/pictures/draw.py

Only numpy and Pillow; drawn at twice the size and reduced, so that edges are smooth.
"""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image, ImageDraw

HEIGHT, WIDTH, SCALE = 480, 832, 2
HORIZON = 0.62  # of the height
Colour = tuple[int, int, int]


def gradient(top: Colour, bottom: Colour, rows: int) -> np.ndarray:
    """`[rows, 1, 3]` from one colour to the other."""
    share = np.linspace(0, 1, rows)[:, None, None] ** 0.8
    return np.asarray(top) * (1 - share) + np.asarray(bottom) * share


def glow(shape: tuple[int, int], x: float, y: float, radius: float) -> np.ndarray:
    """`[H, W, 1]`, 1 at the centre and falling to 0."""
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    return np.exp(-(np.hypot(columns - x, rows - y) / radius))[..., None]


def hill(draw: ImageDraw.ImageDraw, size: tuple[int, int], height: float, phase: float, colour: Colour) -> None:
    """A range of hills that ends at the horizon."""
    width, horizon = size
    x = np.arange(0, width + 8, 8)
    ridge = np.sin(x / width * 5 + phase) + 0.4 * np.sin(x / width * 13 + 2 * phase)
    y = horizon - height * np.clip(ridge, 0, None)
    draw.polygon([(0, horizon), *zip(x.tolist(), y.tolist(), strict=True), (width, horizon)], fill=colour)


def boat(draw: ImageDraw.ImageDraw, x: float, y: float, size: float) -> None:
    """A hull, a mast and two sails; `x y` is the middle of the waterline."""

    def shape(points: list[tuple[float, float]], colour: Colour) -> None:
        draw.polygon([(x + size * px, y - size * py) for px, py in points], fill=colour)

    shape([(-1.0, 0.28), (1.1, 0.28), (0.75, -0.1), (-0.75, -0.1)], (122, 46, 32))
    shape([(-0.03, 0.28), (0.03, 0.28), (0.03, 2.3), (-0.03, 2.3)], (70, 50, 40))
    shape([(0.08, 0.4), (1.0, 0.4), (0.08, 2.2)], (250, 246, 236))
    shape([(-0.08, 0.4), (-0.8, 0.4), (-0.08, 1.9)], (226, 66, 52))


def scene(
    *, sun: tuple[float, float], boat_x: float, sky: tuple[Colour, Colour], sea: tuple[Colour, Colour]
) -> Image.Image:
    """One picture; positions are shares of width and height."""
    height, width = HEIGHT * SCALE, WIDTH * SCALE
    horizon = round(height * HORIZON)
    sun_x, sun_y, radius = sun[0] * width, sun[1] * height, 0.055 * width
    canvas = np.empty((height, width, 3))
    canvas[:horizon] = gradient(*sky, horizon)
    canvas[horizon:] = gradient(*sea, height - horizon)
    light = np.array([255, 214, 140])
    canvas += 0.8 * glow((height, width), sun_x, sun_y, 2.5 * radius) * (light - canvas)
    rows, columns = np.mgrid[0 : height - horizon, 0:width]
    path = np.exp(-(((columns - sun_x) / (radius * (0.6 + rows / 200))) ** 2)) * (0.5 + 0.5 * np.sin(rows / 7))
    canvas[horizon:] += 0.5 * path[..., None] * (light - canvas[horizon:])
    image = Image.fromarray(np.clip(np.round(canvas), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    ground = Image.new("L", (width, height), 0)
    ImageDraw.Draw(ground).ellipse((sun_x - radius, sun_y - radius, sun_x + radius, sun_y + radius), fill=255)
    ground.paste(0, (0, horizon, width, height))  # the sun sets behind the sea
    image.paste((255, 236, 170), mask=ground)
    hill(draw, (width, horizon), 0.16 * height, 2.6, (96, 116, 128))
    hill(draw, (width, horizon), 0.09 * height, 0.4, (64, 98, 84))
    boat(draw, boat_x * width, 0.76 * height, 0.07 * height)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def main() -> None:
    """Draw both."""
    folder = pathlib.Path(__file__).parent
    day = scene(
        sun=(0.42, 0.22), boat_x=0.22, sky=((70, 140, 210), (190, 220, 235)), sea=((90, 160, 185), (24, 84, 120))
    )
    dusk = scene(
        sun=(0.56, 0.59), boat_x=0.76, sky=((58, 50, 110), (246, 140, 90)), sea=((196, 116, 104), (38, 40, 84))
    )
    for name, picture in (("first", day), ("last", dusk)):
        picture.save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
