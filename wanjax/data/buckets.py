"""Batches of clips of one shape: which clip is which sample, and what stands in for clips that cannot be used.

    groups = group(clips)                              # opens every file once, to see its shape
    order = Order(groups.buckets, size=8, seed=0)      # of clips: batch k is order[8 k] .. order[8 k + 7]
    clip = Usable(clips, groups.buckets)[order[k]]     # sample k, the same after resuming and on any host

The position in the data is one number, the batches taken so far.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from wanjax.data.clip import Clip, Clips, UnusableClip
from wanjax.errors import InputError

logger = logging.getLogger(__name__)

Shape = tuple[int, int, int]  # frames, height, width
MOST_IN_A_PASS = 2**25
"""Clips in a pass over the data, each counted as often as it repeats; the order of a pass is in memory."""
_NEAR = 0.15
"""By how much of its share a bucket may come more or less often than another."""
_MOST_PASSES = 256
"""Over the data in an epoch."""
_TOGETHER = 16  # clips that a thread asks for at a time: sets that need no files may be very large


class Groups(NamedTuple):
    """A set's clips by shape.

    buckets: shape -> indices of its clips, ascending.
    unusable: name -> reason, of the clips in no bucket.
    """

    buckets: dict[Shape, np.ndarray]
    unusable: dict[str, str]


def group(clips: Clips, threads: int = 8, progress: bool = False) -> Groups:
    """Sorts a set by shape.

    Args:
      clips: of which `shape` is asked for every clip.
      threads: to ask in; the answer is the same for any number.
      progress: show a bar.

    Raises:
      InputError: no clip is usable.
      OSError: the disk fails: that is no reason to leave out a clip, other hosts would not.
    """

    def ask(indices: range) -> list[Shape | UnusableClip]:
        return [_shape(clips, index) for index in indices]

    every = range(len(clips))
    parts = [every[start : start + _TOGETHER] for start in every[::_TOGETHER]]
    answers: list[Shape | UnusableClip] = []
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(clips), desc="probing", disable=not progress) as bar:
        for part in pool.map(ask, parts):
            answers += part
            bar.update(len(part))
    found: dict[Shape, list[int]] = {}
    unusable: dict[str, str] = {}
    unusable |= getattr(clips, "left_out", {})
    for index, answer in enumerate(answers):
        if isinstance(answer, UnusableClip):
            unusable[answer.name] = answer.reason
        else:
            found.setdefault(answer, []).append(index)
    if not found:
        raise InputError(
            f"{describe_unusable(unusable, total(clips))}; accepted: at least one usable clip; see to the files"
        )
    return Groups({shape: np.array(found[shape]) for shape in sorted(found)}, unusable)


def total(clips: Clips) -> int:
    """Clips of a set, and files in its place that are none."""
    return len(clips) + len(getattr(clips, "left_out", {}))


def _shape(clips: Clips, index: int) -> Shape | UnusableClip:
    try:
        return clips.shape(index)
    except UnusableClip as error:
        return error


def describe_unusable(unusable: Mapping[str, str], total: int) -> str:
    """One line: how many clips of how many are left out, the commonest reasons, and a name for each."""
    reasons = Counter(unusable.values()).most_common(3)
    first = {reason: next(name for name, why in unusable.items() if why == reason) for reason, _ in reasons}
    parts = [f"{count} x {reason} ({first[reason]}{', ..' if count > 1 else ''})" for reason, count in reasons]
    return f"{len(unusable)} of {total} clips cannot be used" + (": " if parts else "") + "; ".join(parts)


class Order:
    """Which clip is sample `k`, for every k from 0 on, without end: each batch from one bucket, all of it shuffled.

    A bucket gives batches in proportion to its clips, each counted as often as it repeats. For that, an epoch is as
    many passes over the data as it takes for the small buckets to fill whole batches. Every clip of a bucket is seen as
    often as it repeats before any is seen again.

    Attributes:
      batches: in an epoch.
      passes: over the data in an epoch, about.

    Args:
      buckets: shape -> indices of its clips.
      size: samples in a batch, over all hosts.
      seed: not negative.
      repeats: how often a clip comes in a pass, by its index; None: once.

    Raises:
      InputError: a pass is longer than `MOST_IN_A_PASS`.
    """

    def __init__(
        self, buckets: Mapping[Shape, np.ndarray], size: int, seed: int = 0, repeats: np.ndarray | None = None
    ):
        self.size = size
        self.shapes = list(buckets)
        if repeats is not None and (length := sum(repeats[clips].sum() for clips in buckets.values())) > MOST_IN_A_PASS:
            raise InputError(
                f"a pass of {length:,} clips, each counted as often as it repeats; up to {MOST_IN_A_PASS:,} are "
                "accepted; let clips repeat less often, or give shares that differ less"
            )
        self._members = [
            buckets[shape] if repeats is None else np.repeat(buckets[shape], repeats[buckets[shape]])
            for shape in self.shapes
        ]
        lengths = np.array([len(members) for members in self._members])
        self.passes = _passes(lengths / size)
        counts = _batches(lengths / size, self.passes)
        self._ends = np.cumsum(counts)
        self.batches = int(self._ends[-1])
        self._seed = seed
        self._shuffles: dict[tuple[int, int], np.ndarray] = {}  # those in use, by what is shuffled and epoch

    def __getitem__(self, sample: int) -> int:
        """Index of the clip that is sample `sample`."""
        bucket, epoch, at = self._place(sample)
        members = self._members[bucket]
        return int(members[self._shuffle(bucket + 1, epoch, len(members))[at]])

    def times(self, sample: int) -> int:
        """How many times all clips of its bucket came before sample `sample`."""
        return self._place(sample)[1]

    def shape(self, batch: int) -> Shape:
        """Frames, height and width of the clips in batch `batch`."""
        return self.shapes[self._find(batch)[0]]

    def first_batches(self) -> dict[Shape, int]:
        """By shape, the first batch that has it."""
        found: dict[Shape, int] = {}
        for batch in range(self.batches):  # an epoch has all of them
            found.setdefault(self.shape(batch), batch)
            if len(found) == len(self.shapes):
                break
        return found

    def _place(self, sample: int) -> tuple[int, int, int]:
        """The bucket of a sample, how often the bucket was gone through before, and the place in its order now."""
        batch, place = divmod(int(sample), self.size)
        bucket, number = self._find(batch)
        return bucket, *divmod(number * self.size + place, len(self._members[bucket]))

    def _find(self, batch: int) -> tuple[int, int]:
        """The bucket of a batch, and the batch's number among all that this bucket ever gives."""
        epoch, at = divmod(batch, self.batches)
        slot = int(self._shuffle(0, epoch, self.batches)[at])
        bucket = int(np.searchsorted(self._ends, slot, side="right"))
        start = int(self._ends[bucket - 1]) if bucket else 0
        count = int(self._ends[bucket]) - start
        return bucket, epoch * count + slot - start

    def _shuffle(self, what: int, epoch: int, count: int) -> np.ndarray:
        """The numbers below `count`, in the order of an epoch.

        Grain's shuffle needs no memory, but milliseconds for each number of a small set; this is ready after the first.
        """
        order = self._shuffles.get((what, epoch))
        if order is None:
            # Unlike a generator's permutation, NumPy promises these numbers to stay the same in every version.
            draws = np.random.SeedSequence((self._seed, what, epoch)).generate_state(count, np.uint64)
            order = np.argsort(draws, kind="stable")
            if len(self._shuffles) > 2 * len(self.shapes) + 2:
                self._shuffles = {}
            self._shuffles[what, epoch] = order
        return order


