"""Trials of a sweep as they are on the disk, and a table of them.

The folder SWEEP/trials/trial-000/ is a run's folder with three more files: trial.json holds the varied values,
session.json the seconds that the trial has taken, and outcome.json says how it ended. So a sweep that was killed loses
nothing that it knew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elmo_ray.config.command_line import text_table
from elmo_ray.config.schema import show
from elmo_ray.errors import DataError
from elmo_ray.storage import read_json
from elmo_ray.training.metrics import Record, clock, read_metrics

TRIALS, TRIAL, SESSION, OUTCOME = "trials", "trial.json", "session.json", "outcome.json"
FINISHED, STOPPED, FAILED, INTERRUPTED = "finished", "stopped", "failed", "interrupted"
"""Ends of a trial: at its last step or by patience, early because other trials are better, with an error, or with the
sweep, which has been stopped and can go on."""

ALIVE_S = 60.0
"""A trial that runs writes session.json every second; after this time without a change it no longer runs."""


@dataclass
class Trial:
    """Trial of a sweep.

    values: those that differ from the configuration as given, by dotted key. shown: the value of each varied key.
    outcome: None until the trial ends, then `status` and more. seconds: the time that it has taken so far. alive: True
    if a process works on it.
    """

    number: int
    folder: Path
    values: dict[str, Any]
    shown: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] | None = None
    records: list[Record] = field(default_factory=list)
    seconds: float | None = None
    alive: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def status(self) -> str:
        if self.outcome is not None:
            return str(self.outcome["status"])
        if self.alive:
            return "running"
        return INTERRUPTED if self.records else "waiting"

    @property
    def validations(self) -> list[tuple[int, float]]:
        """Return (step, held-out perplexity) of each validation with a finite perplexity."""
        pairs = ((r["step"], r.get("perplexity")) for r in self.records if r["kind"] == "valid")
        return [(step, float(value)) for step, value in pairs if value is not None]

    @property
    def step(self) -> int:
        return max((int(record["step"]) for record in self.records), default=0)

    @property
    def best(self) -> tuple[int, float] | None:
        """Return (step, held-out perplexity) of the best validation, or None."""
        return min(self.validations, key=lambda pair: pair[1], default=None)

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds to the last step at the speed of the last training record, or None if it is unknown."""
        train = [record for record in self.records if record["kind"] == "train"]
        needed = ("positions_per_second", "positions", "total_steps")
        if not self.alive or not train or not all(train[-1].get(name) for name in needed):
            return None
        last = train[-1]
        left = (last["total_steps"] - self.step) * last["positions"] / max(1, last["step"])
        return float(left / last["positions_per_second"])

    def read(self) -> None:
        """Read the outcome and the records from the disk."""
        if self.outcome is None:
            self.outcome = read_json(self.folder / OUTCOME)
        seconds = (self.outcome or {}).get("seconds", (read_json(self.folder / SESSION) or {}).get("seconds"))
        self.seconds = None if seconds is None else float(seconds)
        self.alive = is_alive(self.folder)
        try:
            self.records = [r for r in read_metrics(self.folder) if r["kind"] in ("train", "valid")]
        except DataError:  # it has not begun, or a line is being written
            return


def is_alive(folder: Path) -> bool:
    """Return True if a process works on the trial in this folder."""
    try:
        age = time.time() - (folder / SESSION).stat().st_mtime
    except OSError:
        return False
    return age < ALIVE_S and not (folder / OUTCOME).exists()


def read_trials(sweep_dir: Path) -> list[Trial]:
    """Return all trials that have a folder, read from the disk and sorted by number."""
    trials = []
    for folder in (sweep_dir / TRIALS).glob("trial-*"):
        given = read_json(folder / TRIAL)
        if given is not None:
            values = dict(given["values"])
            # A sweep of an older version has no values of the trial that is the configuration as given.
            trials.append(Trial(int(given["number"]), folder, values, dict(given.get("shown", values))))
    for trial in trials:
        trial.read()
    return sorted(trials, key=lambda trial: trial.number)


def is_sweep(folder: Path) -> bool:
    """Return True if the folder has trials."""
    return any((folder / TRIALS).glob(f"trial-*/{TRIAL}"))


def table(trials: Sequence[Trial]) -> str:
    """Return a table for the terminal with a row for each trial, and the reasons of those that failed."""
    reasons = [
        f"trial {trial.number} failed: {trial.outcome.get('message', '')}"
        for trial in trials
        if trial.outcome is not None and trial.status == FAILED
    ]
    return "\n".join([*text_table(table_cells(trials), left=0), *reasons, *_one_way_note(trials)])


def _one_way_note(trials: Sequence[Trial]) -> list[str]:
    """Return a line where some trials have both directions and others the forward one alone."""
    measured = [record for trial in trials for record in trial.records if record["kind"] == "valid"]
    one_way = {record.get("perplexity_backward") is None for record in measured if record.get("perplexity") is not None}
    if len(one_way) < 2:
        return []
    return ["model.bidirectional=false is measured forward alone: its perplexity does not compare with the others'"]


def table_cells(trials: Sequence[Trial]) -> list[list[str]]:
    """Return the cells of the table: the head, and a row for each trial."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.shown))
    rows = [["trial", "status", *keys, "step", "perplexity", "best", "at step", "left"]]
    for trial in trials:
        last, best, left = trial.validations[-1:], trial.best, trial.seconds_left
        rows.append(
            [
                str(trial.number),
                trial.status,
                *(_format_value(trial.shown[key]) if key in trial.shown else "as given" for key in keys),
                f"{trial.step:,}",
                f"{last[0][1]:.2f}" if last else "-",
                f"{best[1]:.2f}" if best else "-",
                f"{best[0]:,}" if best else "-",
                clock(left) if left is not None else "-",
            ]
        )
    return rows


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show(value)
