"""`sweep`: train with several combinations of settings, some at a time, by Ray Tune.

    python -m elmo_ray.sweep CONFIG.yaml [key.path=value ...] [--resume | --fresh] [--dry-run] [--json FILE]

Each trial is a run of its own on Ray Train, in SWEEP/trials/; all use the same prepared text. Tune decides which trial
runs when, and which one ends early because of its held-out perplexity. The folder holds everything that is known of a
sweep: `--resume` begins a new session of Tune with the trials that are left, each from its own checkpoint.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from elmo_ray import prepare
from elmo_ray.background import start_thread
from elmo_ray.checkpoints.source import Source
from elmo_ray.cluster.stopping import STOP_FILE
from elmo_ray.config import PretrainConfig
from elmo_ray.config.command_line import Flags, run_verb
from elmo_ray.config.finetune import FinetuneConfig, explicit
from elmo_ray.config.schema import flatten, nest
from elmo_ray.config.yaml_reader import dump_yaml
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import ConfigError, ElmoRayError, FormatError, TrainingError, reason
from elmo_ray.finetune import (
    fit_negatives,
    from_source,
    make_initializer,
    open_init,
    resumed_settings,
    training_settings,
)
from elmo_ray.machine import available_cores
from elmo_ray.pretrain import NO_FLAGS, check_sizes, estimate_for, make_plan, measured
from elmo_ray.report.trials import FAILED, FINISHED, INTERRUPTED, Trial, read_trials, table
from elmo_ray.storage import absolute_or_none, expect_answers, is_uri, read_json
from elmo_ray.storage.files import write_aside, write_json
from elmo_ray.sweep.config import SweepConfig
from elmo_ray.sweep.trials import add_trial, best_of, end_trial, results, try_lost_again, write_results
from elmo_ray.sweep.tuning import concurrent_trials, report_until, run_session
from elmo_ray.trackers import check_trackers
from elmo_ray.trackers.beside import following
from elmo_ray.training.dry_run import DryRun
from elmo_ray.training.metrics import clock
from elmo_ray.training.plan import TrainPlan
from elmo_ray.training.run_folder import RunFolder, open_run

logger = logging.getLogger("elmo_ray.sweep")  # __name__ is __main__ as a command

SETTINGS_FILE = "sweep.json"
_MAY_CHANGE = ("cluster.", "sweep.concurrent", "sweep.show_every_s")
_FAILURE_PAUSE_S = 5.0


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep.

    rows: from `trials.results`. shown: the table of the trials. best: the number of the best trial, or None if no trial
    was measured. has_given: True if trial 0 is the configuration as given. interrupted: True if the sweep was asked to
    stop before all trials had ended; then nothing is exported.
    """

    sweep_dir: Path
    rows: list[dict[str, Any]]
    shown: str
    best: int | None
    wall_seconds: float
    has_given: bool
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        return 130 if self.interrupted else 0

    def summary(self) -> str:
        lines = [self.shown]
        by_number = {row["trial"]: row for row in self.rows}
        if self.best is not None:
            best = by_number[self.best]
            head = "best so far" if self.interrupted else "best"
            line = f"{head}: trial {self.best}, held-out perplexity {best['best_perplexity']:.2f}"
            given = by_number.get(0) if self.has_given else None
            if given is not None and given["best_perplexity"] is not None:
                ratio = best["best_perplexity"] / given["best_perplexity"]
                line += f"; trial {given['trial']}, as given, {given['best_perplexity']:.2f} ({ratio:.3f} of it)"
                if given["status"] != FINISHED:
                    line += f", which {given['status']} at step {given['steps']:,}"
            lines.append(line)
        alone = sum(row["seconds"] or 0.0 for row in self.rows)
        lines.append(f"{clock(self.wall_seconds)} in all; the trials' own times, one after another: {clock(alone)}")
        if self.interrupted:
            lines.append(f"{self.sweep_dir}: results.csv, results.json, sweep.png; nothing is exported yet")
            lines.append("stopped; the same command with --resume goes on")
        else:
            lines.append(f"{self.sweep_dir}: results.csv, results.json, sweep.png, best.yaml, best/, export/")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "sweep_dir": str(self.sweep_dir),
            "best": self.best,
            "interrupted": self.interrupted,
            "wall_seconds": self.wall_seconds,
            "trials": self.rows,
        }


