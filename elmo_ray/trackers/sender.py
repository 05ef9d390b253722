"""Sending of a run's files to a tracker: records of metrics, settings, measures of the test text, and pictures.

A tracker gets each step once. The `Sender` asks it when it begins up to which step it has records of each kind, and
sends those after it; a resumed run that repeats steps after its checkpoint adds nothing for these. What has been sent
is remembered in the run's folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from elmo_ray.config.schema import flatten
from elmo_ray.config.yaml_reader import parse_yaml
from elmo_ray.errors import ConfigError, ElmoRayError, short
from elmo_ray.storage import base_name, read_json
from elmo_ray.storage.files import file_lock, write_json
from elmo_ray.storage.local_copy import local_copy_of
from elmo_ray.trackers.tracker import Memory, Tracker, without_secrets
from elmo_ray.training.metrics import MetricsFollower, Record

FOLDER = "trackers"
"""Folder of a run that holds what is remembered of each tracker."""

COPIED = (f"{FOLDER}/*", "wandb/*")
"""Files that a run in an object store keeps there for its trackers."""

SETTINGS, RESULT = "config.yaml", "result.json"
FILES = (SETTINGS, RESULT, "report.html", "*.png")
"""Files of a run that a tracker gets, in this order."""

RECORDS_AT_ONCE = 40
"""Records in a request; MLflow takes 1,000 numbers at once, and a record has some 25."""


class TrackerError(ElmoRayError):
    """Error of a tracker that is away or refuses what it is sent."""


def memory_path(run_dir: Path, tracker: str) -> Path:
    """Return the file with what is remembered of a tracker."""
    return run_dir / FOLDER / f"{tracker}.json"


def read_memory(run_dir: Path, tracker: str) -> Memory:
    """Return what is remembered of a tracker; an empty memory where there is none."""
    values = read_json(memory_path(run_dir, tracker)) or {}
    return Memory(**{name: value for name, value in values.items() if name in Memory.__dataclass_fields__})


def make_tracker(tracker: str, run_dir: Path, name: str) -> Tracker:
    """Return the tracker of this name, not opened yet."""
    # the packages of trackers are optional and slow to import
    if tracker == "mlflow":
        from elmo_ray.trackers.to_mlflow import MlflowTracker

        return MlflowTracker(run_dir, name)
    from elmo_ray.trackers.to_wandb import WandbTracker

    return WandbTracker(run_dir, name)


class Sender:
    """Sender of a run's files to one tracker, as far as the tracker does not have them.

    name: of the run, for a tracker that does not have it yet. shown_at: the place where it is shown, once the tracker
    has answered.
    """

    def __init__(self, run_dir: Path, tracker: str, name: str) -> None:
        self.run_dir, self.kind = run_dir, tracker
        self.memory = read_memory(run_dir, tracker)
        self.memory.name = self.memory.name or name
        self._follower = MetricsFollower(run_dir, from_start=True)
        self._waiting: dict[tuple[str, int], Record] = {}
        self._tracker: Tracker | None = None
        self._looked: dict[str, tuple[int, int]] = {}
        self.shown_at = ""

    def send(self) -> int:
        """Send everything that is new; return the number of records. Raises TrackerError where it cannot be sent."""
        for record in self._follower.poll():
            if record["kind"] in ("train", "valid"):
                self._waiting[record["kind"], record["step"]] = record
        try:
            tracker = self._opened()
            new = [record for record in self._waiting.values() if _is_new(record, self.memory)]
            for first in range(0, len(new), RECORDS_AT_ONCE):
                some = new[first : first + RECORDS_AT_ONCE]
                tracker.write(some)
                for record in some:
                    steps = self.memory.steps
                    steps[record["kind"]] = max(record["step"], steps.get(record["kind"], 0))
                self._remember()
            self._waiting.clear()
            self._send_files(tracker)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of any kind: the libraries have many, and one of W&B's is no Exception
            raise self._problem(error) from error
        return len(new)

    def close(self, outcome: str) -> None:
        """Wait until everything is sent, and end the run in the tracker. Raises TrackerError."""
        try:
            if self._tracker is not None:
                self._tracker.close(outcome)
                self._remember()
        except Exception as error:
            raise self._problem(error) from error

    def _opened(self) -> Tracker:
        if self._tracker is None:
            tracker, memory = make_tracker(self.kind, self.run_dir, self.memory.name), self.memory
            if memory.address != tracker.address:
                self.memory = memory = Memory(memory.key, memory.name, tracker.address)
            self._remember()  # its key, before the tracker knows it
            self.shown_at = tracker.open(memory)
            self._remember()
            self._tracker = tracker
        return self._tracker

    def _problem(self, error: BaseException) -> TrackerError:
        where = f"{self.kind} at {self.memory.address}" if self.memory.address else self.kind
        return TrackerError(f"{where}: {short(without_secrets(str(error))) or type(error).__name__}")

    def _remember(self) -> None:
        write_json(memory_path(self.run_dir, self.kind), asdict(self.memory))

    def _send_files(self, tracker: Tracker) -> None:
        for path, digest in _new_files(self.run_dir, self.memory, self._looked):
            if path.name == SETTINGS:
                values = parse_yaml(path.read_text("utf-8"), path.name)
                tracker.write_settings(flatten(values) if isinstance(values, dict) else {})
            if path.name == RESULT:
                tracker.write_result(json.loads(path.read_bytes()))
            tracker.write_file(path)
            self.memory.files[path.name] = digest
            self._remember()


def send_rest(place: str, tracker: str) -> str:
    """Send what a tracker does not have of the run at a path or URI, and return a line about it.

    Raises TrackerError where it cannot be sent, and ConfigError while another process is sending.
    """
    copy = local_copy_of(place)
    run_dir = copy.folder
    try:
        copy.pull(*COPIED, *FILES)
        with file_lock(lock_path(run_dir, tracker)):
            sender = Sender(run_dir, tracker, base_name(place))
            count = sender.send()
            sender.close("finished")
        copy.push(*COPIED)
    except BlockingIOError:
        raise ConfigError(f"to={tracker}: another process is sending {place}; wait for its end") from None
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror or error}") from None
    return f"{tracker}: has all of {place} ({count:,} new records): {sender.shown_at}"


def lock_path(run_dir: Path, tracker: str) -> Path:
    """Return the file that a process locks while it sends."""
    return run_dir / FOLDER / f".{tracker}.lock"


def unsent(run_dir: Path, tracker: str) -> tuple[int, int]:
    """Return how many records and how many files a tracker does not have, as far as is remembered."""
    memory = read_memory(run_dir, tracker)
    records = MetricsFollower(run_dir, from_start=True).poll()
    new = {(r["kind"], r["step"]) for r in records if r["kind"] in ("train", "valid") and _is_new(r, memory)}
    return len(new), sum(1 for _ in _new_files(run_dir, memory, {}))


def _is_new(record: Record, memory: Memory) -> bool:
    return bool(record["step"] > memory.steps.get(record["kind"], -1))


def _new_files(run_dir: Path, memory: Memory, looked: dict[str, tuple[int, int]]) -> Iterator[tuple[Path, str]]:
    """Yield each file that the tracker does not have in this form, with its sha256.

    looked: size and time of change of the files that it has; it is brought up to date.
    """
    for path in (path for pattern in FILES for path in sorted(run_dir.glob(pattern))):
        status = path.stat()
        version = status.st_size, status.st_mtime_ns
        if looked.get(path.name) == version:
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if memory.files.get(path.name) != digest:
            yield path, digest
        looked[path.name] = version
