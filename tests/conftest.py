"""Eight fake CPU devices and a quick compiler for every test, set before jax is imported."""

import gc
import importlib.metadata
import os

# Nearly all the time of these tests is tracing and compiling; the models are tiny and run in milliseconds.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    # Devices meet in collectives when a busy machine lets them: after 40 s XLA would end the process.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600",
    "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
    "--xla_cpu_collective_timeout_seconds=1200",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # compiles in half the time; 0.12 no longer knows the flag
os.environ["XLA_FLAGS"] = f"{' '.join(FLAGS)} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["WANJAX_COMPILE_CACHE"] = "off"  # tests leave nothing in the user's cache
# A traced program is a hundred thousand objects that stay; looking them through again and again is a third of tracing.
gc.set_threshold(200_000, 50, 100)
