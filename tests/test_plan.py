"""`wanjax plan`: what is counted, what is compiled, what is searched, and what a person reads."""

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import pytest
from tiny import DIT, TRAIN

from sharding.mesh import MeshShape, make_mesh, parse_mesh
from wanjax.commands import plan as command
from wanjax.commands import report
from wanjax.config import DiTConfig, LoRAConfig, SampleConfig, TrainConfig
from wanjax.errors import InputError
from wanjax.report import compiled, memory, programs, savings, search
from wanjax.report.compiled import Case, Figures
from wanjax.report.devices import count, device
from wanjax.report.plan import lower_bound, make_plan
from wanjax.sampling.memory import working_bytes
from wanjax.terminal import bar

GIB = 2**30
CONFIGS = ("flf2v_14b_720p", "i2v_14b_480p", "t2v_1_3b_480p")
TRAINING = ("train_flf2v_14b_720p", "train_flf2v_14b_720p_4chips", "train_lora_flf2v_14b")
STAGES = ("train_flf2v_14b_stage1", "train_flf2v_1_3b_stage1")
FLF2V = "configs/flf2v_14b_720p.py"
STEP = Figures(
    8 * GIB, {"weights": 6 * GIB, "context": GIB, "inputs": 0}, {"all-to-all": GIB}, 0, {"bfloat16": 10**15}, {}
)


# -------------------------------------------------------------------------------------------------------------- counted


@pytest.mark.parametrize("name", CONFIGS + TRAINING + STAGES)
def test_every_mesh_of_every_configuration(name, capsys):
    path = f"configs/{name}.py"
    command.main(["--config", path])
    head, _, *rows = itertools.takewhile(bool, capsys.readouterr().out.splitlines())
    assert path in head
    assert len(rows) == len(memory.load(path)[2]) > 0


def test_weights_are_counted_to_the_byte(capsys):
    command.main(["--config", "configs/train_flf2v_14b_720p.py", "--mesh", "fsdp=16,ulysses=4"])
    header, row = (re.split(r"\s+", line.strip()) for line in capsys.readouterr().out.splitlines()[1:3])
    columns = dict(zip(header, map(float, row[1:]), strict=True))
    parameters = 16_395_536_704  # tests/test_parameter_counts.py
    assert columns["weights"] == pytest.approx(4 * parameters / 64 / GIB, abs=0.02)
    assert columns["optimiser"] == pytest.approx(2 * columns["weights"], abs=0.02)


def test_estimate_of_activations_is_near_the_compilers():
    """Compiled for v6e:2x4, the DiT step's peak is 8.75 GiB, 6.59 of it arguments (docs/memory.md)."""
    assert working_bytes(18900, DiTConfig(dtype=jnp.bfloat16)) / GIB == pytest.approx(8.75 - 6.59, rel=0.05)


def test_the_report_is_the_plans_count(capsys):
    flags = ["--config", FLF2V, "--mesh", "data=2,ulysses=4", "--quantize", "int8"]
    command.main(flags)
    counted = capsys.readouterr().out
    report.main(flags)
    assert capsys.readouterr().out == counted != ""


