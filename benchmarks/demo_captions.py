"""Whether the demo's text encoder says whose each word of a caption is, token by token, as the DiT reads it.

    python benchmarks/demo_captions.py [--checkpoint DIR]...

A caption tells of up to three figures which way each turns, bends and grows. The DiT's cross-attention knows no places
of tokens: that "clockwise" is the cyan triangle's must be in the token's features. Here a small cross-attention is
trained for that alone, which asks by colour and shape and answers turn, bend and growth, and is tried on captions that
it has not seen. Printed is the share of right answers by the number of figures in the caption; a third is chance. The
encoder stays as it is. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from wanjax.cli import exit_codes
from wanjax.conditioning.text import Tokenizer
from wanjax.demo import FOLDER
from wanjax.demo.shapes import COLOURS, SHAPES, Figure, describe_scene, draw_scene
from wanjax.weights import Checkpoint

FIRST_SEED, LEARNED, TRIED = 30_000_000, 6000, 1500
"""Of a seed that no training and no other benchmark takes: captions to learn from, and to try."""
HEADS, WIDTH, STEPS, BATCH = 4, 128, 1500, 256
ANSWERS = ("turn", "bend", "growth")


class Questions(NamedTuple):
    """Of every figure: colour and shape `[n, q]`, answers `[n, 3]` in 0..2, its caption, figures of that."""

    asked: np.ndarray
    answers: np.ndarray
    caption: np.ndarray
    figures: np.ndarray


class Reader(nnx.Module):
    """Cross-attention from a question to the tokens of a caption, and an answer."""

    def __init__(self, asked: int, dim: int, rngs: nnx.Rngs):
        self.ask = nnx.Sequential(nnx.Linear(asked, WIDTH, rngs=rngs), jax.nn.gelu, nnx.Linear(WIDTH, WIDTH, rngs=rngs))
        self.key, self.value = (nnx.Linear(dim, WIDTH, rngs=rngs) for _ in range(2))
        self.out = nnx.Sequential(
            nnx.Linear(WIDTH, WIDTH, rngs=rngs), jax.nn.gelu, nnx.Linear(WIDTH, 3 * len(ANSWERS), rngs=rngs)
        )

    def __call__(self, asked: Any, text: Any, mask: Any) -> jax.Array:
        """`[b, q]`, `[b, l, e]`, `[b, l]` -> logits `[b, answers, 3]`."""
        q, k, v = (x.reshape(*x.shape[:-1], HEADS, -1) for x in (self.ask(asked), self.key(text), self.value(text)))
        scores = jnp.einsum("bhd,blhd->bhl", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
        read = jnp.einsum("bhl,blhd->bhd", weights, v).reshape(len(asked), -1)
        return self.out(read).reshape(-1, len(ANSWERS), 3)


def question(figure: Figure) -> np.ndarray:
    """One-hot colour and shape, which no two figures of a caption share both of."""
    return np.array([figure.colours[0] == name for name in COLOURS] + [figure.shape == name for name in SHAPES], float)


def questions() -> tuple[list[str], Questions]:
    """Captions, and what is asked of each."""
    scenes = [draw_scene(FIRST_SEED + i, "different") for i in range(LEARNED + TRIED)]
    figures = [(figure, i, len(scene.figures)) for i, scene in enumerate(scenes) for figure in scene.figures]
    return [describe_scene(scene) for scene in scenes], Questions(
        np.stack([question(figure) for figure, *_ in figures]),
        np.array([[getattr(figure, name) + 1 for name in ANSWERS] for figure, *_ in figures]),
        np.array([caption for _, caption, _ in figures]),
        np.array([count for *_, count in figures]),
    )


def features(checkpoint: str, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of the checkpoint's text encoder, of deviation 1: `[n, l, e]`; and where there are tokens."""
    opened = Checkpoint(checkpoint)
    umt5 = opened.load("umt5", opened.config("umt5"))
    ids, mask = Tokenizer(f"{checkpoint}/tokenizer", 80)(captions)
    run = jax.jit(lambda umt5, ids, mask: jnp.where(mask[..., None], umt5(ids, mask), 0))
    parts = zip(np.split(ids, 30), np.split(mask, 30), strict=True)
    text = np.concatenate([np.asarray(run(umt5, *part)) for part in parts])
    return text / text.std(), mask


def right(checkpoint: str, captions: list[str], all_questions: Questions) -> dict[str, Any]:
    """Share of right answers on captions that the reader has not seen."""
    text, mask = features(checkpoint, captions)
    reader = Reader(all_questions.asked.shape[1], text.shape[-1], nnx.Rngs(0))
    optimizer = nnx.Optimizer(reader, optax.adam(2e-3), wrt=nnx.Param)

    @nnx.jit
    def step(reader: Reader, optimizer: nnx.Optimizer, answers: Any, *given: Any) -> None:
        def loss(reader: Reader) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(reader(*given), answers).mean()

        optimizer.update(reader, nnx.grad(loss)(reader))

    def given(rows: np.ndarray) -> tuple[np.ndarray, ...]:
        captions_of = all_questions.caption[rows]
        return all_questions.asked[rows], text[captions_of], mask[captions_of]

    rng, learned = np.random.default_rng(0), np.flatnonzero(all_questions.caption < LEARNED)
    for _ in range(STEPS):
        rows = rng.choice(learned, BATCH)
        step(reader, optimizer, all_questions.answers[rows], *given(rows))
    tried = np.flatnonzero(all_questions.caption >= LEARNED)
    answer: Any = nnx.jit(lambda reader, *given: reader(*given).argmax(-1))
    told = np.concatenate([np.asarray(answer(reader, *given(rows))) for rows in np.array_split(tried, 8)])
    hits = told == all_questions.answers[tried]
    counts = all_questions.figures[tried]
    return {
        str(n): dict(zip(ANSWERS, hits[counts == n].mean(0).round(4).tolist(), strict=True)) for n in np.unique(counts)
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", metavar="DIR", help="again for another (default: the demo)")
    checkpoints = parser.parse_args().checkpoint or [str(FOLDER)]
    captions, all_questions = questions()
    found = {}
    print(f"{'text encoder':30} figures  " + "  ".join(f"{name:>7}" for name in ANSWERS))
    for checkpoint in checkpoints:
        found[checkpoint] = right(checkpoint, captions, all_questions)
        for count, shares in found[checkpoint].items():
            print(f"{checkpoint:30} {count:>7}  " + "  ".join(f"{shares[name]:7.1%}" for name in ANSWERS), flush=True)
    print(json.dumps({"captions": TRIED, "right": found}))


if __name__ == "__main__":
    with exit_codes():
        main()
