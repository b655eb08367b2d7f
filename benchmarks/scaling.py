"""How the work of one DiT step is shared: static figures of the compiled program, on 1 to 64 devices for one sample.

    python benchmarks/scaling.py            # any machine: the devices are fake, nothing is run

Per mesh, per device: operations of the matrix products (attention's too), and bytes that each kind of collective moves.
A reduced network, so that it compiles in seconds; the rules that split it are those of the full one, for which
`wanjax plan --config configs/flf2v_14b_720p.py --target v6e:2x4` asks the TPU's compiler. The last
line is JSON. `work` is one device's operations times the devices, over those of one device alone: 1 is perfect.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

DEVICES = 64
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

from sharding.mesh import MeshShape, make_mesh  # noqa: E402
from wanjax.config import DiTConfig, SampleConfig  # noqa: E402
from wanjax.report import programs  # noqa: E402
from wanjax.report.hlo import KINDS, read  # noqa: E402

NETWORK = DiTConfig(
    dim=512, ffn_dim=1536, num_heads=8, num_layers=2, freq_dim=64, text_dim=64, text_len=64, image_dim=64
)
VIDEO = SampleConfig(height=512, width=1024, frames=29, guidance=1.0)  # 16,384 tokens: 256 a device on 64
MESHES = (
    MeshShape(),
    MeshShape(ulysses=2),
    MeshShape(ring=2),
    MeshShape(ulysses=4),
    MeshShape(ring=2, ulysses=2),
    MeshShape(ulysses=8),
    MeshShape(ring=2, ulysses=4),
    MeshShape(ring=8),
    MeshShape(ring=2, ulysses=8),
    MeshShape(ring=4, ulysses=8),
    MeshShape(ring=8, ulysses=8),
)


def measure(shape: MeshShape) -> dict[str, Any]:
    """Operations and bytes of a step on one device of a mesh."""
    count = shape.batch * shape.sequence
    mesh = make_mesh(shape, jax.devices()[:count])
    with jax.set_mesh(mesh):
        program = read(programs.denoise_step(VIDEO, NETWORK, programs.AbstractInputs(mesh)).lower().compile())
    payload = {kind: program.payload(kind) for kind in KINDS}
    return {"mesh": str(shape), "devices": count, "operations": program.flops, **payload}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=DEVICES, help="meshes of at most so many")
    limit = parser.parse_args().devices
    print(f"{'mesh':32} {'devices':>7} {'GFLOP':>9} {'work':>6} " + " ".join(f"{kind:>18}" for kind in KINDS))
    rows: list[dict[str, Any]] = []
    for shape in MESHES:
        if shape.sequence > limit:
            continue
        row = measure(shape)
        rows.append(row)
        row["work"] = round(row["operations"] * row["devices"] / rows[0]["operations"], 4)
        moved = " ".join(f"{row[kind] / 2**20:14.2f} MiB" for kind in KINDS)
        print(f"{row['mesh']:32} {row['devices']:7} {row['operations'] / 1e9:9.3f} {row['work']:6.3f} {moved}")
    print(json.dumps({"benchmark": "scaling", "rows": rows}))


if __name__ == "__main__":
    main()
