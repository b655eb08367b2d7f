"""Pictures of latents while they are sampled."""

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from tiny import DIFFUSERS, flags, normal, refused

import sample_jax
from wanjax import demo
from wanjax.errors import InputError
from wanjax.sampling import preview
from wanjax.sampling.pipeline import Pipeline
from wanjax.training.metrics import psnr

LATENTS = normal(0, 1, 5, 6, 8, 16)


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(demo.get_config(), keep="all")


def test_the_demos_latents_look_like_its_video(pipe):
    """Colours of the linear map, by what the network thinks after each step, against the means of the video's parts."""
    shown, make = [], pipe.preview()
    result = pipe(on_step=lambda step: shown.append(make(step.x0)), progress=False)
    colours = preview.part_colours(result.video, 4, 8)
    flat = np.broadcast_to(colours.mean(axis=(0, 1, 2)), colours.shape)
    assert len(shown) == 4
    assert shown[-1].dtype == np.uint8
    np.testing.assert_array_equal(shown[-1], make(result.latents))
    assert psnr(shown[-1], colours) > psnr(flat, colours) + 4
    assert psnr(shown[0], colours) > psnr(flat, colours) + 4  # not the noise that is left: what the network expects
    assert pipe.preview() is make


def test_a_linear_vae_is_found_exactly():
    """What the fit is for: a network whose latents are colours, turned and shifted, gives the colours back."""
    turn = np.linalg.qr(normal(1, 3, 3))[0]
    config = type("VAE", (), {"temporal_factor": 4, "spatial_factor": 8})
    make = preview.fit(lambda clip: 20 * (preview.part_colours(clip, 4, 8) @ turn)[None] + 2, config)
    clip = preview.draw_clip(99)
    colours = preview.part_colours(clip, 4, 8)
    ours = make((20 * colours @ turn)[None] + 2) / 127.5 - 1
    assert np.abs(ours - colours).max() < 0.03


def test_sheets():
    pictures = np.arange(21 * 9 * 16 * 3, dtype=np.int64).reshape(21, 9, 16, 3).astype(np.uint8)
    whole = preview.sheet(pictures)
    assert whole.shape == (5 * 9, 5 * 16, 3)
    np.testing.assert_array_equal(whole[9:18, 16:32], pictures[6])
    assert not whole[36:, 16:].any()
    np.testing.assert_array_equal(preview.sheet(pictures[:1]), pictures[0])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif"])
def test_files(tmp_path, suffix):
    writer = preview.Writer(lambda x: np.full((2, 4, 6, 3), x, np.uint8), tmp_path / f"a{suffix}", 16)
    seen = []
    for done in range(1, 51):
        writer(done, 50, done)
        if done > 4:
            with PIL.Image.open(tmp_path / f"a{suffix}") as picture:
                seen.append(int(np.asarray(picture.convert("RGB"))[0, 0, 0]))
    assert [seen[0], seen[4], seen[-1]] == pytest.approx([5, 5, 50], abs=2)  # every fifth
    with PIL.Image.open(tmp_path / f"a{suffix}") as picture:
        size, count = picture.size, getattr(picture, "n_frames", 1)
    assert size == ((6, 4) if suffix == ".gif" else (12, 4))
    assert count == 1  # of a gif's equal frames one is kept


def test_a_preview_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    (tmp_path / "a.png").mkdir()
    writer = preview.Writer(lambda x: np.zeros((1, 2, 2, 3), np.uint8), tmp_path / "a.png", 16)
    for done in (1, 2):
        writer(done, 2, None)
    assert capsys.readouterr().out.count("no more previews") == 1


# -------------------------------------------------------------------------------------------------------------- TAEHV


