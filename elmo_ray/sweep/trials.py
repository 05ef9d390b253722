"""Trials of a sweep as they are on the disk, and tables of them.

The folder SWEEP/trials/trial-000/ is a run's folder with two more files: trial.json holds the varied values, and
outcome.json says how the trial ended. So a sweep that was killed loses nothing that it knew.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elmo_ray.config.command_line import text_table
from elmo_ray.config.schema import show
from elmo_ray.errors import DataError
from elmo_ray.storage import read_json
from elmo_ray.storage.files import write_aside, write_json
from elmo_ray.training.metrics import Record, clock, read_metrics

TRIAL, OUTCOME = "trial.json", "outcome.json"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
"""Ends of a trial: at its last step or by patience, early because other trials are better, or with an error."""


@dataclass
class Trial:
    """Trial of a sweep. values: the varied ones, by dotted key. outcome: None until it ends, then `status` and more."""

    number: int
    folder: Path
    values: dict[str, Any]
    outcome: dict[str, Any] | None = None
    records: list[Record] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def status(self) -> str:
        if self.outcome is not None:
            return str(self.outcome["status"])
        return "running" if self.records else "waiting"

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
        if self.outcome is not None or not train or not train[-1].get("positions_per_second"):
            return None
        last = train[-1]
        left = (last["total_steps"] - self.step) * last["positions"] / max(1, last["step"])
        return float(left / last["positions_per_second"])

    def read(self) -> None:
        """Read the outcome and the records from the disk."""
        if self.outcome is None:
            self.outcome = read_json(self.folder / OUTCOME)
        try:
            self.records = [r for r in read_metrics(self.folder) if r["kind"] in ("train", "valid")]
        except DataError:  # it has not begun, or a line is being written
            return

    def end(self, status: str, **more: Any) -> None:
        """Write the outcome, unless one is there: the first one counts."""
        if read_json(self.folder / OUTCOME) is None:
            write_json(self.folder / OUTCOME, {"status": status, **more})


def try_lost_again(trials: Sequence[Trial]) -> None:
    """Remove the outcome of trials that were lost with their workers, so that they continue from their checkpoints."""
    for trial in trials:
        if trial.status == FAILED and (trial.outcome or {}).get("lost"):
            (trial.folder / OUTCOME).unlink(missing_ok=True)


def add_trial(sweep_dir: Path, number: int, values: dict[str, Any]) -> Trial:
    """Make the folder of a new trial. Raises FileExistsError if the number is taken."""
    folder = sweep_dir / "trials" / f"trial-{number:03d}"
    folder.mkdir(parents=True)
    write_json(folder / TRIAL, {"number": number, "values": values})
    return Trial(number, folder, values)


def read_trials(sweep_dir: Path) -> list[Trial]:
    """Return all trials that have a folder, read from the disk and sorted by number."""
    trials = []
    for folder in (sweep_dir / "trials").glob("trial-*"):
        given = read_json(folder / TRIAL)
        if given is not None:
            trials.append(Trial(int(given["number"]), folder, dict(given["values"])))
    for trial in trials:
        trial.read()
    return sorted(trials, key=lambda trial: trial.number)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the lowest held-out perplexity among the finished ones or, if there are none, among all."""
    measured = [trial for trial in trials if trial.best is not None and trial.status != FAILED]
    finished = [trial for trial in measured if trial.status == FINISHED]
    return min(finished or measured, key=lambda trial: (trial.best or (0, 0.0))[1], default=None)


def table(trials: Sequence[Trial]) -> str:
    """Return a table for the terminal with a row for each trial, and the reasons of those that failed."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    rows = [["trial", "status", *keys, "step", "perplexity", "best", "at step", "left"]]
    for trial in trials:
        last, best, left = trial.validations[-1:], trial.best, trial.seconds_left
        rows.append(
            [
                str(trial.number),
                trial.status,
                *(_format_value(trial.values[key]) if key in trial.values else "as given" for key in keys),
                f"{trial.step:,}",
                f"{last[0][1]:.2f}" if last else "-",
                f"{best[1]:.2f}" if best else "-",
                f"{best[0]:,}" if best else "-",
                clock(left) if left is not None else "-",
            ]
        )
    reasons = [
        f"trial {trial.number} failed: {trial.outcome.get('message', '')}"
        for trial in trials
        if trial.outcome is not None and trial.status == FAILED
    ]
    return "\n".join([*text_table(rows, left=0), *reasons, *_one_way_note(trials)])


def _one_way_note(trials: Sequence[Trial]) -> list[str]:
    """Return a line where some trials have both directions and others the forward one alone."""
    measured = [record for trial in trials for record in trial.records if record["kind"] == "valid"]
    one_way = {record.get("perplexity_backward") is None for record in measured if record.get("perplexity") is not None}
    if len(one_way) < 2:
        return []
    return ["model.bidirectional=false is measured forward alone: its perplexity does not compare with the others'"]


def results(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return the plain values of each trial, with its validations."""
    rows = []
    for trial in trials:
        best, outcome = trial.best, trial.outcome or {}
        first = next((value for step, value in trial.validations if step == 0), None)
        rows.append(
            {
                "trial": trial.number,
                "status": trial.status,
                "values": trial.values,
                "steps": trial.step,
                "best_perplexity": best[1] if best else None,
                "best_step": best[0] if best else None,
                "last_perplexity": trial.validations[-1][1] if trial.validations else None,
                "perplexity_before": first,
                "seconds": outcome.get("seconds"),
                "message": outcome.get("message"),
                "folder": str(trial.folder),
                "validations": [list(pair) for pair in trial.validations],
            }
        )
    return rows


def write_results(sweep_dir: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write results.json and results.csv; in results.csv each varied key is a column."""
    write_json(sweep_dir / "results.json", {**about, "trials": list(rows)})
    keys = list(dict.fromkeys(key for row in rows for key in row["values"]))
    plain = [name for name in (rows[0] if rows else {}) if name not in ("values", "validations")]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*plain[:2], *keys, *plain[2:]])
    for row in rows:
        varied = [show(row["values"][key]) if key in row["values"] else "" for key in keys]
        writer.writerow([*(row[name] for name in plain[:2]), *varied, *(row[name] for name in plain[2:])])
    write_aside(sweep_dir / "results.csv", text.getvalue().encode())


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show(value)
