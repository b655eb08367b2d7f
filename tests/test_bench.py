"""`make bench`: what benchmarks print becomes a dated file and a table, and what cannot be run is said."""

import importlib.util
import json

import pytest
from tiny import ROOT


@pytest.fixture
def bench(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("all_benchmarks", ROOT / "benchmarks/all.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, spec.name, module)
    spec.loader.exec_module(module)
    (tmp_path / "benchmarks").mkdir()
    programs = {
        "good": 'import sys\nprint("words")\nprint(\'{"rows": [{"s": 1.5}, {"s": 2}], "flags": %d}\' % len(sys.argv))',
        "bad": "raise SystemExit(3)",
        "mute": "print('no figures')",
    }
    for name, program in programs.items():
        (tmp_path / f"benchmarks/{name}.py").write_text(program)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    cases = {name: module.Case(f"{name}.py", f"{name}.py --few") for name in programs}
    cases["absent"] = module.Case("good.py", "good.py", ("no_such_module", "golden"))
    monkeypatch.setattr(module, "CASES", cases)
    return module


def test_all_that_can_run_is_written_down(bench, tmp_path):
    assert bench.main(["--folder", str(tmp_path / "o")]) == 1  # one failed
    (file,) = (tmp_path / "o").glob("*.json")
    found = json.loads(file.read_text())["benchmarks"]
    assert found["good"]["result"]["rows"] == [{"s": 1.5}, {"s": 2}]
    assert "exit code 3" in found["bad"]["not run"]
    assert "no JSON" in found["mute"]["not run"]
    assert "pip install 'wanjax[golden]'" in found["absent"]["not run"]
    table = file.with_suffix(".md").read_text()
    assert "| **good** | `python benchmarks/good.py` |" in table
    assert "| | rows 2 s | 2 |" in table
    assert "| bad | not measured |" in table


def test_one_that_takes_too_long_is_left(bench, monkeypatch):
    def late(words, **options):
        raise bench.subprocess.TimeoutExpired(words, options["timeout"])

    monkeypatch.setattr(bench.subprocess, "run", late)
    assert "longer than 5 s" in bench.run(bench.CASES["good"], False, 5)["not run"]


def test_quick_and_only(bench, tmp_path):
    assert bench.main(["--folder", str(tmp_path / "o"), "--quick", "--only", "good"]) == 0
    (file,) = (tmp_path / "o").glob("*.json")
    assert json.loads(file.read_text())["benchmarks"]["good"]["result"]["flags"] == 2


def test_every_script_that_is_named_is_there():
    for word in (ROOT / "benchmarks/all.py").read_text().split('"'):
        script = word.split(" ")[0]
        if script.endswith(".py") and "/" not in script:
            assert (ROOT / "benchmarks" / script).exists(), script
