"""Which checkpoint, DiT and adapters a configuration asks for; only headers of files are read."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from wanjax.config import DiTConfig, SampleConfig
from wanjax.errors import InputError
from wanjax.ops.attention import check_choice
from wanjax.weights import Checkpoint, lora
from wanjax.weights.lora_files import LoRAFile
from wanjax.weights.mapping import NetworkName
from wanjax.weights.quantize import open_checkpoint, requantized


def choose_checkpoint(config: SampleConfig) -> Checkpoint:
    """The checkpoint that is asked for: a folder, or one of the Hugging Face hub.

    Raises:
      InputError: none is, or as `checkpoint_folder` and `Checkpoint`.
    """
    return open_checkpoint(config)


def choose_dit(
    config: SampleConfig, checkpoint: Checkpoint
) -> tuple[DiTConfig, dict[NetworkName, tuple[LoRAFile, ...]], bool]:
    """The DiT with the dtype, format and attention that are asked for; adapters of each expert, and whether to merge
    them. Two experts are alike.

    Raises:
      InputError: the checkpoint has none, has it in another format, its experts differ, or there is no such
        attention on this device; or as `lora.parse` and `lora.check`.
    """
    dtype = jnp.dtype(config.dtype)
    dit = checkpoint.config("dit", dtype=dtype, param_dtype=dtype)
    if checkpoint.experts == 2:
        check_alike(dit, checkpoint.config("dit_low", dtype=dtype, param_dtype=dtype), checkpoint)
    is_quantized = dit.quantize != "off"
    dit = dataclasses.replace(requantized(dit, config.quantize), attention=config.attention)
    loras = choose_loras(config, checkpoint.experts)
    merged = [lora.check(files, dit, is_quantized, config.lora_merge) for files in loras.values()]
    check_choice(config.attention, dtype, jax.devices()[0].platform)
    return dit, loras, merged[0]


def check_alike(high: DiTConfig, low: DiTConfig, checkpoint: Checkpoint) -> None:
    """Raises `InputError` unless two experts have the same sizes and format."""
    differ = [field.name for field in dataclasses.fields(high) if getattr(high, field.name) != getattr(low, field.name)]
    if differ:
        name = differ[0]
        raise InputError(
            f"{checkpoint.path} has experts of {name} {getattr(high, name)} for high noise and {getattr(low, name)} "
            "for low; two of the same sizes are needed; give two that belong together"
        )


def choose_loras(config: SampleConfig, experts: int) -> dict[NetworkName, tuple[LoRAFile, ...]]:
    """The adapters by DiT: those of both first.

    Raises:
      InputError: some are for one of two experts, and there is one DiT; or as `lora.parse`.
    """
    both = lora.parse(config.lora)
    if experts == 2:
        return {"dit": both + lora.parse(config.lora_high), "dit_low": both + lora.parse(config.lora_low)}
    for flag, files in (("--lora-high", config.lora_high), ("--lora-low", config.lora_low)):
        if files:
            raise InputError(
                f"{flag} {files[0]} with a checkpoint of one DiT; two experts are needed (Wan2.2-A14B); "
                "give it as --lora"
            )
    return {"dit": both}
