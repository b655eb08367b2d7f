"""Command lines with a value that a flag does not take: each has to be refused in one line before the work begins.

The work itself is cut off: a command that comes to it has accepted what it was given.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image

from wanjax import commands, media
from wanjax.cli import number, whole_number

from . import networks
from .limits import SLOWEST, limited
from .networks import GOLDEN, ROOT

NUMBERS = (
    *("nan", "inf", "-inf", "", "x", "1e400", "-1e400", "1" + "0" * 30, "-1" + "0" * 30, "0x10", "1 2", ",", "1,,2"),
    "9" * 5000,
)
LONG = ("9" * 5000, "a" * 5000)
NO_TEXTS = ("a\0b", "a\udcff")
NO_PATHS = ("", "\n", "a\x1b[31mb", "a" * 5000, *NO_TEXTS)
INPUTS = (
    *NO_PATHS,
    "missing",
    "missing.json",
    "pipe",
    "pipe.json",
    "loop",
    "loop.npy",
    "/dev/null",
    "http://x.invalid/y",
)
OUTPUTS = (*NO_PATHS, "first.png/v", "loop/v", "pipe", "pipe.json", "/proc/v", "s3://x/y", "first.png", "/dev/null")
LISTS = {
    "AXES": ("", "x", "data", "data=", "data=0", "data=-2", "data=1e3", "data=1,data=1", "data=1" + "0" * 30, "*=1"),
    "KIND": ("", "x", "fixed:", "fixed:0", "fixed:-1", "fixed:nan", "fixed:1e30", "teacache:nan", "magcache:inf"),
    "K": ("", "x", "0", "-1", "nan", "1e400", "1" + "0" * 30),
    "LIST": (*NUMBERS, "0", "0.5,0.9", "1,1", "2,1", "1,0.5,nan"),
    "FRAME=FILE": (
        *("", "x", "=", "0=", "=first.png", "nan%=first.png", "infs=first.png", "1e400s=first.png", "-1=first.png"),
        *("9999=first.png", "2=missing", "2=pipe", "2=loop", "0=first.png"),
    ),
    "FILE[:STRENGTH]": (
        *INPUTS,
        "first.png",
        *(f"lora.safetensors:{x}" for x in ("", "nan", "x", "1e400", "1e308", "-2000")),
    ),
    "NAME": (*NO_PATHS, "x", "../lightning4", "missing.json", "pipe.json", "loop.json", "missing.py"),
    "NAME=VALUE": ("", "x", "=", "difference=", "difference=nan", "difference=x", "nothing=1"),
    "NAME=SHARE": ("", "x", "=", "difference=nan", "difference=2", "difference=0", "difference=-1", "nothing=0.5"),
    "N,N,..": (*NUMBERS, "0", "-4", "80", "1,1,nan"),
    "X,X,..": (*NUMBERS, "0", "-1", "1,inf"),
    "TEXT": (),
    "FIRST:STOP": ("", "x", ":", "1", "1:", "2:1", "-1:1", "0:99", "nan:1"),
    "ADDRESS": ("", "\n", "1.2.3.4"),
    "SIZES": ("x", ",", "0x10", "16x0", "99999x99999", "17x17", "1e3x16"),
    "HOST:PORT": ("", "x", "x:", ":1", "localhost:0x10"),
    "TOPOLOGY": ("", "x", "v6e", "v6e:", "v6e:2x", "h100:0", "h100:nan"),
}
VALUES = {name: (*values, *LONG, *NO_TEXTS) if values else NO_TEXTS for name, values in LISTS.items()}
"""What flags do not take, by what their value is called."""
WRITTEN = (
    "--output",
    "--out",
    "--save-latents",
    "--sheet",
    "--scores",
    "--workdir",
    "target",
    "--compile-cache",
    "--data",
)
"""Flags that name what is written."""
FREE = ("extend_model", "help", "version")
"""Flags that take any words."""
TAKEN = {
    ("select", "--sheet", "first.png"),  # which is replaced
    *((command, "--extend-prompt", "http://x.invalid/y") for command in ("sample", "serve", "app")),
    *((command, "--warm", "") for command in ("serve", "app")),
    *((command, "--caption-encoding", "") for command in ("select", "train")),
    *(
        (command, "--compile-cache", "/proc/v") for command in ("sample", "decode", "calibrate", "plan", "serve", "app")
    ),  # a line says so later
}
"""Of them: those that a command takes."""
CHECKPOINT = ("--checkpoint", str(GOLDEN))
SAMPLE = (
    *(*CHECKPOINT, "--first-frame", "first.png", "--last-frame", "last.png", "--prompt", "a cat", "--dtype", "float32"),
    *("--height", "32", "--width", "48", "--frames", "9", "--steps", "4", "--compile-cache", "off"),
)
SERVE = (
    *(*CHECKPOINT, "--dtype", "float32", "--height", "32", "--width", "48", "--frames", "9", "--steps", "4"),
    *("--compile-cache", "off"),
)
WORK = {
    "sample": ("wanjax.sampling.pipeline.Pipeline.__call__",),
    "decode": ("wanjax.sampling.decoding.decode_video",),
    "train": ("wanjax.commands.train.open_state",),
    "convert": ("wanjax.weights.save._Writer.write",),
    "quantize": ("wanjax.weights.load.Checkpoint.load",),
    "calibrate": ("wanjax.sampling.calibrate.measure",),
    "cache": ("wanjax.training.latent_cache.encode_all",),
    "select": ("wanjax.selection.select.score_all",),
    **dict.fromkeys(("serve", "app"), ("wanjax.commands.serve.listen",)),
    "demo": ("wanjax.sampling.pipeline.Pipeline.__call__", "wanjax.demo.publish.replace"),
    **dict.fromkeys(("plan", "report"), ("wanjax.report.memory.training", "wanjax.report.memory.sampling")),
}
"""Where each command's work begins."""
GOOD = {
    "sample": (*SAMPLE, "--output", "v.mp4"),
    "decode": ("latents.npy", *CHECKPOINT, "--compile-cache", "off"),
    "train": ("--config", "train.py", "--workdir", "run"),
    "convert": (str(GOLDEN), "converted", "--layout", "official", "--no-pth"),
    "quantize": (*CHECKPOINT, "--output", "quantized", "--format", "int8"),
    "calibrate": (*SAMPLE, "--output", "c.json"),
    "cache": ("--config", "train.py", "--out", "cached"),
    "select": ("clips",),
    **{name: (*SERVE, "--data", "server", "--port", "0") for name in ("serve", "app")},
    "demo": ("--output", "v.mp4"),
    "plan": ("--config", "train.py", "--mesh", "fsdp=2"),
    "report": ("--config", "train.py", "--mesh", "fsdp=2"),
}
"""A command line that each takes."""
TRAIN = """
import dataclasses, runpy
from wanjax.config import ShapesData
tiny = runpy.run_path({tiny!r})["get_config"]
def get_config():
    data = ShapesData("all", 0, 4)
    return dataclasses.replace(tiny(), checkpoint={golden!r}, dit=None, data=data, height=32, width=32, batch=1)
from wanjax.weights import Checkpoint
NETWORK = Checkpoint({golden!r}).config("dit")
"""


