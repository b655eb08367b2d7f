"""Eight fake CPU devices for every test, set before jax is imported."""

import os

# Nearly all the time of these tests is LLVM's; level 0 takes a third of it, and the models here are tiny.
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["WANJAX_COMPILE_CACHE"] = "off"  # tests leave nothing in the user's cache
