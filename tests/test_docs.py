"""What README and docs name is there: files, commands and their flags, make targets, modules and their members."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from wanjax.commands import COMMANDS, module

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = "wanjax|sharding|configs|benchmarks|docs|tests"
MADE_BY_USERS = re.compile(r"configs/X\.py|configs/train_\.\.")
OTHER_PROGRAMS = {
    "--build-arg",
    "--gpus",
    "--index-url",
    "--logdir",
    "--ei",
    "--completion",
    "--check",
    "--version",
    "--help",
    "--upgrade",
}


def named(page, pattern):
    return sorted(set(re.findall(pattern, page.read_text())))


def flags_of(parser):
    return set(re.findall(r"--[a-z][a-z-]+", parser.format_help()))


@pytest.fixture(scope="module")
def flags():
    """All flags of all commands, and of the benchmarks."""
    found = set().union(*(flags_of(module(command).make_parser()) for command in COMMANDS)) | OTHER_PROGRAMS
    for script in (ROOT / "benchmarks").glob("*.py"):
        found |= set(re.findall(r'"(--[a-z][a-z-]+)"', script.read_text()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files(page):
    for path in named(page, rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*\w)"):
        if not MADE_BY_USERS.match(path):
            assert (ROOT / path).exists() or list(ROOT.glob(f"{path}*")), path
    for path in named(page, r"\]\(([\w./-]+)\)"):
        assert (page.parent / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags(page, flags):
    for command in named(page, r"(?:^    |`)wanjax ([a-z]+)"):
        assert command in COMMANDS, command
    for script in named(page, r"python ((?:[\w]+/)?\w+\.py)"):
        assert (ROOT / script).exists(), script
    for flag in named(page, r"(?<![\w-])(--[a-z][a-z-]+)"):
        assert flag in flags, flag
    assert not re.search(r"python -m wanjax\.", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in named(page, r"(?:^    |`)(?:PYTHON=\S+ )?make ([a-z-]+)"):
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_members(page):
    for name in named(page, r"`((?:wanjax|sharding)(?:\.\w+)+)"):
        parts = name.split(".")
        if Path(name).suffix in (".py", ".md") or parts[1] == "x":
            continue
        for i in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:i]))
            except ModuleNotFoundError:
                continue
            for part in parts[i:]:
                assert hasattr(found, part), name
                found = getattr(found, part)
            break


def test_troubleshooting_lists_what_the_source_raises():
    done = subprocess.run([sys.executable, "docs/errors.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "### Checkpoints and adapters" in done.stdout
    assert "- `--boundary … and --boundary-step …; one of them is accepted; leave one out`" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("- `") and ";" not in line] == []
    assert "<!-- errors: docs/errors.py -->" in (ROOT / "docs/troubleshooting.md").read_text()
