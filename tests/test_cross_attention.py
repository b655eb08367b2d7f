"""The kernel of attention to text and images for TPUs against the sum of two attentions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wanjax.ops.attention import _summed_attention, summed_attention
from wanjax.ops.kernels import cross_tpu


def random(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def operands(*lengths, queries=700):
    shapes = [(2, queries, 3, 128), *((2, length, 3, 128) for length in lengths for _ in range(2))]
    return [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("lengths", [(64, 50), (7,), (1, 128)])
def test_kernel_equals_the_sum(monkeypatch, lengths):
    monkeypatch.setattr(cross_tpu, "QUERIES", 512)
    cross_tpu.forward.clear_cache()
    args = operands(*lengths)
    got = np.asarray(cross_tpu.forward(*args, interpret=True), np.float32)
    cross_tpu.forward.clear_cache()
    wanted = np.asarray(_summed_attention(*(x.astype(jnp.float32) for x in args)))
    assert np.linalg.norm(got - wanted) <= 0.01 * np.linalg.norm(wanted)


def test_scores_far_apart_do_not_overflow():
    _, k, v = operands(32)
    q = jnp.concatenate([k * 300, -k * 300], axis=1)  # each finds its own key, or flees from it
    got = np.asarray(cross_tpu.forward(q, k, v, interpret=True), np.float32)
    np.testing.assert_array_equal(got[:, :32], np.asarray(v, np.float32))
    assert np.all(np.abs(got) <= np.abs(np.asarray(v, np.float32)).max())


def test_value_and_gradients_are_those_of_the_sum():
    args, dout = operands(20, 12, queries=40), random(2, 40, 3, 128, seed=9)

    def run(function):
        return jax.jit(lambda *args: (function(*args), *jax.vjp(function, *args)[1](dout)))(*args)

    for got, wanted in zip(run(summed_attention), run(_summed_attention), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_tpus_get_one_kernel_unless_gradients_are_wanted():
    args = operands(20, 12, queries=40)

    def kernels(function, platform):
        text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
        return text.count("tpu_custom_call")

    assert kernels(summed_attention, "tpu") == 1
    assert kernels(summed_attention, "cpu") == kernels(summed_attention, "cuda") == 0
    assert kernels(jax.grad(lambda *args: summed_attention(*args).astype(jnp.float32).sum()), "tpu") > 1
