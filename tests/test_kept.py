"""A finished video is never lost: whatever goes wrong with its place, it is somewhere, and the message says where."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from tiny import DIFFUSERS, flags, refused

import sample_jax
from wanjax import files, media
from wanjax.commands import decode, sample
from wanjax.errors import InputError
from wanjax.files import Output, check_apart, replacing, write_all

VIDEO = np.arange(5 * 32 * 48 * 3).astype(np.uint8).reshape(5, 32, 48, 3)


def kept(caught):
    """The array in the file that a message names."""
    return np.load(re.search(r"is in (\S+\.npy) instead", str(caught.value))[1])


def spoil(path, how):
    """What somebody does to an output's place while the video is made."""
    if how == "folder":
        path.mkdir()
        (path / "x").touch()
    elif how == "gone":
        path.parent.rmdir()
        path.parent.touch()  # a file where the folder was
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "foreign":
        path.mkdir()
        (path / "letter.txt").touch()


@pytest.mark.parametrize("how", ["folder", "gone", "pipe"])
def test_a_place_that_changed_meanwhile(how, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    path = tmp_path / "out" / "v.npy"
    path.parent.mkdir()
    spoil(path, how)
    with pytest.raises(InputError, match=r"v\.npy cannot be written \(.*\); the video is in .* instead") as caught:
        write_all(media.video_output(path, VIDEO, 16))
    np.testing.assert_array_equal(kept(caught), VIDEO)


def test_a_folder_that_became_foreign(tmp_path):
    spoil(tmp_path / "frames", "foreign")
    with pytest.raises(InputError, match=r"the video is in .*frames-.* instead") as caught:
        write_all(media.video_output(tmp_path / "frames", VIDEO, 16))
    place = re.search(r"is in (\S+) instead", str(caught.value))[1]
    assert len(os.listdir(place)) == 5


def test_every_output_is_tried_and_every_place(tmp_path, monkeypatch, capsys):
    """A full disk for the latents does not cost the video; the last place is as good as the first."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "gone" / "too"))
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr("pathlib.Path.home", lambda: home)
    monkeypatch.chdir(tmp_path)

    def full(place):
        if not place.is_relative_to(home):
            raise OSError(28, "No space left on device")
        media.save_array(place, VIDEO)

    with pytest.raises(InputError, match="No space left on device") as caught:
        write_all(Output("latents", "l.npy", full), media.video_output("v.npy", VIDEO, 16))
    np.testing.assert_array_equal(kept(caught), VIDEO)
    np.testing.assert_array_equal(np.load("v.npy"), VIDEO)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    with pytest.raises(InputError, match=r"nor any other place \(No space left on device\); make room"):
        write_all(Output("latents", "l.npy", full))
    assert "with the same --seed makes it again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        ({"--output": "v.npy", "--save-latents": "v.npy"}, {}),
        ({"--output": "v.npy", "--save-latents": "./a/../v.npy"}, {}),
        ({"--output": "linked.npy", "--save-latents": "v.npy"}, {}),
        ({"--output": "hard.npy"}, {"--initial-noise": "v.npy"}),
        ({"--output": "frames"}, {"--first-frame": "frames/00000.png"}),
        ({"--output": "frames", "--save-latents": "frames/l.npy"}, {}),
    ],
)
def test_outputs_over_one_another_or_over_inputs(outputs, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "frames"):
        (tmp_path / name).mkdir()
    (tmp_path / "v.npy").touch()
    (tmp_path / "linked.npy").symlink_to("v.npy")
    os.link("v.npy", "hard.npy")
    with pytest.raises(InputError, match=r"(is|holds) .*; one place each is accepted; change one"):
        check_apart(outputs, inputs)


def test_sample_refuses_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("wanjax.sampling.pipeline.Pipeline.__call__", None)  # no work is done
    case = {"save_latents": tmp_path / "v.npy", "output": tmp_path / "v.npy"}
    refused(flags(DIFFUSERS, **case), ["--output", "--save-latents", "one place each"])
    for name, fps in (("v.mp4", "1e12"), ("v.gif", "0.001"), ("v.gif", "200"), ("v.mp4", "1e-9")):
        refused(flags(DIFFUSERS, output=tmp_path / name, fps=fps), ["fps", "accepted"])


@pytest.mark.parametrize("fps", [0.01, 0.5, 23.976, 1000])
def test_a_file_plays_as_fast_as_it_was_asked(fps, tmp_path):
    import av

    media.write_video(tmp_path / "v.mp4", VIDEO, fps)
    with av.open(str(tmp_path / "v.mp4")) as container:
        times = [float(frame.time) for frame in container.decode(video=0)]
    np.testing.assert_allclose(np.diff(times), 1 / fps, rtol=1e-2)


def test_latents_are_kept_where_decoding_fails_and_become_the_video(tmp_path, monkeypatch, capsys):
    run = {"steps": 1, "output": tmp_path / "v.npy"}
    sample_jax.main(flags(DIFFUSERS, **run))
    with monkeypatch.context() as patch:
        patch.setattr("wanjax.sampling.pipeline.decode_video", lambda *_: 1 / 0)
        refused(
            flags(DIFFUSERS, **run | {"output": tmp_path / "w.mp4"}),
            ["division by zero", "w.latents.npy", "wanjax decode"],
        )
    decode.main([str(tmp_path / "w.latents.npy"), "--checkpoint", str(DIFFUSERS), "--output", str(tmp_path / "w.npy")])
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), np.load(tmp_path / "w.npy"))
    for bad in (np.zeros((1, 3, 2, 4, 6)), np.full((1, 16, 1, 4, 6), np.nan), np.zeros((1, 16, 1, 4, 6), int)):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(
            InputError, match=r"latents .*bad.npy .*accepted: an .npy file of floats \[1, 16, f, h, w\]"
        ):
            decode.main(
                [str(tmp_path / "bad.npy"), "--checkpoint", str(DIFFUSERS), "--output", str(tmp_path / "x.npy")]
            )


# ---- what killed writers leave


KILLED = """
import os, sys
from pathlib import Path
from wanjax.files import replacing
with replacing(Path(sys.argv[1])) as path:
    (path.mkdir if sys.argv[2] == "folder" else path.touch)()
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_of_killed_writers_go_at_the_next_start(kind, tmp_path):
    target = tmp_path / ("v.npy" if kind == "file" else "frames")
    other = tmp_path / ".v.notes.npy"
    other.touch()
    assert subprocess.run([sys.executable, "-c", KILLED, str(target), kind], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    with replacing(target) as writing:  # what is being written stays
        writing.touch()
        files.remove_leftovers(target)
        assert sorted(tmp_path.iterdir()) == sorted([other, writing])
    target.unlink()
    assert subprocess.run([sys.executable, "-c", KILLED, str(target), kind], check=False).returncode == -9
    files.check_output(target)
    assert list(tmp_path.iterdir()) == [other]


def test_a_folder_is_never_away(tmp_path, monkeypatch):
    """An earlier output is there until the new one is, in one step of the system."""
    media.write_video(tmp_path / "frames", VIDEO, 16)
    monkeypatch.setattr(os, "rename", None)
    media.write_video(tmp_path / "frames", VIDEO[:2], 16)
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]
    assert len(os.listdir(tmp_path / "frames")) == 2


def test_decode_has_the_flags_of_sample():
    assert sample.make_parser().parse_args([]).fps is None
    assert decode.make_parser().parse_args(["l.npy", "--fps", "8"]).fps == 8
