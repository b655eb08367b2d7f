"""Blocks in 8 bits: as exact as the formats allow, half the bytes, saved and loaded, sharded."""

import dataclasses
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import (
    GOLDEN,
    OFFICIAL,
    assert_same_model,
    flags,
    golden,
    golden_arrays,
    official_inputs,
    on,
    relative_error,
    velocity,
)

import sample_jax
from sharding.mesh import MeshShape
from sharding.rules import parameter_sharding
from wanjax.commands.quantize import main
from wanjax.config import DiTConfig, LoRAConfig, TrainConfig
from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.ops.quantized import DTYPES, matmul, quantize_weight
from wanjax.sampling.pipeline import Pipeline
from wanjax.training.objectives.flow_matching import network_to_train
from wanjax.weights import Checkpoint, convert, save
from wanjax.weights.quantize import quantize

CASES = [("fp8", None), ("int8", (1, 2))]


@pytest.mark.parametrize("shape", [(5120, 5120), (5120, 13824), (13824, 5120)], ids=str)
def test_error_at_the_shapes_of_14b(shape):
    """Gaussian weights and activations, the latter of very different sizes from token to token."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal(shape, np.float32))
    x = rng.standard_normal((4, shape[0]), np.float32) * np.float32([[1e-3], [1], [30], [1]])
    expected = np.asarray(x @ kernel)
    for format, limit in (("fp8", 0.04), ("int8", 0.015)):
        stored, scale = jax.jit(quantize_weight, static_argnums=1)(kernel, format)
        assert stored.dtype == DTYPES[format]
        assert scale.dtype == jnp.float32
        for got, wanted in zip(jax.jit(matmul)(x, stored, scale), expected, strict=True):
            assert relative_error(got, wanted) <= limit


@pytest.mark.parametrize("format", DTYPES)
def test_zeros_and_the_largest_number(format):
    kernel = np.float32([[0, 1], [-3, 2]])
    stored, scale = quantize_weight(kernel, format)
    assert np.all(np.abs(np.asarray(stored, np.float32)) <= {"fp8": 448, "int8": 127}[format])
    out = matmul(jnp.float32([[0, 0], [3e38, -3e38]]), stored, scale)
    np.testing.assert_array_equal(out[0], 0)
    assert np.all(np.isfinite(matmul(jnp.float32([[3e30, -1e30]]), stored, scale)))
    assert not np.any(quantize_weight(np.zeros((2, 2), np.float32), format)[0].astype(jnp.float32))


@pytest.mark.parametrize("format", DTYPES)
def test_bytes_of_the_blocks_are_halved(format):
    def size(**changes):
        config = dataclasses.replace(DiTConfig(param_dtype=jnp.bfloat16), **changes)
        return sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: DiT(config, nnx.Rngs(0))).blocks)
        )

    full = size()
    assert 0.5 < size(quantize=format) / full < 0.501
    assert abs(size(quantize=format, quantized_layers=(1, 39)) / full - (2 + 38 / 2) / 40) < 0.001


@pytest.mark.parametrize(("format", "layers"), CASES)
def test_velocity_stays_close(format, layers):
    dit, expected = golden("official", "dit"), golden_arrays("official")
    latents, text, image = official_inputs()
    timestep = expected["dit_t"].astype(np.float32)
    exact = velocity(dit, latents, timestep, text, image)
    smaller = quantize(dit, format, layers)
    assert 0 < relative_error(velocity(smaller, latents, timestep, text, image), exact) < 0.06
    shapes = [jax.eval_shape(lambda m: m.context(text, image), m) for m in (dit, smaller)]
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])
    out = jax.eval_shape(lambda m, c: m.without_context()(latents, timestep, c), smaller, shapes[1])
    assert out.shape == exact.shape
    assert dit.config.quantize == "off"


@pytest.mark.parametrize(("format", "layers"), CASES)
def test_save_and_load(format, layers, tmp_path):
    base = Checkpoint(GOLDEN / "official")
    model = quantize(golden("official", "dit"), format, layers)
    save(tmp_path / "a", "diffusers", {"dit": model}, base=base)
    new = Checkpoint(tmp_path / "a")
    assert new.config("dit") == model.config
    assert_same_model(new.load("dit", new.config("dit")), model)
    if layers:
        convert(tmp_path / "a", tmp_path / "b", "official", pth=False)
        assert_same_model(Checkpoint(tmp_path / "b").load("dit", model.config), model)
    # Quantised while it is read: the same.
    assert_same_model(base.load("dit", model.config), model)


@pytest.mark.parametrize(("layers", "layout", "dtype"), [(None, None, "float32"), ((1, 2), "diffusers", "bfloat16")])
def test_command(layers, layout, dtype, tmp_path, capsys):
    """What it writes is the quantised network, and a run takes it as it is."""
    command = ["--checkpoint", OFFICIAL, "--output", tmp_path / "a", "--format", "int8", "--dtype", dtype]
    command += (["--layers", "{}:{}".format(*layers)] if layers else []) + (["--layout", layout] if layout else [])
    main([str(x) for x in command])
    assert f"{tmp_path / 'a'} has the {layout or 'official'} layout" in capsys.readouterr().out
    base = Checkpoint(OFFICIAL)
    model = quantize(base.load("dit", base.config("dit")), "int8", layers)  # from the file's float32 on
    config = dataclasses.replace(model.config, param_dtype=jnp.dtype(dtype))
    dtypes = [x.dtype for x in jax.tree.leaves(jax.eval_shape(lambda: DiT(config, nnx.Rngs(0))))]
    leaves, tree = jax.tree.flatten(model)
    model = jax.tree.unflatten(tree, [x.astype(kept) for x, kept in zip(leaves, dtypes, strict=True)])
    written = Checkpoint(tmp_path / "a")
    plan = Pipeline(sample_jax.parse(flags(OFFICIAL, checkpoint=written.path, dtype=dtype)))
    assert (plan.dit.quantize, plan.dit.quantized_layers) == ("int8", layers)
    assert_same_model(written.load("dit", plan.dit), model)
    run = {"save_latents": tmp_path / "l.npy", "output": tmp_path / "v.npy", "steps": 2, "dtype": dtype}
    if layers is None:  # `sample_jax.py --quantize` takes all
        latents = []
        for changes in ({"checkpoint": written.path}, {"quantize": "int8"}):
            sample_jax.main(flags(OFFICIAL, **run, **changes))
            latents.append(np.load(tmp_path / "l.npy"))
        np.testing.assert_array_equal(*latents)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--layers": "1"}, ["layers '1'", "FIRST:STOP", "--layers 1:39"]),
        ({"--layers": "-1:2"}, ["--layers"]),
        ({"--layers": "2:9"}, ["layers (2, 9)", "of 3"]),
        ({"--format": "int4"}, ["int4", "fp8", "--help"]),
        ({"--checkpoint": "nowhere"}, ["nowhere is not a folder"]),
        ({"--output": OFFICIAL}, ["is not empty", "another folder"]),
        ({"--output": OFFICIAL / "8-bit"}, ["is inside", "outside of it"]),
    ],
)
def test_bad_flags(changes, words, monkeypatch, tmp_path):
    """Found before anything is read, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpoint, "load", None)
    values = {"--checkpoint": OFFICIAL, "--output": "a", "--format": "fp8"} | changes
    with pytest.raises(InputError) as caught:
        main([str(x) for flag in values.items() for x in flag])
    assert all(word in str(caught.value) for word in words), caught.value
    assert list(tmp_path.iterdir()) == []
    assert not (OFFICIAL / "8-bit").exists()


