"""Starting or joining Ray, and what a run may take of the cluster."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Sequence
from typing import Literal

import torch

from elmo_ray.config import ClusterConfig
from elmo_ray.errors import ConfigError
from elmo_ray.machine import starting_in_background

logger = logging.getLogger(__name__)

Device = Literal["cpu", "gpu"]

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
            raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster can be joined: {first_line(error)}") from None
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
            logger.warning("Ray did not start (%s); trying once more", first_line(error))
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
        raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster can be joined: {error}") from None


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


def first_line(error: BaseException) -> str:
    """An exception in one line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
    return text if len(text) <= 240 else text[:240] + "..."
