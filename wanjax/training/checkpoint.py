"""The training state on disk, by Orbax: sharded, written in the background, whole or not at all.

A checkpoint is `WORKDIR/checkpoints/STEP`. It names every array by its path in the state, and knows nothing of meshes:
whatever devices and processes restore it read the parts that they need. It is trusted only when it is whole, see
`wanjax.training.whole`: a damaged one is named, put into `WORKDIR/set_aside`, and the one before it is taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sharding.distributed import is_main
from wanjax.errors import InputError, one_line
from wanjax.training.state import TrainState
from wanjax.training.whole import damage, write_checksums


class UnreadableError(InputError):
    """A checkpoint is damaged: the one before it may not be."""


class UnwritableError(InputError):
    """A checkpoint cannot be written: the disk is full, or fails."""


class TrainCheckpoints:
    """The checkpoints of a run. Every process makes one and calls its methods at the same steps.

    Args:
      workdir: folder that all processes see; made if it is not there.
      keep: how many of the newest stay.
    """

    def __init__(self, workdir: str | Path, keep: int = 2):
        self.path, self._keep, self._saving = Path(workdir).absolute() / "checkpoints", keep, -1

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Made when it is needed: it fails where there are damaged checkpoints, which are put aside before."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
            cleanup_tmp_directories=True,  # of a run that was killed while it saved
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.path, item_handlers=handlers, options=options)

    def _write_checksums(self) -> None:
        """Called in the background, when all processes' files are there and before the checkpoint gets its name."""
        if is_main():
            (folder,) = self.path.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            write_checksums(folder)

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: int) -> None:
        """Begin to save; returns as soon as the arrays may change again.

        Args:
          state: of the run; what is frozen of it is left out.
          position: batches taken from the data.
        """
        step = int(state.step)
        if step == self.latest:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_by_path(state)), data=ocp.args.JsonSave({"position": position})
        )
        with self._written():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=items, force=True)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Says in one line why a checkpoint cannot be written; Orbax does so in pages, of whatever kind.

        Raises:
          UnwritableError: in place of that.
        """
        try:
            yield
        except Exception as error:
            raise UnwritableError(
                f"checkpoint {self.path}/{self._saving} cannot be written ({one_line(error)[-300:]}); room and rights "
                "are needed there; make them, and the same command goes on from the checkpoint before"
            ) from error

    def resume(self, abstract: TrainState, resume_from: int | None = None) -> tuple[TrainState, int] | None:
        """The newest whole checkpoint, as `restore` gives it; None: there is none yet. Tells which it passes over.

        Args:
          abstract: as `restore` takes it.
          resume_from: the step to go on from; later ones are put aside. One without checksums is taken as it is.

        Raises:
          InputError: none of those that are there is whole, or the one that is asked for is not; or as `restore`.
        """
        steps = self._steps()
        if resume_from is not None and resume_from not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise InputError(
                f"--resume-from {resume_from}, which is not in {self.path}; there are: {there}; choose one"
            )
        for step in steps:
            why = "a later one than --resume-from" if step > (resume_from or step) else self._damage(step)
            if why == "it has no checksums" and step == resume_from:
                why = None
            if why is None:
                try:
                    return self.restore(abstract, step)
                except UnreadableError as error:
                    why = str(error)
            if step == resume_from:
                raise InputError(f"--resume-from {step}: {self.path}/{step} is damaged ({why}); give another step")
            self._put_aside(step, why)
        if steps:
            raise InputError(
                f"checkpoints in {self.path} cannot be read, none of them is whole; they are in {self._aside} now; a "
                "whole one is needed to go on; bring one back, or give another --workdir to begin anew"
            )
        return None

    def _steps(self) -> list[int]:
        """Of all checkpoints that have their name, newest first."""
        if not self.path.is_dir():
            return []
        return sorted((int(path.name) for path in self.path.iterdir() if path.name.isdecimal()), reverse=True)

    def _damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint; the processes share the work, and all come to the same answer."""
        why = damage(self.path / str(step), (jax.process_index(), jax.process_count()))
        if jax.process_count() > 1:
            found = multihost_utils.process_allgather(np.int32(why is not None))
            why = why or (f"process {int(np.argmax(found))} says why" if np.any(found) else None)
        return why

    @property
    def _aside(self) -> Path:
        return self.path.parent / "set_aside"

    def _put_aside(self, step: int, why: str) -> None:
        """Out of the way of the run that goes on from an earlier step; nothing is deleted."""
        if is_main():
            place = self._aside / f"{step}-{secrets.token_hex(2)}"
            print(
                one_line(f"checkpoint {self.path}/{step} is not taken ({why}); it is in {place} now"), file=sys.stderr
            )
            place.parent.mkdir(exist_ok=True)
            (self.path / str(step)).rename(place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"put aside {step}")
        if "_manager" in self.__dict__:
            self._manager.reload()

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, int]:
        """A checkpoint's state, without what is frozen, and data position, laid out as `abstract` says.

        Args:
          abstract: shapes, dtypes and shardings.
          step: which; None: the newest.

        Raises:
          InputError: it is of another network, or damaged.
        """
        step = (self.latest or 0) if step is None else step
        abstract = dataclasses.replace(abstract, frozen=None)
        wanted = _by_path(abstract)
        try:
            stored = self._manager.item_metadata(step)["state"]
            shapes = {} if stored is None else {name: tuple(leaf.shape) for name, leaf in stored.items()}
            self._check(step, shapes, wanted)  # first: Orbax would say it in pages
            items = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), data=ocp.args.JsonRestore())
            restored: Any = self._manager.restore(step, args=items)
            position = restored["data"]["position"]
            if type(position) is not int or position < 0:
                raise ValueError(f"position {position!r}")
        except InputError:
            raise
        except Exception as error:  # what Orbax and its storage make of damage has no common base
            reason = " ".join(str(error).split())[:200]
            raise UnreadableError(
                f"checkpoint {self.path}/{step} cannot be read ({reason}); whole ones are accepted; delete this folder"
            ) from error
        state = jax.tree.unflatten(jax.tree.structure(abstract), [restored["state"][name] for name in wanted])
        return state, position

    def _check(self, step: int, stored: dict[str, tuple[int, ...]], wanted: dict[str, Any]) -> None:
        for name in sorted(stored.keys() | wanted.keys()):
            ours = tuple(wanted[name].shape) if name in wanted else "missing"
            theirs = stored.get(name, "missing")
            if ours != theirs:
                raise InputError(
                    f"checkpoint {self.path}/{step} is of another model: {name} is {theirs} there and {ours} "
                    "here; the same config is needed; give that, or another --workdir"
                )

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
          UnwritableError: something cannot be written.
        """
        with self._written():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of threads."""
        self._manager.close()


def _by_path(state: TrainState) -> dict[str, Any]:
    """Every array that changes under its path, such as `model.blocks.ffn.fc_in.kernel`."""
    leaves = jax.tree_util.tree_flatten_with_path(dataclasses.replace(state, frozen=None))[0]
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): x for path, x in leaves}
