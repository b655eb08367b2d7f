"""2D convolution with a gradient that a CPU can compute.

XLA on a CPU computes a convolution fast and the gradient of its kernel 5 to 20 times slower: it sees a convolution
whose window is the whole picture. Here that gradient is a sum over pictures of small matrix products of their patches.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """2D convolution, summed in float32.

    Args:
      x: `[n, h, w, c]`.
      kernel: `[kh, kw, c, out]`.
      stride: of both axes.
      padding: zeros before and behind, per axis.

    Returns:
      `[n, h', w', out]`, float32.
    """
    return _conv2d(x, kernel, stride, padding)


def _conv2d(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.float32,
    )


def _forward(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> tuple[jax.Array, tuple]:
    return conv2d(x, kernel, stride, padding), (x, kernel)


def _backward(stride: int, padding: Padding, saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: _conv2d(x, kernel, stride, padding), x)(dy)
    return dx, kernel_gradient(x, dy, kernel.shape, stride, padding).astype(kernel.dtype)


def kernel_gradient(x: jax.Array, dy: jax.Array, shape: tuple[int, ...], stride: int, padding: Padding) -> jax.Array:
    """Gradient of the kernel `[kh, kw, c, out]`, float32, from the input and the result's gradient."""
    kh, kw, c, out = shape
    _, height, width, _ = dy.shape

    def add(sofar: jax.Array, picture: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, dy = picture
        x = jnp.pad(x, (*padding, (0, 0)))  # [h, w, c]
        rows, columns = (height - 1) * stride + 1, (width - 1) * stride + 1
        taps = [x[i : i + rows : stride, j : j + columns : stride] for i in range(kh) for j in range(kw)]
        patches = jnp.concatenate(taps, axis=-1).reshape(height * width, kh * kw * c)  # [h' w', kh kw c]
        return sofar + jnp.dot(patches.T, dy.reshape(height * width, out), preferred_element_type=jnp.float32), None

    total, _ = jax.lax.scan(add, jnp.zeros((kh * kw * c, out), jnp.float32), (x, dy))
    return total.reshape(shape)  # [kh, kw, c, out]


conv2d.defvjp(_forward, _backward)  # pyright: ignore[reportFunctionMemberAccess]
