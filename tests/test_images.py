"""From picture files to pixels: the official conventions, those of diffusers, and bad files."""

import math
import struct

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
from tiny import GOLDEN, OFFICIAL, golden_arrays

from wanjax.conditioning import images
from wanjax.errors import InputError

EXPECTED = golden_arrays("official")
ICC = GOLDEN / "display_p3.icc"


def picture(width, height, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def golden(name):
    return images.read_image(OFFICIAL / f"{name}.png")


def same(ours, reference, tolerance=1e-5):
    assert ours.dtype == np.float32
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= tolerance


# ---- the official conventions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "i", "name"), [("clip", 0, "first"), ("clip", 1, "last"), ("large_clip", 0, "first")])
def test_clip_pixels_equal_official(case, i, name):
    image = golden(name if case == "clip" else f"{name}_large")
    same(images.clip_pixels(image, 42), np.moveaxis(EXPECTED[f"{case}_pixels"][i], 0, -1))


def test_size_and_video_pixels_equal_official():
    first = golden("first_large")
    size = images.choose_size(first, 64 * 96, 16)
    assert size == tuple(EXPECTED["large_size"])
    pixels = images.video_pixels(first, *size)
    same(pixels, np.moveaxis(EXPECTED["large_first_video"], 0, -1))
    assert pixels.max() > 1  # overshoot is kept


def test_no_resampling_at_the_same_size():
    image = golden("first")
    same(images.video_pixels(image, 64, 96), np.asarray(image).astype(np.float32) / 127.5 - 1, 2e-7)


def test_array_input_equals_picture_input():
    image = golden("first_large")
    np.testing.assert_array_equal(images.video_pixels(np.asarray(image), 64, 96), images.video_pixels(image, 64, 96))


def test_bicubic_equals_torch():
    # torch 2.13: F.interpolate(x[None, None], size=(3, 5), mode="bicubic", align_corners=False); then size=(3, 2) of
    # torch.arange(20.).reshape(4, 5).sin(). Edges repeat, values overshoot, downscaling does not antialias.
    up = [
        [-0.005027713254094124, 0.5393403768539429, 1.0434030294418335, 0.4205901622772217, -0.19530555605888367],
        [-0.6200000047683716, 0.0030002910643815994, 0.75, 0.6869997978210449, 0.4760001003742218],
        [-1.2349721193313599, -0.5333395600318909, 0.45659738779067993, 0.9534094929695129, 1.1473054885864258],
    ]
    x = np.array([[0, 1, 0], [-1, 0.5, 1]], np.float32)[..., None]
    same(images.resize_bicubic(x, 3, 5)[..., 0], np.array(up), 1e-6)
    down = [
        [0.4821004569530487, 0.00971387978643179],
        [-0.9373176097869873, 0.9793453812599182],
        [-0.1465761959552765, -0.36028212308883667],
    ]
    x = np.sin(np.arange(20, dtype=np.float32)).reshape(4, 5, 1)
    same(images.resize_bicubic(x, 3, 2)[..., 0], np.array(down), 1e-6)


# ---- the video's size -------------------------------------------------------------------------------------------


def test_official_size_loses_a_step_to_rounding():
    assert images.choose_size(picture(832, 480), 480 * 832, 16) == (464, 832)
    assert images.choose_size(picture(1280, 720), 720 * 1280, 16) == (720, 1280)


def test_official_size_formula():
    # As `wan/first_last_frame2video.py` writes it: latent rows, rounded down to the VAE's step, then to the patch's.
    rng = np.random.default_rng(0)
    for width, height, area in rng.integers([100, 100, 200_000], [900, 900, 1_000_000], (300, 3)).tolist():
        rows, columns = (math.sqrt(x) // 8 // 2 * 2 for x in (area * (height / width), area / (height / width)))
        image = PIL.Image.new("RGB", (width, height))
        assert images.choose_size(image, area, 16) == (round(rows) * 8, round(columns) * 8)


def test_too_narrow_a_picture():
    with pytest.raises(InputError, match=r"first frame 4000x2 at an area of 6144 .*; accepted: .*; set height"):
        images.choose_size(picture(4000, 2), 64 * 96, 16)


# ---- frames of different shapes ---------------------------------------------------------------------------------


def test_frames_of_one_shape_stay_as_they_are():
    frames = [picture(150, 100, 0), picture(150, 100, 1)]
    for ours, given in zip(images.match_frames(frames, 64, 96, 16), frames, strict=True):
        np.testing.assert_array_equal(ours, given)


def test_the_first_frame_is_whole_under_the_official_size():
    sizes = np.random.default_rng(0).integers(100, 900, (300, 2)).tolist()
    for width, height in [*sizes, [832, 480], [1248, 720]]:
        first = PIL.Image.new("RGB", (width, height))
        assert images.match_frames([first], *images.choose_size(first, 480 * 832, 16), 16)[0].size == (width, height)


def test_another_aspect_ratio_is_centre_cropped():
    columns = np.repeat(np.arange(100, dtype=np.uint8), 3).reshape(1, 100, 3).repeat(40, 0)  # each column its number
    first, last = images.match_frames([picture(60, 40), columns], 64, 96, 16)
    assert first.size == last.size == (60, 40)
    np.testing.assert_array_equal(np.asarray(last)[0, :, 0], np.arange(20, 80))
    rows = columns.swapaxes(0, 1)
    last = images.match_frames([picture(60, 40), rows], 64, 96, 16)[1]
    assert last.size == (40, 27)
    np.testing.assert_array_equal(np.asarray(last)[:, 0, 0], np.arange(36, 63))


def test_same_aspect_at_another_resolution_is_the_same_field():
    first, last = images.match_frames([picture(150, 100), picture(300, 200)], 64, 96, 16)
    assert first.size == (150, 100)
    assert last.size == (300, 200)


def test_an_explicit_size_of_another_shape_crops_both_frames():
    first, last = images.match_frames([picture(150, 100), picture(150, 100, 1)], 96, 96, 16)
    assert first.size == last.size == (100, 100)


def test_diffusers_stretches_instead_of_cropping():
    frames = images.match_frames([picture(150, 100), picture(110, 130)], 64, 96, 16, "diffusers")
    assert [frame.size for frame in frames] == [(150, 100), (110, 130)]


# ---- the conventions of diffusers -------------------------------------------------------------------------------


def test_video_pixels_of_diffusers():
    # diffusers 0.42.1: VideoProcessor(vae_scale_factor=8).preprocess(first_large.png, height=64, width=96)
    reference = {
        (0, 0): [-0.7411764860153198, -0.8039215803146362, -0.8196078538894653],
        (31, 47): [-0.9921568632125854, -0.05098038911819458, 0.35686278343200684],
        (63, 95): [-0.5215686559677124, -0.7098039388656616, -0.8196078538894653],
    }
    pixels = images.video_pixels(golden("first_large"), 64, 96, "diffusers")
    assert pixels.shape == (64, 96, 3)
    for (y, x), values in reference.items():
        same(pixels[y, x], np.array(values), 1e-6)


def test_clip_pixels_of_diffusers():
    # transformers 5.23: CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}) on
    # last_large.png, 110x130: scaled to 42x49, rows 3 to 44 kept.
    reference = {
        (0, 0): [-1.2229238748550415, 0.3339827358722687, 1.4491138458251953],
        (20, 21): [-1.777664065361023, -1.0467320680618286, 0.08398749679327011],
        (41, 41): [1.9303361177444458, 1.8647749423980713, 1.8614956140518188],
    }
    pixels = images.clip_pixels(golden("last_large"), 42, "diffusers")
    assert pixels.shape == (42, 42, 3)
    for (y, x), values in reference.items():
        same(pixels[y, x], np.array(values), 1e-6)


# ---- reading files ----------------------------------------------------------------------------------------------


def save(image, path, **options):
    image.save(path, **options)
    return images.read_image(path)


def test_gray_palette_and_cmyk_become_rgb(tmp_path):
    gray = picture(6, 4).convert("L")
    np.testing.assert_array_equal(save(gray, tmp_path / "gray.png"), np.asarray(gray)[..., None].repeat(3, 2))
    palette = picture(6, 4).quantize(8)
    np.testing.assert_array_equal(save(palette, tmp_path / "palette.png"), palette.convert("RGB"))
    assert save(picture(6, 4).convert("CMYK"), tmp_path / "cmyk.jpg").mode == "RGB"


def test_16_bit_gray_is_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 257, 32768, 65535]], np.uint16)
    image = save(PIL.Image.fromarray(levels), tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(image)[0, :, 0], [0, 1, 128, 255])


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = [0, 51, 255]  # black, hidden; a fifth; in full
    image = save(PIL.Image.fromarray(rgba), tmp_path / "alpha.png")
    np.testing.assert_array_equal(np.asarray(image)[0, :, 0], [255, 204, 0])
    image = save(PIL.Image.new("RGB", (2, 2), "red"), tmp_path / "key.png", transparency=(255, 0, 0))
    np.testing.assert_array_equal(image, np.full((2, 2, 3), 255))


