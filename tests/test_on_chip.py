"""The command for a real chip, whole, on the CPU with small shapes; and what it says where something fails."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def on_chip(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return importlib.import_module("on_chip")


def rows(on_chip, capsys, *flags):
    on_chip.main(["--small", *flags])
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["small"]
    assert len(table) == 2 + len(found["rows"])
    return found["rows"]


@pytest.mark.slow
def test_every_part(on_chip, capsys):
    found = rows(on_chip, capsys)
    assert not [row["part"] + ": " + row["why"] for row in found if row["why"]]
    errors = [row for row in found if row["error"] is not None]
    timed = [row for row in found if row["seconds"] is not None]
    assert len(errors) + len(timed) == len(found)
    assert all(row["error"] < (0.01 if "8" not in row["part"] else 0.04) for row in errors)
    assert all(row["seconds"] > 0 and row["tera"] > 0 for row in timed)
    parts = {row["part"].split(",")[0] for row in timed}
    assert parts == {
        *("attention forward", "attention backward", "product", "block forward", "block forward and backward"),
        *("VAE encode", "VAE decode", "step"),
    }


def test_a_part_that_fails_is_a_row(on_chip, capsys, monkeypatch):
    from chip import parts

    monkeypatch.setattr(parts, "vae_chunks", lambda *_: 1 / 0)
    monkeypatch.setattr(parts, "kernel", lambda *_: parts.jnp.missing)
    (attention, vae) = rows(on_chip, capsys, "--only", "attention", "vae")
    assert "AttributeError" in attention["why"]
    assert "ZeroDivisionError" in vae["why"]
