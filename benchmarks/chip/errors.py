"""Every kernel of the platform against float64, beside the error of JAX without a kernel in the same format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chip.measuring import Row, compared

from sharding import ring
from wanjax.config import Attention
from wanjax.models.products import activated, identity, plain_products, products, quantized_product
from wanjax.ops import norms
from wanjax.ops.attention import kernel, reference_backward, reference_forward, summed_attention
from wanjax.ops.quantized import quantize_weight

BF16 = jnp.bfloat16
HEAD_DIM = 128


def random(*shape: int, seed: int, dtype: Any = BF16, scale: float = 1.0) -> jax.Array:
    """Normal random numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)


def exact(q: Any, k: Any, v: Any, dout: Any = None) -> tuple[np.ndarray, ...]:
    """Attention `[b, n, l, d]` and its log-sum-exp in float64; with `dout`, also the three gradients and `delta`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    scores = q @ k.swapaxes(2, 3) * scale
    top = scores.max(-1, keepdims=True)
    lse = top + np.log(np.exp(scores - top).sum(-1, keepdims=True))
    weights = np.exp(scores - lse)
    out = weights @ v
    if dout is None:
        return out, lse[..., 0]
    dout = np.asarray(dout, np.float64)
    delta = np.sum(out * dout, -1)
    dscores = weights * (dout @ v.swapaxes(2, 3) - delta[..., None]) * scale
    gradients = dscores @ k, dscores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dout
    return out, lse[..., 0], *gradients, delta


def attention_errors(small: bool) -> Iterator[Row]:
    """Forward with many keys and with few, a part of a block among them, in both formats; backward."""
    queries = 256 if small else 1024
    plain = partial(reference_forward, valid=None, dtype=BF16)
    for name, keys in (("many keys", 600 if small else 8016), ("few keys", 200 if small else 1900)):
        q, k, v = (random(1, 1, n, HEAD_DIM, seed=i) for i, n in enumerate((queries, keys, keys)))
        told, wanted = f"{queries} x {keys}", exact(q, k, v)
        choices: tuple[tuple[str, Attention], ...] = ("bf16", "auto"), ("8 bits", "int8fp8")
        for format, choice in choices:
            run = partial(kernel(choice).forward, valid=None, dtype=BF16)
            yield compared(f"attention forward, {format}, {name}", told, run, (q, k, v), wanted, plain)
    q, k, v, dout = (random(1, 1, n, HEAD_DIM, seed=i) for i, n in enumerate((queries, keys, keys, queries)))
    _, lse, *gradients, delta = exact(q, k, v, dout)
    given = q, k, v, None, jnp.asarray(lse, jnp.float32), jnp.asarray(delta, jnp.float32), dout
    yield compared("attention backward, bf16", told, kernel().backward, given, gradients, reference_backward)


def sum_errors(small: bool) -> Iterator[Row]:
    """Attention to text and images, summed; and the sum of what a ring's hops return."""
    queries = 256 if small else 2048
    q = random(1, queries, 2, HEAD_DIM, seed=0)
    pairs = [random(1, n, 2, HEAD_DIM, seed=n + i) for n in (512, 514) for i in range(2)]
    heads = [np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, *pairs)]
    wanted = (exact(heads[0], *heads[1:3])[0] + exact(heads[0], *heads[3:])[0]).swapaxes(1, 2)
    yield compared("attention to text and images", f"{queries} x (512, 514)", summed_attention, (q, *pairs), wanted)

    shape, float32 = (1, 2, queries), jnp.float32
    outs = [random(*shape, HEAD_DIM, seed=i, dtype=float32) for i in range(2)]
    sums = [random(*shape, seed=i + 2, dtype=float32) for i in range(2)]
    parts = list(zip(outs, sums, strict=True))
    (one, one_lse), (other, other_lse) = jax.tree.map(lambda x: np.asarray(x, np.float64), parts)
    lse = np.logaddexp(one_lse, other_lse)
    merged = np.exp(one_lse - lse)[..., None] * one + np.exp(other_lse - lse)[..., None] * other
    yield compared("sum of two hops", f"{queries}", partial(ring.merge, dtype=float32), parts, (merged, lse))


def product_errors(small: bool) -> Iterator[Row]:
    """With as many channels as are summed at once, and more; with an activation; in 8 bits."""
    for rows, width, out in ((64, 128, 128), (64, 256, 128)) if small else ((2048, 5120, 1024), (2048, 13824, 1024)):
        x, matrix = random(1, rows, width, seed=0), random(width, out, seed=1, scale=width**-0.5)
        bias, told = random(out, seed=2), f"{rows} x {width} x {out}"
        wanted = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64) + np.asarray(bias, np.float64)
        weights = ((matrix, bias),)
        yield compared("product, bf16", told, products, (x, weights), (wanted,), plain_products)
        gelu = 0.5 * wanted * (1 + np.tanh((2 / np.pi) ** 0.5 * (wanted + 0.044715 * wanted**3)))
        run = partial(activated, activation=jax.nn.gelu)
        yield compared("product and GELU, bf16", told, run, (x, weights), gelu)
        for format in ("int8", "fp8"):
            bits, scale = jax.jit(partial(quantize_weight, format=format))(matrix)
            run = partial(quantized_product, activation=identity)
            yield compared(f"product, {format}", told, run, (x, bits, scale, bias), wanted)


def norm_errors(small: bool) -> Iterator[Row]:
    """Against the same function of float32, which no kernel takes."""
    rows, width = (64, 256) if small else (2048, 5120)
    x, y = (random(1, rows, width, seed=i) for i in range(2))
    gate, factor, shift = (random(1, 1, width, seed=i, dtype=jnp.float32) for i in range(3))
    angles = np.random.default_rng(0).uniform(0, 6, (rows, HEAD_DIM // 2)).repeat(2, axis=1)
    tables = [jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)]
    cases: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {
        "layer norm": (norms.layer_norm, (x, factor, shift)),
        "gated sum, layer norm": (norms.gated_layer_norm, (x, y, gate, factor, shift)),
        "sum, layer norm": (norms.added_layer_norm, (x, y, factor, shift)),
        "gated sum": (lambda *args, eps: norms.gated_sum(*args), (x, y, gate)),
        "RMS norm": (norms.rms_norm, (x, factor[0, 0])),
        "RMS norm, rotation": (norms.rms_norm_rotate, (x, factor[0, 0], *tables)),
    }
    for name, (function, given) in cases.items():
        run = partial(function, eps=1e-6)
        wanted = jax.jit(run)(*(x.astype(jnp.float32) for x in given))
        yield compared(name, f"{rows} x {width}", run, given, wanted)


def errors(small: bool) -> Iterator[Row]:
    """All of them."""
    for part in (attention_errors, sum_errors, product_errors, norm_errors):
        yield from part(small)
