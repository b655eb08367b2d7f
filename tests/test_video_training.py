"""Video files all the way to what the DiT learns from: in pixels and through the cache the same, bad files named."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from tiny import TRAIN, on, write_config
from tiny_videos import encode, gray, sound

from wanjax.commands import cache
from wanjax.config import CachedData, TaskMix, VideoData
from wanjax.data.batch import Batches
from wanjax.training.objectives import make_objective

LEVELS = {"even.mp4": 60, "odd.mp4": 100, "other.mp4": 140, "short.mp4": 180, "unsteady.mp4": 220}
"""Grey of the files that can be used."""
LEFT_OUT = {
    "garbage.mp4": "cannot be decoded (Invalid data found when processing input)",
    "one frame.mp4": "1 frames at 16 fps, the shortest bucket takes 5",
    "sound.mp4": "holds sound alone",
}
DAMAGED = "damaged.mp4"
"""Promises nine frames and has noise in place of some: found out when it is decoded."""


@pytest.fixture
def folder(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()

    def grey(name, frames, height=48, width=48, **options):
        encode(clips / name, gray([LEVELS[name]] * frames, height, width), **options)

    grey("even.mp4", 12)
    grey("odd.mp4", 20, 51, 53, rate=25)
    grey("other.mp4", 9)
    grey("short.mp4", 6)
    grey("unsteady.mp4", 7, times=[0, 0.04, 0.1, 0.11, 0.5, 0.52, 0.9])
    encode(clips / "one frame.mp4", gray([100]))
    (clips / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    sound(clips / "sound.mp4")
    noise = np.random.default_rng(0).integers(0, 255, (9, 48, 48, 3), np.uint8)
    whole = encode(clips / DAMAGED, noise).read_bytes()
    half = len(whole) // 2
    (clips / DAMAGED).write_bytes(whole[:half] + np.random.default_rng(1).bytes(len(whole) - half))
    for path in clips.glob("*.mp4"):
        path.with_suffix(".txt").write_text(f"caption of {path.stem}")
    return clips


@pytest.mark.slow
def test_both_ways_give_the_same_samples(folder, tmp_path, monkeypatch, capsys, caplog):
    devices = jax.devices()[:1]  # for eight, two shapes take a minute to compile
    monkeypatch.setattr(jax, "local_devices", lambda: devices)

    def config(data):
        tasks = TaskMix(i2v=1.0, flf2v=1.0, variants=2)
        return dataclasses.replace(TRAIN, checkpoint="tests/golden/diffusers", data=data, tasks=tasks, frames=9)

    def said():
        """What was printed and logged of files left out."""
        lines = [line for line in capsys.readouterr().out.splitlines() if "cannot be used" in line or "left" in line]
        logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        caplog.clear()
        assert lines[:-1] == [f"left out: {name}: {reason}" for name, reason in LEFT_OUT.items()]
        assert lines[-1].startswith("3 of 9 clips cannot be used: 1 x cannot be decoded (Invalid data")
        assert [line.partition(": ")[2].partition(": ")[0] for line in logged] == [DAMAGED]  # once

    pixels = config(VideoData(str(folder)))
    cached = config(CachedData(str(tmp_path / "cache"), pixels.data))
    config_file = write_config(tmp_path / "config.py", cached)
    cache.main(["--config", config_file, "--out", cached.data.path, "--batch", "4"])
    said()

    with on():
        objective = make_objective(pixels)
        direct, stored = objective.open_data(pixels), objective.open_data(cached)
        seen, given = set(), set()
        for number, (ours, theirs) in enumerate(
            zip(*(Batches(data.source, 4, encode=data.encode) for data in (direct, stored)), strict=False)
        ):
            names = Batches(direct.source, 4).names(number)
            assert names == Batches(stored.source, 4).names(number)
            for name, x, y in zip(ours._fields, ours, theirs, strict=True):
                np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max(), err_msg=name)
            for row, name in enumerate(names):
                sample = direct.source[4 * number + row]
                assert abs(sample.video.mean() - LEVELS[name]) < 2.5
                assert len(sample.video) == (5 if name == "short.mp4" else 9)
                given.add(tuple(np.flatnonzero(sample.given)))
            seen |= {*names}
            if number == 2 * direct.source.order.batches - 1:  # both draws of what is given
                break
    said()
    assert seen == {*LEVELS}
    assert given >= {(0,), (0, 8)}
