"""Outputs: every format reads back as what was written, names hold whole files or nothing, bad input is refused."""

import os
import stat

import av
import ml_dtypes
import numpy as np
import PIL.Image
import pytest

from wanjax import media
from wanjax.errors import InputError
from wanjax.files import check_output


def picture_video(frames=5, height=32, width=48):
    """Smooth and colourful, so that H.264 loses little: [F, H, W, 3] in [-1, 1]."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    channels = [np.sin(0.1 * x + 0.2 * t), np.cos(0.13 * y - 0.1 * t), np.sin(0.07 * (x + y))]
    return np.stack(channels, axis=-1).astype(np.float32)  # [F, H, W, 3]


def decode(path):
    """Luma of each frame, frames per second, and what the file says of codec and colours."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        luma = [np.asarray(frame.to_ndarray())[: frame.height] for frame in container.decode(stream)]
        context = stream.codec_context
        names = ["name", "pix_fmt", "colorspace", "color_primaries", "color_trc", "color_range"]
        return np.stack(luma).astype(float), stream.average_rate, [getattr(context, name) for name in names]


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_mp4_keeps_light_rate_and_tags(tmp_path):
    video = media.to_uint8(picture_video())
    media.write_video(tmp_path / "a.mp4", video, fps=16)
    luma, rate, tags = decode(tmp_path / "a.mp4")
    assert luma.shape == video.shape[:3]
    assert rate == 16
    assert tags == ["h264", "yuv420p", 1, 1, 1, 1]
    assert np.abs(luma - (16 + 219 / 255 * video @ [0.2126, 0.7152, 0.0722])).mean() < 1
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)])
def test_mp4_is_bt709(tmp_path, colour):
    """Decoded by the BT.709 equations themselves: with BT.601's, red would be off by some 20 levels."""
    media.write_video(tmp_path / "a.mp4", np.full((2, 16, 16, 3), colour, np.uint8), fps=16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        planes = [np.asarray(plane) for plane in next(container.decode(video=0)).planes]
    y, u, v = (np.frombuffer(plane, np.uint8)[0].astype(float) for plane in planes)
    y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    rgb = np.array([y + 1.5748 * v, y - 0.1873 * u - 0.4681 * v, y + 1.8556 * u]) * 255
    np.testing.assert_allclose(rgb, colour, atol=4)


def test_mp4_fractional_rate(tmp_path):
    media.write_video(tmp_path / "a.mp4", picture_video(), fps=29.97002997)
    _, rate, _ = decode(tmp_path / "a.mp4")
    assert (rate.numerator, rate.denominator) == (30000, 1001)


def test_mp4_refuses_odd_sizes_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match=r"31x48 .*accepted: even sizes"):
        media.write_video(tmp_path / "a.mp4", picture_video(height=31), fps=16)
    assert os.listdir(tmp_path) == []


def test_gif_keeps_frames_and_total_time(tmp_path):
    media.write_video(tmp_path / "a.gif", picture_video(frames=16), fps=16)
    with PIL.Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 16
        assert gif.info["loop"] == 0
        durations, errors = [], []
        for index, frame in enumerate(media.to_uint8(picture_video(frames=16))):
            gif.seek(index)
            durations.append(gif.info["duration"])
            errors.append(np.abs(np.asarray(gif.convert("RGB")).astype(int) - frame).mean())
    assert sum(durations) == 1000
    assert set(durations) == {60, 70}
    assert max(errors) < 8


def test_npy_and_folder_are_exact(tmp_path):
    video = media.to_uint8(picture_video())
    media.write_video(tmp_path / "a.npy", video, fps=16)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), video)
    media.write_video(tmp_path / "deep" / "er" / "pictures", video, fps=16)
    folder = tmp_path / "deep" / "er" / "pictures"
    assert sorted(os.listdir(folder)) == [f"{index:05d}.png" for index in range(5)]
    np.testing.assert_array_equal(np.stack([PIL.Image.open(folder / f"{i:05d}.png") for i in range(5)]), video)
    assert leftovers(folder.parent) == []


def test_floats_round_and_clamp():
    values = np.array([-2, -1, 0, 1, 3, -1 + 1.4 / 127.5], np.float32)
    video = np.broadcast_to(values[None, None, :, None], (1, 1, 6, 3))
    assert media.to_uint8(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 1]
    assert media.to_uint8(video.astype(ml_dtypes.bfloat16))[0, 0, :3, 0].tolist() == [0, 0, 128]


@pytest.mark.parametrize("shape", [(5, 32, 48), (5, 3, 32, 48), (0, 32, 48, 3)])
def test_other_shapes_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"\[F, H, W, 3\]"):
        media.write_video(tmp_path / "a.npy", np.zeros(shape, np.float32), fps=16)


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        media.write_video(tmp_path / "a.npy", np.full((1, 2, 2, 3), np.nan, np.float32), fps=16)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.mp4", "A.MP4", "a.gif", "a.npy", "folder", "new/deep/a.mp4"])
def test_check_accepts_and_leaves_no_trace(tmp_path, name):
    assert check_output(tmp_path / name) == tmp_path / name
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.avi", "a.png", "a.npz", "a.mp4.txt"])
def test_check_refuses_other_extensions(tmp_path, name):
    with pytest.raises(InputError, match=r"accepted: \.mp4, \.gif, \.npy, a folder .*; change the name"):
        check_output(tmp_path / name)


