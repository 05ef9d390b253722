"""Trials of a sweep: making and ending them, the best one, and the files of results.

`report.trials` reads them from the disk and has the table of them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elmo_ray.config.schema import show
from elmo_ray.report.trials import FAILED, FINISHED, INTERRUPTED, OUTCOME, TRIAL, TRIALS, Trial
from elmo_ray.storage import read_json
from elmo_ray.storage.files import write_aside, write_json


def add_trial(sweep_dir: Path, number: int, values: dict[str, Any], given: Mapping[str, Any] | None = None) -> Trial:
    """Make the folder of a new trial. Raises FileExistsError if the number is taken.

    given: the value of each varied key in the configuration as given.
    """
    folder = sweep_dir / TRIALS / f"trial-{number:03d}"
    folder.mkdir(parents=True)
    shown = {**(given or {}), **values}
    write_json(folder / TRIAL, {"number": number, "values": values, "shown": shown})
    return Trial(number, folder, values, shown)


def end_trial(trial: Trial, status: str, **more: Any) -> None:
    """Write the outcome of a trial, unless one is there: the first one counts."""
    if read_json(trial.folder / OUTCOME) is None:
        write_json(trial.folder / OUTCOME, {"status": status, **more})


def try_lost_again(trials: Sequence[Trial]) -> None:
    """Remove the outcome of trials that were interrupted, or lost with their workers: they go on from a checkpoint."""
    for trial in trials:
        if trial.status == INTERRUPTED or (trial.status == FAILED and (trial.outcome or {}).get("lost")):
            (trial.folder / OUTCOME).unlink(missing_ok=True)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the lowest held-out perplexity among the finished ones or, if there are none, among all."""
    measured = [trial for trial in trials if trial.best is not None and trial.status != FAILED]
    finished = [trial for trial in measured if trial.status == FINISHED]
    return min(finished or measured, key=lambda trial: (trial.best or (0, 0.0))[1], default=None)


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
                "values": trial.shown,
                "steps": trial.step,
                "best_perplexity": best[1] if best else None,
                "best_step": best[0] if best else None,
                "last_perplexity": trial.validations[-1][1] if trial.validations else None,
                "perplexity_before": first,
                "seconds": trial.seconds,
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
