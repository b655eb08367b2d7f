"""Every field of every configuration has a type and a range, and a value outside of them is named when it is given."""

import dataclasses
import math
import typing

import pytest

from wanjax import config
from wanjax.commands import calibrate
from wanjax.config import (
    CLIPConfig,
    DiTConfig,
    LoRAConfig,
    SampleConfig,
    ShapesData,
    TaskMix,
    TowersConfig,
    TrainConfig,
    UMT5Config,
    VAEConfig,
    VideoData,
    load_config,
)
from wanjax.errors import InputError
from wanjax.settings import Config, DType

KINDS = [
    kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, Config) and kind is not Config
]
NEEDED = {
    "ShapesData": {"kind": "all", "first_seed": 0, "count": 1},
    "VideoData": {"path": "a"},
    "MixedData": {"of": (VideoData("a"),)},
    "CachedData": {"path": "a", "of": VideoData("a")},
    "TowersConfig": {"umt5": UMT5Config(), "clip": CLIPConfig(), "words": ("a",)},
    "TaskMix": {"flf2v": 1.0},
    "LoRATarget": {"name": "ffn", "rank": 4},
}
FIELDS = [(kind, field) for kind in KINDS for field in dataclasses.fields(kind)]
NONSENSE = [
    math.nan, math.inf, -math.inf, 10**400, -(10**400), "4", "", "\0", b"4", [], {}, (), (1, "x"), object(), True, 1j,
    1.5, -1, 2**70, None, [math.nan], ("\0",), float, KINDS,
]  # fmt: skip


def name(field):
    return f"{field[0].__name__}.{field[1].name}"


def test_there_are_all():
    assert {kind.__name__ for kind in KINDS} >= {"DiTConfig", "SampleConfig", "TrainConfig", "TaskMix", "LoRAConfig"}
    assert all(field.metadata["help"] for _, field in FIELDS)


@pytest.mark.parametrize("field", FIELDS, ids=name)
def test_numbers_have_bounds(field):
    kind, field = field
    hints = typing.get_type_hints(kind, localns={"DTypeLike": DType})
    if {int, float} & {hints[field.name], *typing.get_args(hints[field.name])}:
        assert field.metadata["most"] is not None
        assert field.metadata["least"] is not None or field.metadata["above"] is not None


def made(kind, values):
    """The configuration, or what is said instead."""
    try:
        return kind(**values)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("field", FIELDS, ids=name)
def test_nonsense_is_refused_by_name_or_is_a_value(field):
    """No value raises anything but the one error, in one line that names the field; and no number is infinite."""
    kind, field = field
    for value in NONSENSE:
        result = made(kind, NEEDED.get(kind.__name__, {}) | {field.name: value})
        if isinstance(result, str):
            assert result.isprintable()
            assert result.count(";") >= 2
            assert field.name.rstrip("_") in result.replace("-", "_") or "all weights are 0" in result
        else:
            given = getattr(result, field.name)
            assert not isinstance(given, float) or math.isfinite(given)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainConfig, {"optimizer": "4"}, "--optimizer '4'; one of adamw, adamw8bit, muon is accepted; use"),
        (
            TrainConfig,
            {"ema_decay": math.nan},
            "ema_decay nan; a number from 0 to 1 is accepted; change it, or leave",
        ),
        (TrainConfig, {"warmup": math.inf}, "warmup inf; whole numbers from 0"),
        (TrainConfig, {"batch": []}, r"--batch \(\); whole numbers from 1 .* are accepted; use --batch 1"),
        (TrainConfig, {"batch": 0}, "--batch 0; whole numbers from 1"),
        (TrainConfig, {"workdir": ""}, "--workdir ''; a path is accepted"),
        (
            SampleConfig,
            {"lora": ("a", "s3://b/l:1")},
            "--lora 's3://b/l:1'; a path on this machine's disks is accepted",
        ),
        (VideoData, {"path": "ftp://a"}, "path 'ftp://a'; a path, or an address of gs://, s3://, hf://, memory://, "),
        (TrainConfig, {"snippet": (17, 256)}, r"snippet \(17, 256\); a tuple of 3 whole numbers from 1"),
        (
            TrainConfig,
            {"data": "clips"},
            "data 'clips'; SyntheticData or ShapesData or VideoData or MixedData or CachedData is",
        ),
        (TaskMix, {}, r"tasks .*: all weights are 0; one above 0 is needed"),
        (TaskMix, {"flf2v": -1.0}, "flf2v -1.0; a number from 0"),
        (LoRAConfig, {"alpha": math.nan}, "alpha nan; a number above 0"),
        (LoRAConfig, {"rank": 0}, "rank 0; whole numbers from 1"),
        (SampleConfig, {"fps": 1e12}, "--fps 1000000000000.0; a number above 0 to 1000"),
        (SampleConfig, {"seed": "x"}, "--seed 'x'; whole numbers"),
        (SampleConfig, {"first_frame": 3}, "--first-frame 3; a path is accepted"),
        (SampleConfig, {"lora": [3]}, r"--lora \(3,\); a tuple of paths is accepted"),
        (DiTConfig, {"freq_dim": 7}, "freq_dim 7; even numbers are accepted; use 8"),
        (DiTConfig, {"dtype": "int8"}, "dtype 'int8'; a type of floats is accepted"),
        (VAEConfig, {"dim_mult": (1, 2)}, "dim_mult of 2 sizes with temporal_downsample of 3"),
        (CLIPConfig, {"patch_size": 300}, "image_size 224 with patch_size 300"),
        (ShapesData, {"kind": "all", "first_seed": -1, "count": 1}, "first_seed -1"),
        (TowersConfig, {"umt5": UMT5Config(), "clip": CLIPConfig(), "words": ()}, "words "),
    ],
)
def test_what_is_said(kind, values, message):
    with pytest.raises(InputError, match=f"^{message}") as caught:
        kind(**values)
    assert str(caught.value).isprintable()


def test_lists_become_tuples():
    assert SampleConfig(lora=["a.safetensors"]).lora == ("a.safetensors",)


def test_a_file_is_named(tmp_path):
    (tmp_path / "c.py").write_text("from wanjax.config import TrainConfig\nget_config = lambda: TrainConfig(steps=-1)")
    with pytest.raises(InputError, match=r"config .*c.py: --steps -1; whole numbers from 1 .*; use --steps 1000"):
        load_config(str(tmp_path / "c.py"), TrainConfig)


@pytest.mark.parametrize(
    "line", ['{"prompt": "x", "seed": "x"}', '{"seed": 1e5}', '{"first_frame": 3}', '{"prompt": []}']
)
def test_a_line_of_prompts(line, tmp_path):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    (settings,) = calibrate.read_prompts(str(tmp_path / "p.jsonl"))
    with pytest.raises(InputError, match=r"^--(seed|first-frame|prompt) "):
        dataclasses.replace(SampleConfig(), **settings)
