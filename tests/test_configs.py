"""The stages' configurations fit together and their batches fit their meshes; test_plan.py traces their programs."""

import dataclasses
import itertools
import math
import runpy
import sys

import pytest

from wanjax.config import SampleConfig, TrainConfig, VideoData, load_config
from wanjax.report.memory import abstract_shape, count, load
from wanjax.sampling import presets
from wanjax.training import checks
from wanjax.training.objectives.distillation import Distillation, write_preset
from wanjax.training.objectives.flow_matching import FlowMatching


@pytest.mark.parametrize("model", ["flf2v_14b", "flf2v_1_3b"])
def test_stages(model):
    paths = [f"configs/train_{model}_stage{number}.py" for number in (1, 2, 3)]
    configs = [load_config(path, TrainConfig) for path in paths]
    for before, after in itertools.pairwise(configs):
        assert after.checkpoint == f"{before.workdir}/model"
        assert after.dit == before.dit
        assert after.learning_rate < before.learning_rate
    assert configs[0].tasks.interpolation > 0
    assert (
        configs[1].tasks.weights
        == configs[2].tasks.weights
        == configs[0].tasks.weights
        | dict.fromkeys(("t2v", "i2v", "continuation", "interpolation"), 0.0)
        | {"flf2v": 1.0}
    )
    assert [config.height for config in configs] == [480, 480, 720]
    assert len({config.data for config in configs}) == 3
    for path, config in zip(paths, configs, strict=True):
        config = dataclasses.replace(config, encoders=None)  # a download that is not here
        assert isinstance(config.validation, VideoData)
        assert config.dit.task == "flf2v"
        meshes = runpy.run_path(path)["MESHES"]
        assert config.mesh in meshes.values()
        for topology, mesh in meshes.items():
            shape = abstract_shape(mesh)
            assert math.prod(shape) == math.prod(map(int, topology.split(":")[1].split("x")))
            checks.check(dataclasses.replace(config, accumulate=1), FlowMatching(config, config.dit), shape)
        mesh = abstract_shape(config.mesh)
        checks.check(config, FlowMatching(config, config.dit), mesh)


def test_distillation_fits_its_mesh():
    path = "configs/distill_flf2v_14b.py"
    config, dit, meshes, _ = load(path)
    assert config.mesh in meshes.values()
    assert config.tasks.caption_dropout == 0.0  # guidance has the empty caption already
    for topology, mesh in meshes.items():
        shape = abstract_shape(mesh)
        assert math.prod(shape) == math.prod(map(int, topology.split(":")[1].split("x")))
        checks.check(dataclasses.replace(config, workdir="unused"), Distillation(config, dit), shape)
        row = count(config, dit, shape)  # traces the program
        assert row["step~"] < 95 * 2**30


def test_the_demos_student_samples_as_the_preset_of_its_sigmas(tmp_path):
    config = load_config("configs/demo_distill.py", TrainConfig)
    assert config.lora is None
    write_preset(tmp_path / "preset.json", config.distillation.sigmas)
    sample = presets.apply(SampleConfig(), str(tmp_path / "preset.json"))
    assert (sample.solver, sample.guidance, sample.sigmas) == ("lcm", 1.0, config.distillation.sigmas)


def test_both_tunings_on_real_clips_read_one_cache():
    adapters, full = (load_config(f"configs/real_{name}.py", TrainConfig) for name in ("lora", "full"))
    assert adapters.data == full.data
    assert adapters.tasks == full.tasks
    assert adapters.lora is not None
    assert full.lora is None
    assert adapters.workdir != full.workdir


def test_a_configuration_imports_its_neighbours_from_anywhere(tmp_path, monkeypatch):
    """`wanjax train --config` is started without the clone on Python's path."""
    folder = tmp_path / "settings"
    folder.mkdir()
    (folder / "shared.py").write_text("from wanjax.config import TrainConfig\nCONFIG = TrainConfig(steps=7)\n")
    (folder / "mine.py").write_text("from settings.shared import CONFIG\nget_config = lambda: CONFIG\n")
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert load_config(str(folder / "mine.py"), TrainConfig).steps == 7
