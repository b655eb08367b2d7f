"""Attention on one device: the reference against plain softmax, the kernels against the reference."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wanjax.ops.attention import attention, kernel, public_forward, reference_backward, reference_forward
from wanjax.ops.kernels import LOWEST, cudnn, flash_tpu, tiles_tpu


def softmax_attention(q, k, v):
    scores = jnp.einsum("blnd,bmnd->bnlm", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bnlm,bmnd->blnd", jax.nn.softmax(scores), v)


def random(shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


forward, backward = jax.jit(reference_forward, static_argnums=4), jax.jit(reference_backward)


def assert_close_by_norm(results, expected, tolerance=2e-6):
    """By norm; what should be zero is exactly that."""
    for got, wanted in zip(results, expected, strict=True):
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)


@partial(jax.jit, static_argnums=0)
def with_gradients(function, q, k, v, dout):
    out, vjp = jax.vjp(function, q, k, v)
    return out, *vjp(dout)


@pytest.mark.parametrize(("lq", "lk"), [(600, 37), (5, 300)])
def test_value_and_gradients(lq, lk):
    q, k, v, dout = (random((2, length, 3, 16), seed) for seed, length in enumerate((lq, lk, lk, lq)))
    assert_close_by_norm(with_gradients(attention, q, k, v, dout), with_gradients(softmax_attention, q, k, v, dout))


def test_bfloat16_stays_close_and_keeps_its_dtype():
    inputs = [random((1, 300, 2, 32), seed) for seed in range(4)]
    results = with_gradients(attention, *(x.astype(jnp.bfloat16) for x in inputs))
    assert all(x.dtype == jnp.bfloat16 for x in results)
    assert_close_by_norm(results, with_gradients(softmax_attention, *inputs), 0.02)


def test_gradient_needs_no_memory_for_the_scores():
    x = jax.ShapeDtypeStruct((1, 4096, 4, 8), jnp.float32)
    grad = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v).sum(), argnums=(0, 1, 2)))
    stats = grad.lower(x, x, x).compile().memory_analysis()
    assert stats.temp_size_in_bytes < 4 * 4096 * 4096 / 4  # a sixteenth of the score matrix


@pytest.mark.parametrize("valid", [1, 20, 37])
def test_only_valid_keys_count(valid):
    q, k, v, dout = (random((1, 2, 37, 8), seed) for seed in range(4))
    short = k[:, :, :valid], v[:, :, :valid]
    out, lse = forward(q, k, v, jnp.int32(valid), jnp.float32)
    assert_close_by_norm((out, lse), forward(q, *short, None, jnp.float32))
    lse, delta = lse + 0.5, random(lse.shape, 4)  # as if other blocks had keys too
    dq, dk, dv = backward(q, k, v, jnp.int32(valid), lse, delta, dout)
    assert_close_by_norm((dq, dk[:, :, :valid], dv[:, :, :valid]), backward(q, *short, None, lse, delta, dout))
    assert not np.any(dk[:, :, valid:])
    assert not np.any(dv[:, :, valid:])


def test_a_block_without_valid_keys_adds_nothing():
    q, k, v, dout = (random((1, 2, 5, 8), seed) for seed in range(4))
    rows, none = jnp.zeros(q.shape[:3]), jnp.int32(0)
    out, lse = forward(q, k, v, none, jnp.float32)
    np.testing.assert_array_equal(lse, np.float32(LOWEST))
    for zero in (out, *backward(q, k, v, none, rows, rows, dout)):
        assert not np.any(zero)


def test_a_checkpoint_policy_can_keep_the_output():
    """With what is named "attention" saved, the backward pass attends no second time."""
    x = jax.ShapeDtypeStruct((1, 8, 2, 8), jnp.float32)

    def count(policy):
        block = jax.checkpoint(lambda x: attention(jnp.sin(x), jnp.cos(x), x), policy=policy)
        lowered = jax.jit(jax.value_and_grad(lambda x: block(x).sum())).trace(x).lower(lowering_platforms=("tpu",))
        return len(re.findall(r"call @forward(_\d+)?\(", lowered.as_text()))

    assert count(jax.checkpoint_policies.nothing_saveable) == 2
    assert count(jax.checkpoint_policies.save_only_these_names("attention")) == 1


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks and units in a small problem."""
    monkeypatch.setattr(flash_tpu, "QUERIES", 256)
    monkeypatch.setattr(flash_tpu, "UNIT_QUERIES", 128)
    monkeypatch.setattr(flash_tpu, "UNIT_KEYS", 128)
    monkeypatch.setattr(flash_tpu, "KEYS_FORWARD", 512)
    monkeypatch.setattr(flash_tpu, "KEYS_RUNNING", 384)
    monkeypatch.setattr(flash_tpu, "KEYS_BACKWARD", 384)
    monkeypatch.setattr(flash_tpu, "DQ_BYTES", 256 * 128 * 4)
    flash_tpu.forward.clear_cache()
    flash_tpu.backward.clear_cache()
    yield
    flash_tpu.forward.clear_cache()
    flash_tpu.backward.clear_cache()


