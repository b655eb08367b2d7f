"""What pyproject.toml asks for is what is tested."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def lower_bound(requirement):
    (bound,) = (s.version for s in requirement.specifier if s.operator == ">=")
    return Version(bound)


def test_the_oldest_releases_are_the_lower_bounds():
    lines = [line for line in Path("tests/oldest.txt").read_text().splitlines() if not line.startswith("#")]
    oldest = {name: Version(version) for name, version in (line.split("==") for line in lines)}
    extras = PROJECT["optional-dependencies"]
    tested = ("data", "hub", "gguf", "serve", "prompt", "runs")
    asked = [
        Requirement(line) for line in (*PROJECT["dependencies"], *(line for extra in tested for line in extras[extra]))
    ]
    for requirement in asked:
        pinned, bound = oldest[requirement.name], lower_bound(requirement)
        assert pinned in requirement.specifier
        assert pinned.release[: len(bound.release)] == bound.release, requirement.name
    assert {"jaxlib", "safetensors"} == set(oldest) - {r.name for r in asked}  # jax's own, and the tests'


def test_every_python_that_is_promised_is_named_and_tested():
    workflow = Path(".github/workflows/ci.yml").read_text()
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language")]
    assert f">={named[0]}" == PROJECT["requires-python"]
    assert f"python: {named}".replace("'", '"') in workflow
