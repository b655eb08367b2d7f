"""The cache of encoded clips: goes on where it was stopped, and says what is wrong with a folder."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
from tiny import DIFFUSERS, DIT, TRAIN, on

from wanjax.commands import cache
from wanjax.conditioning.samples import Encoded, PixelSample
from wanjax.config import CachedData, ShapesData, TaskMix, VideoData
from wanjax.data.buckets import Order
from wanjax.data.samples import TaskSamples
from wanjax.data.sources import captions_digest
from wanjax.demo.shapes import ProceduralClips
from wanjax.errors import InputError
from wanjax.files import replacing
from wanjax.training import latent_cache

CLIPS = ShapesData("all", 0, 5)
NETWORK = dataclasses.replace(
    DIT, in_channels=8, out_channels=2, text_dim=3, text_len=6, image_dim=None, image_positions=0
)
CONFIG = dataclasses.replace(TRAIN, tasks=TaskMix(flf2v=1.0, variants=2), height=16, width=16, batch=2, data=CLIPS)


class Encoders:
    """Latents that tell which clip they are of: its mean. After `last` batches it is interrupted."""

    def __init__(self, last=None):
        self.calls, self.last = 0, last

    def __call__(self, batch: PixelSample) -> Encoded:
        if self.calls == self.last:
            raise KeyboardInterrupt
        self.calls += 1
        b = len(batch.video)
        latents = np.broadcast_to(
            np.asarray(batch.video).mean((1, 2, 3, 4))[:, None, None, None, None], (b, 2, 2, 2, 2)
        )
        text = np.broadcast_to(np.float32([[[1] * 3] * 4 + [[0] * 3] * 2]), (b, 6, 3))
        return Encoded(np.float32(latents), text, None, np.zeros((b, 2, 2, 2, 6), np.float32))

    def empty_text(self):
        return np.zeros((6, 3), np.float32)


def tokens(captions):
    return np.ones((len(captions), 6), np.int32), np.ones((len(captions), 6), np.int32)


def write(out, encoders, config=CONFIG, **share):
    clips = ProceduralClips(config.data.first_seed, 5, 5, 16)
    buckets = {clips.shape(0): np.arange(5)}
    samples = TaskSamples(clips, Order(buckets, config.batch), config, tokens, 0, 0)
    with on():
        latent_cache.write_cache(config, samples, buckets, encoders, out, **share)


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(latent_cache, "CLIPS_PER_FILE", 2)


@pytest.fixture
def reading(tmp_path):
    return dataclasses.replace(CONFIG, data=CachedData(str(tmp_path / "c"), CLIPS))


def test_goes_on_where_it_was_stopped(tmp_path, reading):
    write(tmp_path / "whole", Encoders())
    with pytest.raises(KeyboardInterrupt):  # in the middle of the second file
        write(tmp_path / "c", Encoders(last=3))
    (tmp_path / "c/.clips-000001.1a2b.arrayrecord").touch()  # as a process that was killed leaves it
    with pytest.raises(InputError, match=r"no index\.json"):
        latent_cache.CachedSamples(reading.data.path, reading, NETWORK)
    first = (tmp_path / "c/clips-000000.arrayrecord").stat().st_mtime_ns
    encoders = Encoders()
    write(tmp_path / "c", encoders)
    assert encoders.calls == 3  # (2 + 1 clips) x 2 draws, 2 at a time
    assert (tmp_path / "c/clips-000000.arrayrecord").stat().st_mtime_ns == first
    assert sorted(os.listdir(tmp_path / "c")) == sorted(os.listdir(tmp_path / "whole"))
    ours = latent_cache.CachedSamples(reading.data.path, reading, NETWORK)
    whole = latent_cache.CachedSamples(str(tmp_path / "whole"), reading, NETWORK)
    clips = ProceduralClips(0, 5, 5, 16)
    for i in range(10):
        assert ours.name(i) == whole.name(i)
        np.testing.assert_array_equal(ours[i].latents, whole[i].latents)
        (seed,) = [k for k in range(5) if clips[k].name == ours.name(i)]
        np.testing.assert_allclose(ours[i].latents, clips[seed].video.mean(), rtol=1e-4)


def of_another_process(path):
    """The hidden name under which a process that is alive, here the one that started this, would write `path`."""
    with replacing(path) as ours:
        ours.touch()
    path.unlink()
    theirs = ours.with_name(ours.name.replace(f"-{os.getpid():x}-", f"-{os.getppid():x}-"))
    assert theirs != ours
    theirs.touch()
    return theirs.name


def test_processes_that_begin_or_end_together(tmp_path):
    """What another one is writing just now is no foreign file, and is not removed."""
    names = [of_another_process(tmp_path / "c/plan.json")]
    encoders = Encoders()

    def empty_text():  # asked for at the end
        names.append(of_another_process(tmp_path / "c/index.json"))
        return np.zeros((6, 3), np.float32)

    encoders.empty_text = empty_text
    write(tmp_path / "c", encoders)
    assert {*names, "index.json"} < {*os.listdir(tmp_path / "c")}


def test_other_clips_do_not_go_on(tmp_path):
    write(tmp_path / "c", Encoders(), share=(0, 2))
    other = dataclasses.replace(CONFIG, data=ShapesData("all", 100, 5))
    with pytest.raises(InputError, match="holds the beginning of another cache"):
        write(tmp_path / "c", Encoders(), other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(InputError, match="is not empty and no cache"):
        write(tmp_path / "mine", Encoders())


def test_what_a_network_does_not_take(tmp_path, reading):
    write(tmp_path / "c", Encoders())
    for change, message in (
        ({"out_channels": 4, "in_channels": 12}, "has latents of 2 channels, the network takes 4"),
        ({"text_dim": 5}, "has text of 3 channels, the network takes 5"),
        ({"image_dim": 7}, "has image of no channels, the network takes 7"),
        ({"in_channels": 2}, "has known of 2 channels, the network takes none"),
    ):
        with pytest.raises(InputError, match=message):
            latent_cache.CachedSamples(reading.data.path, reading, dataclasses.replace(NETWORK, **change))


def test_damaged_folders(tmp_path, reading):
    write(tmp_path / "c", Encoders())
    (tmp_path / "c/clips-000001.arrayrecord").unlink()
    with pytest.raises(InputError, match=r"lacks 1 of 4 files, the first clips-000001\.arrayrecord"):
        latent_cache.CachedSamples(reading.data.path, reading, NETWORK)
    index = json.loads((tmp_path / "c/index.json").read_text())
    for text in ("{", json.dumps({k: v for k, v in index.items() if k != "files"})):
        (tmp_path / "c/index.json").write_text(text)
        with pytest.raises(InputError, match=r"index\.json is damaged"):
            latent_cache.CachedSamples(reading.data.path, reading, NETWORK)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["buckets"][0]["clips"].append(10**6),
        lambda index: index["buckets"][0]["clips"].append(-1),
        lambda index: index["buckets"][0]["clips"].append("1"),
        lambda index: index["buckets"][0]["clips"].append(index["buckets"][0]["clips"][0]),
        lambda index: index["buckets"].clear(),
        lambda index: index["buckets"][0]["shape"].pop(),
        lambda index: index["files"].append("../c/clips-000001.arrayrecord"),
        lambda index: index["files"].pop(),
        lambda index: index.update(files={"a": 1}),
        lambda index: index.pop("seed"),
        lambda index: index["buckets"][0]["repeats"].pop(),
        lambda index: index["buckets"][0].pop("repeats"),
        lambda index: index["buckets"][0]["clips"].__setitem__(0, 10**9),
    ],
)
def test_an_index_that_is_not_of_its_records(tmp_path, reading, change):
    write(tmp_path / "c", Encoders())
    index = json.loads((tmp_path / "c/index.json").read_text())
    change(index)
    (tmp_path / "c/index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"is damaged|lacks"):
        latent_cache.CachedSamples(reading.data.path, reading, NETWORK)


def test_records_that_are_damaged(tmp_path, reading):
    write(tmp_path / "c", Encoders())
    file = tmp_path / "c/clips-000000.arrayrecord"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(InputError, match=r"cache .* is damaged \(.*\); a whole one is needed; make it anew"):
        latent_cache.CachedSamples(reading.data.path, reading, NETWORK)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch 0", "--batch 0; whole numbers"),
        ("--processes 2 --process-id 2", "--process-id 2 of --processes 2"),
        ("--batch many", "whole numbers are accepted"),
        ("--validation", "has no validation"),
    ],
)
def test_flags(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        cache.main(["--config", "configs/train_tiny.py", "--out", str(tmp_path / "c"), *flags.split()])
    assert not (tmp_path / "c").exists()


def test_clips_are_encoded_before_the_stage_before_is_trained(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "import dataclasses\n"
        "from configs.demo_stage3 import get_config as stage\n"
        "from wanjax.config import ShapesData\n"
        "def get_config():\n"
        "    clips = ShapesData('fine', 0, 1)\n"
        f"    return dataclasses.replace(stage(), data=clips, checkpoint={str(tmp_path / 'not there yet')!r})\n"
    )
    out = tmp_path / "clips"
    cache.main(["--config", str(config), "--out", str(out), "--encoders", "wanjax/demo", "--batch", "8"])
    assert json.loads((out / "index.json").read_text())["files"] == ["clips-000000.arrayrecord"]


def test_captions_edited_since(tmp_path, reading):
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("a", "b"):
        (clips / f"{name}.mp4").touch()
        (clips / f"{name}.txt").write_text(name)
    write(tmp_path / "c", Encoders())
    index = json.loads((tmp_path / "c/index.json").read_text())
    of = VideoData(str(clips))
    index["captions"] = captions_digest(of)
    (tmp_path / "c/index.json").write_text(json.dumps(index))
    reading = dataclasses.replace(reading, data=CachedData(reading.data.path, of))
    latent_cache.CachedSamples(reading.data.path, reading, NETWORK)
    (clips / "b.txt").write_text("other words")
    with pytest.raises(InputError, match=r"is of other clips or captions than .* has now; they must agree"):
        latent_cache.CachedSamples(reading.data.path, reading, NETWORK)
    shutil.rmtree(clips)  # clips that are gone cannot be compared, and are not needed
    latent_cache.CachedSamples(reading.data.path, reading, NETWORK)


@pytest.mark.parametrize("change", [{"fps": 8.0}, {"lengths": (5,)}, {"ratios": (1.0,)}])
def test_other_clips_of_the_same_files(tmp_path, reading, change):
    write(tmp_path / "c", Encoders())
    with pytest.raises(InputError, match=f"has {next(iter(change))} .*, the run .*; they must agree"):
        latent_cache.CachedSamples(reading.data.path, dataclasses.replace(reading, **change), NETWORK)


@pytest.mark.parametrize("network", ["vae", "text_encoder", "image_encoder"])
def test_every_encoder_has_its_print(tmp_path, network):
    ours = latent_cache.encoders_fingerprint(str(DIFFUSERS))
    other = shutil.copytree(DIFFUSERS, tmp_path / "other")
    assert latent_cache.encoders_fingerprint(str(other)) == ours
    (file,) = (other / network).glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({name: x + np.ones((), x.dtype) for name, x in tensors.items()}, file)
    assert latent_cache.encoders_fingerprint(str(other)) != ours
