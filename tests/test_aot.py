"""Full-size programs compiled for real TPUs: what a chip holds and what travels. Minutes a test; `make aot`."""

import pytest

from wanjax.report import compiled, memory
from wanjax.report.compiled import Case
from wanjax.report.programs import one_sample_each
from wanjax.weights.quantize import requantized

pytestmark = pytest.mark.aot
GIB = 2**30
SAMPLING = "configs/flf2v_14b_720p.py"


def figures(config, topology, name="DiT step", mesh=None, quantize=None):
    config, dit, meshes, _ = memory.load(config)
    mesh = mesh or meshes[topology]
    config = one_sample_each(config, memory.abstract_shape(mesh))
    return compiled.measure(Case(config, requantized(dit, quantize), topology, mesh), name)


def test_a_step_of_sampling_on_eight_chips_of_v6e():
    row = figures(SAMPLING, "v6e:2x4")
    assert row.peak <= 9 * GIB
    # Self-attention's queries, keys, values and results; cross-attention sends nothing.
    assert row.payload["all-to-all"] == 4 * 40 * 18944 * 5120 * 2
    # The weights once, without those of the context.
    assert row.payload["all-gather"] <= 24 * GIB
    assert row.exposed <= 0.1 * GIB  # before the first block there is nothing to compute meanwhile
    assert row.payload["all-reduce"] == row.payload["reduce-scatter"] == row.payload["collective-permute"] == 0


def test_a_step_of_sampling_on_one_chip_in_8_bits():
    row = figures(SAMPLING, "v6e:2x2", mesh="data=1", quantize="int8")
    assert row.peak <= 25 * GIB


@pytest.mark.parametrize("name", ["umT5", "CLIP", "VAE encode", "VAE decode"])
def test_other_stages_of_sampling_on_v6e(name):
    row = figures(SAMPLING, "v6e:2x4", name)
    assert row.peak <= 31 * GIB


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_a_step_of_sampling_compiles_elsewhere(topology):
    row = figures(SAMPLING, topology)
    assert 0 < row.peak <= 20 * GIB


def test_adapters_of_14b_learn_on_one_chip():
    """Beside an expert of A14B in int8, at 480p; what blocks keep waits in the host's memory."""
    row = figures("configs/train_a14b_lora.py", "v6e:2x2", "training step", "data=1")
    assert not row.refused
    assert row.arguments <= 15.5 * GIB
    assert row.peak <= 28 * GIB


@pytest.mark.parametrize(
    ("config", "topology", "limit"),
    [
        ("configs/train_flf2v_14b_720p_4chips.py", "v5p:2x2x1", 95),
        ("configs/train_flf2v_14b_720p.py", "v5p:4x4x4", 95),
        ("configs/train_flf2v_14b_720p.py", "v6e:16x16", 31),
        ("configs/distill_flf2v_14b.py", "v5p:4x4x8", 95),
    ],
)
def test_a_training_step(config, topology, limit):
    row = figures(config, topology, "training step")
    assert row.peak <= limit * GIB
    # Gradients go home as sums of parts, and are nowhere whole.
    assert row.payload["reduce-scatter"] > 0
    assert row.payload["all-reduce"] < 0.1 * row.payload["reduce-scatter"]
