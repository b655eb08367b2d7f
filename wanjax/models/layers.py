"""Layers that every network here is built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from sharding.local import per_token
from sharding.rules import gather
from wanjax.config import Remat
from wanjax.models.products import Activation, activated, identity, products, quantized_product, weight_only_product
from wanjax.ops import norms
from wanjax.ops.norms import normalize
from wanjax.ops.quantized import Format, quantize_weight

M = TypeVar("M", bound=nnx.Module)
Step = TypeVar("Step", bound=Callable[..., Any])
Axes = tuple[str | None, ...]
xavier = jax.nn.initializers.xavier_uniform()
zeros = jax.nn.initializers.zeros


class LowRank(nnx.Module):
    """`scale * x @ a @ b` beside a linear layer: LoRA (arXiv 2106.09685). `a` `[in, r]`, `b` `[r, out]`.

    With a magnitude it is DoRA (arXiv 2402.09353): columns of `kernel + scale * a @ b` in the lengths `magnitude`
    `[out]`. `key`, data of a PRNG key, and `dropout` are there in a step of training that drops some of `x`.

    Args:
      a, b: the factors, perhaps with a leading layer axis.
      axes: logical names of the kernel's two axes; the rank has none.
      alpha: `scale` is alpha / r.
      magnitude: of DoRA; None: none.
    """

    def __init__(self, a: Any, b: Any, *, axes: Axes, alpha: float, magnitude: Any = None):
        self.a = nnx.LoRAParam(a, axes=(axes[0], None))
        self.b = nnx.LoRAParam(b, axes=(None, axes[1]))
        self.magnitude = nnx.data(None if magnitude is None else nnx.LoRAParam(magnitude, axes=axes[1:]))
        self.alpha = alpha
        self.key: jax.Array | None = nnx.data(None)
        self.dropout = 0.0

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
        x = x if self.key is None else dropped(x, self.key, self.dropout)
        y = x @ gather(self.a[...].astype(x.dtype), x) * self.scale  # [.., r]
        return y @ gather(self.b[...].astype(x.dtype), y)  # [.., out]

    def beside(self, x: jax.Array, y: jax.Array, layer: Linear | QuantizedLinear) -> jax.Array:
        """The result `[.., out]` of a layer with the adapter, from that without, `y`."""
        if self.magnitude is None:
            return y + self(x)
        bias = 0 if layer.bias is None else gather(layer.bias[...]).astype(y.dtype)
        lengths = jax.lax.stop_gradient(self.lengths(layer.whole()))
        ratio = (gather(self.magnitude[...]) / lengths).astype(y.dtype)  # in float32, as the lengths are
        return y + (ratio - 1) * (y - bias) + ratio * self(x)

    def lengths(self, kernel: jax.Array) -> jax.Array:
        """Of the columns of `kernel + scale * a @ b`, float32 `[out]`, without making that matrix.

        |w + s a b|^2 = |w|^2 + 2 s (w a) b + s^2 b (a a) b; DoRA takes no gradient of it (section 4.3).
        """
        w, a, b = (gather(x).astype(jnp.float32) for x in (kernel, self.a[...], self.b[...]))
        products = 2 * self.scale * (a.T @ w) + self.scale**2 * (a.T @ a @ b)  # [r, out]
        squares = jnp.sum(w * w, axis=0) + jnp.sum(products * b, axis=0)
        return jnp.sqrt(jnp.maximum(squares, 1e-30))


def dropped(x: jax.Array, key: jax.Array, share: float) -> jax.Array:
    """`x` with a share of its numbers zero and the others larger, so that the mean stays; `key` is a key's data."""
    sharding = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding
    kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - share, x.shape, out_sharding=sharding)
    return jnp.where(kept, x / (1 - share), 0).astype(x.dtype)


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

    def __call__(
        self, x: jax.Array, activation: Activation = identity, *, read: int = 1, written: int = 1
    ) -> jax.Array:
        """`[.., in]` -> `[.., out]`, through `activation`; `read`, `written` as `wanjax.models.products` takes them."""
        if self.lora is None and activation is not identity:
            return activated(x, (self.weight(x),), activation)
        return activation(apply_all((self,), x, read=read, written=(written,))[0])

    def weight(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Kernel and bias in the dtype of `x`.

        Weights may be stored wider (float32 masters) or narrower than the activations: x decides, and before they
        travel.
        """
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        return self.kernel[...].astype(x.dtype), bias

    def whole(self) -> jax.Array:
        """The kernel."""
        return self.kernel[...]


class QuantizedLinear(nnx.Module):
    """A `Linear` whose kernel is stored, gathered and multiplied in 8 bits; it has no gradient.

    Kernel int8 or float8 `[in, out]`, its scale a float32 scalar or `[out]`, bias `[out]`; see `wanjax.ops.quantized`.
    `weight_only`: stored and gathered in 8 bits, multiplied in the dtype of `x`, for which there is a gradient.
    """

    def __init__(self, linear: Linear, format: Format, channel_scales: bool = False, weight_only: bool = False):
        kernel, scale = quantize_weight(linear.kernel[...], format, channel_scales)
        self.kernel = linear.kernel.replace(kernel)
        self.kernel_scale = nnx.Param(scale, axes=linear.kernel.get_metadata()["axes"][1:] if channel_scales else ())
        self.bias = linear.bias
        self.lora = nnx.data(linear.lora)
        self.weight_only = weight_only

    def __call__(
        self, x: jax.Array, activation: Activation = identity, *, read: int = 1, written: int = 1
    ) -> jax.Array:
        """`[.., in]` -> `[.., out]`, through `activation`; `read`, `written` as `wanjax.models.products` takes them."""
        return self.apply(x, self.gathered(), activation, read=read, written=written)

    def gathered(self) -> jax.Array:
        """The kernel's bits, whole on every device; where a device has no fp8, XLA would send 16 of them as numbers."""
        return gather(row_major(jax.lax.bitcast_convert_type(self.kernel[...], jnp.int8)))

    def apply(self, x: jax.Array, bits: jax.Array, activation: Activation, *, read: int, written: int) -> jax.Array:
        """The layer of `x`, with the kernel that `gathered` returned."""
        weight = jax.lax.bitcast_convert_type(bits, self.kernel[...].dtype), gather(self.kernel_scale[...])
        bias = None if self.bias is None else gather(self.bias[...])
        product = weight_only_product if self.weight_only else quantized_product
        if self.lora is None:
            return product(x, *weight, bias, activation, read, written)
        return activation(self.lora.beside(x, product(x, *weight, bias, identity, read, 1), self))

    def whole(self) -> jax.Array:
        """The kernel, float32."""
        return gather(self.kernel[...]).astype(jnp.float32) * gather(self.kernel_scale[...])


def apply_all(
    layers: Sequence[Linear | QuantizedLinear], x: jax.Array, *, read: int = 1, written: Sequence[int] = (1,)
) -> tuple[jax.Array, ...]:
    """Every layer's result, `[.., in]` -> `[.., out]`; `read` and `written` as `wanjax.models.products` takes them."""
    full = [layer for layer in layers if isinstance(layer, Linear)]
    eight_bit = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    if len(eight_bit) == len(layers) > 1:
        # As in `products`: all are here before the first is used.
        bits = tuple(layer.gathered() for layer in eight_bit)
        bits = jax.lax.platform_dependent(bits, tpu=jax.lax.optimization_barrier, default=lambda bits: bits)
        each = zip(eight_bit, bits, written, strict=True)
        return tuple(layer.apply(x, b, identity, read=read, written=n) for layer, b, n in each)
    if eight_bit:
        return tuple(layer(x, read=read, written=n) for layer, n in zip(layers, written, strict=True))
    results = products(x, tuple(layer.weight(x) for layer in full), read=read, written=written)
    pairs = zip(full, results, strict=True)
    return tuple(y if layer.lora is None else layer.lora.beside(x, y, layer) for layer, y in pairs)


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


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Layer norm without parameters, then scale and shift; float32 inside, returned in the dtype of `x`."""
    return per_token(partial(norms.layer_norm, eps=eps), x, 1 + scale, shift)


def add_gated(x: jax.Array, y: jax.Array, gate: jax.Array) -> jax.Array:
    """`x + gate * y`, summed in float32 because the gate is float32."""
    return per_token(norms.gated_sum, x, y, gate)


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
