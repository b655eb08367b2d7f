"""Meshes of accelerators that are not there, which XLA compiles for all the same.

    mesh = topology_mesh("v6e:2x4", "data=2,ulysses=4")     # TPUs
    mesh = topology_mesh("h100:8", "data=2,ulysses=4")      # NVIDIA GPUs

The compilers come with the extras `aot` and `aot-gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.experimental import topologies
from jax.sharding import Mesh

from sharding.mesh import make_mesh, parse_mesh
from wanjax.errors import InputError


class GPU(NamedTuple):
    """What the compilers ask about a GPU.

    kind: one of the same capability that Pallas knows by this name.
    capability: CUDA's compute capability, major and minor.
    shared_kib: shared memory that a block of threads may have.
    memory_gib: the GPU's.
    cores: streaming multiprocessors.
    bandwidth_gb: of its memory, GB/s.
    """

    kind: str
    capability: tuple[int, int]
    shared_kib: int
    memory_gib: int
    cores: int
    bandwidth_gb: int


GPUS = {
    "a100": GPU("NVIDIA A100", (8, 0), 163, 80, 108, 2039),
    "rtx3090": GPU("NVIDIA A10", (8, 6), 99, 24, 82, 936),
    "l40s": GPU("NVIDIA L40", (8, 9), 99, 48, 142, 864),
    "h100": GPU("NVIDIA H100", (9, 0), 227, 80, 132, 3350),
    "b200": GPU("NVIDIA B200", (10, 0), 227, 180, 148, 8000),
    "rtx5090": GPU("NVIDIA RTX PRO 6000", (12, 0), 99, 32, 170, 1792),
}

_DESCRIPTION = """
platform_name: "CUDA"
device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 8 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {shared}
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {cores}
  fpus_per_core: 128
  clock_rate_ghz: 1.7
  memory_bandwidth: {bandwidth}
  l2_cache_size: 50000000
  device_memory_size: {memory}
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.8.0"
}}
"""  # a GpuTargetConfigProto of XLA's


def topology_mesh(topology: str, mesh: str) -> Mesh:
    """A mesh of devices that only the compiler knows.

    Args:
      topology: of TPUs, such as v6e:2x4, v5p:4x4x4, tpu7x:2x2x1; or a GPU of `GPUS` and how many, such as h100:8.
      mesh: as `parse_mesh` takes it; data=1 is one device of the topology.

    Raises:
      InputError: the compiler is missing or does not know the topology; or as `parse_mesh`.
    """
    name, _, count = topology.partition(":")
    try:
        devices = _gpus(name, count) if name in GPUS else _tpus(topology)
    except Exception as error:  # whatever the compiler raises
        reason = " ".join(str(error).split())
        raise InputError(
            f"topology {topology!r}: {reason}; accepted: v6e:2x4, v5p:4x4x4, tpu7x:2x2x1 and the like, with libtpu "
            f"(pip install 'wanjax[aot]'); h100:8 and the like, of {', '.join(GPUS)}, with jax's CUDA plugin (pip "
            "install 'wanjax[aot-gpu]') and JAX_PLATFORMS=cpu"
        ) from error
    devices = devices[:1] if mesh == "data=1" else devices
    return make_mesh(parse_mesh(mesh, len(devices)), devices)


def _tpus(topology: str) -> Sequence[Any]:
    # libtpu would ask the machine for its TPUs.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return _devices("tpu", topology)


def _gpus(name: str, count: str) -> Sequence[Any]:
    gpu = GPUS[name]
    description = _DESCRIPTION.format(
        kind=gpu.kind,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        shared=gpu.shared_kib * 1024,
        cores=gpu.cores,
        bandwidth=gpu.bandwidth_gb * 10**9,
        memory=gpu.memory_gib * 2**30,
    )
    # partitions x hosts x GPUs of a host
    return _devices("cuda", name, target_config=description, topology=f"1x1x{int(count)}")


def _devices(platform: str, name: str, **options: Any) -> Sequence[Any]:
    return topologies.get_topology_desc(name, platform=platform, **options).devices
