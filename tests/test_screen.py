"""What `wanjax sample` prints: before, meanwhile, behind; on a terminal and elsewhere; where it is interrupted."""

import io
import json
import re
import sys

import numpy as np
import pytest
from tiny import DIFFUSERS, flags
from tiny_experts import make_folders

import sample_jax
from wanjax.errors import InputError
from wanjax.sampling import recorded, stages
from wanjax.sampling.pipeline import Pipeline
from wanjax.terminal import bar_width, has_colours, painted


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self):
        return True


def sample(tmp_path, *more, **changes):
    sample_jax.main([*flags(DIFFUSERS, output=tmp_path / "v.npy", **changes), *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("screen")


def test_a_request_is_told_before_and_the_path_comes_last(folder, capsys):
    sample(folder)
    out, err = capsys.readouterr()
    first, *_, last = out.splitlines()
    assert re.fullmatch(r"first and last frame to video: \d+ frames of \d+x\d+, .* s at 16 fps", first)
    assert re.search(r"unipc \d+ steps, guidance .*, shift .*, seed 0", out)
    assert re.search(r"memory: about \S+ MiB expected of \S+ GiB", out)
    assert last == str(folder / "v.npy")
    assert "\033" not in out + err
    assert "\r" not in err  # no bar where nobody watches


def test_quiet_prints_the_path_alone(folder, capsys):
    sample(folder, "--quiet")
    assert capsys.readouterr() == (f"{folder / 'v.npy'}\n", "")


def test_json_is_one_line(folder, capsys):
    sample(folder, "--json", save_latents=folder / "l.npy")
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert (made["video"], made["latents"], err) == (str(folder / "v.npy"), str(folder / "l.npy"), "")
    assert np.load(made["video"]).shape == (made["frames"], made["height"], made["width"], 3)
    assert {"denoise", "VAE decode"} <= made["seconds"].keys()
    assert made["given_frames_psnr"].keys() == {"0", str(made["frames"] - 1)}


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "said", "left"),
    [
        ("wanjax.sampling.pipeline.Pipeline.encode", r"interrupted after 0 of \d+ steps: nothing was written", set()),
        (
            "wanjax.sampling.pipeline.Pipeline.decode",
            r"interrupted after the denoising: the latents are in",
            {"v.latents.npy"},
        ),
        ("wanjax.commands.sample.Work.write", "make the video of them with wanjax decode", {"v.latents.npy"}),
    ],
)
def test_an_interrupt_says_what_was_kept(place, said, left, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path)
    assert re.search(said, capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_video_holds_the_settings_that_made_it(tmp_path):
    sample_jax.main([*flags(DIFFUSERS, output=tmp_path / "v.mp4", frames=5, height=16, width=16, steps=2, seed=7)])
    settings, loras = recorded.read(tmp_path / "v.mp4")
    assert [settings[name] for name in ("frames", "height", "width", "steps", "seed")] == [5, 16, 16, 2, 7]
    assert loras == ()


@pytest.mark.parametrize(
    ("place", "fault", "said", "left"),
    [
        ("Pipeline.encode", KeyboardInterrupt, r"interrupted after 0 of 1 steps: the first 9 frames are in", ""),
        ("Pipeline.encode", MemoryError, r"a later window failed \(.*; the first 9 frames are in", ""),
        ("Pipeline.decode", RuntimeError, r"could not be decoded \(.*frames are in .*; the latents are in", "latents"),
    ],
)
def test_windows_that_are_whole_are_kept(place, fault, said, left, tmp_path, monkeypatch, capsys):
    """Whatever comes over the second."""
    work, times = getattr(Pipeline, place.partition(".")[2]), []

    def fail_at_second(*args, **kwargs):
        times.append(1)
        if len(times) == 2:
            raise fault("no more")
        return work(*args, **kwargs)

    monkeypatch.setattr(f"wanjax.sampling.pipeline.{place}", fail_at_second)
    folder = make_folders(tmp_path / "a14b")["flf2v"]
    out = tmp_path / "out"
    with pytest.raises((KeyboardInterrupt, InputError)) as ended:
        sample_jax.main(
            f"--checkpoint {folder} --first-frame docs/pictures/first.png --height 16 --width 16 --frames 15 "
            f"--window 9 --overlap 3 --steps 1 --guidance 1 --prompt x --output {out / 'v.npy'}".split()
        )
    assert re.search(said, capsys.readouterr().err + str(ended.value))
    assert {path.name for path in out.iterdir()} == {"v-begun.npy"} | ({"v.latents.npy"} if left else set())
    assert np.load(out / "v-begun.npy").shape == (9, 16, 16, 3)


def test_where_nobody_watches_a_line_comes_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    with stages.Stages()("denoise", 4) as tick:
        for _ in range(4):
            tick()
    assert capsys.readouterr().err == "denoise: 3 of 4, 75 s, about 25 s left\n"


def test_colours_are_for_terminals(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert painted("x", "red", Terminal()) == "\033[31mx\033[0m"
    assert painted("x", "red", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(Terminal())


def test_a_terminal_without_columns_shows_bars_all_the_same(monkeypatch):
    class Size:
        columns = 0

    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda number: Size)
    assert bar_width() == {"ncols": 80, "nrows": 24}
