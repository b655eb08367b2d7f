"""Layers that every network here is built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from sharding.rules import gather
from wanjax.config import Remat
from wanjax.ops.quantized import Format, matmul, quantize_weight

M = TypeVar("M", bound=nnx.Module)
Step = TypeVar("Step", bound=Callable[..., Any])
Axes = tuple[str | None, ...]
xavier = jax.nn.initializers.xavier_uniform()
zeros = jax.nn.initializers.zeros


class LowRank(nnx.Module):
    """`scale * x @ a @ b` beside a linear layer: LoRA (arXiv 2106.09685). `a` `[in, r]`, `b` `[r, out]`.

    Args:
      a, b: the factors, perhaps with a leading layer axis.
      axes: logical names of the kernel's two axes; the rank has none.
      alpha: `scale` is alpha / r.
    """

    def __init__(self, a: Any, b: Any, *, axes: Axes, alpha: float):
        self.a = nnx.LoRAParam(a, axes=(axes[0], None))
        self.b = nnx.LoRAParam(b, axes=(None, axes[1]))
        self.alpha = alpha

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-1]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[.., in]` -> `[.., out]`, in the dtype of `x`, as the layer beside it."""
        y = x @ gather(self.a[...].astype(x.dtype), x) * self.scale  # [.., r]
        return y @ gather(self.b[...].astype(x.dtype), y)  # [.., out]


class Linear(nnx.Module):
    """`x @ kernel + bias`, computed in the dtype of `x`. Kernel `[in, out]`, bias `[out]`.

    `lora` is what `wanjax.weights.lora` adds to the product.

    Args:
      in_dim, out_dim: sizes of the contracted and of the new last axis.
      rngs: keys for the initial weights.
      axes: logical names of the kernel's two axes.
      use_bias: whether there is a bias.
      param_dtype: what the weights are stored in.
      init: initial kernel; the bias starts at zero.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rngs: nnx.Rngs,
        *,
        axes: Axes,
        use_bias: bool = True,
        param_dtype: DTypeLike = jnp.float32,
        init: jax.nn.initializers.Initializer = xavier,
    ):
        self.kernel = nnx.Param(init(rngs.params(), (in_dim, out_dim), param_dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_dim,), param_dtype), axes=axes[1:]) if use_bias else None
        self.lora: LowRank | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[.., in]` -> `[.., out]`."""
        # Weights may be stored wider (float32 masters) or narrower than the activations: x decides, and before they
        # travel.
        y = x @ gather(self.kernel[...].astype(x.dtype), x)  # [.., out]
        y = y if self.bias is None else y + gather(self.bias[...].astype(x.dtype))
        return y if self.lora is None else y + self.lora(x)


class QuantizedLinear(nnx.Module):
    """A `Linear` whose kernel is stored, gathered and multiplied in 8 bits; it has no gradient.

    Kernel int8 or float8 `[in, out]`, its scale a float32 scalar, bias `[out]`; see `wanjax.ops.quantized`.
    """

    def __init__(self, linear: Linear, format: Format):
        kernel, scale = quantize_weight(linear.kernel[...], format)
        self.kernel = linear.kernel.replace(kernel)
        self.kernel_scale = nnx.Param(scale, axes=())
        self.bias = linear.bias
        self.lora = nnx.data(linear.lora)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[.., in]` -> `[.., out]`."""
        kernel = self.kernel[...]
        # Travels as bits: where a device has no fp8, XLA would send 16 of them.
        bits = gather(row_major(jax.lax.bitcast_convert_type(kernel, jnp.int8)))
        y = matmul(x, jax.lax.bitcast_convert_type(bits, kernel.dtype), gather(self.kernel_scale[...]))  # [.., out]
        y = y if self.bias is None else y + gather(self.bias[...]).astype(jnp.float32)
        y = y.astype(x.dtype)  # once, behind the scales and the bias
        return y if self.lora is None else y + self.lora(x)


def row_major(matrix: jax.Array) -> jax.Array:
    """`matrix` itself. On GPUs cuBLAS wants 8 bits by columns; left alone, XLA turns the whole stack over, a copy."""
    return jax.lax.platform_dependent(
        matrix, cuda=lambda x: with_layout_constraint(x, Layout((0, 1))), default=lambda x: x
    )


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32, returned in the dtype of `x`."""

    def __init__(self, dim: int, eps: float, *, axes: Axes = ("embed",)):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), axes=axes)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[.., e]` -> `[.., e]`."""
        x32 = x.astype(jnp.float32)  # bf16 squares lose the small channels
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (y * gather(self.scale[...])).astype(x.dtype)


def normalize(x: jax.Array, eps: float) -> jax.Array:
    """Layer norm over the last axis without scale or bias; float32 in and out, whatever the dtype of `x`."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias over the last axis, in float32, returned in the dtype of `x`."""

    def __init__(self, dim: int, eps: float, *, axes: Axes = ("embed",)):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), axes=axes)
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32), axes=axes)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[.., e]` -> `[.., e]`."""
        return (normalize(x, self.eps) * gather(self.scale[...]) + gather(self.bias[...])).astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], M], num_layers: int, rngs: nnx.Rngs) -> M:
    """`num_layers` modules as one whose parameters have a leading layer axis, ready for `jax.lax.scan`."""
    keys = jax.random.split(rngs.params(), num_layers)
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def scan(step: Callable[..., Any], carry: Any, stacks: Sequence[nnx.Module], xs: Any = None) -> tuple[Any, Any]:
    """`jax.lax.scan` of `step(carry, (module, x))` over the layers of one or several stacks, one after the other."""
    if len(stacks) == 1:
        return jax.lax.scan(step, carry, (stacks[0], xs))

    def indexed(carry: Any, layer: tuple[nnx.Module, jax.Array]) -> tuple[Any, Any]:
        module, i = layer  # a part of xs for each scan would be a copy
        return step(carry, (module, jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), xs)))

    first, results = 0, []
    for modules in stacks:
        count = len(jax.tree.leaves(modules)[0])
        carry, ys = jax.lax.scan(indexed, carry, (modules, jnp.arange(first, first + count)))
        first += count
        results.append(ys)
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys), *results)


def rematerialised(step: Step, remat: Remat) -> Step:
    """The body of a scan over blocks, with less kept for the backward pass.

    Args:
      step: the body.
      remat: what is kept of a block. "none": everything, the gathered weights too. "dots": the matrix products'
        results. "attention": its input and what attention returned, so that nothing is attended to twice. "block": its
        input only. "offload": as "attention", in the host's memory.
    """
    if remat == "none":
        return step
    policies = jax.checkpoint_policies
    names = ["attention", "block_input"]
    policy = {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "attention": policies.save_only_these_names(*names),
        "block": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=(),
            names_which_can_be_offloaded=names,
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    # A scan's body cannot be merged with its own recomputation, so JAX need not guard against that.
    return jax.checkpoint(step, policy=policy, prevent_cse=False)  # pyright: ignore[reportReturnType]