class Accepted(BaseException):
    """A command came to its work."""


def begin(*args: object, **options: object) -> None:
    """In place of the work."""
    raise Accepted


def lines() -> Iterator[tuple[str, str, str]]:
    """Command, flag and a value that it does not take."""
    for name in GOOD:
        for action in commands.module(name).make_parser()._actions:
            if (
                action.nargs == 0
                or action.dest in FREE
                or isinstance(action, (argparse._HelpAction, argparse.BooleanOptionalAction))
            ):
                continue
            flag = action.option_strings[-1] if action.option_strings else action.dest
            for value in not_taken(action, flag):
                if (name, flag, value) not in TAKEN:
                    yield name, flag, value


def not_taken(action: argparse.Action, flag: str) -> tuple[str, ...]:
    """Values that a flag must refuse."""
    if action.choices is not None:
        return ("", "x", "a\0b")
    if flag in WRITTEN:
        return OUTPUTS
    if isinstance(action.metavar, str) and action.metavar in VALUES:
        return VALUES[action.metavar]
    is_number = action.metavar in ("N", "X", "I", "BITS", "SECONDS") or action.type in (number, whole_number)
    return NUMBERS if is_number else INPUTS


def argv_with(name: str, flag: str, value: str) -> list[str]:
    """A command's good line, with another value of one flag or of a positional."""
    positions = {"source": 0, "target": 1, "latents": 0, "input": 0}
    if flag.startswith("-"):
        return [*GOOD[name], f"{flag}={value}"]
    argv = list(GOOD[name])
    argv[positions[flag]] = value
    return argv


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[None]:
    """A folder with the files that the good command lines name, as current one; no network."""
    for name in ("first.png", "last.png"):
        PIL.Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(folder / name)
    media.save_array(folder / "latents.npy", np.zeros((1, 16, 2, 4, 6), np.float32))
    networks.diffusers_lora(folder).rename(folder / "lora.safetensors")
    (folder / "clips").mkdir()
    for name in ("a", "b"):
        media.write_video(folder / f"clips/{name}.mp4", np.zeros((9, 32, 48, 3), np.uint8), 16)
        (folder / f"clips/{name}.txt").write_text("grey")
    (folder / "train.py").write_text(TRAIN.format(tiny=str(ROOT / "configs/train_tiny.py"), golden=str(GOLDEN)))
    for name in ("pipe", "pipe.json"):
        os.mkfifo(folder / name)
    for name in ("loop", "loop.npy", "loop.json"):
        (folder / name).symlink_to(name)
    variables = {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder), "WANJAX_COMPILE_CACHE": "off"}
    installed = mock.patch("wanjax.commands.serve.check_installed")  # the page is not reached
    with mock.patch.dict(os.environ, variables), contextlib.chdir(folder), installed:
        yield


def try_line(name: str, argv: Sequence[str]) -> str:
    """What became of a command line: "refused", or what else in words."""
    out, err, start = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.ExitStack() as stack:
        for place in WORK[name]:
            stack.enter_context(mock.patch(place, begin))
        stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # a server sets its own
        stack.enter_context(limited())
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            commands.main([name, *argv])
            return "accepted: it is done"
        except Accepted:
            return "accepted"
        except SystemExit as end:
            code = end.code
        except BaseException:
            return traceback.format_exc(limit=-4)
    if time.process_time() - start > SLOWEST:
        return f"{time.process_time() - start:.0f} s"
    return "refused" if code == 2 and is_line(err.getvalue()) else f"exit code {code}: {err.getvalue()!r}"


def is_line(text: str) -> bool:
    """Whether it is one line of an error, in parts: what was given, what is accepted, what to do."""
    line = text.removesuffix("\n")
    return line.startswith("error: ") and line.isprintable() and ";" in line
