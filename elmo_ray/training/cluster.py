"""Runs the training loop on Ray Train, or in this process: resources checked first, errors and signals brought home."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch

from elmo_ray import errors, storage
from elmo_ray.config import ClusterConfig
from elmo_ray.data.encode import thread_source
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import ConfigError, ElmoRayError, TrainingError
from elmo_ray.machine import available_cores, leave_background, starting_in_background
from elmo_ray.training.loop import train
from elmo_ray.training.plan import TrainPlan, Worker
from elmo_ray.training.relay import LogRelay, log_to_run
from elmo_ray.training.stopping import STOP_FILE, in_thread, leave_note, stop_check, stop_on_signals

logger = logging.getLogger(__name__)

Device = Literal["cpu", "gpu"]
TrainFunction = Callable[[TrainPlan, Worker], dict[str, Any]]
T = TypeVar("T")

_START_FAILURES = 3
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # print() in a worker would come twice
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # a dead worker is noticed, and a report taken, in one second instead of two
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # of the report of a checkpoint, in which all workers take part
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",
}


# ---------------------------------------------------------------- the cluster


def ensure_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine that only this process can use; no-op in a session.

    Raises ConfigError if nothing answers at RAY_ADDRESS.
    """
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS") or None
    if address is None and "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        # With the mode unset Ray asks for a token on a cluster of its own, and would write one to the home directory.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        return
    if address is not None:
        _check_address(address)
        try:
            ray.init(logging_level="ERROR", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster can be joined there: {_line(error)}") from None
        return
    # Ray gives its workers a niceness of 15, so that its own processes would take the cores from training at any time.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Nothing is preempted here, and its watcher is a process more that logs an error of no meaning.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    options = {"address": "local", "object_store_memory": min(1 << 30, memory // 5)}
    with starting_in_background():
        try:
            ray.init(**options, logging_level="ERROR", log_to_driver=False)
        except Exception as error:
            # Ray gives its own processes 30 s, which a busy machine may need for their imports alone.
            logger.warning("Ray did not start (%s); trying once more", _line(error))
            ray.shutdown()
            ray.init(**options, logging_level="ERROR", log_to_driver=False)


def _check_address(address: str) -> None:
    """Raise ConfigError if nothing listens at host:port, for which `ray.init` would try for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=20).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster can be joined there: {error}") from None


def check_resources(cluster: ClusterConfig) -> Device:
    """The device that workers will use, if the cluster can hold them and their data tasks; call `ensure_ray` first.

    A data task that is held back keeps its CPU: with less than this, a rank could wait for ever for its data. Raises
    ConfigError with the numbers, for the sum and for the nodes.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    device = _device(cluster, sum(node.get("GPU", 0.0) for node in nodes))
    cpus = [node.get("CPU", 0.0) for node in nodes]
    n, worker, task = cluster.fewest_workers, cluster.cpus_per_worker, cluster.data_cpus
    if cluster.elastic:  # a worker and its task are on one node
        worker, task = worker + task, 0.0
    request = (
        f"cluster.workers={_shown(cluster)} x (cluster.cpus_per_worker={cluster.cpus_per_worker} + "
        f"cluster.data_cpus={cluster.data_cpus})"
    )
    have = f"{sum(cpus):g} on {len(nodes)} node{'s' if len(nodes) != 1 else ''} ({', '.join(f'{c:g}' for c in cpus)})"
    if n * (worker + task) > sum(cpus) + 1e-6:
        raise ConfigError(
            f"{request} needs {n * (worker + task):g} CPUs, the Ray cluster has {have}; lower one of them"
        )
    gpus = [int(node.get("GPU", 0.0)) if device == "gpu" else n for node in nodes]
    if not fits(cpus, gpus, n, worker, task):
        raise ConfigError(
            f"{request} cannot be placed: the CPUs are {have}, and a worker or data task must be on one node"
        )
    for pause in (0.0, 0.2, 0.8):  # CPUs of tasks that have just ended are told of a moment later
        time.sleep(pause)
        free = ray.available_resources().get("CPU", 0.0)
        if n * (worker + task) <= free + 1e-6:
            break
    else:
        logger.warning("%s: only %g CPUs are free; training waits for others to end", request, free)
    return device


def _device(cluster: ClusterConfig, gpus: float) -> Device:
    if cluster.device == "cpu" or (cluster.device == "auto" and gpus == 0):
        return "cpu"
    if gpus >= cluster.fewest_workers:
        return "gpu"
    message = f"cluster.workers={_shown(cluster)} needs a GPU each, and the cluster has {gpus:g}"
    if cluster.device == "gpu":
        raise ConfigError(f"cluster.device=gpu: {message}; lower cluster.workers or set cluster.device=cpu")
    logger.warning("cluster.device=auto: %s: training on CPUs", message)
    return "cpu"


def _shown(cluster: ClusterConfig) -> str:
    return f"[{cluster.fewest_workers}, {cluster.most_workers}]" if cluster.elastic else str(cluster.workers)


def fits(cpus: Sequence[float], gpus: Sequence[int], workers: int, worker: float, task: float) -> bool:
    """Whether some placement holds `workers` workers (a worker on one node, with a GPU if counted) and its task."""
    # tasks[k]: most data tasks that fit beside k workers on the nodes so far
    tasks: list[float] = [0.0] + [-math.inf] * workers
    for cpu, gpu in zip(cpus, gpus, strict=True):
        most = min(int(cpu / worker + 1e-6), gpu, workers)
        room = [int((cpu - k * worker) / task + 1e-6) if task else workers for k in range(most + 1)]
        tasks = [max(tasks[n - k] + room[k] for k in range(min(n, most) + 1)) for n in range(workers + 1)]
    return tasks[workers] >= workers


# ---------------------------------------------------------------- running


def fit(plan: TrainPlan, function: TrainFunction = train, device: Device | None = None) -> dict[str, Any]:
    """Train as `plan` says, on Ray or (cluster.workers: 0) here; the result of rank 0.

    device: what `check_cluster` said, where it has been asked already.
    The first SIGINT or SIGTERM asks the workers to stop at the next step, with a checkpoint; a second one ends the
    process. Lost workers are restarted up to cluster.max_failures times. ElmoRayErrors of the workers are raised here,
    and never retried; TrainingError if workers or the cluster fail too often.
    """
    run_dir = storage.absolute(plan.run_dir)
    stop_file = storage.join(run_dir, STOP_FILE)
    device = device or check_cluster(plan.config.cluster)  # before our handlers: Ray sets one for SIGTERM
    if plan.config.cluster.workers == 0:
        worker = _local_worker(plan, device)
        with stop_on_signals(stop_file) as asked:
            worker.stop_requested = asked.is_set
            return function(plan, worker)
    relay = LogRelay(run_dir)
    with stop_on_signals(stop_file) as asked:
        left = -math.inf

        def meanwhile() -> None:
            nonlocal left
            relay.poll()
            if asked.is_set() and time.monotonic() - left >= (5.0 if storage.is_uri(stop_file) else 0.0):
                leave_note(stop_file)  # again and again: storage may have been away
                left = time.monotonic()

        return in_thread(lambda: _fit_on_ray(plan, run_dir, device, function), meanwhile)


def check_cluster(cluster: ClusterConfig) -> Device:
    """The device that workers will use; starts or joins Ray where `cluster` needs it.

    Raises ConfigError where this machine or cluster has not what is asked for.
    """
    if cluster.workers == 0:
        if cluster.device == "gpu" and not torch.cuda.is_available():
            raise ConfigError("cluster.device=gpu: torch sees no GPU on this machine; set cluster.device=cpu")
        return "gpu" if cluster.device != "cpu" and torch.cuda.is_available() else "cpu"
    ensure_ray()
    return check_resources(cluster)


def _local_worker(plan: TrainPlan, device: Device) -> Worker:
    cluster = plan.config.cluster
    if cluster.threads is not None:
        torch.set_num_threads(cluster.threads)
    source = functools.partial(
        thread_source,
        vocabulary=Vocabulary.read(plan.vocabulary_path),
        max_characters=plan.config.model.char_cnn.max_characters,
        on_error=plan.config.data.on_error,
    )
    place = torch.device("cuda" if device == "gpu" else "cpu")
    return Worker(0, 1, place, source, lambda step, path, metrics: None, lambda: False)


def _fit_on_ray(plan: TrainPlan, run_dir: str, device: Device, function: TrainFunction) -> dict[str, Any]:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = plan.config.cluster
    # Ray decides how many elastic workers there are and knows nothing of data tasks: the CPUs of a worker's task are
    # reserved with the worker, or workers could take them all and wait for ever.
    cpus = cluster.cpus_per_worker + (cluster.data_cpus if cluster.elastic else 0.0)
    resources = {"CPU": cpus} | ({"GPU": 1.0} if device == "gpu" else {})
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "plan": plan.to_dict() | {"run_dir": run_dir},
            "vocabulary_sha256": Vocabulary.read(plan.vocabulary_path).sha256,
            "function": function,
        },
        torch_config=TorchConfig(timeout_s=math.ceil(cluster.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=device == "gpu",
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
        ),
        run_config=RunConfig(
            **_ray_storage(run_dir),
            failure_config=FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=_START_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            callbacks=[_failure_log(run_dir, cluster.max_failures)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        returned = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _training_error(error, cluster) from error
    if "error" in returned:
        kind = getattr(errors, returned["error"], TrainingError)
        raise kind(returned["message"])
    return dict(returned["result"])


def _ray_storage(run_dir: str) -> dict[str, Any]:
    """Where Ray Train keeps its own notes, which all nodes must see."""
    name = storage.base_name(run_dir)
    if not storage.is_uri(run_dir):
        return {"name": name, "storage_path": os.path.dirname(run_dir)}
    import pyarrow.fs

    system, path = storage.file_system(run_dir)
    arrow = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system))
    return {"name": name, "storage_path": path.rpartition("/")[0], "storage_filesystem": arrow}


def _training_error(error: Exception, cluster: ClusterConfig) -> TrainingError:
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for rank, failure in failures.items():
        logger.error("worker %d: %s", rank, "".join(traceback.format_exception(failure)).rstrip())
    if failures:
        rank, failure = next(iter(failures.items()))
        return TrainingError(
            f"workers failed more than cluster.max_failures={cluster.max_failures} times; last, worker {rank}: "
            f"{_line(failure)}; --resume goes on from the newest checkpoint"
        )
    return TrainingError(
        f"Ray could not run cluster.workers={_shown(cluster)} with cluster.cpus_per_worker={cluster.cpus_per_worker}: "
        f"{_line(getattr(error, 'controller_failure', error))}"
    )


def _failure_log(run_dir: str, max_failures: int) -> Any:
    from ray.train import UserCallback

    class FailureLog(UserCallback):
        """Says in the driver's terminal what Ray does in silence; lives in the controller process."""

        count = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if self.count == 0:
                with contextlib.suppress(OSError):  # an error here would end training
                    log_to_run(run_dir, None)
            self.count += 1
            lost = "; ".join(f"worker {rank}: {_line(error)}" for rank, error in worker_exceptions.items())
            then = "restarting all" if self.count <= max_failures else "giving up"
            logging.getLogger("elmo_ray").warning("failure %d of %d: %s: %s", self.count, max_failures, then, lost)

    return FailureLog()


def _line(error: BaseException) -> str:
    """An exception in one line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
    return text if len(text) <= 240 else text[:240] + "..."


# ---------------------------------------------------------------- in a worker


def _train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs in each worker process."""
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray.train
    import ray.train.torch

    from elmo_ray.data.feed import ray_source

    plan = TrainPlan.from_dict(settings["plan"])
    cluster = plan.config.cluster
    context = ray.train.get_context()
    rank = context.get_world_rank()
    log_to_run(plan.run_dir, rank)
    leave_background()
    # Ray allows one OpenMP thread for each process whatever the machine has.
    torch.set_num_threads(cluster.threads or max(1, available_cores() // context.get_local_world_size()))
    source = functools.partial(
        ray_source,
        vocabulary_path=plan.vocabulary_path,
        vocabulary_sha256=settings["vocabulary_sha256"],
        max_characters=plan.config.model.char_cnn.max_characters,
        data_cpus=0.0 if cluster.elastic else cluster.data_cpus,
        on_error=plan.config.data.on_error,
    )

    def register(step: int, path: str, metrics: dict[str, Any]) -> None:
        # Not as a Checkpoint of Ray's: the loop finds, checks and prunes them itself, and Ray would write a list of
        # them to the storage, where an error (a full disk) ends training and a missing directory the next start.
        ray.train.report({**metrics, "checkpoint_path": path})

    device = ray.train.torch.get_device()
    worker = Worker(rank, context.get_world_size(), device, source, register, stop_check(plan.run_dir))
    try:
        return {"result": settings["function"](plan, worker)}
    except ElmoRayError as error:
        # As a value: Ray would retry an exception, and a user's mistake does not go away.
        return {"error": type(error).__name__, "message": str(error)}
