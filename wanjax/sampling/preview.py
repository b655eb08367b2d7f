"""Small pictures of latents, cheap enough to be made while they are sampled.

    preview = pipe.preview()                                        # or pipe.preview("taew2_1.safetensors")
    pipe(request, on_step=lambda step: show(preview(step.x0)))      # uint8 [f, h, w, 3], one picture a latent frame
    picture = sheet(preview(latents))                               # all of them in one

`Linear` says a colour for each latent vector, by the linear map that fits the VAE best (least squares). `Tiny` is TAEHV
(github madebyollin/taehv), a small decoder that others trained; without its steps in time, at twice the latents' size.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from wanjax.config import VAEConfig
from wanjax.errors import InputError
from wanjax.files import check_output, replacing
from wanjax.weights.tensors import SafetensorsFile

Preview = Callable[[jax.Array | np.ndarray], np.ndarray]
"""Latents `[1, f, h, w, c]`, normalised, to uint8 pictures `[f, h', w', 3]`."""
PICTURES = (".png", ".jpg", ".webp", ".gif")
SIDE, FRAMES, CLIPS, ELLIPSES = 64, 9, 16, 8
"""Pixels, frames and number of the clips that the linear map is fitted to, and of what is drawn in each."""
NOISE = 0.1
"""Deviation of latents that is to change no colour."""
TIMES = 10
"""How often at most a run's preview is written."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """Colours in [-1, 1] as a linear map of latent vectors.

    first, later: `[c + 1, 3]`, of a video's first latent frame, which is one frame, and of the others, which are four.
    """

    first: np.ndarray
    later: np.ndarray

    def __call__(self, latents: jax.Array | np.ndarray) -> np.ndarray:
        """See `Preview`; of the latents' own size."""
        x = _with_one(np.asarray(latents)[0])
        colours = np.concatenate([x[:1] @ self.first, x[1:] @ self.later])
        return np.round((np.clip(colours, -1, 1) + 1) * 127.5).astype(np.uint8)


def fit(encode: Callable[[np.ndarray], jax.Array | np.ndarray], vae: VAEConfig) -> Linear:
    """The linear map by least squares: of drawn clips, from what the VAE makes of them to the mean colour of each part.

    Args:
      encode: frames `[F, H, W, 3]` in [-1, 1] to latents `[1, f, h, w, c]`.
      vae: of the latents.
    """
    latents, colours = [], []
    for seed in range(CLIPS):
        clip = draw_clip(seed)
        latents.append(_with_one(np.asarray(encode(clip))[0]))
        colours.append(part_colours(clip, vae.temporal_factor, vae.spatial_factor))
    x, y = np.stack(latents), np.stack(colours)  # [k, f, h, w, ..]
    return Linear(_solve(x[:, :1], y[:, :1]), _solve(x[:, 1:], y[:, 1:]))


def _with_one(latents: np.ndarray) -> np.ndarray:
    return np.concatenate([latents, np.ones_like(latents[..., :1])], axis=-1)


