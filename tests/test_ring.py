"""Attention over tokens that are split among devices, against one device's."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import on, relative_error

from sharding import check_heads, sequence_attention
from sharding.mesh import MeshShape
from sharding.ring import merge
from wanjax.errors import InputError
from wanjax.ops.kernels import LOWEST, merge_tpu

TOKENS = PartitionSpec(("data", "fsdp"), ("ring", "ulysses"))
MESHES = [
    MeshShape(ring=8),
    MeshShape(ulysses=8),
    MeshShape(ring=2, ulysses=4),
    MeshShape(ring=4, ulysses=2),
    MeshShape(data=2, ring=2, ulysses=2),
]


def softmax_attention(q, k, v):
    scores = jnp.einsum("blnd,bmnd->bnlm", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bnlm,bmnd->blnd", jax.nn.softmax(scores), v)


def random(shape, count):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]


def with_gradients(length):
    """Output and gradients of `sequence_attention`, as one function of q, k, v and the output's gradient."""

    def function(q, k, v, dout):
        out, vjp = jax.vjp(lambda q, k, v: sequence_attention(q, k, v, length), q, k, v)
        return out, *vjp(dout)

    return jax.jit(function)


def place(x, padding=0, spec=TOKENS, dtype=np.float32):
    """`x` on the ambient mesh; the padding is noise, as a network would make of it."""
    noise = np.random.default_rng(1).standard_normal((x.shape[0], padding, *x.shape[2:]))
    x = np.concatenate([x, noise], axis=1)
    return jax.device_put(jnp.asarray(x, dtype), NamedSharding(jax.sharding.get_mesh(), spec))


@pytest.mark.parametrize("length", [64, 37, 3])  # divides; does not; leaves devices with padding only
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_equals_one_device(shape, length):
    q, k, v, dout = random((shape.batch, length, 8, 16), 4)
    out, vjp = jax.vjp(softmax_attention, q, k, v)
    expected = out, *vjp(dout)
    padding = -length % shape.sequence
    with on(shape):
        inputs = [place(x, padding) for x in (q, k, v)]
        dout = place(np.pad(dout, ((0, 0), (0, padding), (0, 0), (0, 0))))
        results = with_gradients(length)(*inputs, dout)
        assert all(x.sharding.is_equivalent_to(inputs[0].sharding, x.ndim) for x in results)
    for got, wanted in zip(map(np.asarray, results), expected, strict=True):
        assert np.all(np.isfinite(got))
        assert relative_error(got[:, :length], wanted) < 1e-5
    assert not np.any(np.asarray(results[2])[:, length:])  # keys that do not count
    assert not np.any(np.asarray(results[3])[:, length:])


def test_bfloat16_on_a_ring_stays_close():
    q, k, v, dout = random((1, 37, 8, 16), 4)
    out, vjp = jax.vjp(softmax_attention, q, k, v)
    with on(MeshShape(ring=4, ulysses=2)):
        inputs = [place(x, 3, dtype=jnp.bfloat16) for x in (q, k, v)]
        dout_padded = place(np.pad(dout, ((0, 0), (0, 3), (0, 0), (0, 0))), dtype=jnp.bfloat16)
        results = with_gradients(37)(*inputs, dout_padded)
    for got, wanted in zip(results, (out, *vjp(dout)), strict=True):
        assert got.dtype == jnp.bfloat16
        assert relative_error(np.asarray(got, np.float32)[:, :37], wanted) < 0.02


def test_a_batch_that_does_not_divide_stays_whole():
    q, k, v = random((1, 16, 8, 16), 3)
    with on(MeshShape(data=2, ring=2, ulysses=2)):
        inputs = [place(x, spec=PartitionSpec(None, ("ring", "ulysses"))) for x in (q, k, v)]
        out = jax.jit(lambda q, k, v: sequence_attention(q, k, v, 16))(*inputs)
    assert relative_error(out, softmax_attention(q, k, v)) < 1e-5


def test_without_a_mesh():
    q, k, v = random((2, 16, 3, 8), 3)  # three heads: there is nobody to share them with
    out = sequence_attention(*map(jnp.asarray, (q, k, v)), 13)
    assert relative_error(out[:, :13], softmax_attention(q[:, :13], k[:, :13], v[:, :13])) < 1e-5


def compiled(shape, tokens):
    """The program for forward and gradients, of a padded sequence with `tokens` on every device."""
    with on(shape):
        array = (shape.batch, tokens * shape.sequence, 8, 64)
        x = jax.ShapeDtypeStruct(array, jnp.float32, sharding=NamedSharding(jax.sharding.get_mesh(), TOKENS))
        return with_gradients(array[1] - 1).lower(x, x, x, x).compile()


@pytest.mark.parametrize("shape", [MeshShape(ring=8), MeshShape(ulysses=8), MeshShape(ring=4, ulysses=2)], ids=str)
def test_nothing_is_gathered_and_no_scores_are_stored(shape):
    text = compiled(shape, 256).as_text()
    assert "all-gather" not in text
    assert "all-reduce" not in text
    assert ("collective-permute" in text) == (shape.ring > 1)
    assert ("all-to-all" in text) == (shape.ulysses > 1)
    largest = max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text))
    tokens, keys = 256 * 8 * 64, 256 * shape.ulysses  # elements of q; keys that a device attends to at a time
    assert largest == max(2 * tokens if shape.ring > 1 else tokens, 256 * keys)  # k and v together; a chunk's scores


def test_memory_does_not_grow_with_the_ring():
    sizes = [compiled(MeshShape(ring=ring), 64).memory_analysis().temp_size_in_bytes for ring in (4, 8)]
    assert sizes[1] <= sizes[0] * 1.01


def test_heads_that_cannot_be_split_name_the_factors():
    check_heads(40, 8)
    with pytest.raises(InputError, match=r"ulysses=8 cannot split 12 attention heads; .* 1, 2, 3, 4, 6, 12; "):
        check_heads(12, 8)
    x = jnp.zeros((1, 8, 3, 8))
    with on(MeshShape(ulysses=8)), pytest.raises(InputError, match="1, 3"):
        sequence_attention(x, x, x, 8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2.0**-7)])
def test_tpu_kernel_merges_as_said(dtype, tolerance):
    """Of the rows of the second block, the first ones saw no key."""
    random = np.random.default_rng(0)
    one, other = (
        (
            jnp.asarray(random.normal(size=(2, 3, 300, 128)), jnp.float32),
            jnp.asarray(random.normal(size=(2, 3, 300)) * 9, jnp.float32),
        )
        for _ in range(2)
    )
    other = other[0].at[:, :, :7].set(0), other[1].at[:, :, :7].set(LOWEST)
    got, expected = merge_tpu.merge(one, other, dtype, interpret=True), merge(one, other, dtype)
    assert got[0].dtype == dtype
    np.testing.assert_allclose(*(np.asarray(x[0], np.float32) for x in (got, expected)), rtol=tolerance, atol=2e-6)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[1][:, :, :7], one[1][:, :, :7])
