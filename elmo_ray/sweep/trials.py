"""The trials of a sweep as they are on the disk: what each varies, how far it is, how it ended; and tables of them.

Everything is in SWEEP/trials/trial-000/, a run's folder with two files more: trial.json, what is varied, and
outcome.json, how it ended. So a sweep that was killed knows all that it knew.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elmo_ray.config.schema import show
from elmo_ray.errors import DataError
from elmo_ray.storage.files import write_aside, write_json
from elmo_ray.training.metrics import Record, clock, read_metrics

TRIAL, OUTCOME = "trial.json", "outcome.json"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
"""How a trial can end: at its last step (or by patience), early because others are better, or with an error."""


@dataclass
class Trial:
    """values: what is varied, by dotted key. outcome: None while it has not ended; `status` and more."""

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
        """(step, held-out perplexity) as far as it was finite."""
        pairs = ((r["step"], r.get("perplexity")) for r in self.records if r["kind"] == "valid")
        return [(step, float(value)) for step, value in pairs if value is not None]

    @property
    def step(self) -> int:
        return max((int(record["step"]) for record in self.records), default=0)

    @property
    def best(self) -> tuple[int, float] | None:
        return min(self.validations, key=lambda pair: pair[1], default=None)

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last record of training."""
        train = [record for record in self.records if record["kind"] == "train"]
        if self.outcome is not None or not train or not train[-1].get("positions_per_second"):
            return None
        last = train[-1]
        left = (last["total_steps"] - self.step) * last["positions"] / max(1, last["step"])
        return float(left / last["positions_per_second"])

    def read(self) -> None:
        """What it has come to since the last look."""
        if self.outcome is None:
            self.outcome = read_json_file(self.folder / OUTCOME)
        try:
            self.records = [r for r in read_metrics(self.folder) if r["kind"] in ("train", "valid")]
        except DataError:  # not begun, or a line that is being written
            return

    def end(self, status: str, **more: Any) -> None:
        """Note how it ended; the first note counts."""
        if read_json_file(self.folder / OUTCOME) is None:
            write_json(self.folder / OUTCOME, {"status": status, **more})


def try_lost_again(trials: Sequence[Trial]) -> None:
    """Forget how trials ended that were lost with their workers: they go on where they were."""
    for trial in trials:
        if trial.status == FAILED and (trial.outcome or {}).get("lost"):
            (trial.folder / OUTCOME).unlink(missing_ok=True)


def read_json_file(path: Path) -> dict[str, Any] | None:
    """None where there is no such file, or none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def add_trial(sweep_dir: Path, number: int, values: dict[str, Any]) -> Trial:
    """Make the trial's folder; raises FileExistsError where the number is taken."""
    folder = sweep_dir / "trials" / f"trial-{number:03d}"
    folder.mkdir(parents=True)
    write_json(folder / TRIAL, {"number": number, "values": values})
    return Trial(number, folder, values)


def read_trials(sweep_dir: Path) -> list[Trial]:
    """All trials that have a folder, by number, read from the disk."""
    trials = []
    for folder in (sweep_dir / "trials").glob("trial-*"):
        note = read_json_file(folder / TRIAL)
        if note is not None:
            trials.append(Trial(int(note["number"]), folder, dict(note["values"])))
    for trial in trials:
        trial.read()
    return sorted(trials, key=lambda trial: trial.number)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Lowest held-out perplexity among those that came to their end, or, where none did, among all."""
    measured = [trial for trial in trials if trial.best is not None and trial.status != FAILED]
    finished = [trial for trial in measured if trial.status == FINISHED]
    return min(finished or measured, key=lambda trial: (trial.best or (0, 0.0))[1], default=None)


def table(trials: Sequence[Trial], total_steps: int | None = None) -> str:
    """For the terminal: a line for each trial."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    lines = [["trial", "status", *keys, "step", "perplexity", "best", "at step", "left"]]
    for trial in trials:
        last, best, left = trial.validations[-1:], trial.best, trial.seconds_left
        lines.append(
            [
                str(trial.number),
                trial.status,
                *(_short(trial.values[key]) if key in trial.values else "as given" for key in keys),
                f"{trial.step:,}",
                f"{last[0][1]:.2f}" if last else "-",
                f"{best[1]:.2f}" if best else "-",
                f"{best[0]:,}" if best else "-",
                clock(left) if left is not None else "-",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
    reasons = [
        f"trial {trial.number} failed: {trial.outcome.get('message', '')}"
        for trial in trials
        if trial.outcome is not None and trial.status == FAILED
    ]
    return "\n".join([*rows, *reasons])


def results(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Plain values of each trial, with its validations."""
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
    """results.json and results.csv; in the second each varied key is a column."""
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


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show(value)
