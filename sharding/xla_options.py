"""XLA's options for the programs of this project, by platform, and how a run gives them to libtpu."""

from __future__ import annotations

import os
from typing import Any

import jax

TPU_OPTIONS: dict[str, Any] = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_tpu_enable_async_all_to_all": True,
    "xla_tpu_force_async_all_to_all": True,
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
    "xla_tpu_scoped_vmem_limit_kib": 48 * 1024,
}
"""With these the TPU computes while weights and tokens travel; by default (libtpu 0.0.42) it waits. Without the last
but one, weights are gathered on 64 chips as sums of what is zero but for a part, at twice the traffic. Without the
last, kernels behind which a collective goes on may have 32 MiB of the chip's on-core memory, too little for
`wanjax.ops.kernels.matmul_tpu`; a core of tpu7x has 64, the others 128."""

TPU_OPTIONS_8_BIT = {**TPU_OPTIONS, "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": False}
"""For 8-bit weights: libtpu 0.0.42 aborts when such a gather is to overlap with anything but a matrix product."""

VAE_OPTIONS: dict[str, Any] | None = None
"""Of the VAE's programs. At its usual effort libtpu 0.0.42 compiles the encoding of four frames of 720p for eight chips
for 15 minutes of a core, with less in 83 seconds; the static count of both programs is 217 million cycles, while the
least effort, -1, gives 281 million in 34 seconds. Compilers for CPUs and GPUs do the same as without it; JAX 0.12 has
no such option any more."""
if "jax_exec_time_optimization_effort" in jax.config.values:
    VAE_OPTIONS = {"exec_time_optimization_effort": -0.5}

GPU_OPTIONS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
"""For compiling without the GPU: there is none to try XLA's own tiles on, and those it guesses may not fit a product.
cuBLAS takes every product."""


def use_tpu_options(options: dict[str, Any] = TPU_OPTIONS) -> None:
    """Let libtpu compile with these; the user's LIBTPU_INIT_ARGS win. Call it before JAX looks for devices."""
    flags = (f"--{name}={str(value).lower()}" for name, value in options.items())
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*flags, os.environ.get("LIBTPU_INIT_ARGS", "")]).strip()
