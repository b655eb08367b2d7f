"""Jobs in one SQLite file: what was accepted is there after any end of the process, and is done once.

    jobs = Jobs(folder)                     # jobs that ran when the process was killed wait again
    job, is_new = jobs.add(order)           # on disk when this returns
    job = jobs.take()                       # the longest waiting one; None: there is none
    jobs.finish(job.id, timings)            # after its video is on disk

A job is queued -> running -> completed, failed or cancelled. Its video is `jobs.video(id)`, put there whole. A process
that is killed between that and `finish` leaves a running job with a video: the next start takes it as completed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from wanjax.errors import InputError
from wanjax.files import remove_all_leftovers

State = Literal["queued", "running", "completed", "failed", "cancelled"]
OVER = ("completed", "failed", "cancelled")
MOST_RUNS = 5
"""A job that the process was killed in so often is not tried again: it may be the reason."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, key TEXT UNIQUE, state TEXT NOT NULL,
  created REAL NOT NULL, started REAL, finished REAL, runs INTEGER NOT NULL DEFAULT 0,
  settings TEXT NOT NULL, loras TEXT NOT NULL, extend_prompt INTEGER NOT NULL, error TEXT,
  notes TEXT NOT NULL DEFAULT '[]', timings TEXT NOT NULL DEFAULT '{}');