def test_exif_orientation_is_applied(tmp_path):
    image = picture(6, 4)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    turned = save(image, tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_damaged_exif_is_read_as_none(tmp_path, suffix):
    """As some tools write it: the text of a bytes literal."""
    path = tmp_path / f"a.{suffix}"
    picture(9, 5).save(path, exif=b"b'Exif\\x00\\x00MM'")
    assert images.read_image(path).size == (9, 5)


def test_colours_of_a_profile_become_srgb(tmp_path):
    """Display P3 (phones): a red that it writes as 234, 51, 35 is sRGB's 255, 0, 0. sRGB's own numbers stay."""
    profile = ICC.read_bytes()
    for mode, colour, name in (("RGB", (234, 51, 35), "a.png"), ("RGBA", (234, 51, 35, 255), "b.png")):
        image = PIL.Image.new(mode, (4, 4), colour)
        image.save(tmp_path / name, icc_profile=profile)
        assert images.read_image(tmp_path / name).getpixel((0, 0)) == (255, 0, 0)
        image.info["icc_profile"] = profile
        assert images.read_image(image).getpixel((0, 0)) == (255, 0, 0)
    srgb = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"damaged", b""):
        image = picture(8, 8)
        image.save(tmp_path / "c.png", icc_profile=profile)
        np.testing.assert_array_equal(images.read_image(tmp_path / "c.png"), image)


