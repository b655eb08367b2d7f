"""8-bit attention compiled for NVIDIA GPUs that are not here: `make aot-gpu`."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wanjax.ops.kernels import int8fp8_gpu

pytestmark = pytest.mark.aot_gpu

DESCRIPTION = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 8 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_bytes}
  shared_memory_per_core: {shared_bytes}
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: 100
  fpus_per_core: 128
  clock_rate_ghz: 1.5
  memory_bandwidth: 1000000000000
  l2_cache_size: 50000000
  device_memory_size: 24000000000
}}
"""


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    ("name", "capability", "shared_kib", "values", "products"),
    [
        ("A100", (8, 0), 163, "bf16", {"mma.sync s8", "mma.sync bf16"}),
        ("RTX 3090", (8, 6), 99, "bf16", {"mma.sync s8", "mma.sync bf16"}),
        ("L40S", (8, 9), 99, "fp8", {"mma.sync s8", "mma.sync e4m3"}),
        ("H100", (9, 0), 227, "bf16", {"wgmma s8", "wgmma bf16"}),
        ("B200", (10, 0), 227, "fp8", {"tcgen05.mma i8", "tcgen05.mma f8f6f4"}),
        ("RTX 5090", (12, 0), 99, "fp8", {"mma.sync s8", "mma.sync e4m3"}),
    ],
)
def test_the_kernel_compiles_with_the_units_of_the_chip(tmp_path, name, capability, shared_kib, values, products, d):
    major, minor = capability
    config = DESCRIPTION.format(name=name, major=major, minor=minor, shared_bytes=shared_kib * 1024)
    topology = topologies.get_topology_desc("one", platform="cuda", target_config=config, topology="1x1x1")
    sharding = NamedSharding(Mesh(topology.devices, "x"), PartitionSpec())
    q, k = (jax.ShapeDtypeStruct((1, 2, length, d), jnp.bfloat16, sharding=sharding) for length in (500, 3000))
    attend = jax.jit(partial(int8fp8_gpu.run, values=values), static_argnums=4)
    attend.lower(q, k, k, None, jnp.bfloat16).compile(compiler_options={"xla_dump_to": str(tmp_path)})
    (program,) = (text for file in tmp_path.glob("*.ptx") if "int8fp8" in (text := file.read_text()))
    found = re.findall(r"(mma\.sync|wgmma|tcgen05\.mma)\S*?[.:](s8|i8|bf16|f16|e4m3|f8f6f4)\b", program)
    assert {" ".join(pair) for pair in found} == products