def test_exit_code(tmp_path):
    command = ["--checkpoint", str(tmp_path / "nowhere"), "--output", str(tmp_path / "a"), "--format", "fp8"]
    done = subprocess.run([sys.executable, "-m", "wanjax", "quantize", *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("format", "layers"), CASES)
def test_on_a_mesh(format, layers):
    checkpoint = Checkpoint(GOLDEN / "official")
    config = dataclasses.replace(checkpoint.config("dit"), quantize=format, quantized_layers=layers)
    expected = golden_arrays("official")
    inputs = official_inputs()
    timestep = expected["dit_t"].astype(np.float32)
    dit = checkpoint.load("dit", config)
    one = velocity(dit, inputs[0], timestep, *inputs[1:])
    with on(MeshShape(fsdp=2, ring=2, ulysses=2)):
        placed = checkpoint.load("dit", config, parameter_sharding)
        assert_same_model(jax.device_get(placed), jax.device_get(dit))
        kernel = placed.stacks[layers is not None].ffn.fc_in.kernel[...]
        assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8
        program = velocity.lower(placed, inputs[0], timestep, *inputs[1:]).compile()
        several = program(placed, inputs[0], timestep, *inputs[1:])
    gathered = [line for line in program.as_text().splitlines() if " all-gather(" in line]
    assert sum(" s8[" in line for line in gathered) >= 9  # the block's matrices, half the bytes of bfloat16
    # Sums in another order round some activations to the neighbouring number.
    assert relative_error(several, one) < 0.01


@pytest.mark.parametrize("format", DTYPES)
def test_the_gradient_is_refused(format):
    stored, scale = quantize_weight(np.eye(4, dtype=np.float32), format)
    with pytest.raises(InputError, match="8-bit numbers has no gradient"):
        jax.grad(lambda x: matmul(x, stored, scale).sum())(jnp.ones((2, 4)))


def test_what_is_refused(tmp_path):
    model = quantize(golden("official", "dit"), "int8")
    with pytest.raises(InputError, match="quantised to int8 already"):
        quantize(model, "fp8")
    with pytest.raises(InputError, match=r"layers \(2, 9\) to quantise of 3"):
        quantize(golden("official", "dit"), "fp8", (2, 9))
    save(tmp_path / "a", "official", {"dit": model})
    checkpoint = Checkpoint(tmp_path / "a")
    for format in ("off", "fp8"):
        with pytest.raises(InputError, match=f"is quantised to int8, .* not as {format}; ask for no other format"):
            checkpoint.check("dit", dataclasses.replace(checkpoint.config("dit"), quantize=format))
    with pytest.raises(InputError, match="quantised to int8, which has no gradient"):
        network_to_train(TrainConfig(checkpoint=str(tmp_path / "a")))
    beside = network_to_train(TrainConfig(checkpoint=str(tmp_path / "a"), lora=LoRAConfig()))  # adapters may learn
    assert (beside.quantize, beside.weight_only) == ("int8", True)
    shutil.rmtree(tmp_path / "a")
