"""The training state on disk, by Orbax: sharded, written in the background, whole or not at all.

A checkpoint is `WORKDIR/checkpoints/STEP`. It names every array by its path in the state, and knows nothing of meshes:
whatever devices and processes restore it read the parts that they need.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from wanjax.errors import InputError
from wanjax.training.state import TrainState


class TrainCheckpoints:
    """The checkpoints of a run. Every process makes one and calls its methods at the same steps.

    Args:
      workdir: folder that all processes see; made if it is not there.
      keep: how many of the newest stay.
    """

    def __init__(self, workdir: str | Path, keep: int = 2):
        self.path = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,  # of a run that was killed while it saved
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.path, item_handlers=handlers, options=options)

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
        self._manager.save(step, args=items, force=True)

    def restore(self, abstract: TrainState) -> tuple[TrainState, int]:
        """The newest checkpoint's state, without what is frozen, and data position, laid out as `abstract` says.

        Raises:
          InputError: it is of another network, or damaged.
        """
        step: Any = self.latest
        abstract = dataclasses.replace(abstract, frozen=None)
        wanted = _by_path(abstract)
        try:
            stored = self._manager.item_metadata(step)["state"]
            shapes = {} if stored is None else {name: tuple(leaf.shape) for name, leaf in stored.items()}
            self._check(shapes, wanted)  # first: Orbax would say it in pages
            items = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), data=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=items)
        except (ValueError, KeyError, OSError) as error:
            if isinstance(error, InputError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"checkpoint {self.path}/{step} cannot be read ({reason}); whole ones are accepted; delete this folder"
            ) from error
        state = jax.tree.unflatten(jax.tree.structure(abstract), [restored["state"][name] for name in wanted])
        return state, restored["data"]["position"]

    def _check(self, stored: dict[str, tuple[int, ...]], wanted: dict[str, Any]) -> None:
        for name in sorted(stored.keys() | wanted.keys()):
            ours = tuple(wanted[name].shape) if name in wanted else "missing"
            theirs = stored.get(name, "missing")
            if ours != theirs:
                raise InputError(
                    f"checkpoint {self.path}/{self.latest} is of another model: {name} is {theirs} there and {ours} "
                    "here; the same config is needed; give that, or another --workdir"
                )

    def wait(self) -> None:
        """Until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of threads."""
        self._manager.close()


def _by_path(state: TrainState) -> dict[str, Any]:
    """Every array that changes under its path, such as `model.blocks.ffn.fc_in.kernel`."""
    leaves = jax.tree_util.tree_flatten_with_path(dataclasses.replace(state, frozen=None))[0]
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): x for path, x in leaves}
