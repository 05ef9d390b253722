"""Session of Ray Tune: the number of trials that fit at a time, the order of trials, and the early end of bad ones.

The state that lasts is on the disk (`trials`); a session that was killed is followed by a new one with the trials left.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elmo_ray.background import repeating
from elmo_ray.cluster.session import Device, alive_nodes, check_cluster, describe_cpus, fits, losses_as_errors
from elmo_ray.cluster.stopping import STOP_FILE, in_thread, make_stop_file, stop_on_signals
from elmo_ray.errors import ConfigError
from elmo_ray.report.trials import (
    ALIVE_S,
    FAILED,
    FINISHED,
    OUTCOME,
    SESSION,
    STOPPED,
    TRIALS,
    Trial,
    read_trials,
    table,
)
from elmo_ray.storage import read_json
from elmo_ray.storage.files import write_json
from elmo_ray.sweep.config import SweepConfig
from elmo_ray.sweep.trials import end_trial
from elmo_ray.training.metrics import clock

logger = logging.getLogger(__name__)

DRIVER_CPUS = 0.05
"""CPUs that a trial's own process reserves; it only waits for its workers."""


def concurrent_trials(config: SweepConfig) -> tuple[Device, int]:
    """Return the device of the workers, and the number of trials that fit at a time.

    Raises ConfigError with the numbers if no trial fits, or if fewer than sweep.concurrent fit.
    """
    # The process of each trial, its workers and their data tasks must all find CPUs: trials that hold some of theirs
    # while they wait for the others would wait for ever.
    cluster = config.cluster
    device = check_cluster(cluster)
    nodes = alive_nodes()
    workers = cluster.fewest_workers
    cpus_per_trial = DRIVER_CPUS + workers * (cluster.cpus_per_worker + cluster.data_cpus)

    def fit(trials: int) -> bool:
        left = [replace(node, cpus=node.cpus - DRIVER_CPUS * trials / len(nodes)) for node in nodes]
        total_fits = trials * cpus_per_trial <= sum(node.cpus for node in nodes) + 1e-6
        return total_fits and fits(left, device, trials * workers, cluster.cpus_per_worker, cluster.data_cpus)

    asked = config.sweep.concurrent
    most = 0
    while most < (asked or config.sweep.trials) and fit(most + 1):
        most += 1
    needs = (
        f"a trial needs {cpus_per_trial:g} CPUs: {DRIVER_CPUS:g} + cluster.workers={workers} x "
        f"(cluster.cpus_per_worker={cluster.cpus_per_worker} + cluster.data_cpus={cluster.data_cpus})"
    )
    have = f"the CPUs of the Ray cluster are {describe_cpus(nodes)}"
    if device == "gpu":
        have += f", and it has {sum(node.gpus for node in nodes)} GPUs, one for each worker"
    if not most or (asked is not None and asked > most):
        wanted = f"sweep.concurrent={asked}: only {most} fit" if asked is not None else "no trial fits"
        raise ConfigError(f"{wanted}: {needs}; {have}; lower one of them")
    logger.info("%d trials at a time: %s; %s", most, needs, have)
    return device, most


