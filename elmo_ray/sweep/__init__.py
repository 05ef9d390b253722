"""`sweep`: the same training with other settings, several at a time, by Ray Tune.

    python -m elmo_ray.sweep CONFIG.yaml [key.path=value ...] [--resume | --fresh] [--dry-run] [--json FILE]

Each trial is a run of its own on Ray Train, in SWEEP/trials/, on text that is prepared once. Tune decides which trial
runs when and, by their held-out perplexity, which one ends early. What is known of a sweep is in its folder: `--resume`
begins a new session of Tune with what is left, and each trial goes on from its own checkpoint.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from elmo_ray import prepare
from elmo_ray.checkpoints.source import Source
from elmo_ray.config import PretrainConfig
from elmo_ray.config.command_line import Flags, run_verb
from elmo_ray.config.finetune import FinetuneConfig
from elmo_ray.config.yaml_reader import dump_yaml
from elmo_ray.errors import ConfigError, ElmoRayError, FormatError, TrainingError
from elmo_ray.finetune import open_init, settings, settings_of_run, write_beginning
from elmo_ray.machine import available_cores
from elmo_ray.pretrain import NO_FLAGS, estimate, make_plan
from elmo_ray.storage import absolute, is_uri
from elmo_ray.storage.files import write_aside, write_json
from elmo_ray.sweep.config import SweepConfig
from elmo_ray.sweep.trials import (
    FAILED,
    FINISHED,
    Trial,
    add_trial,
    best_of,
    read_json_file,
    read_trials,
    results,
    table,
    try_lost_again,
    write_results,
)
from elmo_ray.sweep.tuning import report_while, room, run_session
from elmo_ray.training.dry_run import DryRun
from elmo_ray.training.metrics import clock
from elmo_ray.training.plan import TrainPlan
from elmo_ray.training.run_folder import RunFolder, open_run

logger = logging.getLogger("elmo_ray.sweep")  # __name__ is __main__ as a command

NOTE = "sweep.json"
_MAY_CHANGE = ("cluster.", "sweep.concurrent", "sweep.show_every_s")
_FAILURE_PAUSE_S = 5.0


@dataclass(frozen=True)
class SweepResult:
    """rows: of `trials.results`. best: its number, or None where no trial was measured. has_given: trial 0 is the
    configuration as it stands."""

    sweep_dir: Path
    rows: list[dict[str, Any]]
    shown: str
    best: int | None
    wall_seconds: float
    has_given: bool

    def summary(self) -> str:
        lines = [self.shown]
        by_number = {row["trial"]: row for row in self.rows}
        if self.best is not None:
            best = by_number[self.best]
            line = f"best: trial {self.best}, held-out perplexity {best['best_perplexity']:.2f}"
            given = by_number.get(0) if self.has_given else None
            if given is not None and given["best_perplexity"] is not None:
                ratio = best["best_perplexity"] / given["best_perplexity"]
                line += f"; trial {given['trial']}, as given, {given['best_perplexity']:.2f} ({ratio:.3f} of it)"
            lines.append(line)
        alone = sum(row["seconds"] or 0.0 for row in self.rows)
        lines.append(f"{clock(self.wall_seconds)} in all; the trials' own times, one after another: {clock(alone)}")
        lines.append(f"{self.sweep_dir}: results.csv, results.json, png, best.yaml, best/, export/")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "sweep_dir": str(self.sweep_dir),
            "best": self.best,
            "wall_seconds": self.wall_seconds,
            "trials": self.rows,
        }


@dataclass(frozen=True)
class SweepPlan:
    """What the sweep would do: its trials, and what one of them would be."""

    trials: list[dict[str, Any]]
    one: DryRun

    def summary(self) -> str:
        shown = table([Trial(number, Path(), values) for number, values in enumerate(self.trials)])
        return f"{self.one.summary()}\n\n{len(self.trials)} trials, each as above but for:\n{shown}"

    def to_dict(self) -> dict[str, Any]:
        return {"trials": self.trials, "one": self.one.to_dict()}


def run(config: SweepConfig, flags: Flags = NO_FLAGS) -> SweepResult | SweepPlan:
    """The whole sweep. Raises an ElmoRayError for what the user can mend, before Ray starts where that can be known."""
    if is_uri(config.run.storage_path):
        raise ConfigError(
            f"run.storage_path={config.run.storage_path}: a sweep keeps its trials in a folder; name a path that all "
            "machines see (the SOURCE and the texts may be URIs)"
        )
    if config.sweep.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise ConfigError("sweep.search=optuna: Optuna is not installed: pip install 'elmo-ray[optuna]'")
    source = open_init(config) if config.init.source is not None else None
    base = _settings(config, {}, source)
    drawn = config.draws()
    for number, values in enumerate(drawn):
        try:
            _settings(config, values, source)
        except ConfigError as error:
            raise ConfigError("\n".join(f"trial {number}: {line}" for line in str(error).split("\n"))) from None
    if flags.dry_run:
        return SweepPlan(drawn, estimate(base))
    folder = open_run(config, flags.resume, flags.fresh)
    with folder.locked():
        note: dict[str, Any] = {"config": config.tree(), "sweep": config.sweep.to_dict()}
        note["source"] = None if source is None else source.fingerprint
        if folder.aside is None:
            _check_same_sweep(folder.path / NOTE, note)
        del source
        prepared = prepare.run(base)
        base.softmax.check_vocabulary(prepared.vocabulary_size)
        device, concurrent = room(config)
        folder.make()
        plan = make_plan(base, folder.path, prepared)
        write_json(folder.path / NOTE, note)
        try_lost_again(read_trials(folder.path))
        there = {trial.number for trial in read_trials(folder.path)}
        for number, values in enumerate(drawn):
            if number not in there:
                add_trial(folder.path, number, values)
        wall = _run_trials(config, folder.path, plan, device, concurrent)
        return _finish(config, folder, wall)


def _settings(config: SweepConfig, values: dict[str, Any], source: Source | None) -> PretrainConfig:
    """A trial's settings for training."""
    trial = config.trial(values)
    if not isinstance(trial, FinetuneConfig):
        return trial
    assert source is not None
    return settings(trial, source)


