"""Attention in 8 bits: near to exact attention, GPUs' kernel equal to its reference, in a ring too; no gradient."""

import dataclasses
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh
from tiny import golden, golden_arrays, official_inputs, on, relative_error, velocity

from sharding import sequence_attention
from sharding.mesh import MeshShape
from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.ops.attention import kernel, reference_forward
from wanjax.ops.kernels import LOWEST, bounded_tpu, flash_tpu, int8fp8, int8fp8_gpu, int8fp8_tpu

exact = jax.jit(reference_forward, static_argnums=4)
forward = jax.jit(int8fp8.forward, static_argnums=4, static_argnames=("values", "keys"))


def random(lq, lk, d, outliers=False, heads=2):
    """Normalised queries, keys and values; with outliers, channels of the keys with large means or spreads."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, length, d), np.float32) for length in (lq, lk, lk))
    if outliers:
        k[..., [1, 5]] += np.float32([40, -25])
        k[..., [2, d - 3]] *= np.float32([8, 5])
    return q, k, v


def cosine(got, expected):
    got, expected = (np.asarray(x, np.float64).ravel() for x in (got, expected))
    return got @ expected / np.linalg.norm(got) / np.linalg.norm(expected)


@pytest.mark.parametrize("outliers", [False, True])
def test_near_to_exact_attention(outliers):
    q, k, v = random(512, 2048, 128, outliers)
    out, lse = exact(q, k, v, None, jnp.float32)
    for values, least in (("fp8", 0.999), ("bf16", 0.9998)):
        got, got_lse = forward(q, k, v, None, jnp.float32, values=values)
        assert cosine(got, out) >= least
        assert np.abs(got_lse - lse).max() < 0.05
    naive = [np.round(x / (top := np.abs(x).max(axis=(-2, -1), keepdims=True) / 127)) * top for x in (q, k)]
    if outliers:  # which is what smoothing and rotation are for
        assert cosine(exact(*naive, v, None, jnp.float32)[0], out) < 0.997


def test_padding_has_no_influence():
    q, k, v = random(20, 300, 16)
    expected = forward(q, k[:, :, :270], v[:, :, :270], None, jnp.float32)
    k[:, :, 270:], v[:, :, 270:] = 1e9, np.nan
    for got, wanted in zip(forward(q, k, v, jnp.int32(270), jnp.float32), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    out, lse = forward(q, k, v, jnp.int32(0), jnp.float32)
    assert not np.any(out)
    np.testing.assert_array_equal(lse, np.float32(LOWEST))


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks and units in a small problem."""
    for name, value in {"MOST_QUERIES": 256, "COLUMNS": 128, "KEYS": 512, "PART": 256, "ROWS": 384}.items():
        monkeypatch.setattr(int8fp8_tpu, name, value)
    monkeypatch.setattr(bounded_tpu, "COLUMNS", 128)
    monkeypatch.setattr(flash_tpu, "UNIT_KEYS", 128)

    def dot(a, b, axes):  # XLA on CPUs lacks some of the products of bfloat16
        sums, a, b = (
            (jnp.int32, a, b) if a.dtype == jnp.int8 else (jnp.float32, a.astype("float32"), b.astype("float32"))
        )
        return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=sums)

    monkeypatch.setattr(int8fp8_tpu, "dot", dot)
    int8fp8_tpu.run.clear_cache()
    yield
    int8fp8_tpu.run.clear_cache()


@pytest.mark.parametrize(
    ("lq", "lk", "d", "valid", "outliers"),
    [(300, 1100, 128, 900, True), (512, 1024, 128, None, False), (100, 257, 80, None, True)],
)
@pytest.mark.usefixtures("small_blocks")
def test_tpu_kernel_is_near_to_exact_attention(lq, lk, d, valid, outliers):
    q, k, v = random(lq, lk, d, outliers)
    out, lse = exact(q, k[:, :, :valid].copy(), v[:, :, :valid].copy(), None, jnp.float32)
    if valid is not None:
        k[:, :, valid:], v[:, :, valid:] = 1e9, np.nan
    got, got_lse = int8fp8_tpu.run(q, k, v, valid and jnp.int32(valid), jnp.float32, interpret=True)
    assert cosine(got, out) >= 0.9998
    assert np.abs(got_lse - lse).max() < 0.05