def _solve(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares with noise on all but the last of `x`: a network's latents have some that no picture's have."""
    x, y = (z.reshape(-1, z.shape[-1]).astype(np.float64) for z in (x, y))
    noise = np.diag([len(x) * NOISE**2] * (x.shape[-1] - 1) + [0.0])
    return np.linalg.solve(x.T @ x + noise, x.T @ y).astype(np.float32)


def part_colours(video: np.ndarray, n: int, s: int) -> np.ndarray:
    """The mean colour of each latent vector's `n` frames of `s` by `s` pixels: `[F, H, W, 3]` to `[f, h, w, 3]`."""
    _, height, width, _ = video.shape
    whole = np.concatenate([np.repeat(video[:1], n - 1, axis=0), video])  # the first latent frame has one frame only
    return whole.reshape(-1, n, height // s, s, width // s, s, 3).mean(axis=(1, 3, 5))


def draw_clip(seed: int) -> np.ndarray:
    """A clip of ellipses that move over a plain ground: float32 `[F, H, W, 3]` in [-1, 1]."""
    rng = np.random.default_rng(seed)
    ground, colours = rng.uniform(-0.8, 0.8, 3), rng.uniform(-1, 1, (ELLIPSES, 3))
    centres, speeds = rng.uniform(0, SIDE, (ELLIPSES, 2)), rng.uniform(-2, 2, (ELLIPSES, 2))
    radii = rng.uniform(SIDE / 16, SIDE / 3, (ELLIPSES, 2))
    clip = np.broadcast_to(ground, (FRAMES, SIDE, SIDE, 3)).astype(np.float32)
    for t, i in itertools.product(range(FRAMES), range(ELLIPSES)):
        away = [np.arange(SIDE) - (centres[i] + t * speeds[i])[k] for k in (0, 1)]
        inside = (away[0][:, None] / radii[i, 0]) ** 2 + (away[1] / radii[i, 1]) ** 2 < 1
        clip[t, inside] = colours[i]
    return clip


class Tiny:
    """TAEHV's decoder from its file, in float32.

    Args:
      path: `taew2_1.safetensors` or the like.
      channels: of the latents.

    Raises:
      InputError: it cannot be read, is none, or is one of other latents.
    """

    def __init__(self, path: str | Path, channels: int):
        file = SafetensorsFile(Path(path))
        self._layers: dict[int, dict[str, jax.Array]] = {}
        with file.open() as reader:
            for key in (key for key in file.infos if key.startswith("decoder.")):
                index, _, name = key.removeprefix("decoder.").partition(".")
                weight = reader.view(key).astype(np.float32)  # it is small
                if not index.isdecimal():
                    raise InputError(f"{path} has {key}; TAEHV's file (taew2_1.safetensors) is accepted; give it")
                self._layers.setdefault(int(index), {})[name] = jnp.asarray(weight)
        shape = self._layers.get(1, {}).get("weight", np.zeros(())).shape
        if not set(TAEHV) <= self._layers.keys() or len(shape) != 4 or shape[1] != channels:
            raise InputError(
                f"{path} is no TAEHV decoder of {channels} latent channels; for Wan2.1 and Wan2.2-A14B "
                "taew2_1.safetensors is accepted; give that, or leave it out"
            )

    def __call__(self, latents: jax.Array | np.ndarray) -> np.ndarray:
        """See `Preview`; twice the latents' size."""
        return np.asarray(_decode(self._layers, jnp.asarray(latents, jnp.float32)[0]))


TAEHV = {1: "conv", 3: "memory", 4: "memory", 5: "memory", 7: "grow", 8: "conv", 9: "memory", 10: "memory",
         11: "memory", 13: "grow", 14: "conv", 15: "memory", 16: "memory", 17: "memory", 19: "grow", 20: "conv",
         22: "conv"}  # fmt: skip
"""The layers of its decoder that have weights, by their number in the file."""


@jax.jit
def _decode(layers: Mapping[int, Mapping[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Latents `[f, h, w, c]` to uint8 `[f, 2 h, 2 w, 3]`."""
    x = jnp.tanh(x / 3) * 3
    for index, kind in TAEHV.items():
        weights = layers[index]
        if kind == "memory":
            x = _memory(weights, x)
        elif kind == "grow":  # in time it would make two frames of one: of its channels, the later frame's
            x = conv(x, weights["conv.weight"][-x.shape[-1] :])
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2) if index == 7 else x
        else:
            x = conv(x, weights["weight"], weights.get("bias"))
        x = jax.nn.relu(x) if index in (1, 20) else x
    return jnp.round(jnp.clip(x, 0, 1) * 255).astype(jnp.uint8)


def _memory(weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """A residual block that sees the frame before, too."""
    before = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])
    y = jnp.concatenate([x, before], axis=-1)
    for i in (0, 2, 4):
        y = conv(y, weights[f"conv.{i}.weight"], weights[f"conv.{i}.bias"])
        y = jax.nn.relu(y) if i < 4 else y
    return jax.nn.relu(y + (conv(x, weights["skip.weight"]) if "skip.weight" in weights else x))


def conv(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """`[f, h, w, c]` by torch's `[out, in, k, k]`, of the same size."""
    y = jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC"))
    return y if bias is None else y + bias


def sheet(pictures: np.ndarray) -> np.ndarray:
    """Pictures `[f, h, w, 3]` in rows, as one of about 16:9: uint8 `[H, W, 3]`; what is left over is black."""
    f, h, w, _ = pictures.shape
    columns = min(f, max(1, round(math.sqrt(f * h / w * 16 / 9))))
    rows = -(-f // columns)
    whole = np.concatenate([pictures, np.zeros((rows * columns - f, h, w, 3), np.uint8)])
    return whole.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)


def write(path: str | Path, pictures: np.ndarray, fps: float) -> None:
    """Writes pictures `[f, h, w, 3]`: as one, or moving where the name ends in `.gif`.

    Args:
      path: ends as `PICTURES`.
      pictures: of latent frames.
      fps: frames a second of the video, which has four for one here.

    Raises:
      InputError: the path cannot be written.
      OSError: the disk is full or fails.
    """
    target = check_output(path, PICTURES)
    moving = target.suffix.lower() == ".gif"
    images = [PIL.Image.fromarray(x) for x in (pictures if moving else [sheet(pictures)])]
    with replacing(target) as temporary:
        images[0].save(temporary, **(_animation(images, fps) if moving else {}))


def _animation(images: Sequence[PIL.Image.Image], fps: float) -> dict[str, Any]:
    return {"save_all": True, "append_images": images[1:], "duration": max(20, round(4000 / fps)), "loop": 0}


class Writer:
    """What `on_step` calls to write a preview now and then, and at the last step.

    Args:
      preview: makes the pictures.
      path, fps: as `write` takes them.

    A preview that cannot be written ends no run: one line says so, once.
    """

    def __init__(self, preview: Preview, path: str | Path, fps: float):
        self._preview, self._write = preview, functools.partial(write, path, fps=fps)
        self._failed = False

    def __call__(self, done: int, steps: int, x0: jax.Array) -> None:
        """After `done` of `steps` steps the network thinks of the latents as `x0`."""
        if self._failed or (done % max(1, steps // TIMES) and done != steps):
            return
        try:
            self._write(pictures=self._preview(x0))
        except (OSError, InputError) as error:
            self._failed = True
            print(f"note: no more previews ({error})")