def test_pillow_says_nothing_beside_the_one_line(tmp_path, caplog):
    picture(4, 4).save(tmp_path / "a.tiff")
    samples = struct.pack("<HHIH", 277, 3, 1, 3)
    content = (tmp_path / "a.tiff").read_bytes()
    assert samples in content
    (tmp_path / "a.tiff").write_bytes(content.replace(samples, struct.pack("<HHIH", 277, 3, 1, 1027)))
    with pytest.raises(InputError, match="accepted: PNG"):
        images.read_image(tmp_path / "a.tiff")
    assert caplog.records == []


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match=r"gone.png does not exist; accepted: .*; check the path"):
        images.read_image(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match=r"text.png is not a picture; accepted: .*; convert or replace it"):
        images.read_image(tmp_path / "text.png")
    with pytest.raises(InputError, match=r"cannot be read \(.*\); accepted: .*; convert or replace it"):
        images.read_image(tmp_path)
    picture(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"half.png cannot be read \(.*\); accepted: .*; convert or replace it"):
        images.read_image(tmp_path / "half.png")
    PIL.Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(InputError, match=r"float.tiff: pixels of Pillow mode F have no fixed range; accepted: .*; con"):
        images.read_image(tmp_path / "float.tiff")


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_bad_arrays(array):
    with pytest.raises(InputError, match=r"accepted: uint8 \[H, W, 3\]; convert it"):
        images.as_rgb(array)