def run_session(
    config: SweepConfig, sweep_dir: Path, concurrent: int, run_trial: Callable[[dict[str, Any]], None]
) -> tuple[float, bool]:
    """Run the trials that are left with Tune.

    Returns the seconds that all sessions of the sweep have taken, and True if trials are left: the first SIGINT or
    SIGTERM asks the running ones to stop at their next step with a checkpoint, and then no other begins. run_trial:
    called in a process of each trial, with the trial's number or, for Optuna, its values.
    """
    trials = read_trials(sweep_dir)
    waiting = sum(trial.outcome is None for trial in trials)
    total = max(len(trials), config.sweep.trials if config.sweep.search == "optuna" else 0)
    left = waiting + total - len(trials)
    before = float((read_json(sweep_dir / SESSION) or {}).get("seconds", 0.0))
    if not left:
        return before, False
    stop_file = sweep_dir / STOP_FILE
    tuner = _tuner(config, sweep_dir, trials, left, concurrent, run_trial)
    logger.info("%d of %d trials to run, in %s", left, max(len(trials), config.sweep.trials), sweep_dir)
    start = time.monotonic()

    def seconds() -> float:
        return before + time.monotonic() - start

    def note() -> None:
        write_json(sweep_dir / SESSION, {"seconds": seconds()})
        logger.info("%s so far\n%s", clock(seconds()), table(read_trials(sweep_dir)))

    lost = losses_as_errors("when Ray runs again, give the same command with --resume")
    with repeating(note, config.sweep.show_every_s, "table"), stop_on_signals(str(stop_file)) as asked, lost:
        in_thread(tuner.fit, lambda: None)
    write_json(sweep_dir / SESSION, {"seconds": seconds()})
    ended = sum(trial.status in (FINISHED, STOPPED, FAILED) for trial in read_trials(sweep_dir))
    return seconds(), asked.is_set() and ended < total


