"""The kernel relative to a bound: as exact as the running maximum whatever the scores are, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wanjax.ops.kernels import bounded_tpu, flash_tpu
from wanjax.ops.kernels.tiles_tpu import dot

LQ, LK, D = 300, 1100, 128


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and units in a small problem."""
    monkeypatch.setattr(flash_tpu, "QUERIES", 256)
    monkeypatch.setattr(flash_tpu, "UNIT_KEYS", 128)
    monkeypatch.setattr(flash_tpu, "KEYS_FORWARD", 512)
    monkeypatch.setattr(flash_tpu, "KEYS_RUNNING", 384)
    for module in (flash_tpu, bounded_tpu):  # XLA on CPUs lacks some of the products of bfloat16
        monkeypatch.setattr(module, "dot", lambda a, b, axes: dot(a.astype(jnp.float32), b.astype(jnp.float32), axes))


def forward(*args):
    """Anew, whatever was patched since the last call."""
    function = flash_tpu.forward.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    return jax.jit(lambda *args: function(*args, jnp.float32, interpret=True))(*args)


def inputs(change):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, length, D)) for length in (LQ, LK, LK))
    change(q, k, v)
    return [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]


def exact(q, k, v, valid):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k[:, :, :valid], v[:, :, :valid]))
    scores = q @ k.swapaxes(2, 3) * D**-0.5
    row_max = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - row_max)
    row_sum = weights.sum(axis=-1, keepdims=True)
    return weights @ v / row_sum, (row_max + np.log(row_sum))[..., 0]


def error(got, expected):
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def as_is(q, k, v):
    pass


def large(q, k, v):
    q *= 30


def huge(q, k, v):
    q *= 1e4
    k *= 1e4


def tiny(q, k, v):
    q *= 1e-4
    k *= 1e-6


def one_long_key(q, k, v):
    """Nobody attends to it, but the bound of all is its length."""
    q[..., 0], k[..., 0], k[:, :, 700] = 0, 0, 0
    k[:, :, 700, 0] = 1e4


def all_scores_at_the_lower_end(q, k, v):
    q[...] = 20 * np.abs(q)
    k[...] = -q[:, :, :1] / 20 + 0.1 * k


def one_query_far_below_its_bound(q, k, v):
    k[..., 0] = -np.abs(k[..., 0])
    q[:, 1, 280] = 0
    q[:, 1, 280, 0] = 1000
    k[:, :, 5] *= 3


def large_values(q, k, v):
    v *= 1e10


CASES = [
    as_is, large, huge, tiny, one_long_key, all_scores_at_the_lower_end, one_query_far_below_its_bound, large_values,
]  # fmt: skip


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("valid", [LK, 900])
@pytest.mark.parametrize("change", CASES, ids=lambda case: case.__name__)
def test_error_against_float64_is_the_running_maximum_s(monkeypatch, change, valid, deep):
    monkeypatch.setattr(bounded_tpu, "deep", lambda width: deep)
    q, k, v = inputs(change)
    expected = exact(q, k, v, valid)

    out, lse = forward(q, k, v, jnp.int32(valid))
    monkeypatch.setattr(flash_tpu, "KEYS_RUNNING", 1152)
    running_out, running_lse = forward(q, k, v, jnp.int32(valid))
    assert error(out, expected[0]) <= max(1.1 * error(running_out, expected[0]), 2e-7)  # float32's own
    assert np.abs(lse - expected[1]).max() <= np.abs(running_lse - expected[1]).max() + 2**-8


@pytest.mark.parametrize(
    ("change", "blocks"),
    [(as_is, 0), (one_long_key, 4), (all_scores_at_the_lower_end, 4), (one_query_far_below_its_bound, 1)],
    ids=lambda case: getattr(case, "__name__", case),
)
def test_only_blocks_far_below_their_bound_are_computed_again(monkeypatch, change, blocks):
    monkeypatch.setattr(bounded_tpu, "repaired", lambda out, lse, *_: (out, lse))
    _, lse = forward(*inputs(change), None)
    bad, queries = np.isneginf(np.asarray(lse)[0]), flash_tpu.QUERIES  # [n, lq]
    assert sum(bad[:, i : i + queries].any(axis=1).sum() for i in range(0, LQ, queries)) == blocks


def test_repair_takes_every_such_block_once():
    queries, lse = 4, np.zeros((3, 1, 10), np.float32)
    lse[0, 0, 3] = lse[2, 0, 8] = lse[2, 0, 9] = -np.inf

    def repair(out, lse, head, block):
        rows = block * queries + jnp.arange(queries)
        return out.at[head, rows].add(1, mode="drop"), lse.at[head, 0, rows].set(5, mode="drop")

    out, fixed = jax.jit(lambda out, lse: bounded_tpu.repaired(out, lse, queries, repair))(jnp.zeros((3, 10, 1)), lse)
    again = np.zeros((3, 10, 1))
    again[0, :4] = again[2, 8:] = 1
    np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(fixed[:, 0], again[..., 0] * 5)


def test_what_is_no_number_stays_where_it_is():
    q, k, v = inputs(as_is)
    out, _ = forward(q.at[0, 0, 0, 0].set(jnp.nan), k, v, None)
    expected = np.zeros((1, 2, LQ), bool)
    expected[0, 0, 0] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(out)).all(axis=-1), expected)