@pytest.mark.parametrize(
    ("lq", "lk", "d", "valid"),
    [(300, 1100, 16, 900), (300, 1024, 128, None), (3, 5, 12, None), (100, 257, 80, None), (20, 300, 16, 0)],
)
@pytest.mark.usefixtures("small_blocks")
def test_tpu_kernel_equals_the_reference(lq, lk, d, valid):
    q, dout = random((1, 2, lq, d), 0), random((1, 2, lq, d), 3)
    k, v = random((1, 2, lk, d), 1), random((1, 2, lk, d), 2)
    valid = None if valid is None else jnp.int32(valid)
    out, lse = forward(q, k, v, valid, jnp.float32)
    results = flash_tpu.forward(q, k, v, valid, jnp.float32, interpret=True)
    assert_close_by_norm(results, (out, lse))
    lse, delta = jnp.maximum(lse, 0) + 0.5, random(lse.shape, 4)  # as if other blocks had keys too
    expected = backward(q, k, v, valid, lse, delta, dout)
    assert_close_by_norm(flash_tpu.backward(q, k, v, valid, lse, delta, dout, interpret=True), expected)


@pytest.mark.usefixtures("small_blocks")
def test_tpu_kernel_in_bfloat16(monkeypatch):
    def product(a, b, axes):  # XLA on CPUs lacks some of the products of bfloat16
        return tiles_tpu.dot(a.astype(jnp.float32), b.astype(jnp.float32), axes)

    monkeypatch.setattr(flash_tpu, "dot", product)
    q, k, v, dout = (random((1, 1, 200, 64), seed, jnp.bfloat16) for seed in range(4))
    out, lse = forward(q, k, v, None, jnp.float32)
    assert_close_by_norm(flash_tpu.forward(q, k, v, None, jnp.float32, interpret=True), (out, lse), 0.01)
    delta = jnp.sum(out * dout, axis=-1)
    results = flash_tpu.backward(q, k, v, None, lse, delta, dout, interpret=True)
    assert all(x.dtype == jnp.float32 for x in results)
    assert_close_by_norm(results, backward(q, k, v, None, lse, delta, dout), 0.02)


def lowered(platform, dtype, valid):
    """What the dispatcher makes of forward and backward for a platform that is not here."""

    def both(q, k, v, valid, rows):
        k_forward, k_backward = kernel()
        return k_forward(q, k, v, valid, jnp.float32), k_backward(q, k, v, valid, rows, rows, q)

    x, rows = jax.ShapeDtypeStruct((1, 2, 40, 64), dtype), jax.ShapeDtypeStruct((1, 2, 40), jnp.float32)
    valid = jax.ShapeDtypeStruct((), jnp.int32) if valid else None
    return jax.jit(both).trace(x, x, x, valid, rows).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("valid", [False, True])