@dataclass(frozen=True)
class SweepPlan:
    """Work that a sweep would do: the varied values of its trials, and the estimate of one of them."""

    trials: list[dict[str, Any]]
    one: DryRun

    def summary(self) -> str:
        shown = table([Trial(number, Path(), values, values) for number, values in enumerate(self.trials)])
        return f"{self.one.summary()}\n\n{len(self.trials)} trials, each as above but for:\n{shown}"

    def to_dict(self) -> dict[str, Any]:
        return {"trials": self.trials, "one": self.one.to_dict()}


def run(config: SweepConfig, flags: Flags = NO_FLAGS) -> SweepResult | SweepPlan:
    """Run a sweep, or resume it; a dry run lists its trials only.

    Raises an ElmoRayError for a mistake of the user, before Ray starts if the mistake can be known by then.
    """
    _check_settings(config)
    source = open_init(config) if config.init.source is not None else None
    base = _trial_settings(config, {}, source)
    plain = config.trial({})
    start = from_source(plain, source) if isinstance(plain, FinetuneConfig) and source is not None else None
    planned = config.planned_trials()
    for number, values in enumerate(planned):
        try:
            _trial_settings(config, values, source)
        except ConfigError as error:
            raise ConfigError("\n".join(f"trial {number}: {line}" for line in str(error).split("\n"))) from None
    given = _given_values(config, base)
    if flags.dry_run:
        sizes = measured(base, start)
        one = estimate_for(base, sizes, start)
        for number, trial in _distinct_sizes(config, planned, source, sizes.vocabulary):
            try:
                estimate_for(trial, sizes)
            except ConfigError as error:
                raise ConfigError(f"trial {number}: {error}") from None
        return SweepPlan([{**given, **values} for values in planned], one)
    folder = open_run(config, flags.resume, flags.fresh)
    with folder.locked():
        settings: dict[str, Any] = {"config": config.tree(), "sweep": config.sweep.to_dict()}
        settings["source"] = None if source is None else source.fingerprint
        if folder.aside is None:
            _check_same_sweep(folder.path / SETTINGS_FILE, settings)
        prepared = prepare.run(base, replaces=False, is_models_vocabulary=start is not None and start.has_vocabulary)
        _check_sizes(config, planned or [{}], source, prepared)
        del source
        device, concurrent = concurrent_trials(config)
        folder.make()
        plan = make_plan(base, folder.path, prepared)
        write_json(folder.path / SETTINGS_FILE, settings)
        try_lost_again(read_trials(folder.path))
        existing = {trial.number for trial in read_trials(folder.path)}
        for number, values in enumerate(planned):
            if number not in existing:
                add_trial(folder.path, number, values, given)
        wall_seconds, interrupted = _run_trials(config, folder.path, plan, device, concurrent, given)
        if interrupted:
            return _stop(config, folder.path, wall_seconds)
        return _finish(config, folder, wall_seconds)


def _check_settings(config: SweepConfig) -> None:
    """Raise ConfigError for a place that a sweep cannot be in, or for a program that is not installed."""
    if is_uri(config.run.storage_path):
        raise ConfigError(
            f"run.storage_path={config.run.storage_path}: a sweep keeps its trials in a folder; name a path that all "
            "machines see (the SOURCE and the texts may be URIs)"
        )
    if config.sweep.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise ConfigError("sweep.search=optuna: Optuna is not installed: pip install 'elmo-ray[optuna]'")
    check_trackers(config.run.report_to)


def _given_values(config: SweepConfig, base: PretrainConfig) -> dict[str, Any]:
    """Return the value of each varied key in the configuration as given, completed with the settings of the SOURCE."""
    whole = {**flatten(config.trial({}).to_dict()), **flatten(base.to_dict())}
    return {key: whole[key] for key in config.sweep.space if key in whole}


def _trial_settings(config: SweepConfig, values: dict[str, Any], source: Source | None) -> PretrainConfig:
    """Return the settings for the training of a trial with these values."""
    trial = config.trial(values)
    if not isinstance(trial, FinetuneConfig):
        return trial
    assert source is not None
    return training_settings(trial, source)


def _check_sizes(
    config: SweepConfig, values: Sequence[dict[str, Any]], source: Source | None, prepared: prepare.PrepareResult
) -> None:
    """Check the sizes of trials with these values, those of the same sizes once. Raises ConfigError."""
    for number, settings in _distinct_sizes(config, values, source, prepared.vocabulary_size):
        try:
            check_sizes(settings, prepared)
        except ConfigError as error:
            raise ConfigError(f"trial {number}: {error}") from None