def _check_same_sweep(path: Path, note: dict[str, Any]) -> None:
    """Raise ConfigError, a line for each key, where the sweep that shall go on was another one."""
    before = read_json_file(path)
    if before is None:
        return
    flat, old = (dict(_flat(values, "")) for values in (note, before))
    keys = [key for key in sorted(flat.keys() | old.keys()) if flat.get(key) != old.get(key)]
    names = [key.removeprefix("config.") for key in keys]
    different = [name for name in names if not name.startswith(_MAY_CHANGE)]
    if different:
        raise ConfigError(
            "\n".join(
                f"{name} is not what this sweep was begun with; use the same, or --fresh, or another run.name"
                for name in different
            )
        )


def _flat(values: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


def _run_trials(config: SweepConfig, sweep_dir: Path, plan: TrainPlan, device: Any, concurrent: int) -> float:
    """What is left of the trials; the seconds that all sessions of the sweep have taken."""

    threads = config.cluster.threads or max(1, available_cores() // (concurrent * config.cluster.fewest_workers))
    tree = config.tree()
    tree.setdefault("cluster", {})["threads"] = threads
    for key in ("from", "options", "vocab"):  # a trial's process has another working folder
        if tree.get("init", {}).get(key) is not None:
            tree["init"][key] = absolute(tree["init"][key])
    job = {
        "sweep_dir": str(sweep_dir),
        "config": {**tree, "sweep": config.sweep.to_dict()},
        "plan": plan.to_dict(),
        "device": device,
    }
    return run_session(config, sweep_dir, concurrent, partial(run_trial, job=job))


def _finish(config: SweepConfig, folder: RunFolder, wall: float) -> SweepResult:
    from elmo_ray import export
    from elmo_ray.checkpoints.read import open_checkpoint
    from elmo_ray.checkpoints.write import copy_best
    from elmo_ray.sweep.picture import draw

    path, trials = folder.path, read_trials(folder.path)
    best, rows = best_of(trials), results(trials)
    number = None if best is None else best.number
    write_results(path, rows, {"best": number, "wall_seconds": wall, "space": config.sweep.space})
    draw(path / "sweep.png", trials, best)
    result = SweepResult(path, rows, table(trials), number, wall, config.sweep.first)
    if best is None:
        raise TrainingError(f"{path}: no trial was measured; see {path}/results.csv and trials/*/outcome.json")
    write_aside(path / "best.yaml", best_yaml(config, best).encode())
    if (best.folder / "best").is_dir():
        copy_best(open_checkpoint(best.folder / "best", verify=False), path / "best")
    if config.run.export:
        try:
            export.export_model(best.folder, path / "export")
        except FormatError as error:
            logger.warning("run.export: %s", error)
    return result


def best_yaml(config: SweepConfig, best: Trial) -> str:
    """A file that `finetune` (or `pretrain`) takes, to train the best trial once more."""
    chosen = config.trial(best.values)
    ran = (best.outcome or {}).get("threads")
    from elmo_ray.config.finetune import explicit
    from elmo_ray.sweep.config import nested

    flat = dict(explicit(chosen, ""))
    flat["run.name"] = f"{config.run.name or 'sweep'}-best"
    if ran is not None:
        flat["cluster.threads"] = ran
    verb = "finetune" if isinstance(chosen, FinetuneConfig) else "pretrain"
    measured = best.best
    about = f"held-out perplexity {measured[1]:.4f} at step {measured[0]}" if measured else "not measured"
    head = f"# Trial {best.number} of the sweep {config.run.name}: {about}. For: python -m elmo_ray.{verb}\n"
    return head + dump_yaml(nested(flat))


# ---------------------------------------------------------------- in a trial's process


def run_trial(values: dict[str, Any], job: dict[str, Any]) -> None:
    """A trial from where it is to its end, with a report to Tune for each validation; called by Tune."""
    # several trials start at once, and a busy machine may need longer than Ray's minute to start their workers
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    from elmo_ray.cluster.trainer import fit

    config = SweepConfig.from_dict(job["config"])
    trial = _claim(config, values, Path(job["sweep_dir"]))
    ended: list[dict[str, Any]] = []
    problems: list[BaseException] = []

    def work() -> None:
        try:
            plan = _trial_plan(config, trial, job)
            ended.append(fit(plan, device=job["device"]))
        except BaseException as error:
            problems.append(error)

    seconds = report_while(work, trial)
    if problems:
        # where the sweep itself is being killed, its workers are lost a moment before this process: no failure of its
        time.sleep(_FAILURE_PAUSE_S)
        error = problems[0]
        if not isinstance(error, ElmoRayError):
            logger.error("%s", "".join(traceback.format_exception(error)))
        message = " ".join(str(error).split())[:500] or type(error).__name__
        # an error of the cluster comes from one of Ray's; the others are of the settings or the text
        lost = not isinstance(error, ElmoRayError) or error.__cause__ is not None
        trial.end(FAILED, seconds=seconds, message=message, lost=lost)
    elif ended[0]["finished"]:
        trial.end(FINISHED, seconds=seconds, threads=config.cluster.threads, training=ended[0])


def _claim(config: SweepConfig, values: dict[str, Any], sweep_dir: Path) -> Trial:
    """The trial that this process is to run: by its number, or (Optuna) the one that has these values, or a new one."""
    trials = read_trials(sweep_dir)
    if "number" in values:
        return next(trial for trial in trials if trial.number == values["number"])
    for trial in trials:
        if trial.outcome is None and config.places(trial.values) == values:
            return trial
    domains = config.sweep.domains()
    chosen = {
        key: domains[key].values[int(value)] if domains[key].kind == "choice" else value
        for key, value in values.items()
    }
    number = len(trials)
    while True:
        try:
            return add_trial(sweep_dir, number, chosen)
        except FileExistsError:
            number += 1


def _trial_plan(config: SweepConfig, trial: Trial, job: dict[str, Any]) -> TrainPlan:
    """Its settings with the sweep's text; a trial of finetune that has no checkpoint yet gets its first."""
    shared = TrainPlan.from_dict(job["plan"])
    given = config.trial(trial.values)
    begin: Callable[[TrainPlan], None] | None = None
    if isinstance(given, FinetuneConfig):
        from elmo_ray.checkpoints.read import newest_checkpoint

        newest = newest_checkpoint(trial.folder / "checkpoints")
        if newest is not None:
            training = settings_of_run(given, RunFolder(trial.folder, newest, False))
        else:
            source = open_init(given)
            training = settings(given, source)

            def begin(plan: TrainPlan) -> None:
                write_beginning(given, source, plan)
    else:
        training = given
    plan = TrainPlan(training, str(trial.folder), shared.corpus_path, shared.valid_path, shared.vocabulary_path)
    write_aside(trial.folder / "config.yaml", training.to_yaml().encode())
    if begin is not None:
        begin(plan)
    return plan


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_verb("sweep", SweepConfig, run, argv)