CREATE INDEX IF NOT EXISTS by_state ON jobs (state, number);
CREATE TABLE IF NOT EXISTS pictures (job TEXT NOT NULL, place TEXT NOT NULL, data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS by_job ON pictures (job);
"""


@dataclasses.dataclass(frozen=True)
class Order:
    """What is asked for, checked.

    settings: fields of `SampleConfig` by name, without pictures; plain values.
    pictures: files' bytes by "first", "last" or the place of a keyframe.
    loras: adapters as `--lora` takes them.
    extend_prompt: whether a language model is asked to write the prompt out.
    key: the client's own name for it; a second order of the same name is the first one.
    """

    settings: dict[str, Any]
    pictures: tuple[tuple[str, bytes], ...] = ()
    loras: tuple[str, ...] = ()
    extend_prompt: bool = False
    key: str | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """An accepted order: times are seconds since 1970, `runs` counts how often it was begun."""

    number: int
    id: str
    key: str | None
    state: State
    created: float
    started: float | None
    finished: float | None
    runs: int
    settings: dict[str, Any]
    loras: tuple[str, ...]
    extend_prompt: bool
    error: str | None
    notes: tuple[str, ...]
    timings: dict[str, float]


class FullError(Exception):
    """As many jobs wait as may."""


class Jobs:
    """The jobs of a folder; all threads may use it.

    Args:
      folder: of `jobs.sqlite` and the videos; this process's alone, see `wanjax.files.hold`.
      most_waiting: orders that may wait.

    Raises:
      InputError: the file is none of SQLite's.
    """

    def __init__(self, folder: str | Path, most_waiting: int = 100):
        self.folder, self.most_waiting = Path(folder), most_waiting
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock, self.changed = threading.RLock(), threading.Condition()
        path = self.folder / "jobs.sqlite"
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + SCHEMA)
        except sqlite3.DatabaseError as error:
            with contextlib.suppress(AttributeError):  # it was not even opened
                self._db.close()
            raise InputError(f"{path} cannot be read ({error}); one of wanjax serve is needed; move it away") from error
        self._recover()

    def _recover(self) -> None:
        """What a killed process left: running jobs are completed if their video is there, else they wait again."""
        remove_all_leftovers(self.folder)
        with self._transaction() as db:
            for row in db.execute("SELECT id, runs FROM jobs WHERE state = 'running'").fetchall():
                if self.video(row["id"]).exists():
                    self._end(row["id"], "completed")
                elif row["runs"] >= MOST_RUNS:
                    self._end(row["id"], "failed", f"the server ended {MOST_RUNS} times while it ran; it is left alone")
                else:
                    db.execute("UPDATE jobs SET state = 'queued' WHERE id = ?", (row["id"],))
        for path in self.folder.glob("video_*.mp4"):
            if self.get(path.stem) is None:  # deleted, but for the file
                path.unlink()

    def add(self, order: Order) -> tuple[Job, bool]:
        """The job of an order, on disk, and whether it is new.

        Raises:
          FullError: see there.
        """
        with self._transaction() as db:
            if order.key is not None:
                found = db.execute("SELECT * FROM jobs WHERE key = ?", (order.key,)).fetchone()
                if found is not None:
                    return _job(found), False
            if self.count("queued") >= self.most_waiting:
                raise FullError
            id = f"video_{secrets.token_hex(12)}"
            db.execute(
                "INSERT INTO jobs (id, key, state, created, settings, loras, extend_prompt) "
                "VALUES (?, ?, 'queued', ?, ?, ?, ?)",
                (id, order.key, time.time(), json.dumps(order.settings), json.dumps(order.loras), order.extend_prompt),
            )
            db.executemany("INSERT INTO pictures VALUES (?, ?, ?)", [(id, *picture) for picture in order.pictures])
            job = self.get(id)
        assert job is not None
        self.notify()
        return job, True

    def take(self) -> Job | None:
        """The job that waits longest, now running; None: none waits."""
        with self._transaction() as db:
            row = db.execute(
                "UPDATE jobs SET state = 'running', started = ?, runs = runs + 1 WHERE number = "
                "(SELECT min(number) FROM jobs WHERE state = 'queued') RETURNING *",
                (time.time(),),
            ).fetchone()
        return row and _job(row)

    def finish(self, id: str, timings: dict[str, float]) -> None:
        """The job's video is there."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET timings = ? WHERE id = ?", (json.dumps(timings), id))
            self._end(id, "completed")
        self.notify()

    def fail(self, id: str, error: str) -> None:
        """The job cannot be done; why."""
        with self._transaction():
            self._end(id, "failed", error)
        self.notify()

    def cancel(self, id: str, state: Literal["queued", "running"], timings: dict[str, float] | None = None) -> bool:
        """End a job that is not over; whether it was in that state."""
        with self._transaction() as db:
            row = db.execute("SELECT id FROM jobs WHERE id = ? AND state = ?", (id, state)).fetchone()
            if row is not None:
                db.execute("UPDATE jobs SET timings = ? WHERE id = ?", (json.dumps(timings or {}), id))
                self._end(id, "cancelled")
        self.notify()
        return row is not None

    def put_back(self, id: str) -> None:
        """A running job waits again, in its place."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET state = 'queued', runs = runs - 1 WHERE id = ? AND state = 'running'", (id,))
        self.notify()

    def _end(self, id: str, state: str, error: str | None = None) -> None:
        """Its pictures are no longer needed."""
        self._db.execute(
            "UPDATE jobs SET state = ?, finished = ?, error = ? WHERE id = ?", (state, time.time(), error, id)
        )
        self._db.execute("DELETE FROM pictures WHERE job = ?", (id,))

    def describe(self, id: str, settings: dict[str, Any], notes: tuple[str, ...]) -> None:
        """What became of its settings, as far as they were left open, and lines that the user should read."""
        with self._transaction() as db:
            values = (json.dumps(settings), json.dumps(notes), id)
            db.execute("UPDATE jobs SET settings = ?, notes = ?, extend_prompt = 0 WHERE id = ?", values)
        self.notify()

    def delete(self, id: str) -> None:
        """Forget a job that is over, and its video."""
        with self._transaction() as db:
            db.execute("DELETE FROM jobs WHERE id = ?", (id,))
        self.video(id).unlink(missing_ok=True)
        self.notify()

    def prune(self, most: int) -> None:
        """Forget the oldest jobs that are over, but for so many."""
        with self._lock:
            rows = self._db.execute(
                f"SELECT id FROM jobs WHERE state IN {OVER} ORDER BY number DESC LIMIT -1 OFFSET ?", (most,)
            ).fetchall()
        for row in rows:
            self.delete(row["id"])

    def get(self, id: str) -> Job | None:
        """A job by its id; None: there is none."""
        with self._lock:
            row = self._db.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
        return row and _job(row)

    def list(self, limit: int, after: str | None = None, newest_first: bool = True, states: tuple = ()) -> list[Job]:
        """Jobs in their order, those behind `after`."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        of_states = f"AND state IN ({', '.join('?' * len(states))})" if states else ""
        start = f"AND number {sign} (SELECT number FROM jobs WHERE id = ?)" if after else ""
        query = f"SELECT * FROM jobs WHERE 1 {of_states} {start} ORDER BY number {order} LIMIT ?"
        with self._lock:
            rows = self._db.execute(query, (*states, *([after] if after else []), limit)).fetchall()
        return [_job(row) for row in rows]

    def count(self, state: State) -> int:
        """How many are in a state."""
        with self._lock:
            return self._db.execute("SELECT count(*) FROM jobs WHERE state = ?", (state,)).fetchone()[0]

    def ahead(self, job: Job) -> int:
        """How many come before a waiting one."""
        with self._lock:
            query = "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running') AND number < ?"
            return self._db.execute(query, (job.number,)).fetchone()[0]

    def pictures(self, id: str) -> tuple[tuple[str, bytes], ...]:
        """As the order had them; none, once the job is over."""
        with self._lock:
            rows = self._db.execute("SELECT place, data FROM pictures WHERE job = ? ORDER BY rowid", (id,)).fetchall()
        return tuple((row["place"], row["data"]) for row in rows)

    def video(self, id: str) -> Path:
        """Where the job's video is, or will be."""
        return self.folder / f"{id}.mp4"

    def wait(self, seconds: float) -> None:
        """Until something changed, or so long."""
        with self.changed:
            self.changed.wait(seconds)

    def notify(self) -> None:
        """Wake all who `wait`."""
        with self.changed:
            self.changed.notify_all()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it is on disk when the block ends, or nothing of it."""
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


def _job(row: sqlite3.Row) -> Job:
    values: dict[str, Any] = dict(row)
    for name in ("settings", "loras", "notes", "timings"):
        values[name] = json.loads(values[name])
    for name in ("loras", "notes"):
        values[name] = tuple(values[name])
    values["extend_prompt"] = bool(values["extend_prompt"])
    return Job(**values)