def _distinct_sizes(
    config: SweepConfig, values: Sequence[dict[str, Any]], source: Source | None, n_words: int
) -> Iterator[tuple[int, PretrainConfig]]:
    """Yield numbers and settings of trials with these values, one of each size. n_words: size of the vocabulary."""
    seen = set()
    for number, varied in enumerate(values):
        given, settings = config.trial(varied), _trial_settings(config, varied, source)
        if isinstance(given, FinetuneConfig):
            settings = fit_negatives(given, settings, n_words)
        train = settings.train
        sizes = settings.data.streams, train.unroll, train.accumulate, str(settings.model), str(settings.softmax)
        if sizes not in seen:
            seen.add(sizes)
            yield number, settings


def _check_same_sweep(path: Path, settings: dict[str, Any]) -> None:
    """Raise ConfigError, with a line for each key, if the sweep in the folder was begun with other settings."""
    before = read_json(path)
    if before is None:
        return
    now, old = flatten(settings), flatten(before)
    keys = [key for key in sorted(now.keys() | old.keys()) if now.get(key) != old.get(key)]
    names = [key.removeprefix("config.") for key in keys]
    different = [name for name in names if not name.startswith(_MAY_CHANGE)]
    if different:
        raise ConfigError(
            "\n".join(
                f"{name} is not what this sweep was begun with; use the same, or --fresh, or another run.name"
                for name in different
            )
        )


