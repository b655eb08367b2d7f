"""A thousand malformed inputs: each is used, or refused in one line within seconds; `benchmarks/fuzz.py` makes more."""

import argparse
import json
import math
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzzing.readers import READERS
from benchmarks.fuzzing.run import fuzz, fuzz_command_lines
from sharding.mesh import parse_mesh
from wanjax.commands.quantize import read_layers
from wanjax.commands.select import limit
from wanjax.config import SampleConfig
from wanjax.diffusion.solvers import make_schedule
from wanjax.errors import InputError, one_line
from wanjax.sampling.cache_rules import switches
from wanjax.untrusted import parse_json
from wanjax.weights import lora

SEEDS = range(44)  # of each reader


@pytest.mark.parametrize("reader", READERS)
def test_malformed_inputs(reader):
    assert fuzz(SEEDS, reader) == []


def test_there_are_a_thousand():
    assert len(SEEDS) * len(READERS) >= 1000


# ---- parsers of what is typed: no text raises anything but the one error


def check(parse, *values):
    """It takes the values, or raises the one error, in one line."""
    said = "taken"
    try:
        parse(*values)
    except InputError as error:
        said = str(error)
    assert said.isprintable()


TEXT = st.one_of(st.text(max_size=40), st.text("=,:-0123456789.einfatdspryoglux", max_size=40))
QUICK = settings(max_examples=150, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck))


@QUICK
@given(TEXT, st.integers(1, 64))
def test_meshes(text, devices):
    check(parse_mesh, text, devices)


@QUICK
@given(TEXT, TEXT)
def test_switches_of_caches(cache, cfg_cache):
    check(lambda: switches(SampleConfig(cache=cache, cfg_cache=cfg_cache)))


@QUICK
@given(TEXT)
def test_layers(text):
    check(read_layers, text)


@QUICK
@given(TEXT)
def test_limits(text):
    try:
        _, number = limit(text)
    except argparse.ArgumentTypeError:
        number = 0.0
    assert not math.isnan(number)


@QUICK
@given(TEXT)
def test_adapters(text):
    check(lora.parse, (text,))


NUMBERS = st.one_of(st.integers(), st.floats(), st.text(max_size=5), st.none(), st.booleans())


@QUICK
@given(st.sampled_from(["unipc", "dpmpp", "euler"]), NUMBERS, NUMBERS)
def test_schedules(solver, steps, shift):
    def make():
        config = SampleConfig(solver=solver, steps=steps, shift=shift)
        make_schedule(config.solver, config.steps, config.shift or 5.0)

    check(make)


@QUICK
@given(st.binary(max_size=60) | st.text(string.printable, max_size=60))
def test_json(text):
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    assert parse_json(json.dumps(value)) == value


@QUICK
@given(st.text())
def test_lines(text):
    assert one_line(text).isprintable()


def test_command_lines():
    """Every flag of every command, with values that it does not take."""
    tried, failures = fuzz_command_lines(every=6)
    assert failures == []
    assert tried > 250