def _tuner(
    config: SweepConfig,
    sweep_dir: Path,
    trials: Sequence[Trial],
    left: int,
    concurrent: int,
    run_trial: Callable[[dict[str, Any]], None],
) -> Any:
    """Return Tune's tuner for the trials that are left: for Optuna so many, else those without an outcome."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints tables of its own at any verbosity
    from ray import tune

    scheduler, session = _scheduler(config, trials), _session(sweep_dir, sweep_dir / STOP_FILE)
    if config.sweep.search == "optuna":
        search, space, samples = _optuna(config, trials), {}, left
    else:
        numbers = [trial.number for trial in trials if trial.outcome is None]
        search, space, samples = None, {"number": tune.grid_search(numbers)}, 1
    return tune.Tuner(
        tune.with_resources(run_trial, {"CPU": DRIVER_CPUS}),
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=samples,
            search_alg=search,
            scheduler=scheduler,
            max_concurrent_trials=concurrent,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(sweep_dir),
            verbose=0,
            callbacks=[session],
            stop=session,
        ),
    )


def report_until(done: Future[Any], trial: Trial, stop_file: Path) -> float:
    """Report each validation of a trial to Tune until it is done; return the seconds that the trial has taken.

    stop_file: the sweep's; once it is there, the training of this trial is asked to stop. Called in the trial's
    process. Tune may end this process at any report.
    """
    from ray import tune

    start = time.monotonic()
    before = (read_json(trial.folder / SESSION) or {}).get("seconds", 0.0)
    reported, alive, seconds = 0, True, 0.0
    while alive:
        wait([done], 1.0)
        alive = not done.done()
        if alive and stop_file.exists():
            make_stop_file(str(trial.folder / STOP_FILE))  # again and again, as training removes it when it starts
        trial.read()
        seconds = float(before + time.monotonic() - start)
        write_json(trial.folder / SESSION, {"seconds": seconds})
        for step, perplexity in trial.validations[reported:]:
            tune.report({"step": step, "perplexity": perplexity, "number": trial.number, "seconds": seconds})
            reported += 1
    (trial.folder / STOP_FILE).unlink(missing_ok=True)
    return seconds


def _scheduler(config: SweepConfig, trials: Sequence[Trial]) -> Any:
    """Return a scheduler of Tune that has the results of earlier sessions: a new session does not know their rungs."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

    if config.sweep.scheduler is None:
        return FIFOScheduler()

    class Scheduler(ASHAScheduler):
        """ASHA that never ends trial 0: the configuration as given is the yardstick for the others."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision = super().on_trial_result(tune_controller, trial, result)
            given = config.sweep.first and result.get("number") == 0
            return TrialScheduler.CONTINUE if given else str(decision)

    scheduler = Scheduler(
        time_attr="step",
        metric="perplexity",
        mode="min",
        max_t=10**12,  # trials end by themselves
        grace_period=int(config.sweep.grace.amount),
        reduction_factor=config.sweep.reduction,
    )
    for trial in trials:
        if trial.outcome is not None and trial.validations:
            ended = _EndedTrial(f"earlier-{trial.name}")
            scheduler.on_trial_add(None, ended)
            for step, perplexity in trial.validations:
                scheduler.on_trial_result(None, ended, {"step": step, "perplexity": perplexity})
    return scheduler


@dataclass(frozen=True)
class _EndedTrial:
    """Trial of an earlier session; a scheduler asks for no more than its id."""

    trial_id: str


def _optuna(config: SweepConfig, trials: Sequence[Trial]) -> Any:
    """Return Tune's search by Optuna. It has the results of ended trials, and begins with the unfinished ones."""
    from ray import tune

    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        raise ConfigError(f"sweep.search=optuna: {error}; pip install 'elmo-ray[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, Any] = {}
    for key, domain in config.sweep.domains().items():
        if domain.kind == "choice":
            space[key] = tune.choice([str(place) for place in range(len(domain.values))])  # no lists
        elif domain.kind == "randint":
            space[key] = tune.randint(domain.values[0], domain.values[1] + 1)
        else:
            space[key] = {"uniform": tune.uniform, "loguniform": tune.loguniform}[domain.kind](*domain.values)
    search = OptunaSearch(
        OptunaSearch.convert_search_space(space),
        metric="perplexity",
        mode="min",
        points_to_evaluate=[config.optuna_values(trial.values) for trial in trials if trial.outcome is None],
        seed=config.run.seed % 2**31,
    )
    for trial in trials:
        if trial.outcome is not None and trial.best is not None:
            search.add_evaluated_point(config.optuna_values(trial.values), trial.best[1])
    return search


class SignsOfLife:
    """Signs of the trials that run now: their processes write session.json every second.

    Only this process's own time counts, because the clocks of other hosts may differ, and clocks are set.
    """

    def __init__(self, sweep_dir: Path) -> None:
        self.trials = sweep_dir / TRIALS
        # folder -> content, and when it was first seen; what is there at the beginning is of an earlier session
        self._seen = {folder: (_read(folder), -math.inf) for folder in self.trials.glob("trial-*")}

    def running(self) -> list[Path]:
        """Return the folders of the trials that have no outcome and wrote session.json less than ALIVE_S ago."""
        now = time.monotonic()
        for folder in self.trials.glob("trial-*"):
            content, before = _read(folder), self._seen.get(folder, (None, -math.inf))
            if content != before[0]:
                self._seen[folder] = content, now
        return [
            folder
            for folder, (_, since) in self._seen.items()
            if now - since < ALIVE_S and not (folder / OUTCOME).exists()
        ]


def _read(folder: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        return (folder / SESSION).read_bytes()
    return None


def _session(sweep_dir: Path, stop_file: Path) -> Any:
    """Return an object that Tune asks after each of its steps whether the sweep ends, and tells how trials end."""
    from ray.tune import Callback, Stopper

    signs = SignsOfLife(sweep_dir)

    class Session(Callback, Stopper):
        """Session that writes the outcome of a trial whose own process cannot: Tune ended it, or it died.

        Once the stop file is there, it writes none, and ends the sweep when all trials that were training have stopped.
        """

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return stop_file.exists() and not any((each / "metrics").exists() for each in signs.running())

        def _trial(self, trial: Any) -> Trial | None:
            number = (trial.last_result or {}).get("number", trial.config.get("number"))
            return next((t for t in read_trials(sweep_dir) if t.number == number), None)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, STOPPED, seconds=(trial.last_result or {}).get("seconds"))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, FAILED, lost=True, message=f"its process was lost; Tune's account: {trial.error_file}")

        def _end(self, trial: Any, status: str, **more: Any) -> None:
            found = self._trial(trial)
            if found is not None and found.outcome is None and not stop_file.exists():
                end_trial(found, status, **more)

    return Session()
