"""Block sizes of TPU kernels out of the table that a search by static cycles has made."""

import re

import jax
import jax.numpy as jnp
import pytest

from wanjax.models.products import identity
from wanjax.ops.kernels import flash_tpu, matmul_tpu, tile_table

KERNELS = {
    "flash_forward": {"queries", "keys"},
    "flash_backward": {"queries", "keys"},
    "matmul": {"rows", "columns"},
    "matmul_long": {"rows", "channels"},
    "matmul_int8": {"rows", "columns"},
}


def test_the_table_names_what_the_kernels_have():
    for kernel, chips in tile_table.TABLE.items():
        for chip, shapes in chips.items():
            assert chip in ("v5e", "v5p", "v6e", "7x")
            for shape, sizes in shapes.items():
                assert re.fullmatch(r"\d+(x\d+)?", shape)
                assert set(sizes) == KERNELS[kernel]


@pytest.fixture
def on_a_chip(monkeypatch):
    monkeypatch.setattr(tile_table, "chip", lambda: "v6e")
    monkeypatch.setattr(tile_table, "TABLE", {})
    jax.clear_caches()
    yield tile_table.TABLE
    jax.clear_caches()


def test_sizes_are_the_kernels_own_but_for_what_was_tried(on_a_chip):
    on_a_chip["matmul"] = {"v6e": {"128x384": {"rows": 64}}}
    assert tile_table.tiles("matmul", 128, 384, rows=1024, columns=512) == {"rows": 64, "columns": 512}
    for kernel, shape in (("matmul", (384, 128)), ("matmul_long", (128, 384))):
        assert tile_table.tiles(kernel, *shape, rows=1024, columns=512) == {"rows": 1024, "columns": 512}


def grid(function, *arguments, kernel=r"\w+"):
    """Of a kernel that a function calls, the first of that name."""
    text = str(jax.make_jaxpr(function)(*arguments))
    return re.search(rf"grid=\(([\d, ]+)\)(?:(?!grid=).)*?name={kernel}\b", text, re.DOTALL)[1]


def test_kernels_ask_the_table(on_a_chip):
    x, bias = jnp.zeros((1, 256, 256), jnp.bfloat16), jnp.zeros((256,))
    matrix = jnp.zeros((256, 256), jnp.bfloat16)
    product = (lambda *args: matmul_tpu.matmul(*args, activation=identity, interpret=True)), x, matrix, bias
    assert grid(*product) == "1, 1, 1"
    on_a_chip["matmul"] = {"v6e": {"256x256": {"rows": 64, "columns": 128}}}
    jax.clear_caches()
    assert grid(*product) == "1, 4, 2"


def test_attention_asks_the_table(on_a_chip):
    q = jnp.zeros((1, 1, 256, 128), jnp.bfloat16)
    k = jnp.zeros((1, 1, 4096, 128), jnp.bfloat16)
    run = lambda q, k: flash_tpu.forward(q, k, k, None, jnp.bfloat16, interpret=True)  # noqa: E731
    assert grid(run, q, k, kernel="flash_forward") == "1, 1, 1"
    on_a_chip["flash_forward"] = {"v6e": {"4096": {"queries": 128, "keys": 2048}}}
    jax.clear_caches()
    assert grid(run, q, k, kernel="flash_forward") == "1, 2, 2"
