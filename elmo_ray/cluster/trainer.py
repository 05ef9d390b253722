"""Running of the training loop on Ray Train or in this process, with the checks before and the errors after it."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from elmo_ray import errors, storage
from elmo_ray.cluster.hosts import RunFiles, versions
from elmo_ray.cluster.logs import LogFollower, log_to_run
from elmo_ray.cluster.preemption import SaveRequests, announced_end
from elmo_ray.cluster.session import (
    TORCH_NAMES,
    Device,
    alive_nodes,
    check_cluster,
    describe_cpus,
    last_line,
    losses_as_errors,
    lost_hosts,
    set_environment,
    shown_workers,
)
from elmo_ray.cluster.stopping import STOP_FILE, for_seconds, in_thread, make_stop_file, stop_check, stop_on_signals
from elmo_ray.config import ClusterConfig
from elmo_ray.data.encode import ThreadSource
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import ElmoRayError, TrainingError
from elmo_ray.machine import available_cores, leave_background
from elmo_ray.training.loop import train
from elmo_ray.training.plan import TrainPlan, Worker

logger = logging.getLogger(__name__)
TrainFunction = Callable[[TrainPlan, Worker], dict[str, Any]]
T = TypeVar("T")

_START_TIMEOUT_S = "20"
"""Seconds for Ray to find room for the workers, without the start of their processes; Ray's own default is 60.

An attempt to use a host that has just been lost costs this much.
"""

_START_S = 180.0
"""Seconds, at least, in which Ray tries to find room for the workers before it gives up."""


# ---------------------------------------------------------------- running


def fit(plan: TrainPlan, function: TrainFunction = train, device: Device | None = None) -> dict[str, Any]:
    """Train by `plan`, on Ray or (cluster.workers: 0) in this process, and return the result of rank 0.

    device: the result of `check_cluster`, where it was called already. The first SIGINT or SIGTERM asks the workers to
    stop at the next step, with a checkpoint; a second one ends the process. Lost workers are restarted up to
    cluster.max_failures times. Raises ElmoRayErrors of the workers, which are never retried, and TrainingError if
    workers or the cluster fail too often.
    """
    run_dir = storage.absolute(plan.run_dir)
    stop_file = storage.join(run_dir, STOP_FILE)
    device = device or check_cluster(plan.config.cluster)  # before our own handlers: Ray sets one for SIGTERM
    if plan.config.cluster.workers == 0:
        with stop_on_signals(stop_file) as asked:
            return function(plan, _local_worker(plan, device, asked.is_set))
    logs = LogFollower(run_dir)
    with stop_on_signals(stop_file) as asked:
        made = -math.inf

        def meanwhile() -> None:
            nonlocal made
            logs.poll()
            if asked.is_set() and time.monotonic() - made >= (5.0 if storage.is_uri(stop_file) else 0.0):
                make_stop_file(stop_file)  # repeated, as the storage may have been away
                made = time.monotonic()

        return in_thread(lambda: _fit_on_ray(plan, run_dir, device, function), meanwhile)


def _local_worker(plan: TrainPlan, device: Device, asked: Callable[[], bool]) -> Worker:
    cluster = plan.config.cluster
    if cluster.threads is not None:
        torch.set_num_threads(cluster.threads)
    source = ThreadSource(
        Vocabulary.read(plan.vocabulary_path),
        max_characters=plan.config.model.char_cnn.max_characters,
        on_error=plan.config.data.on_error,
        interrupted=for_seconds(asked),
    )
    return Worker(0, 1, torch.device(TORCH_NAMES[device]), source, lambda step, path, metrics: None, asked)


def _fit_on_ray(plan: TrainPlan, run_dir: str, device: Device, function: TrainFunction) -> dict[str, Any]:
    """Train in workers of Ray Train and return the result of rank 0."""
    from ray.train import TrainingFailedError

    trainer = _trainer(plan, run_dir, device, function)
    try:
        with losses_as_errors("when Ray runs again, give the same command with --resume"):
            returned = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _training_error(error, plan.config.cluster) from error
    if "error" in returned:
        kind = getattr(errors, returned["error"], TrainingError)
        raise kind(returned["message"])
    return dict(returned["result"])


def _trainer(plan: TrainPlan, run_dir: str, device: Device, function: TrainFunction) -> Any:
    """Return the trainer of Ray Train with the workers, checks and restarts that the plan's settings ask for."""
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from elmo_ray.cluster.backend import CheckedTorchConfig
    from elmo_ray.cluster.lost_hosts import LostHosts

    files = RunFiles(run_dir, plan.corpus_path, plan.vocabulary_path)
    expected = files.marks()
    cluster = plan.config.cluster
    # Ray decides how many elastic workers there are and knows nothing of data tasks: the CPUs of a worker's task are
    # reserved with the worker, or workers could take them all and wait for ever.
    cpus = cluster.cpus_per_worker + (cluster.data_cpus if cluster.elastic else 0.0)
    start_timeout_s = float(os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _START_TIMEOUT_S))
    resources = {"CPU": cpus} | ({"GPU": 1.0} if device == "gpu" else {})
    return TorchTrainer(
        _train_worker,
        train_loop_config={
            "plan": plan.to_dict() | {"run_dir": run_dir},
            "vocabulary_sha256": expected[plan.vocabulary_path],
            "function": function,
        },
        torch_config=CheckedTorchConfig(
            timeout_s=math.ceil(cluster.timeout_s),
            network=cluster.network,
            files=files,
            expected=expected,
            versions=versions(),
        ),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=device == "gpu",
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
        ),
        run_config=RunConfig(
            **_ray_storage(run_dir),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures,
                controller_failure_limit=max(3, math.ceil(_START_S / start_timeout_s)),
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            callbacks=[
                _failure_log(run_dir, cluster.max_failures),
                LostHosts(run_dir, f"cluster.workers={shown_workers(cluster)}"),
            ],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _ray_storage(run_dir: str) -> dict[str, Any]:
    """Return the settings of Ray Train's own storage, which all nodes must see."""
    name = storage.base_name(run_dir)
    if not storage.is_uri(run_dir):
        return {"name": name, "storage_path": os.path.dirname(run_dir)}
    import pyarrow.fs

    system, path = storage.file_system(run_dir)
    arrow = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system))
    return {"name": name, "storage_path": path.rpartition("/")[0], "storage_filesystem": arrow}


