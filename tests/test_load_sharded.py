"""Checkpoints onto the devices: each reads its own part, and all have the same model."""

import contextlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import GOLDEN, assert_same_model, golden
from tiny_checkpoints import fsdp

from wanjax.weights import Checkpoint, placing
from wanjax.weights.load import parameters
from wanjax.weights.tensors import copy


@pytest.mark.parametrize(("layout", "network"), [("diffusers", "dit"), ("official", "clip")])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("ambient", [True, False])
def test_sharded(layout, network, kind, ambient):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(kind, kind))
    checkpoint, choose = Checkpoint(GOLDEN / layout), fsdp(mesh)
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        model = checkpoint.load(network, checkpoint.config(network), choose)
    assert_same_model(model, golden(layout, network))
    for path, leaf in parameters(model).items():
        wanted = choose(tuple(path.split(".")), leaf)
        assert leaf[...].sharding.is_equivalent_to(wanted, leaf.ndim), path


def test_replicated_on_the_ambient_mesh():
    checkpoint = Checkpoint(GOLDEN / "official")
    config = checkpoint.config("umt5")
    plain = golden("official", "umt5")
    assert {leaf.sharding for leaf in jax.tree.leaves(plain)} == {jnp.zeros(()).sharding}
    for shape in ((1, 1, 1, 1), (2, 2, 2, 1)):
        with jax.set_mesh(jax.make_mesh(shape, ("data", "fsdp", "ring", "ulysses"))):
            model = checkpoint.load("umt5", config)
        assert_same_model(model, plain)
        for leaf in jax.tree.leaves(model):
            assert leaf.sharding.is_fully_replicated
            assert len(leaf.sharding.device_set) == np.prod(shape)


def test_only_a_devices_own_part_is_read(monkeypatch):
    """What a host with one device of eight would read is an eighth."""
    mesh = jax.make_mesh((8,), ("fsdp",))
    read = []

    def counting(view, dtype, reader):
        read.append(view.size)
        return copy(view, dtype, reader)

    monkeypatch.setattr(placing, "copy", counting)
    checkpoint = Checkpoint(GOLDEN / "diffusers")
    model = checkpoint.load("dit", checkpoint.config("dit"), fsdp(mesh))
    total = sum(leaf.size for leaf in jax.tree.leaves(model))
    attention_kernels = [size for size in read if size == 64 * 64 // 8]
    assert len(attention_kernels) >= 2 * 10 * 8  # layers x kernels x devices
    assert sum(read) < 1.1 * total


def test_layer_axis_cannot_be_sharded():
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    checkpoint = Checkpoint(GOLDEN / "diffusers")

    def wrong(path, leaf):
        return NamedSharding(mesh, PartitionSpec("fsdp") if path[0] == "blocks" else PartitionSpec())

    with pytest.raises(ValueError, match="layer axis"):
        checkpoint.load("dit", checkpoint.config("dit"), wrong)


def test_sharding_is_asked_with_path_and_parameter():
    asked = {}

    def choose(path, leaf):
        asked[path] = leaf
        return jnp.zeros(()).sharding

    checkpoint = Checkpoint(GOLDEN / "diffusers")
    checkpoint.load("vae", checkpoint.config("vae"), choose)
    assert asked["encoder", "blocks", "3", "shortcut", "kernel"].shape == (1, 1, 1, 4, 8)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((), ()),
        ((5,), (0,)),
        ((100, 40), (1, 0)),
        ((100, 40), (0, 1)),
        ((6, 1), (1, 0)),
        ((0, 3), (1, 0)),
        ((40, 5, 3, 2, 2), (2, 3, 4, 1, 0)),
    ],
)
def test_copies_are_aligned_and_exact(shape, order, dtype):
    class Reader:
        def view(self, key):
            raise NotImplementedError

        def release(self):
            pass

    x = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16).transpose(order)
    y = copy(x, dtype, Reader())
    assert y.dtype == dtype
    assert y.flags.c_contiguous
    assert y.size == 0 or y.ctypes.data % 64 == 0
    np.testing.assert_array_equal(y, x.astype(dtype))