def tiny_taehv(path, channels=16, widths=(8, 6, 4, 4)):
    """Random weights under its file's names; the real one's widths are 256, 128, 64 and 64."""
    tensors, rng = {}, np.random.default_rng(0)

    def put(index, name, out, fan_in, k, bias):
        tensors[f"decoder.{index}.{name}weight"] = rng.normal(0, (2 / fan_in / k / k) ** 0.5, (out, fan_in, k, k))
        if bias:
            tensors[f"decoder.{index}.{name}bias"] = rng.normal(0, 0.1, out)

    put(1, "", widths[0], channels, 3, True)
    for stage, start in enumerate((3, 9, 15)):
        w = widths[stage]
        for i in range(3):
            for j, fan_in in enumerate((2 * w, w, w)):
                put(start + i, f"conv.{2 * j}.", w, fan_in, 3, True)
        put(start + 4, "conv.", w * (1 if stage == 0 else 2), w, 1, False)
        put(start + 5, "", widths[stage + 1], w, 3, False)
    put(22, "", 3, widths[3], 3, True)
    tensors["encoder.0.weight"] = np.zeros(1)
    safetensors.numpy.save_file({k: x.astype(np.float16) for k, x in tensors.items()}, path)
    return safetensors.numpy.load_file(path)


def by_hand(tensors, x):
    """The decoder as its author writes it, one frame and one cell at a time: `[f, h, w, c]`."""

    def conv(x, weight, bias=0.0):
        k = weight.shape[-1] // 2
        wide = np.pad(x, ((k, k), (k, k), (0, 0)))
        cells = [wide[i : i + x.shape[0], j : j + x.shape[1]] @ weight[:, :, i, j].astype(np.float64).T
                 for i in range(weight.shape[2]) for j in range(weight.shape[3])]  # fmt: skip
        return sum(cells) + bias

    def relu(x):
        return np.maximum(x, 0)

    frames = [relu(conv(3 * np.tanh(f / 3), *(tensors[f"decoder.1.{n}"] for n in ("weight", "bias")))) for f in x]
    for start in (3, 9, 15):
        for i in range(start, start + 3):
            before = [np.zeros_like(frames[0]), *frames[:-1]]
            new = []
            for now, past in zip(frames, before, strict=True):
                y = np.concatenate([now, past], axis=-1)
                for j in (0, 2, 4):
                    y = conv(y, tensors[f"decoder.{i}.conv.{j}.weight"], tensors[f"decoder.{i}.conv.{j}.bias"])
                    y = relu(y) if j < 4 else y
                new.append(relu(y + now))
            frames = new
        grow = tensors[f"decoder.{start + 4}.conv.weight"]
        frames = [f.repeat(2, 0).repeat(2, 1) if start == 3 else f for f in frames]
        frames = [conv(conv(f, grow[-f.shape[-1] :]), tensors[f"decoder.{start + 5}.weight"]) for f in frames]
    last = [conv(relu(f), tensors["decoder.22.weight"], tensors["decoder.22.bias"]) for f in frames]
    return np.clip(np.stack(last), 0, 1) * 255


def test_taehv_as_it_is_written(tmp_path):
    tensors = tiny_taehv(tmp_path / "taew2_1.safetensors")
    ours = preview.Tiny(tmp_path / "taew2_1.safetensors", 16)(LATENTS)
    expected = by_hand(tensors, LATENTS[0])
    assert ours.shape == (5, 12, 16, 3)
    assert expected.std() > 20
    assert np.abs(ours - expected).max() <= 0.51  # it is rounded


def test_other_files(tmp_path):
    tiny_taehv(tmp_path / "a.safetensors")
    for path, channels in ((tmp_path / "a.safetensors", 4), (DIFFUSERS / "text_encoder/model.safetensors", 16)):
        with pytest.raises(InputError, match=r"is no TAEHV decoder of .* latent channels") as caught:
            preview.Tiny(path, channels)
        assert "\n" not in str(caught.value)
    refused(flags(DIFFUSERS, preview="a.mp4"), ["a.mp4", "accepted: .png, .jpg, .webp, .gif"])
    refused(flags(DIFFUSERS, preview_decoder="a.safetensors"), ["--preview-decoder a.safetensors without --preview"])
    refused(flags(DIFFUSERS, preview="a.png", output="a.png"), ["--output a.png is --preview a.png"])


def test_the_command_writes_it(tmp_path):
    tiny_taehv(tmp_path / "tiny.safetensors", channels=16)
    given = {"output": tmp_path / "v.npy", "steps": 2, "preview": tmp_path / "p.png", "compile_cache": "off"}
    sample_jax.main(flags(DIFFUSERS, **given, preview_decoder=tmp_path / "tiny.safetensors"))
    with PIL.Image.open(tmp_path / "p.png") as picture:
        assert picture.size == (2 * 16, 2 * 12)  # three latent frames in two rows
