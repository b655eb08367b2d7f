"""Judges clips by their scores: which are kept, and what the command `wanjax select` writes of them."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from wanjax.cli import check_counts
from wanjax.data.clip import UnusableClip
from wanjax.data.decode import Damaged, decode
from wanjax.data.listing import list_clips
from wanjax.data.manifest import MANIFEST, Row, write_manifest
from wanjax.data.pictures import is_picture
from wanjax.data.videos import RATIOS, Videos
from wanjax.errors import InputError
from wanjax.files import check_apart, check_output
from wanjax.selection import SCORES
from wanjax.selection.contact_sheet import SHEET, Cell, Section, fit, write_sheet
from wanjax.selection.score_log import Record, ScoreLog
from wanjax.selection.scores import Distance, find_duplicates, require_packages, score

Limit = tuple[str, float]
_SHOWN = 30  # clips in each half of the contact sheet
_UNUSABLE = "unusable"


@dataclasses.dataclass(frozen=True)
class Criteria:
    """What a clip must be like to be kept; applied in this order.

    minimum, maximum: (score, least or largest value).
    duplicates: bits of 64 in which near duplicates may differ per frame compared; None: they are kept.
    top, bottom: (score, share): of the clips left by the above, those with the highest or lowest values. Several
      shares do not wait for each other: a clip must be among all of them.
    """

    minimum: Sequence[Limit] = ()
    maximum: Sequence[Limit] = ()
    duplicates: int | None = None
    top: Sequence[Limit] = ()
    bottom: Sequence[Limit] = ()

    def __post_init__(self):
        for name, share in (*self.top, *self.bottom):
            if not 0 < share <= 1:
                raise InputError(f"the share {share:g} of {name}; accepted: above 0, up to 1; change it")
        if self.duplicates is not None and not 0 <= self.duplicates <= 64:
            raise InputError(f"duplicates of {self.duplicates} bits; accepted: 0 to 64; 6 is usual")


class Reason(NamedTuple):
    """Why a clip is dropped: the criterion, and the clip's own value or what else there is to say of it."""

    criterion: str
    detail: str

    def __str__(self) -> str:
        return f"{self.criterion}: {self.detail}"


def judge(names: Sequence[str], scores: Sequence[Record], criteria: Criteria) -> list[Reason | None]:
    """Why each clip is dropped; None: it is kept.

    Args:
      names: of the clips.
      scores: of the clips; an unusable one has `unusable`, why.
      criteria: to apply.

    Raises:
      InputError: a criterion names a score that no clip has.
    """
    _check_names(scores, criteria)
    reasons = [Reason(_UNUSABLE, record[_UNUSABLE]) if _UNUSABLE in record else None for record in scores]
    for sign, word, limits in ((1, "below", criteria.minimum), (-1, "above", criteria.maximum)):
        for name, limit in limits:
            for i in _left(reasons):
                value = _value(scores[i], name)
                if not sign * value >= sign * limit:  # also where there is no value
                    reasons[i] = Reason(f"{name} {word} {limit:g}", f"{value:.4g}")
    if criteria.duplicates is not None:
        # The one with the most pixels is kept, of equals the first.
        preferred = sorted(_left(reasons), key=lambda i: -_value(scores[i], "height") * _value(scores[i], "width"))
        found = find_duplicates([scores[i]["fingerprint"] for i in preferred], criteria.duplicates)
        for place, original in found.items():
            reasons[preferred[place]] = Reason("near duplicate", names[preferred[original]])
    _apply_shares(scores, criteria, reasons)
    return reasons


def _apply_shares(scores: Sequence[Record], criteria: Criteria, reasons: list[Reason | None]) -> None:
    left = _left(reasons)
    for sign, word, shares in ((1, "top", criteria.top), (-1, "bottom", criteria.bottom)):
        for name, share in shares:
            values = {i: sign * _value(scores[i], name) for i in left}
            known = [value for value in values.values() if not math.isnan(value)]
            bound = np.quantile(known, 1 - share) if known else math.nan
            for i, value in values.items():
                if not value >= bound:
                    reasons[i] = reasons[i] or Reason(f"{name} not in the {word} {share:.0%}", f"{sign * value:.4g}")


def _value(record: Record, name: str) -> float:
    value = record.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _left(reasons: Sequence[Reason | None]) -> list[int]:
    return [i for i, reason in enumerate(reasons) if reason is None]


def _check_names(scores: Sequence[Record], criteria: Criteria) -> None:
    known = _numeric(scores)
    for name, _ in (*criteria.minimum, *criteria.maximum, *criteria.top, *criteria.bottom):
        if name not in known:
            raise InputError(
                f"no clip has the score {name!r}; accepted: {', '.join(known) or 'none, as no clip can be used'}; "
                "choose one of them"
            )


def _numeric(scores: Sequence[Record]) -> list[str]:
    """Names of the scores that are numbers."""
    return list(dict.fromkeys(name for record in scores for name in record if not math.isnan(_value(record, name))))


# ----------------------------------------------------------------------------------------------------------- scoring


def score_all(clips: Videos, log: ScoreLog, distance: Distance | None, threads: int) -> list[Record]:
    """Scores of all clips, read from the log where they are there, and put there where they are not."""

    def work(index: int) -> Record:
        try:
            height, width, seconds = clips.facts(index)
            video = clips[index].video
        except UnusableClip as error:
            return {_UNUSABLE: error.reason}
        facts = {"resolution": min(height, width), "height": height, "width": width, "seconds": round(seconds, 4)}
        extra = {} if distance is None else {"clip_difference": distance(video)}
        return score(video, clips.fps) | extra | facts

    missing = [i for i, row in enumerate(clips.rows) if log.get(row) is None]
    known = len(clips) - len(missing)
    with ThreadPoolExecutor(threads) as pool, tqdm(missing, "scoring", len(clips), initial=known, unit="clip") as bar:
        try:
            futures = {pool.submit(work, index): index for index in missing}
            for future in as_completed(futures):
                log.add(clips.rows[futures.pop(future)], future.result())
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [log.get(row) or {} for row in clips.rows]


