"""Full-size programs compiled for real TPUs: what a chip holds and what travels. Minutes a test; `make aot`."""

import pytest

from wanjax.report import memory
from wanjax.weights.quantize import requantized

pytestmark = pytest.mark.aot
GIB = 2**30
SAMPLING = "configs/flf2v_14b_720p.py"


def programs(config, topology, only=None, mesh=None, quantize=None):
    config, dit, meshes = memory.load(config)
    return dict(memory.compiled(config, requantized(dit, quantize), topology, mesh or meshes[topology], only))


def test_a_step_of_sampling_on_eight_chips_of_v6e():
    (row,) = programs(SAMPLING, "v6e:2x4", ["DiT step"]).values()
    assert row["peak"] <= 9 * GIB
    # Self-attention's queries, keys, values and results; cross-attention sends nothing.
    assert row["all-to-all"] == 4 * 40 * 18900 * 5120 * 2
    # The weights once, without those of the context.
    assert row["all-gather"] <= 24 * GIB
    assert row["exposed"] <= 0.1 * GIB  # before the first block there is nothing to compute meanwhile
    assert row["all-reduce"] == row["reduce-scatter"] == row["collective-permute"] == 0


def test_a_step_of_sampling_on_one_chip_in_8_bits():
    (row,) = programs(SAMPLING, "v6e:2x2", ["DiT step"], "data=1", "int8").values()
    assert row["peak"] <= 25 * GIB


@pytest.mark.parametrize("name", ["umT5", "CLIP", "VAE encode", "VAE decode"])
def test_other_stages_of_sampling_on_v6e(name):
    (row,) = programs(SAMPLING, "v6e:2x4", [name]).values()
    assert row["peak"] <= 31 * GIB


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_a_step_of_sampling_compiles_elsewhere(topology):
    (row,) = programs(SAMPLING, topology, ["DiT step"]).values()
    assert 0 < row["peak"] <= 20 * GIB


@pytest.mark.parametrize(
    ("config", "topology", "limit"),
    [
        ("configs/train_flf2v_14b_720p_4chips.py", "v5p:2x2x1", 95),
        ("configs/train_flf2v_14b_720p.py", "v5p:4x4x4", 95),
        ("configs/train_flf2v_14b_720p.py", "v6e:16x16", 31),
    ],
)
def test_a_training_step(config, topology, limit):
    (row,) = programs(config, topology).values()
    assert row["peak"] <= limit * GIB
    # Gradients go home as sums of parts, and are nowhere whole.
    assert row["reduce-scatter"] > 0
    assert row["all-reduce"] < 0.1 * row["reduce-scatter"]
