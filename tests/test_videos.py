"""Real video files: times, sizes, orientation, colours."""

from fractions import Fraction

import av
import numpy as np
import pytest
from tiny_videos import encode, gray, videos

from wanjax.data.decode import decode, probe
from wanjax.data.manifest import Row
from wanjax.data.videos import Videos, choose_size, choose_sizes
from wanjax.errors import InputError
from wanjax.media import write_video


def corners(frames=8, height=48, width=64):
    """Four quarters, each of its own colour: red, green / blue, white."""
    pixels = np.zeros((frames, height, width, 3), np.uint8)
    pixels[:, : height // 2, : width // 2, 0] = 220
    pixels[:, : height // 2, width // 2 :, 1] = 220
    pixels[:, height // 2 :, : width // 2, 2] = 220
    pixels[:, height // 2 :, width // 2 :] = 220
    return pixels


def seen(video):
    """Gray level of each frame."""
    return video.mean((1, 2, 3))


def test_titles_that_are_no_utf_8_do_not_matter(tmp_path):
    path = encode(
        tmp_path / "a.mp4", gray([100] * 9), edit=lambda stream: stream.container.metadata.update(title="fenetre")
    )
    whole = path.read_bytes()
    assert whole.count(b"fenetre") == 1
    path.write_bytes(whole.replace(b"fenetre", "fenêtre".encode("latin-1")))
    assert probe(path)[:2] == (48, 64)
    assert decode(path, [0.0], 48, 64).shape == (1, 48, 64, 3)


# ------------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("rate", [16, 30, 25, 8, 60])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_are_those_shown_at_16_fps(tmp_path, rate, suffix):
    levels = np.linspace(20, 230, rate)  # one second
    path = encode(tmp_path / f"a{suffix}", gray(levels), rate=rate)
    got = seen(videos(path, frames=13)[0].video)
    shown = [levels[int((k / 16 + 0.001) * rate)] for k in range(13)]
    np.testing.assert_allclose(got, np.round(shown), atol=2.5)


@pytest.mark.parametrize("b_frames", [0, 3])  # with B-frames the header's duration is too short
def test_variable_frame_rate(tmp_path, b_frames):
    times = [0, 0.04, 0.1, 0.11, 0.5, 0.52, 0.9]
    levels = [20, 50, 80, 110, 140, 170, 200]
    path = encode(tmp_path / "a.mp4", gray(levels), times, options={"bf": str(b_frames)})
    got = seen(videos(path, frames=13)[0].video)
    shown = [levels[max(i for i, t in enumerate(times) if t <= k / 16 + 0.001)] for k in range(13)]
    np.testing.assert_allclose(got, shown, atol=2.5)


@pytest.mark.parametrize("start", [0.0, 0.25, 1.0, 1.37, 2.4])
def test_start_is_exact_wherever_the_keyframes_are(tmp_path, start):
    levels = np.linspace(10, 240, 48)  # three seconds, a keyframe every 12 frames
    path = encode(tmp_path / "a.mp4", gray(levels))
    clips = videos(path, rows=[Row(path, "a", "", start, start + 0.6)])
    assert clips.shape(0)[0] == 9
    shown = [levels[int((start + k / 16) * 16 + 0.05)] for k in range(9)]
    np.testing.assert_allclose(seen(clips[0].video), np.round(shown), atol=2.5)


def test_streams_that_do_not_start_at_zero(tmp_path):
    """Clips count from the first frame."""
    levels = np.linspace(10, 240, 48)
    path = encode(tmp_path / "a.ts", gray(levels), times=2 + np.arange(48) / 16)
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].start_time * container.streams.video[0].time_base) == 2
    clips = videos(path, rows=[Row(path, "a", "", 1.0, 1.6)])
    np.testing.assert_allclose(seen(clips[0].video), np.round(levels[16:25]), atol=2.5)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(("count", "frames"), [(5, 5), (7, 5), (9, 9), (12, 9), (16, 17), (40, 17)])
def test_length_is_the_longest_bucket_that_fits(tmp_path, suffix, count, frames):
    """At the very end of a clip its last picture stands once more: 16 frames are a second, which takes 17."""
    path = encode(tmp_path / f"a{suffix}", gray(np.linspace(20, 230, count)))
    clips = videos(path, frames=17, lengths=(5, 9, 17))
    assert clips.shape(0) == (frames, 48, 64)
    video = clips[0].video
    assert video.shape == (frames, 48, 64, 3)
    assert (video[-1] == video[-2]).all() == (count == 16)


def test_end_bounds_the_clip(tmp_path):
    path = encode(tmp_path / "a.mp4", gray(np.linspace(20, 230, 40)))
    clips = videos(path, rows=[Row(path, "a", "", 0.5, 0.5 + 9.2 / 16), Row(path, "b", "", 2.1, 9.0)], frames=17)
    assert [clips.shape(i)[0] for i in range(2)] == [9, 5]
    assert clips[1].video.shape[0] == 5


# ---------------------------------------------------------------------------------------------------- sizes, colours


def test_odd_sizes_cover_and_are_cut_in_the_middle(tmp_path):
    pixels = np.full((8, 51, 101, 3), 200, np.uint8)
    pixels[:, :, :10] = pixels[:, :, -10:] = 0  # what a cut from 101x51 to 64x48 takes away, and more
    path = encode(tmp_path / "a.mp4", pixels)
    assert probe(path)[:2] == (51, 101)
    video = decode(path, [0, 0.1], 48, 64)
    assert video.shape == (2, 48, 64, 3)
    np.testing.assert_allclose(video, 200, atol=4)


def test_reduction_is_antialiased(tmp_path):
    checks = (np.indices((192, 256)).sum(0) % 2 * 255).astype(np.uint8)
    path = encode(tmp_path / "a.mp4", np.broadcast_to(checks[None, ..., None], (8, 192, 256, 3)))
    np.testing.assert_allclose(decode(path, [0], 48, 64), 127.5, atol=6)


@pytest.mark.parametrize(
    ("degrees", "flips"), [(0, {}), (90, {}), (180, {}), (270, {}), (0, {"hflip": True}), (90, {"vflip": True})]
)
def test_rotation_is_applied(tmp_path, degrees, flips):
    pixels = corners()
    path = encode(tmp_path / "a.mp4", pixels, edit=lambda stream: stream.set_display_rotation(degrees, **flips))
    expected = np.rot90(pixels[0], degrees // 90)
    expected = expected[:, ::-1] if "hflip" in flips else expected[::-1] if "vflip" in flips else expected
    height, width = expected.shape[:2]
    assert probe(path)[:2] == (height, width)
    got = decode(path, [0], height, width)[0]
    assert np.abs(got.astype(int) - expected).mean() < 4


@pytest.mark.parametrize(("aspect", "size"), [(Fraction(2), (48, 128)), (Fraction(1, 2), (96, 64))])
def test_pixels_that_are_not_square(tmp_path, aspect, size):
    def edit(stream):
        stream.codec_context.sample_aspect_ratio = aspect

    path = encode(tmp_path / "a.mp4", corners(), edit=edit)
    assert probe(path)[:2] == size
    clips = videos(path, area=size[0] * size[1], frames=5, ratios=(Fraction(8, 3), 1, Fraction(2, 3)))
    assert clips.shape(0)[1:] == size
    assert np.abs(clips[0].video[0].astype(int) - corners(1, *size)[0]).mean() < 4


@pytest.mark.parametrize("colour", [(200, 30, 40), (30, 180, 60), (40, 60, 220), (255, 255, 255), (0, 0, 0)])
def test_colours_follow_the_tags(tmp_path, colour):
    """Ours are tagged BT.709; a small file without tags is BT.601, as PyAV encodes from RGB."""
    frames = np.full((6, 32, 32, 3), colour, np.uint8)
    write_video(tmp_path / "tagged.mp4", frames, fps=16)
    np.testing.assert_allclose(
        decode(tmp_path / "tagged.mp4", [0], 32, 32)[0, 4:-4, 4:-4], frames[0, 4:-4, 4:-4], atol=4
    )
    path = encode(tmp_path / "plain.mp4", frames)
    np.testing.assert_allclose(decode(path, [0], 32, 32)[0, 4:-4, 4:-4], frames[0, 4:-4, 4:-4], atol=4)


def test_full_range(tmp_path):
    def edit(stream):
        stream.codec_context.color_range = 2

    path = encode(tmp_path / "a.mp4", gray([128] * 6), edit=edit)
    with av.open(str(path)) as container:
        luma = next(container.decode(video=0)).to_ndarray()[0].mean()
    assert abs(decode(path, [0], 48, 64).mean() - luma) < 1.5  # as stored


@pytest.mark.parametrize(
    ("area", "sizes"),
    [
        (480 * 832, {(480, 832), (544, 720), (624, 624), (720, 544), (832, 480)}),
        (720 * 1280, {(720, 1280), (960, 960), (1280, 720)}),
        (64 * 64, {(64, 64), (48, 80), (80, 48)}),
    ],
)
def test_sizes_are_near_area_and_ratio(area, sizes):
    chosen = choose_sizes(area, 16)
    assert sizes <= set(chosen)
    for height, width in chosen:
        assert height % 16 == width % 16 == 0
        assert 0.74 * area < height * width <= area


def test_buckets_are_of_the_vaes_geometry():
    clips = Videos([], frames=17, area=128 * 128, temporal_factor=8, size_multiple=32)
    assert clips.lengths == (17, 9)
    assert (128, 128) in clips.sizes
    assert all(height % 32 == width % 32 == 0 for height, width in clips.sizes)
    with pytest.raises(InputError, match="clips of 13 frames; accepted: 8n \\+ 1"):
        Videos([], frames=13, temporal_factor=8)


def test_each_clip_goes_where_least_is_cut():
    sizes = choose_sizes(480 * 832, 16)
    assert choose_size(1080, 1920, sizes) == (480, 832)
    assert choose_size(1920, 1080, sizes) == (832, 480)
    assert choose_size(1000, 1000, sizes) == (624, 624)
    assert choose_size(480, 640, sizes) == (544, 720)
    assert choose_size(800, 1920, sizes) == (480, 832)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 80}, "clips of 80 frames; accepted: 4n"),
        ({"frames": 81, "lengths": (81, 3)}, "clips of 3 frames"),
        ({"lengths": ()}, "clips of no frames"),
        ({"area": 100}, "an area of 100 pixels"),
        ({"ratios": ()}, "ratios none"),
        ({"fps": 0}, "0 frames a second"),
    ],
)
def test_arguments_are_checked(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        Videos([Row(tmp_path / "a.mp4", "a", "")], **options)


def test_captions_are_required(tmp_path):
    with pytest.raises(
        InputError,
        match=r"1 of 2 clips have no caption, the first b \(there are the columns text_en, fps\); "
        r"accepted: one, perhaps empty, in a column caption, prompt or text;",
    ):
        Videos([Row(tmp_path / "a.mp4", "a", ""), Row(tmp_path / "b.mp4", "b", columns={"text_en": "x", "fps": 16})])
