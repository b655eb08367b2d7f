"""Blocks with which TPU kernels take the fewest cycles by the static count, for the chips and shapes that were tried.

`python benchmarks/tpu_tiles.py` tries them and writes `tiles.json`: kernel, chip, shape, sizes. docs/performance.md
says what it covers. Everything else has the kernels' own sizes.
"""

from __future__ import annotations

import json
from pathlib import Path

from jax.experimental.pallas import tpu as pltpu

FILE = Path(__file__).with_name("tiles.json")
TABLE: dict[str, dict[str, dict[str, dict[str, int]]]] = json.loads(FILE.read_text())


def tiles(kernel: str, *shape: int, **sizes: int) -> dict[str, int]:
    """Sizes for a kernel at a shape on the chip that is compiled for: `sizes`, or what the table has instead."""
    return sizes | TABLE.get(kernel, {}).get(chip(), {}).get("x".join(map(str, shape)), {})


def chip() -> str:
    """The name of the chip that is compiled for: v5e, v5p, v6e, 7x; "" while a program for several is traced."""
    try:
        return str(pltpu.get_tpu_info().chip_version)
    except ValueError:
        return ""
