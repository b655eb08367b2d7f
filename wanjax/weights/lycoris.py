"""What LoKr and LoHa files add to a weight: products that are not of two factors.

LoKr (arXiv 2212.10650)   W1 x W2, Kronecker's product; each in full, or the product of two factors `_a` and `_b`
LoHa (arXiv 2108.06098)   (w1_a @ w1_b) * (w2_a @ w2_b), element by element

Keys are `lokr_w1`, `lokr_w2_a`, `hada_w1_a` and so on, PEFT's and LyCORIS'. Source: github KohakuBlueleaf/LyCORIS
`lycoris/functional`; PEFT `tuners/lokr`, `tuners/loha`. Tucker's cores (`lokr_t2`, `hada_t1`), which only convolutions
of more than one cell have, are not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from wanjax.weights.mapping import Shape

NAMES = (
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
)


def rank(shapes: Mapping[str, Shape]) -> int | None:
    """Of the factors; None where LoKr has both of its matrices in full, which then count as they are."""
    named = next((shapes[name] for name in ("lokr_w1_b", "lokr_w2_b", "hada_w1_b") if name in shapes), None)
    return named[0] if named else None


def shape(shapes: Mapping[str, Shape]) -> Shape | None:
    """The weight's shape that tensors of these shapes make, convolutions as matrices; None: they make none."""
    if any(name.startswith("hada_") for name in shapes):
        one, two = (_product(shapes, f"hada_w{i}") for i in (1, 2))
        return one if one == two else None
    one, two = (_product(shapes, f"lokr_w{i}") for i in (1, 2))
    return None if one is None or two is None else (one[0] * two[0], one[1] * two[1])


def _product(shapes: Mapping[str, Shape], name: str) -> Shape | None:
    names = {part for part in shapes if part.startswith(name)}
    if names == {name}:
        whole = shapes[name]
        return (whole[0], math.prod(whole[1:])) if len(whole) > 1 else None
    a, b = (shapes.get(f"{name}_{part}", ()) for part in "ab")
    fits = names == {f"{name}_a", f"{name}_b"} and len(a) == 2 and len(b) > 1 and a[1] == b[0] > 0
    return (a[0], math.prod(b[1:])) if fits else None


def difference(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """What is added to the weight but for its scale: float32 `[out, in]`.

    Args:
      tensors: by `NAMES`, of shapes that `shape` found good.
    """
    kind = "hada" if any(name.startswith("hada_") for name in tensors) else "lokr"
    one, two = (_matrix(tensors, f"{kind}_w{i}") for i in (1, 2))
    return one * two if kind == "hada" else np.kron(one, two)


def _matrix(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name in tensors:
        return tensors[name].reshape(len(tensors[name]), -1)
    b = tensors[f"{name}_b"]
    return tensors[f"{name}_a"] @ b.reshape(len(b), -1)