def test_the_report_compiles_what_is_named(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(compiled, "check_compiler", lambda target: None)
    monkeypatch.setattr(compiled, "measure", lambda case, name: asked.append((case.target, case.mesh, name)) or STEP)
    report.main(["--config", FLF2V, "--compile", "v6e:2x4", "--only", "DiT step"])
    assert asked == [("v6e:2x4", "data=2,ulysses=4", "DiT step")]
    header, row = (re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[1:])
    assert header == ["arguments", "peak", "all-to-all", "exposed"]
    assert row == ["DiT step", "7.00", "8.00", "1.00", "0.00"]


def test_8_bits_are_counted(capsys):
    weights = []
    for flags in ([], ["--quantize", "fp8"]):
        command.main(["--config", FLF2V, "--mesh", "data=2,ulysses=4", *flags])
        weights.append(float(capsys.readouterr().out.splitlines()[2].split()[1]))
    assert 0.5 * weights[0] <= weights[1] <= 0.6 * weights[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config configs/none.py", "does not exist"),
        ("--config configs/tiny_random.py", "NETWORK"),
        ("--config configs/train_tiny.py", "MESHES"),
        (f"--config {FLF2V} --mesh data=-1", "give every size"),
        (f"--config {FLF2V} --mesh rows=2", "cannot read 'rows=2'"),
        (f"--config {FLF2V} --mesh ulysses=3", "heads"),
        (f"--config {FLF2V} --target v9:1", "accepted: v6e:2x4"),
        (f"--config {FLF2V} --target h100:2x4", "how many devices"),
        (f"--config {FLF2V} --search", "need a --target"),
        (f"--config {FLF2V} --batch 2", "--batch with .*; it is a setting of training"),
        (
            "--config configs/train_flf2v_14b_720p.py --steps 4 --cache fixed:2",
            "a setting of sampling",
        ),
        ("--config configs/train_flf2v_14b_720p.py --quantize fp8", "weights that learn"),
        ("--config configs/i2v_14b_480p.py --train", "no train_i2v_14b_480p.py"),
    ],
)
def test_bad_input(flags, message):
    with pytest.raises(InputError, match=message) as error:
        command.main(flags.split())
    assert "\n" not in str(error.value)


def test_what_a_training_needs():
    """Of 8 bits and the hosts' memory the fewest that fit, and of as few the first."""
    row = {"weights": 28.0, "optimiser": 2.0, "gradients": 1.0, "kept~": 13.0}
    ways = {"a": {"weights": 14.0}, "b": {"optimiser": 0.5}, "c": {"optimiser": 0}, "d": {"kept~": 0}}
    sizes = savings.totals(row, ways)
    assert (sizes[()], sizes["a",], sizes["b", "c"], sizes["a", "b", "c", "d"]) == (44, 30, 42, 15)
    assert [savings.needed(sizes, memory) for memory in (44, 43, 31, 30, 17, 14)] == [
        (), ("a",), ("a",), ("a",), ("a", "d"), None,
    ]  # fmt: skip


def test_what_saves_memory_is_counted():
    config = dataclasses.replace(TRAIN, dit=None, lora=LoRAConfig(rank=64), dtype="bfloat16")
    row, ways = savings.parts_saved(config, dataclasses.replace(DIT, dim=128), MeshShape(fsdp=2))
    assert [*ways] == ["--quantize int8", "--optimizer adamw8bit", "--offload-optimizer", "--remat offload"]
    assert 0.5 * row["weights"] < ways["--quantize int8"]["weights"] < 0.9 * row["weights"]  # the blocks' matrices
    assert 0.2 * row["optimiser"] < ways["--optimizer adamw8bit"]["optimiser"] < 0.3 * row["optimiser"]
    away = dataclasses.replace(config, offload_optimizer=True)
    assert memory.count(away, DIT, MeshShape())["optimiser"] < 100  # counts of steps


@pytest.mark.parametrize(("target", "extra"), [("v6e:2x4", "aot"), ("h100:8", "aot-gpu")])
def test_a_compiler_that_is_missing_is_named(monkeypatch, target, extra):
    monkeypatch.setattr(compiled, "_version", lambda library: None)
    with pytest.raises(InputError, match=re.escape(f"pip install 'wanjax[{extra}]'")):
        command.main(["--config", FLF2V, "--target", target])


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.fixture
def here(monkeypatch):
    """Eight devices of this machine in place of eight chips; figures in megabytes would not be told from nothing."""
    mesh = make_mesh(MeshShape(data=2, ulysses=4))
    monkeypatch.setattr("wanjax.report.topology.topology_mesh", lambda target, text: mesh)
    return mesh


VIDEO = SampleConfig(height=64, width=64, frames=5, guidance=5.0, steps=3, dtype="float32")
TINY = Case(VIDEO, DIT, "v6e:2x4", "data=2,ulysses=4")