def test_check_refuses_what_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "a.mp4").mkdir()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    for name, message in [
        ("file", "is a file"),
        ("a.mp4", "is a folder"),
        ("letters", "holds 'dear.txt'"),
        ("file/a.mp4", "cannot be written"),
        (f"{'n' * 300}.mp4", "cannot be written"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            check_output(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert "accepted:" in str(caught.value)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "x"


def test_check_refuses_a_place_without_permission(tmp_path, monkeypatch):
    def denied(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(media.Path, "touch", denied)  # root may write anywhere, so a mode would prove nothing
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
        check_output(tmp_path / "a.mp4")


def test_earlier_outputs_are_replaced_whole(tmp_path):
    media.write_video(tmp_path / "pictures", picture_video(frames=7), fps=16)
    media.write_video(tmp_path / "pictures", picture_video(frames=3), fps=16)
    assert len(os.listdir(tmp_path / "pictures")) == 3
    media.write_video(tmp_path / "a.npy", picture_video(frames=7), fps=16)
    media.write_video(tmp_path / "a.npy", picture_video(frames=3), fps=16)
    assert len(np.load(tmp_path / "a.npy")) == 3
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "pictures"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "pictures").mkdir()
    media.write_video(tmp_path / "pictures", picture_video(), fps=16)
    assert len(os.listdir(tmp_path / "pictures")) == 5


@pytest.mark.parametrize("name", ["pictures", "a.gif"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interruption_keeps_the_old_and_leaves_no_half(tmp_path, monkeypatch, name, error):
    media.write_video(tmp_path / name, picture_video(frames=2), fps=16)
    before = sorted(os.listdir(tmp_path / name)) if name == "pictures" else (tmp_path / name).read_bytes()
    save = PIL.Image.Image.save

    def interrupted(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        raise error

    monkeypatch.setattr(PIL.Image.Image, "save", interrupted)
    with pytest.raises(error):
        media.write_video(tmp_path / name, picture_video(frames=5), fps=16)
    after = sorted(os.listdir(tmp_path / name)) if name == "pictures" else (tmp_path / name).read_bytes()
    assert after == before
    assert os.listdir(tmp_path) == [name]


def test_failed_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    media.write_video(tmp_path / "pictures", picture_video(frames=2), fps=16)
    rename = os.rename

    def second_fails(source, destination):
        if destination == tmp_path / "pictures" and len(os.listdir(source)) == 5:
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", second_fails)
    monkeypatch.setattr("wanjax.files._exchange", lambda *_: False)  # as where no two names can be exchanged at once
    with pytest.raises(OSError, match="Input/output"):
        media.write_video(tmp_path / "pictures", picture_video(frames=5), fps=16)
    assert os.listdir(tmp_path) == ["pictures"]
    assert len(os.listdir(tmp_path / "pictures")) == 2


def test_permissions_follow_the_umask(tmp_path):
    previous = os.umask(0o022)
    try:
        media.write_video(tmp_path / "a.npy", picture_video(), fps=16)
        media.write_video(tmp_path / "pictures", picture_video(), fps=16)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(os.stat(tmp_path / "a.npy").st_mode) == 0o644
    assert stat.S_IMODE(os.stat(tmp_path / "pictures").st_mode) == 0o755


def test_save_array(tmp_path):
    array = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    media.save_array(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
    narrow = array.astype(ml_dtypes.bfloat16)
    media.save_array(tmp_path / "b.npy", narrow)
    assert np.load(tmp_path / "b.npy").dtype == np.float32
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), narrow.astype(np.float32))
    with pytest.raises(InputError, match=r"accepted: \.npy; change"):
        media.save_array(tmp_path / "a.mp4", array)
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "b.npy"]


SHAPE = (1, 16, 2, 4, 6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_load_noise(tmp_path, dtype):
    noise = np.random.default_rng(0).standard_normal(SHAPE).astype(dtype)
    np.save(tmp_path / "n.npy", noise)
    loaded = media.load_noise(tmp_path / "n.npy", SHAPE)
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, noise.astype(np.float32))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((16, 2, 4, 6), np.float32), r"has shape \[16, 2, 4, 6\]"),
        (np.zeros((1, 2, 4, 6, 16), np.float32), r"has shape \[1, 2, 4, 6, 16\]"),
        (np.zeros(SHAPE, np.int32), "dtype int32"),
        (np.zeros(SHAPE, np.complex64), "dtype complex64"),
        (np.full(SHAPE, np.inf, np.float32), "holds NaN or infinity"),
        (np.array([{}], dtype=object), "cannot be read"),
    ],
)
def test_load_noise_refuses_other_arrays(tmp_path, array, message):
    np.save(tmp_path / "n.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=message) as caught:
        media.load_noise(tmp_path / "n.npy", SHAPE)
    assert "accepted: an .npy file of floats of shape [1, 16, 2, 4, 6]" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_noise_refuses_other_files(tmp_path):
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "folder.npy").mkdir()
    np.savez(tmp_path / "archive.npz", a=np.zeros(SHAPE))
    whole = tmp_path / "whole.npy"
    np.save(whole, np.zeros(SHAPE))
    (tmp_path / "cut.npy").write_bytes(whole.read_bytes()[:-100])
    for name, message in [
        ("missing.npy", "does not exist"),
        ("empty.npy", "cannot be read"),
        ("text.npy", "cannot be read"),
        ("folder.npy", "cannot be read"),
        ("cut.npy", "cannot be read"),
        ("archive.npz", "an .npz archive"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            media.load_noise(tmp_path / name, SHAPE)
        assert "\n" not in str(caught.value)