def _passes(shares: np.ndarray) -> int:
    """The fewest passes in which every bucket gets whole batches near its share, which is batches a pass `[n]`."""
    errors = {}
    for passes in range(1, _MOST_PASSES + 1):
        errors[passes] = float(abs(_batches(shares, passes) / (shares * passes) - 1).max())
        if errors[passes] <= _NEAR:
            return passes
    return min(errors, key=lambda passes: errors[passes])


def _batches(shares: np.ndarray, passes: int) -> np.ndarray:
    return np.maximum(1, np.round(shares * passes)).astype(int)


class Usable:
    """`Clips` in which the next usable one of the same bucket stands in for one that turns out to be unusable.

    Which one that is depends on the index alone, so not on what was read before, nor on which host.

    Attributes:
      skipped: name -> reason, of the clips that turned out to be unusable so far.

    Args:
      clips: that may raise `UnusableClip`.
      buckets: shape -> indices; only these may be asked for.
    """

    def __init__(self, clips: Clips, buckets: Mapping[Shape, np.ndarray]):
        self.clips = clips
        self.skipped: dict[str, str] = {}
        self._bucket = {int(index): members for members in buckets.values() for index in members}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:
        """Clip `index`, or what stands in for it.

        Raises:
          InputError: no clip of the bucket can be used.
        """
        members = self._bucket[index]
        first = int(np.searchsorted(members, index))
        for candidate in np.roll(members, -first):
            try:
                return self.clips[int(candidate)]
            except UnusableClip as error:
                if error.name not in self.skipped:
                    logger.warning("left out: %s", error)
                self.skipped[error.name] = error.reason
        raise InputError(
            f"none of {len(members)} clips of shape {self.clips.shape(index)} can be decoded; accepted: at least one; "
            "see to the files, or leave them out of the manifest"
        )

    def shape(self, index: int) -> Shape:
        """Frames, height and width of clip `index`, and of what stands in for it."""
        return self.clips.shape(index)