def _training_error(error: Exception, cluster: ClusterConfig) -> ElmoRayError:
    cause = getattr(error, "controller_failure", None)
    if isinstance(cause, ElmoRayError):  # of the checks before the workers start
        return cause
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for rank, failure in failures.items():
        logger.error("worker %d: %s", rank, "".join(traceback.format_exception(failure)).rstrip())
    if failures:
        rank, failure = next(iter(failures.items()))
        return TrainingError(
            f"workers failed more than cluster.max_failures={cluster.max_failures} times; last, worker {rank}: "
            f"{last_line(failure)}; --resume goes on from the newest checkpoint"
        )
    failure, lost = getattr(error, "controller_failure", error), lost_hosts()
    # what Ray says of it is a list of possible causes
    reason = "no room was found" if "StartupTimeout" in type(failure).__name__ else last_line(failure)
    after = f" after it lost {', '.join(lost)}" if lost else ""
    return TrainingError(
        f"Ray could not run cluster.workers={shown_workers(cluster)} with "
        f"cluster.cpus_per_worker={cluster.cpus_per_worker}{after}: {reason}; the cluster has "
        f"{describe_cpus(alive_nodes())} CPUs; --resume starts where the run stopped"
    )


def _failure_log(run_dir: str, max_failures: int) -> Any:
    from ray.train import UserCallback

    class FailureLog(UserCallback):
        """Log of lost workers and restarts, of which Ray says nothing; it lives in the controller process."""

        count = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            causes = [getattr(error, "health_check_failure", error) for error in worker_exceptions.values()]
            if any(getattr(error, "preempted", False) for error in causes):
                return  # Ray Train does not count it, and the announcement is in the log
            if self.count == 0:
                with contextlib.suppress(OSError):  # an error here would end training
                    log_to_run(run_dir, None)
            self.count += 1
            lost = "; ".join(f"worker {rank}: {last_line(error)}" for rank, error in worker_exceptions.items())
            then = "restarting all" if self.count <= max_failures else "giving up"
            logging.getLogger("elmo_ray").warning("failure %d of %d: %s: %s", self.count, max_failures, then, lost)

    return FailureLog()


# ---------------------------------------------------------------- in a worker


def _train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train in a worker process of Ray Train; return {"result": ...}, or {"error": class, "message": text}."""
    set_environment()
    storage.expect_answers()
    import ray.exceptions
    import ray.train
    import ray.train.torch

    from elmo_ray.data.ray_source import ray_source

    plan = TrainPlan.from_dict(settings["plan"])
    cluster = plan.config.cluster
    context = ray.train.get_context()
    rank = context.get_world_rank()
    log_to_run(plan.run_dir, rank)
    leave_background()
    # Ray allows one OpenMP thread for each process whatever the machine has.
    torch.set_num_threads(cluster.threads or max(1, available_cores() // context.get_local_world_size()))
    asked = stop_check(plan.run_dir)
    source = functools.partial(
        ray_source,
        vocabulary_path=plan.vocabulary_path,
        vocabulary_sha256=settings["vocabulary_sha256"],
        max_characters=plan.config.model.char_cnn.max_characters,
        data_cpus=0.0 if cluster.elastic else cluster.data_cpus,
        on_error=plan.config.data.on_error,
        interrupted=for_seconds(asked),
    )

    def register(step: int, path: str, metrics: dict[str, Any]) -> None:
        # Not as one of Ray's Checkpoints: the loop finds, checks and prunes them itself. Ray would write a list of them
        # to the storage, where an error (a full disk) ends training, and a missing directory prevents the next start.
        with contextlib.suppress(ray.exceptions.ActorUnschedulableError):
            # That actor of Ray Train starts on the driver's host alone, where nothing starts after a notice of its end.
            ray.train.report({**metrics, "checkpoint_path": path})

    device = ray.train.torch.get_device()
    save_requested = SaveRequests(announced_end()) if rank == 0 else lambda: False
    worker = Worker(rank, context.get_world_size(), device, source, register, asked, save_requested=save_requested)
    try:
        return {"result": settings["function"](plan, worker)}
    except ElmoRayError as error:
        # As a value: Ray would retry after an exception, but a user's mistake stays.
        return {"error": type(error).__name__, "message": str(error)}
