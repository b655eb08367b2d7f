"""What `on_chip.py` measures: attention, products, a block, a step, the VAE, in the shapes of FLF2V-14B."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from chip.measuring import Chip, Row

from wanjax.config import WAN_VAE, Attention, DiTConfig, SampleConfig, VAEConfig
from wanjax.models.dit import Block, Context, quantized
from wanjax.models.layers import Linear, QuantizedLinear
from wanjax.models.rope import Rotation
from wanjax.ops.attention import kernel
from wanjax.ops.quantized import Format
from wanjax.report import programs
from wanjax.weights.quantize import requantized


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Networks and a video.

    Attributes:
      dit, vae, config: in bf16; in the VAE's own dtype; a request.
      length: tokens of a sample.
      heads: of the attention that is timed alone, a device's of four.
      rows: of the products that are timed alone, likewise.
    """

    dit: DiTConfig
    vae: VAEConfig
    config: SampleConfig
    length: int
    heads: int
    rows: int


FULL = Sizes(
    DiTConfig(dtype=jnp.dtype(jnp.bfloat16), param_dtype=jnp.dtype(jnp.bfloat16)),
    WAN_VAE,
    SampleConfig(height=720, width=1280, frames=81, shift=16.0, dtype="bfloat16"),
    length=75600,
    heads=10,
    rows=18944,
)
SMALL = Sizes(
    dataclasses.replace(FULL.dit, dim=256, ffn_dim=384, num_heads=2, num_layers=2, text_dim=64, image_dim=64),
    VAEConfig(dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1),
    dataclasses.replace(FULL.config, height=64, width=64, frames=5),
    length=32,
    heads=2,
    rows=64,
)


def attention(chip: Chip, sizes: Sizes) -> Iterator[Row]:
    """Forward and backward in bf16, forward in 8 bits."""
    shape = 1, sizes.heads, sizes.length, sizes.dit.head_dim
    inputs = programs.AbstractInputs(chip.mesh)
    x = inputs.array(shape, jnp.bfloat16)
    row = inputs.array(shape[:3], jnp.float32)
    told = f"{sizes.heads} heads x {sizes.length}"
    tera = 4 * sizes.heads * sizes.length**2 * sizes.dit.head_dim / 1e12
    kernels: tuple[tuple[Attention, str], ...] = ("auto", "bf16"), ("int8fp8", "8 bits")
    for choice, name in kernels:
        attend = kernel(choice).forward
        run = jax.jit(lambda q, k, v, attend=attend: attend(q, k, v, None, jnp.bfloat16))
        yield chip.measure(f"attention forward, {name}", told, run, (x, x, x), tera)
    run = jax.jit(lambda q, k, v, *rest: kernel().backward(q, k, v, None, *rest))
    yield chip.measure("attention backward, bf16", told, run, (x, x, x, row, row, x), 2.5 * tera)


def products(chip: Chip, sizes: Sizes) -> Iterator[Row]:
    """FFN in, as a layer computes it."""
    dit = sizes.dit
    inputs = programs.AbstractInputs(chip.mesh)

    def make(format: Format | None) -> Any:
        def build(rngs: Any) -> Linear | QuantizedLinear:
            linear = Linear(dit.dim, dit.ffn_dim, rngs, axes=("embed", "mlp"), param_dtype=dit.param_dtype)
            return linear if format is None else QuantizedLinear(linear, format)

        return inputs.network(build)

    x = inputs.array((1, sizes.rows, dit.dim), dit.dtype, "batch", "tokens", None)
    told = f"{sizes.rows} x {dit.dim} x {dit.ffn_dim}"
    tera = 2 * sizes.rows * dit.dim * dit.ffn_dim / 1e12
    formats: tuple[Format | None, ...] = None, "int8", "fp8"
    for format in formats:
        with jax.set_mesh(chip.mesh):
            layer = make(format)
        yield chip.measure(f"product, {format or 'bf16'}", told, jax.jit(lambda layer, x: layer(x)), (layer, x), tera)


def block_inputs(chip: Chip, sizes: Sizes, quantize: Format | None) -> tuple[Any, ...]:
    """A block and what it takes, as shapes."""
    dit, inputs = sizes.dit, programs.AbstractInputs(chip.mesh)

    def build(rngs: Any) -> Block:
        block = Block(dit, rngs)
        return block if quantize is None else quantized(block, quantize)

    with jax.set_mesh(chip.mesh):
        of_sample = "batch", None, None
        text, image = (
            inputs.array((1, n, dit.dim), dit.dtype, *of_sample) for n in (dit.text_len, dit.image_positions)
        )
        table = inputs.array((sizes.length, dit.head_dim), jnp.float32, "tokens", None)
        return (
            inputs.network(build),
            inputs.array((1, sizes.length, dit.dim), dit.dtype, "batch", "tokens", None),
            inputs.array((1, 6, dit.dim), jnp.float32, *of_sample),
            Context(text, text, image, image),
            Rotation(table, table, sizes.length),
        )


def run_block(block: Block, x: jax.Array, modulation: jax.Array, context: Context, rotation: Rotation) -> jax.Array:
    """A block."""
    return block(x, modulation, context, rotation)


def block_gradients(block: Block, x: jax.Array, *rest: Any) -> Any:
    """Of the sum of a block's result, for its weights and its input."""
    return jax.grad(lambda block, x: jnp.sum(run_block(block, x, *rest).astype(jnp.float32)), argnums=(0, 1))(block, x)


def block(chip: Chip, sizes: Sizes) -> Iterator[Row]:
    """One block on all tokens of a sample: forward in both formats, and with its gradients."""
    told = f"1 x {sizes.length} x {sizes.dit.dim}"
    formats: tuple[Format | None, ...] = None, "int8"
    for quantize in formats:
        arguments = block_inputs(chip, sizes, quantize)
        yield chip.measure(f"block forward, {quantize or 'bf16'}", told, jax.jit(run_block), arguments)
    arguments = block_inputs(chip, sizes, None)
    yield chip.measure("block forward and backward, bf16", told, jax.jit(block_gradients), arguments)


def step(chip: Chip, sizes: Sizes) -> Iterator[Row]:
    """One step of sampling with both branches of guidance, in the first of the formats in which it fits."""
    formats: tuple[Format | None, ...] = None, "int8"
    for quantize in formats:
        dit = requantized(sizes.dit, quantize)
        with jax.set_mesh(chip.mesh):
            stage = programs.denoise_step(sizes.config, dit, programs.AbstractInputs(chip.mesh))
        row = chip.measure(f"step, {quantize or 'bf16'}", f"{dit.num_layers} layers, 2 x {sizes.length}", *stage)
        yield row
        if not row.why:
            return


def vae_chunks(chip: Chip, sizes: Sizes) -> Iterator[Row]:
    """A chunk in the middle of a clip: four frames, one latent frame."""
    with jax.set_mesh(chip.mesh):
        stages = programs.vae_chunks(sizes.config, programs.AbstractInputs(chip.mesh), sizes.vae)
    told = f"4 x {sizes.config.height} x {sizes.config.width}"
    for name, stage in zip(("encode", "decode"), stages, strict=True):
        yield chip.measure(f"VAE {name}, {jnp.dtype(sizes.vae.dtype)}", told, *stage)