@pytest.mark.usefixtures("small_blocks")
def test_tpu_kernel_without_a_valid_key():
    out, lse = int8fp8_tpu.run(*random(20, 300, 16), jnp.int32(0), jnp.float32, interpret=True)
    assert not np.any(out)
    np.testing.assert_array_equal(lse, np.float32(LOWEST))


@pytest.mark.usefixtures("small_blocks")
def test_scores_far_above_those_of_the_sample_are_computed_exactly(monkeypatch):
    """A key that no sample shows takes all weight of one query, 190 powers of two above the rest."""
    q, k, v = random(300, 1100, 128)
    assert 702 not in np.arange(int8fp8_tpu.SAMPLES) * 1100 // int8fp8_tpu.SAMPLES
    q[:, 1, 280], k[:, 1, 702] = 0, 0
    q[:, 1, 280, 7], k[:, 1, 702, 7] = 30, 50
    bad = []
    repaired = bounded_tpu.repaired
    monkeypatch.setattr(bounded_tpu, "repaired", lambda out, lse, *rest: bad.append(lse) or repaired(out, lse, *rest))
    run = int8fp8_tpu.run.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    got, got_lse = run(q, k, v, None, jnp.float32, interpret=True)
    out, lse = exact(q, k, v, None, jnp.float32)
    np.testing.assert_array_equal(np.argwhere(np.isneginf(np.asarray(bad[0])[:, 0])), [[1, 280]])
    np.testing.assert_allclose(got[0, 1, 256:], out[0, 1, 256:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got_lse[0, 1, 256:], lse[0, 1, 256:], rtol=1e-5)
    assert cosine(got[0, 0], out[0, 0]) > 0.999


@pytest.mark.usefixtures("small_blocks")
def test_what_softmax_is_relative_to_is_subtracted_exactly():
    """A unit of a query's scores times whole numbers: those of the largest key of the sample come out as 0."""
    rng = np.random.default_rng(0)
    q, mean, scale = rng.standard_normal((64, 128)), rng.standard_normal((1, 128)), np.full((1, 128), 0.03)
    sample = rng.integers(-127, 128, (32, 128)).astype(np.int8)
    sample[0] = 127
    turn = int8fp8_tpu.hadamard()
    q = np.concatenate([q, 100 * turn[:1], 0 * turn[:1]]).astype(np.float32)
    arrays = (jnp.asarray(x, jnp.float32) for x in (mean, scale, turn))
    query, unit, base = int8fp8_tpu.rounded_queries(jnp.asarray(q), jnp.asarray(sample), *arrays, 0.125)
    query, unit = np.asarray(query, np.int64), np.asarray(unit, np.float64)[0]
    scores = query[:, :128] @ sample.T.astype(np.int64)
    spare = query[:, 128:] @ np.array([1] + [127] * 127)
    np.testing.assert_array_equal(scores.max(axis=1) + spare, 0)
    expected = scores.max(axis=1) * unit + 0.125 / 128 * (q @ turn @ mean[0])
    np.testing.assert_allclose(np.asarray(base)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lq", "lk", "d", "valid", "values"),
    [
        (300, 1100, 16, 900, "fp8"),
        (300, 1024, 128, None, "bf16"),
        (100, 257, 80, None, "fp8"),
        (20, 300, 16, 0, "bf16"),
    ],
)
def test_gpu_kernel_equals_the_reference(lq, lk, d, valid, values):
    q, k, v = random(lq, lk, d, outliers=True)
    valid = None if valid is None else jnp.int32(valid)
    expected = forward(q, k, v, valid, jnp.float32, values=values, keys=int8fp8_gpu.KEYS)
    results = int8fp8_gpu.run(q, k, v, valid, jnp.float32, values=values, interpret=True)
    for got, wanted in zip(results, expected, strict=True):
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        assert np.linalg.norm(got - wanted) <= 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("capability", "values"), [("8.0", "bf16"), ("8.9", "fp8"), ("9.0", "bf16"), ("10.0", "fp8"), ("12.0", "fp8")]
)
def test_values_are_rounded_to_what_the_gpu_multiplies(monkeypatch, capability, values):
    assert int8fp8_gpu.chip() == "bf16"  # without any
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
    assert int8fp8_gpu.chip() == values