def test_the_platform_compiled_for_chooses_the_kernel(valid):
    for dtype in (jnp.float32, jnp.bfloat16):
        text = lowered("tpu", dtype, valid)
        assert text.count("tpu_custom_call") == 2
        assert "cudnn" not in text
        assert "custom_call" not in lowered("cpu", dtype, valid)
    text = lowered("cuda", jnp.bfloat16, valid)
    assert "__cudnn$fmhaSoftmax(" in text
    assert "__cudnn$fmhaSoftmaxBackward(" in text
    assert "cudnn" not in lowered("cuda", jnp.float32, valid)


def test_cudnn_is_given_an_output_with_the_right_delta(monkeypatch):
    seen = {}

    def fake(*, query, key, value, **others):
        seen.update(others)
        return query, key, value

    monkeypatch.setattr(cudnn.private, "_dot_product_attention_bwd_impl", fake)
    q, dout = random((1, 2, 5, 8), 0, jnp.bfloat16), random((1, 2, 5, 8), 1, jnp.bfloat16).at[0, 0, 0].set(0)
    delta = random((1, 2, 5), 2).at[0, 0, 0].set(0)
    cudnn.backward(q, q, q, None, delta, delta, dout)
    products = np.sum(np.asarray(seen["fwd_output"], np.float32) * np.asarray(dout, np.float32), axis=-1)
    np.testing.assert_allclose(products, delta, rtol=0.01)
    np.testing.assert_array_equal(seen["activation"], delta)
    np.testing.assert_array_equal(seen["grad_output"], dout)


OTHER_RELEASES = {
    "gone": None,
    "without its parts": SimpleNamespace(),
    "another argument": SimpleNamespace(
        MaskType=None,
        AttentionLayout=None,
        _dot_product_attention_fwd_impl=lambda query, another, **_: None,
        _dot_product_attention_bwd_impl=lambda query, **_: None,
    ),
    "an argument less": SimpleNamespace(
        MaskType=None,
        AttentionLayout=None,
        _dot_product_attention_fwd_impl=lambda query, key, value: None,
        _dot_product_attention_bwd_impl=lambda query, **_: None,
    ),
}


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("release", OTHER_RELEASES)
def test_a_jax_whose_own_functions_are_other_ones(monkeypatch, release, valid):
    """No platform fails; GPUs take the public function where it can be traced, as it is here in the second half."""
    assert cudnn.known()
    monkeypatch.setattr(cudnn, "private", OTHER_RELEASES[release])
    for platform in ("cpu", "cuda"):
        assert "custom_call" not in lowered(platform, jnp.bfloat16, valid)
    seen = use_public_function(monkeypatch)
    assert "custom_call" not in lowered("cuda", jnp.bfloat16, valid)
    assert seen.count("cudnn") == 3  # asked whether it works, forward; again for the backward pass


def use_public_function(monkeypatch):
    """JAX's public function as if there was a GPU, by its implementation for all platforms. Gives what is asked for."""
    seen, real = [], jax.nn.dot_product_attention

    def public(*args, implementation, **others):
        seen.append(implementation)
        return real(*args, implementation="xla", **others)

    monkeypatch.setattr(jax.nn, "dot_product_attention", public)
    return seen


@pytest.mark.parametrize("valid", [None, 0, 1, 20, 37])
def test_public_function(monkeypatch, valid):
    use_public_function(monkeypatch)
    q, k = random((2, 3, 30, 16), 0, jnp.bfloat16), random((2, 3, 37, 16), 1, jnp.bfloat16)
    valid = None if valid is None else jnp.int32(valid)
    got = public_forward(q, k, k, valid, jnp.float32)
    assert all(x.dtype == jnp.float32 for x in got)
    assert_close_by_norm(got, forward(q, k, k, valid, jnp.float32), 0.01)


def test_public_function_alone_is_left_where_nobody_asks_for_sums(monkeypatch):
    use_public_function(monkeypatch)
    x = jax.ShapeDtypeStruct((1, 2, 2000, 64), jnp.bfloat16)
    programs = (
        jax.jit(run).lower(x, x, x).compile().as_text()
        for run in (
            lambda q, k, v: public_forward(q, k, v, None, q.dtype),
            lambda q, k, v: public_forward(q, k, v, None, q.dtype)[0],
        )
    )
    assert ["while(" in text for text in programs] == [True, False]
