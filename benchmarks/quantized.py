"""What 8 bits cost and save: errors and bytes of linear layers and attention at 14B shapes; times on an accelerator.

    python benchmarks/quantized.py          # any machine; a CPU shows no times, as it has no such units

Gaussian inputs; for attention also keys with outlying channels. "error" is the relative L2 distance to float32,
"cosine" that to exact attention, "speedup" over bfloat16. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wanjax.ops.attention import kernel, reference_forward
from wanjax.ops.quantized import DTYPES, matmul, quantize_weight

SHAPES = ((5120, 5120), (5120, 13824), (13824, 5120))


def seconds(function: Callable[..., Any], *inputs: jax.Array, repeats: int = 10) -> float:
    """Of one call, compiled; the shortest of three times `repeats` calls."""
    function = jax.jit(function)
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([function(*inputs) for _ in range(repeats)])
        times.append((time.perf_counter() - start) / repeats)
    return min(times)


def error(got: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


def cosine(got: jax.Array, expected: jax.Array) -> float:
    a, b = (np.asarray(x, np.float64).ravel() for x in (got, expected))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def linear(shape: tuple[int, int], format: Any, tokens: int, timed: bool) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0))
    kernel_ = jax.random.normal(keys[0], shape)
    x = jax.random.normal(keys[1], (tokens, shape[0]), jnp.bfloat16)
    stored, scale = jax.jit(quantize_weight, static_argnums=1)(kernel_, format)
    expected = jnp.matmul(x[:16].astype(jnp.float32), kernel_, precision="highest")
    row: dict[str, Any] = {"what": f"linear {shape[0]}x{shape[1]}", "format": format}
    row["error"] = error(jax.jit(matmul)(x[:16], stored, scale), expected)
    row["bytes_ratio"] = (stored.nbytes + scale.nbytes) / (2 * kernel_.size)
    if timed:
        row["milliseconds"] = 1e3 * seconds(matmul, x, stored, scale)
        row["speedup"] = 1e3 * seconds(jnp.matmul, x, kernel_.astype(jnp.bfloat16)) / row["milliseconds"]
    return row


def attention(outliers: bool, tokens: int, heads: int, timed: bool) -> dict[str, Any]:
    q, k, v = (jax.random.normal(key, (1, heads, tokens, 128)) for key in jax.random.split(jax.random.key(0), 3))
    if outliers:
        k = k.at[..., jnp.array([3, 40])].add(jnp.array([40.0, -25.0])).at[..., 7].multiply(8.0)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    attend = partial(kernel("int8fp8").forward, valid=None, dtype=jnp.float32)
    some, wide = q[:, :, :1024].astype(jnp.float32), (k.astype(jnp.float32), v.astype(jnp.float32))
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(reference_forward, static_argnums=4)(some, *wide, None, jnp.float32)[0]
    row: dict[str, Any] = {"what": f"attention {heads}x{tokens}x128", "format": "int8fp8", "outliers": outliers}
    row["cosine"] = cosine(jax.jit(attend)(q, k, v)[0][:, :, :1024], exact)
    if timed:
        exact_attend = partial(kernel().forward, valid=None, dtype=jnp.float32)
        row["milliseconds"] = 1e3 * seconds(attend, q, k, v)
        row["speedup"] = 1e3 * seconds(exact_attend, q, k, v) / row["milliseconds"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    timed = jax.devices()[0].platform != "cpu"
    parser.add_argument("--tokens", type=int, default=18900 if timed else 1024, help="tokens of a sequence")
    parser.add_argument("--heads", type=int, default=10 if timed else 2, help="heads of attention")
    args = parser.parse_args()
    rows = [linear(shape, format, args.tokens if timed else 16, timed) for shape in SHAPES for format in DTYPES]
    rows += [attention(outliers, args.tokens, args.heads, timed) for outliers in (False, True)]
    for row in rows:
        print("  ".join(f"{key} {value:.5g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    print(json.dumps({"benchmark": "quantized", "device": jax.devices()[0].device_kind, "rows": rows}))


if __name__ == "__main__":
    main()