def test_memory_is_the_compilers_to_the_byte(here, monkeypatch):
    monkeypatch.setattr("sharding.xla_options.TPU_OPTIONS", {})
    monkeypatch.setattr("sharding.xla_options.GPU_OPTIONS", {})
    figures = compiled.measure(TINY, "DiT step")
    with jax.set_mesh(here):
        stage = programs.stages(VIDEO, DIT, here)["DiT step"]()
        said = stage.lower().compile(compiler_options={"xla_backend_optimization_level": 3}).memory_analysis()
    assert figures.arguments == said.argument_size_in_bytes
    assert figures.peak == said.peak_memory_in_bytes
    assert figures.parts["weights"] == memory.bytes_per_device(stage.arguments[0].dit)


def test_a_step_cache_is_counted(here, monkeypatch):
    with jax.set_mesh(here):
        parts = programs.stages(dataclasses.replace(VIDEO, cache="fixed:2"), DIT, here)["DiT step"]().parts()
    assert memory.bytes_per_device(parts["step cache"]) >= 2 * 32 * DIT.dim * 4 // 8  # residual of 32 tokens


def test_figures_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "measure", lambda case, name: STEP)
    first = list(compiled.measure_all([(TINY, "DiT step")], tmp_path, processes=0))
    monkeypatch.setattr(compiled, "measure", None)
    assert (
        list(compiled.measure_all([(TINY, "DiT step")], tmp_path, processes=0)) == first == [(TINY, "DiT step", STEP)]
    )
    (file,) = tmp_path.glob("plans/*.json")
    file.write_text("{}")
    with pytest.raises(TypeError):  # damaged: compiled anew
        list(compiled.measure_all([(TINY, "DiT step")], tmp_path, processes=0))


def test_a_program_that_the_compiler_refuses():
    error = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.09G of 31.25G hbm. Exceeded hbm capacity"
    )
    assert compiled._needed(error) == int(40.09 * GIB)
    error = "Ran out of memory on HBM, the total memory required for HLO temporaries (38.11G) exceeds available HBM."
    assert compiled._needed(error) == int(38.11 * GIB)
    assert compiled._needed("something else") is None


# ---------------------------------------------------------------------------------------------------------------- plans

FULL = Case(SampleConfig(area=720 * 1280, steps=50), DiTConfig(), "h100:8", "data=2,ulysses=4")
ENCODE = dataclasses.replace(STEP, parts={"weights": GIB, "inputs": GIB})


def test_what_lies_beside_counts():
    plan = make_plan(FULL, {"DiT step": STEP, "VAE encode": ENCODE})
    step, encode = plan.rows
    assert (step.total, encode.total) == (9 * GIB, 8 * GIB)
    assert (step.calls, encode.calls) == (50, 21)
    assert plan.fits
    assert not plan.counted
    big = dataclasses.replace(STEP, peak=79 * GIB)
    assert not make_plan(FULL, {"DiT step": big, "VAE encode": ENCODE}).fits


def test_two_experts_stay_where_they_fit():
    for target, stays in (("h100:8", True), ("rtx5090:8", False)):
        step = dataclasses.replace(STEP, parts={"weights": 14 * GIB, "context": GIB, "inputs": 0}, peak=18 * GIB)
        plan = make_plan(dataclasses.replace(FULL, target=target, experts=2), {"DiT step": step})
        assert plan.main.beside == ({"other expert": 15 * GIB} if stays else {})


def test_a_bound_is_the_largest_of_what_has_to_be_done():
    chip = device("h100:8")
    assert lower_bound(FULL, STEP, chip) == (10**15 / 8 / chip.flops, "operations")
    eight = dataclasses.replace(STEP, operations={"int8": 10**15})
    assert lower_bound(FULL, eight, chip)[0] == 10**15 / 8 / chip.flops_8_bit
    sends = dataclasses.replace(STEP, payload={"all-gather": 10**12})
    assert lower_bound(FULL, sends, chip) == (10**12 / chip.links, "bytes between devices")
    waits = dataclasses.replace(STEP, exposed=10**12)
    assert lower_bound(FULL, waits, chip)[1] == "collectives"