def test_inside_ring_and_ulysses():
    """Every member of the ring smooths with another mean: keys drift over the sequence."""
    length = 90
    q, k, v = (x.swapaxes(1, 2) for x in random(length, length, 16, outliers=True, heads=4))  # [b, l, n, d]
    k = k + np.linspace(-3, 3, length, dtype=np.float32)[:, None, None]
    whole, short = exact(*(x.swapaxes(1, 2) for x in (q, k, v)), None, jnp.float32)[0].swapaxes(1, 2), []
    for shape in (MeshShape(), MeshShape(ring=2, ulysses=2)):
        with on(shape):
            sharding = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(None, ("ring", "ulysses")))
            inputs = [jax.device_put(np.pad(x, ((0, 0), (0, 2), (0, 0), (0, 0))), sharding) for x in (q, k, v)]
            out = jax.jit(partial(sequence_attention, length=length, choice="int8fp8"))(*inputs)
            short.append(np.asarray(out)[:, :length])
    assert all(cosine(out, whole) > 0.998 for out in short)
    assert cosine(*short) > 0.998


@pytest.mark.parametrize("mesh", [False, True])
def test_the_gradient_is_refused(mesh):
    x = jnp.ones((1, 8, 2, 16))
    shape = MeshShape(ring=2 if mesh else 1)
    with (
        on(shape),
        pytest.raises(InputError, match=r"attention int8fp8 has no gradient; .* train with attention auto"),
    ):
        jax.jit(jax.grad(lambda x: sequence_attention(x, x, x, 8, "int8fp8").sum()))(x)


def test_the_network_passes_the_choice_on():
    dit, expected = golden("official", "dit"), golden_arrays("official")
    latents, text, image = official_inputs()
    timestep = expected["dit_t"].astype(np.float32)

    def run(choice):
        model = jax.tree.unflatten(structure(choice), jax.tree.leaves(dit))
        return np.asarray(velocity(model, latents, timestep, text, image))

    def structure(choice):
        config = dataclasses.replace(dit.config, attention=choice)
        return jax.tree.structure(jax.eval_shape(lambda: DiT(config, nnx.Rngs(0))))

    plain = np.asarray(velocity(dit, latents, timestep, text, image))
    np.testing.assert_array_equal(run("reference"), plain)
    assert 0 < relative_error(run("int8fp8"), plain) < 0.01


def test_the_platform_and_the_choice_name_the_kernel():
    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100", None, "gpu"))  # for Pallas, which asks

    def lowered(platform, choice, dtype=jnp.bfloat16):
        x = jax.ShapeDtypeStruct((1, 2, 40, 64), dtype)
        run = jax.jit(lambda q, k, v: kernel(choice).forward(q, k, v, None, jnp.float32))
        with use_abstract_mesh(gpu) if platform == "cuda" else nullcontext():
            return run.trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()

    assert "int8fp8_forward" in lowered("tpu", "int8fp8")
    assert "flash_forward" in lowered("tpu", "flash")
    assert "tpu_custom_call" not in lowered("tpu", "reference")
    assert "__cudnn$fmhaSoftmax(" in lowered("cuda", "flash")
    for dtype in (jnp.bfloat16, jnp.float32):
        text = lowered("cuda", "int8fp8", dtype)
        assert "__gpu$xla.gpu.triton" in text
        assert "xi8>" in text
    assert "xi8>" in lowered("cpu", "int8fp8")
    with pytest.raises(NotImplementedError):
        lowered("cpu", "flash")