def _run_trials(
    config: SweepConfig, sweep_dir: Path, plan: TrainPlan, device: Any, concurrent: int, given: dict[str, Any]
) -> tuple[float, bool]:
    """Run the trials that are left; return as `run_session`."""
    threads = config.cluster.threads or max(1, available_cores() // (concurrent * config.cluster.fewest_workers))
    tree = config.tree()
    tree.setdefault("cluster", {})["threads"] = threads
    for key in tree.get("init", {}).keys() & {"from", "options", "vocab"}:
        # Absolute, as a trial's process has another working folder.
        tree["init"][key] = absolute_or_none(tree["init"][key])
    job = {
        "sweep_dir": str(sweep_dir),
        "config": {**tree, "sweep": config.sweep.to_dict()},
        "plan": plan.to_dict(),
        "device": device,
        "given": given,
    }
    return run_session(config, sweep_dir, concurrent, partial(run_trial, job=job))


def _stop(config: SweepConfig, path: Path, wall_seconds: float) -> SweepResult:
    """Mark the trials that were running as interrupted, and write the results so far of a sweep that was stopped."""
    for trial in read_trials(path):
        if trial.outcome is None and (trial.records or trial.seconds is not None):
            end_trial(trial, INTERRUPTED, seconds=trial.seconds)
    trials = read_trials(path)
    return _write_results(config, path, trials, best_of(trials), wall_seconds, interrupted=True)


def _write_results(
    config: SweepConfig, path: Path, trials: list[Trial], best: Trial | None, wall_seconds: float, interrupted: bool
) -> SweepResult:
    from elmo_ray.sweep.picture import draw

    rows, number = results(trials), None if best is None else best.number
    about = {"best": number, "interrupted": interrupted, "wall_seconds": wall_seconds, "space": config.sweep.space}
    write_results(path, rows, about)
    draw(path / "sweep.png", trials, best)
    return SweepResult(path, rows, table(trials), number, wall_seconds, config.sweep.first, interrupted)


def _finish(config: SweepConfig, folder: RunFolder, wall_seconds: float) -> SweepResult:
    """Write the results of a sweep and export its best trial. Raises TrainingError if no trial was measured."""
    from elmo_ray import export
    from elmo_ray.checkpoints.read import open_checkpoint
    from elmo_ray.checkpoints.write import copy_best

    path, trials = folder.path, read_trials(folder.path)
    best = best_of(trials)
    result = _write_results(config, path, trials, best, wall_seconds, interrupted=False)
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
    """Return the text of a configuration for `finetune` or `pretrain` that trains the best trial once more."""
    chosen = config.trial(best.values)
    threads = (best.outcome or {}).get("threads")
    flat = dict(explicit(chosen, ""))
    flat["run.name"] = f"{config.run.name or 'sweep'}-best"
    if threads is not None:
        flat["cluster.threads"] = threads
    verb = "finetune" if isinstance(chosen, FinetuneConfig) else "pretrain"
    measured = best.best
    about = f"held-out perplexity {measured[1]:.4f} at step {measured[0]}" if measured else "not measured"
    head = f"# Trial {best.number} of the sweep {config.run.name}: {about}. For: python -m elmo_ray.{verb}\n"
    return head + dump_yaml(nest(flat))


# ---------------------------------------------------------------- in a trial's process


def run_trial(values: dict[str, Any], job: dict[str, Any]) -> None:
    """Run a trial from its newest checkpoint to its end, with a report to Tune for each validation; called by Tune."""
    # Several trials start at once, and a busy machine may need more than Ray's minute to start their workers.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    expect_answers()
    from elmo_ray.cluster.trainer import fit

    config = SweepConfig.from_dict(job["config"])
    trial = _claim_trial(config, values, Path(job["sweep_dir"]), job["given"])

    def work() -> dict[str, Any]:
        plan = _trial_plan(config, trial, job)
        name = f"{Path(job['sweep_dir']).name}/{trial.name}"
        with following(plan.run_dir, plan.config.run.report_to, name) as senders:
            training = fit(plan, device=job["device"])
            senders.outcome = "stopped" if training["stopped"] else "finished"
        return training

    stop_file = Path(job["sweep_dir"]) / STOP_FILE
    if stop_file.exists():
        return
    done = start_thread(work, "trial")
    seconds = report_until(done, trial, stop_file)
    if (error := done.exception()) is not None:
        # When a whole sweep is killed, its workers are lost a moment before this process; this pause lets the process
        # end before it notes a failure of the trial.
        time.sleep(_FAILURE_PAUSE_S)
        if not isinstance(error, ElmoRayError):
            logger.error("%s", "".join(traceback.format_exception(error)))
        message = reason(error, 500)
        # An error of the cluster has one of Ray's as its cause; the others are of the settings or the text.
        lost = not isinstance(error, ElmoRayError) or error.__cause__ is not None
        end_trial(trial, FAILED, seconds=seconds, message=message, lost=lost)
    elif (training := done.result())["stopped"]:
        end_trial(trial, INTERRUPTED, seconds=seconds)
    else:
        end_trial(trial, FINISHED, seconds=seconds, threads=config.cluster.threads, training=training)


def _claim_trial(config: SweepConfig, values: dict[str, Any], sweep_dir: Path, given: dict[str, Any]) -> Trial:
    """Return the trial for this process: by its number, or for Optuna by its values; new values make a new trial."""
    trials = read_trials(sweep_dir)
    if "number" in values:
        return next(trial for trial in trials if trial.number == values["number"])
    for trial in trials:
        if trial.outcome is None and config.optuna_values(trial.values) == values:
            return trial
    domains = config.sweep.domains()
    chosen = {
        key: domains[key].values[int(value)] if domains[key].kind == "choice" else value
        for key, value in values.items()
    }
    number = len(trials)
    while True:
        try:
            return add_trial(sweep_dir, number, chosen, given)
        except FileExistsError:
            number += 1


def _trial_plan(config: SweepConfig, trial: Trial, job: dict[str, Any]) -> TrainPlan:
    """Return the plan of a trial with the sweep's text; a trial of `finetune` without a checkpoint gets its first."""
    shared = TrainPlan.from_dict(job["plan"])
    given = config.trial(trial.values)
    initialize: Callable[[TrainPlan], None] | None = None
    if isinstance(given, FinetuneConfig):
        from elmo_ray.checkpoints.read import newest_checkpoint

        newest = newest_checkpoint(trial.folder / "checkpoints")
        if newest is not None:
            training = resumed_settings(given, RunFolder(trial.folder, newest, False))
        else:
            source = open_init(given)
            n_words = Vocabulary.read(shared.vocabulary_path).size
            training = fit_negatives(given, training_settings(given, source), n_words)
            initialize = make_initializer(given, [source])
    else:
        training = given
    plan = TrainPlan(training, str(trial.folder), shared.corpus_path, shared.valid_path, shared.vocabulary_path)
    write_aside(trial.folder / "config.yaml", training.to_yaml().encode())
    if initialize is not None:
        initialize(plan)
    return plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_verb("sweep", SweepConfig, run, argv)