def test_a_person_and_a_program_read_the_same(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "check_compiler", lambda target: None)
    monkeypatch.setattr(compiled, "measure_all", lambda wanted, folder: [(*each, STEP) for each in wanted])
    flags = ["--config", FLF2V, "--target", "h100:8"]
    command.main(flags)
    shown = capsys.readouterr().out
    assert "sampling, 81 frames of 1280x720, 50 steps on h100:8, mesh data=2,ulysses=4" in shown
    assert re.search(r"DiT step +\d", shown)
    assert "It fits" in shown
    assert "a bound by nominal rates" in shown
    assert "\033" not in shown
    assert (
        shown.rstrip().splitlines()[-1].strip().startswith(f"wanjax sample --config {FLF2V} --mesh data=2,ulysses=4 ")
    )
    command.main([*flags, "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["fits"] is True
    assert found["programs"]["DiT step"]["peak"] == 8 * GIB
    assert found["command"].startswith("wanjax sample")


# --------------------------------------------------------------------------------------------------------------- search


def test_every_mesh_is_all_of_the_devices():
    heads = FULL.dit.num_heads
    found = list(search.meshes(FULL))
    assert len(found) == len(set(found)) > 5
    for shape in found:
        assert parse_mesh(search.named(shape), 8) == shape
        assert heads % shape.ulysses == 0


def test_a_search_recommends_what_fits_as_the_network_is(monkeypatch, capsys):
    def measured(wanted, folder):
        for case, name in wanted:
            peak = 20 * GIB if case.dit.quantize == "off" else 10 * GIB
            yield case, name, dataclasses.replace(STEP, peak=peak if "ring" not in case.mesh else 90 * GIB)

    monkeypatch.setattr(compiled, "check_compiler", lambda target: None)
    monkeypatch.setattr(compiled, "measure_all", measured)
    command.main(["--config", FLF2V, "--target", "h100:8", "--search"])
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert "--mesh data=2,ulysses=4 --checkpoint" in last
    command.main(["--config", FLF2V, "--target", "rtx5090:1", "--search"])
    shown = capsys.readouterr().out
    assert "->  data=1  fp8" in re.sub(" {3,}", "  ", shown) or "--quantize fp8" in shown.rstrip().splitlines()[-1]


def test_training_searches_remat_and_batch():
    case = Case(TrainConfig(height=720, width=1280, batch=64), DiTConfig(num_layers=2), "v5p:2x2x1", "fsdp=4")
    found = search.guesses(case)
    assert {guess.case.config.remat for guess in found} == set(search.REMATS)
    assert {guess.case.config.batch for guess in found} > {1, 2, 4}
    assert found[0].case.config.remat == "none"
    assert len(search.shortlist(found, 2**50)) == search.TRIED
    least = min(found, key=lambda guess: guess.size)
    assert search.shortlist(found, 0) == [least.case]  # nothing fits: what needs least


@pytest.mark.parametrize(("target", "devices"), [("v6e:2x4", 8), ("tpu7x:2x2x1", 8), ("v5p:4x4x4", 64), ("h100:8", 8)])
def test_devices_of_a_target(target, devices):
    assert count(target) == devices
    assert device(target).memory > 0


def test_a_bar_is_as_wide_as_asked():
    assert bar([1, 1, 0, 1], 4, 8) == "████▓▓░░"[:2] + "▓▓░░··"
    assert bar([5, 5], 4, 8) == "█" * 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise SystemExit(0)", "cannot be read .SystemExit: 0"),
        ("def get_config():\n    return 3", "returns int; SampleConfig or TrainConfig is needed"),
    ],
)
def test_a_file_that_is_no_configuration(text, message, tmp_path):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(InputError, match=message):
        command.main(["--config", str(tmp_path / "a.py")])