# ----------------------------------------------------------------------------------------------------------- reports


def describe_selection(scores: Sequence[Record], reasons: Sequence[Reason | None]) -> str:
    """A table of the scores' distributions, and how many clips fell to which criterion."""
    lines = [f"{'score':18s}" + "".join(f"{head:>10s}" for head in ("least", "10%", "half", "90%", "most"))]
    for name in _numeric(scores):
        values = [record[name] for record in scores if isinstance(record.get(name), (int, float))]
        lines.append(f"{name:18s}" + "".join(f"{x:10.4g}" for x in np.quantile(values, (0, 0.1, 0.5, 0.9, 1))))
    lines.append(f"{len(_left(reasons))} of {len(reasons)} clips kept")
    for criterion, count in Counter(reason.criterion for reason in reasons if reason).most_common():
        lines.append(f"  {count} dropped: {criterion}")
    return "\n".join(lines)


def draw_sheet(
    path: Path, clips: Videos, scores: Sequence[Record], reasons: Sequence[Reason | None], named: Sequence[str]
) -> None:
    """Writes the contact sheet: some of the kept clips with the scores named, some of the dropped with the reason."""

    def cell(index: int) -> Cell:
        known = (f"{name} {_value(scores[index], name):.3g}" for name in named)
        return Cell(_end_frames(clips, index), (clips.rows[index].name, str(reasons[index] or "  ".join(known))))

    dropped = [i for i, reason in enumerate(reasons) if reason]
    sections = []
    with ThreadPoolExecutor() as pool:
        for title, members in (("kept", _left(reasons)), ("dropped", dropped)):
            places = np.linspace(0, len(members) - 1, min(_SHOWN, len(members))).astype(int)  # all different
            some = f", {len(places)} of them" if len(places) < len(members) else ""
            cells = list(pool.map(cell, (members[place] for place in places)))
            sections.append(Section(f"{title}: {len(members)}{some}", cells))
    write_sheet(path, sections)


def _end_frames(clips: Videos, index: int) -> tuple[np.ndarray, np.ndarray] | None:
    start = clips.rows[index].start
    try:
        facts, (frames, _, _) = clips.facts(index), clips.shape(index)
        size = fit(facts.height, facts.width)
        first, last = decode(clips.rows[index].path, [start, start + (frames - 1) / clips.fps], *size)
    except (UnusableClip, Damaged):
        return None
    return first, last


# ------------------------------------------------------------------------------------------------------ command line


def select(args: argparse.Namespace) -> None:
    """The command, its arguments parsed.

    Raises:
      InputError: an argument or the input is wrong, or no clip is left.
    """
    check_counts(threads=args.threads)
    criteria = Criteria(args.min, args.max, args.duplicates, args.top, args.bottom)
    place = args.input if args.input.is_dir() else args.input.parent
    out = check_output(args.out or place / "selected.jsonl", MANIFEST)
    sheet = check_output(args.sheet or out.with_suffix(".png"), SHEET)
    log_path = args.scores or place / f"{'' if args.input.is_dir() else args.input.stem}.scores.jsonl"
    inputs = {} if args.input.is_dir() else {"the input": args.input}
    check_apart({"--out": out, "--sheet": sheet, "--scores": log_path}, inputs)
    require_packages()
    _use_one_core_each()
    listing = list_clips(args.input, args.caption_encoding)
    rows = [row for row in listing.rows if not is_picture(row.path)]
    for name in (*listing.left_out, *(row.name for row in listing.rows if is_picture(row.path))):
        print(f"left out: {name}: {listing.left_out.get(name, 'a picture')}")
    _check_names([dict.fromkeys(SCORES, 0.0), *(dict(_numbers(row)) for row in rows)], criteria)  # before hours of work
    # A caption can still be written when a clip has been kept.
    clips = Videos(
        [dataclasses.replace(row, caption="") for row in rows],
        args.frames,
        args.area,
        args.fps,
        args.lengths,
        args.ratios or RATIOS,
    )
    way = f"{args.frames} frames, {args.area} pixels, {args.fps:g} fps"
    way += "".join(
        f", {what}" for what in (args.lengths, args.ratios, args.clip and os.path.realpath(args.clip)) if what
    )
    log = ScoreLog(log_path, way)
    scores = score_all(clips, log, Distance(args.clip) if args.clip else None, args.threads)
    scores = [{**_numbers(row), **record} for row, record in zip(rows, scores, strict=True)]
    reasons = judge([row.name for row in rows], scores, criteria)
    print(describe_selection(scores, reasons))
    kept = [dataclasses.replace(rows[i], columns={**rows[i].columns, **scores[i]}) for i in _left(reasons)]
    write_manifest(out, kept)
    named = list(dict.fromkeys(name for name, _ in (*args.min, *args.max, *args.top, *args.bottom)))
    draw_sheet(sheet, clips, scores, reasons, named or ["difference", "motion", "sharpness"])
    print(f"{out}\n{sheet}")


def _use_one_core_each() -> None:
    """Clips are scored side by side already, and no score is to depend on how OpenCV splits its work among threads."""
    import cv2

    cv2.setNumThreads(1)


def _numbers(row: Row) -> Mapping[str, float]:
    return {name: value for name, value in row.columns.items() if isinstance(value, (int, float))}
