"""The stages' configurations fit together and their batches fit their meshes; test_report.py traces their programs."""

import dataclasses
import itertools
import math
import runpy

import pytest

from wanjax.config import TrainConfig, VideoData, load_config
from wanjax.report.memory import abstract_shape
from wanjax.training import checks
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
