"""Session with Ray: starting or joining it, counting its nodes' resources, and the decision between CPUs and GPUs."""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from elmo_ray.config import ClusterConfig, DeviceConfig, WorkersConfig
from elmo_ray.errors import ClusterError, ConfigError, TrainingError, short
from elmo_ray.machine import signals_blocked, starting_in_background

logger = logging.getLogger(__name__)

Device = Literal["cpu", "gpu"]

TORCH_NAMES = {"cpu": "cpu", "gpu": "cuda"}
"""Torch's names of the devices."""

_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # else print() in a worker would come twice
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # The raylet's warning of many small processes, which a sweep has on purpose, would come on stdout and in colour.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "PYTHON worker processes have been started",
    # a dead worker is noticed, and a report taken, in one second instead of two
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # the notice that a host will be taken away is seen in two seconds instead of five
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    # limit for the report of a checkpoint, in which all workers take part
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",
}


# ---------------------------------------------------------------- starting and joining


def set_environment() -> None:
    """Set the variables that Ray reads when it is imported, where the user has not set them."""
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def ensure_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine for this process alone; do nothing in a session.

    Raises ConfigError if nothing answers at RAY_ADDRESS, or if Ray cannot write its own files.
    """
    set_environment()
    address = os.environ.get("RAY_ADDRESS") or None
    if address is None and "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        # With the mode unset, Ray needs a token for a cluster of its own and would write one to the home directory.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        return
    if address is not None:
        _check_address(address)
        try:
            ray.init(logging_level="ERROR", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster can be joined: {last_line(error)}") from None
        _report_lost_head(ray.get_runtime_context().gcs_address)
        return
    # Ray gives its workers a niceness of 15, so that its own processes would take the cores from training at any time.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Nothing is preempted here, and the watcher is one more process, which logs a meaningless error.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    options = {"address": "local", "object_store_memory": min(1 << 30, memory // 5)}
    # Batch systems and `kill -- -PGID` send SIGTERM to all processes of a run at once. Ray would end by it before the
    # last checkpoint is written; this process, which handles it, ends Ray afterwards. Ray keeps Ctrl-C from itself.
    with starting_in_background(), signals_blocked(signal.SIGTERM):
        for tries_left in (2, 1, 0):
            try:
                ray.init(**options, logging_level="ERROR", log_to_driver=False)
                break
            except Exception as error:
                ray.shutdown()
                if _is_of_files(error):
                    raise ConfigError(
                        f"Ray cannot keep its files where temporary files are: {last_line(error)}; set RAY_TMPDIR to a "
                        "folder of this machine that can be written, whose path has at most 40 characters"
                    ) from None
                # Ray gives its own processes 30 s, which a busy machine may need for their imports alone.
                if not tries_left:
                    raise TrainingError(
                        f"Ray did not start on this machine in three tries: {last_line(error)}; try again when the "
                        "machine is less busy, or see the logs in /tmp/ray/session_latest/logs"
                    ) from None
                logger.warning("Ray did not start (%s); trying once more", last_line(error))
    _report_lost_head(ray.get_runtime_context().gcs_address)


_OF_FILES = (
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT,
)  # fmt: skip


def _is_of_files(error: Exception) -> bool:
    """Return whether a start of Ray failed for want of a folder, and not of processes or files that may be open."""
    # Ray's own check of the paths of its sockets has no number
    return isinstance(error, OSError) and (error.errno in _OF_FILES or "AF_UNIX path length" in str(error))


_LOST_HEAD = """
import select, socket, sys
address, every, warning, error = sys.argv[1:]
host, _, port = address.rpartition(":")
def is_silent():
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError:
        return True
silent = False
while not select.select([sys.stdin], [], [], float(every))[0]:
    before, silent = silent, is_silent()
    if silent and not before:
        print(warning, file=sys.stderr, flush=True)
if not sys.stdin.buffer.read(1) and (silent or is_silent()):
    print(error, file=sys.stderr)
"""
"""Program that looks every some seconds whether the head answers, until its parent ends.

A byte on stdin says that the parent ends by itself.
"""


def _report_lost_head(address: str) -> None:
    """Let a small process say what happened if the Ray head at `address` takes this process with it."""
    # Ray ends a process that has not reached the head for a minute, within C++: no Python code can run there any more.
    # The lines are written before that and at once, as a container or a batch job ends with its command.
    warning = f"warning: the Ray head at {address} does not answer; Ray ends this command where that lasts for a minute"
    error = (
        f"error: the Ray head at {address} is lost, and this command with it; when Ray runs again, give the same "
        "command with --resume, if it has this flag"
    )
    watcher = subprocess.Popen(
        [sys.executable, "-S", "-c", _LOST_HEAD, address, "10", warning, error],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for this process alone
    )

    def end() -> None:
        with contextlib.suppress(OSError):
            watcher.communicate(b".")

    atexit.register(end)


@contextlib.contextmanager
def losses_as_errors(advice: str) -> Iterator[None]:
    """Raise ClusterError in place of what Ray raises where it has lost the node of this process, or its connection.

    advice: for the message. What a task or an actor raises is let through.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        host = socket.gethostname()
        raise ClusterError(
            f"Ray on host {host} is lost, and this command with it ({last_line(error)}); {advice}"
        ) from error


def in_cluster() -> bool:
    """Return True in a Ray job, in a session, and where RAY_ADDRESS names a cluster, so that other machines may work.

    Starts nothing and does not import Ray.
    """
    if os.environ.get("RAY_ADDRESS"):
        return True
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def last_line(error: BaseException) -> str:
    """Return the class and the last line of an exception, shortened to 240 characters."""
    # Ray puts the remote tracebacks before that line.
    lines = [line for line in str(error).splitlines() if line.strip()]
    return short(f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__, 240)


def _check_address(address: str) -> None:
    """Raise ConfigError if nothing listens at host:port; `ray.init` would try for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        return
    if ":" in host and not host.startswith("["):
        raise ConfigError(f"RAY_ADDRESS={address}: an IPv6 address stands in brackets, as in [{host}]:{port}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=20).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster can be joined: {error}") from None


# ---------------------------------------------------------------- nodes


@dataclass(frozen=True)
class Node:
    """Machine of the cluster, with the numbers of CPUs and whole GPUs that Ray counts on it."""

    cpus: float
    gpus: int


def alive_nodes() -> list[Node]:
    """Return the nodes of the cluster that are alive; starts or joins Ray first."""
    ensure_ray()
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(node.get("CPU", 0.0), int(node.get("GPU", 0.0))) for node in resources]


def lost_hosts() -> list[str]:
    """Return the names and addresses of hosts that had a node in this cluster and have none any more."""
    import ray

    nodes = ray.nodes()
    here = {node["NodeManagerAddress"] for node in nodes if node["Alive"]}
    return sorted({describe_host(node) for node in nodes if node["NodeManagerAddress"] not in here})


def describe_host(node: dict[str, Any]) -> str:
    """Return the name and address of a node of `ray.nodes()`, such as `host nodeb (10.1.0.3)`."""
    return f"host {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def free_cpus() -> float:
    """Return the number of CPUs that are not reserved now; starts or joins Ray first."""
    ensure_ray()
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


def describe_cpus(nodes: Sequence[Node]) -> str:
    """Return the CPUs of all nodes and of each, for a message, such as `6 on 2 nodes (4, 2)`."""
    each = ", ".join(f"{node.cpus:g}" for node in nodes)
    return f"{sum(node.cpus for node in nodes):g} on {len(nodes)} node{'s' if len(nodes) != 1 else ''} ({each})"


# ---------------------------------------------------------------- devices


def local_device(cluster: DeviceConfig) -> Device:
    """Return the device for work in this process. Raises ConfigError for cluster.device=gpu where torch sees none."""
    if cluster.device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("cluster.device=gpu: torch sees no GPU on this machine; set cluster.device=cpu")
    return "gpu" if cluster.device != "cpu" and torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def in_this_process(cluster: DeviceConfig) -> Iterator[str]:
    """Yield torch's name of the local device; torch uses cluster.threads threads, where set, until the block ends."""
    device, before = TORCH_NAMES[local_device(cluster)], torch.get_num_threads()
    try:
        torch.set_num_threads(cluster.threads or before)
        yield device
    finally:
        torch.set_num_threads(before)


def device_for(cluster: DeviceConfig, workers: int) -> Device:
    """Return the device of `workers` processes that run side by side; starts or joins Ray first.

    Raises ConfigError where cluster.device=gpu and the cluster has fewer GPUs than workers.
    """
    if cluster.device == "cpu":
        return "cpu"
    gpus = sum(node.gpus for node in alive_nodes())
    if gpus >= workers:
        return "gpu"
    message = f"cluster.workers={shown_workers(cluster)} needs a GPU each, and the cluster has {gpus}"
    if cluster.device == "gpu":
        raise ConfigError(f"cluster.device=gpu: {message}; lower cluster.workers or set cluster.device=cpu")
    if gpus:
        logger.warning("cluster.device=auto: %s: using CPUs", message)
    return "cpu"


# ---------------------------------------------------------------- placement


def fits(nodes: Sequence[Node], device: Device, workers: int, cpus: float, task_cpus: float = 0.0) -> bool:
    """Return True if the nodes can hold all `workers`, each with `cpus` CPUs and, for the device `gpu`, one GPU.

    task_cpus: CPUs of the data task that each worker has, which may be on another node than its worker.
    """
    # tasks[k]: largest number of data tasks that fit beside k workers on the nodes so far
    tasks: list[float] = [0.0] + [-math.inf] * workers
    for node in nodes:
        most = min(_places(node, device, cpus), workers)
        free = [int((node.cpus - k * cpus) / task_cpus + 1e-6) if task_cpus else workers for k in range(most + 1)]
        tasks = [max(tasks[n - k] + free[k] for k in range(min(n, most) + 1)) for n in range(workers + 1)]
    return tasks[workers] >= workers


def check_room(cluster: WorkersConfig, workers: int, device: Device = "cpu") -> None:
    """Raise ConfigError unless the cluster's nodes hold `workers` workers at a time; starts or joins Ray first."""
    # a process that no node can hold would wait for ever
    nodes = alive_nodes()
    room = sum(_places(node, device, cluster.cpus_per_worker) for node in nodes)
    if room >= workers:
        return
    have = f"the CPUs of the Ray cluster are {describe_cpus(nodes)}"
    if not room:
        so_many = "so many CPUs beside a GPU" if device == "gpu" else "so many CPUs"
        raise ConfigError(f"cluster.cpus_per_worker={cluster.cpus_per_worker}: no node has {so_many}; {have}")
    raise ConfigError(
        f"cluster.workers={shown_workers(cluster)} x cluster.cpus_per_worker={cluster.cpus_per_worker}: the Ray "
        f"cluster has room for {room}; {have}; lower one of them"
    )


def check_cluster(cluster: ClusterConfig) -> Device:
    """Return the device of training's workers; starts or joins Ray unless cluster.workers is 0.

    Raises ConfigError, with the numbers, where this machine or the cluster cannot hold all workers and their data
    tasks.
    """
    # A data task that is held back keeps its CPU: with too few of them a rank could wait for ever for its data.
    if cluster.workers == 0:
        return local_device(cluster)
    nodes = alive_nodes()
    n, worker, task = cluster.fewest_workers, cluster.cpus_per_worker, cluster.data_cpus
    device = device_for(cluster, n)
    if cluster.elastic:  # a worker and its task are on one node
        worker, task = worker + task, 0.0
    request = (
        f"cluster.workers={shown_workers(cluster)} x (cluster.cpus_per_worker={cluster.cpus_per_worker} + "
        f"cluster.data_cpus={cluster.data_cpus})"
    )
    needed, have = n * (worker + task), describe_cpus(nodes)
    if needed > sum(node.cpus for node in nodes) + 1e-6:
        raise ConfigError(f"{request} needs {needed:g} CPUs, the Ray cluster has {have}; lower one of them")
    if not fits(nodes, device, n, worker, task):
        raise ConfigError(
            f"{request} cannot be placed: the CPUs are {have}, and a worker or data task must be on one node"
        )
    for pause in (0.0, 0.2, 0.8):  # Ray counts the CPUs of tasks that have just ended a moment later
        time.sleep(pause)
        free = free_cpus()
        if needed <= free + 1e-6:
            break
    else:
        logger.warning("%s: only %g CPUs are free; training waits for others to end", request, free)
    return device


def shown_workers(cluster: WorkersConfig) -> str:
    """Return cluster.workers as a user writes it."""
    workers: int | tuple[int, int] = cluster.workers
    return str(list(workers)) if isinstance(workers, tuple) else str(workers)


def _places(node: Node, device: Device, cpus: float) -> int:
    """Return the number of workers with `cpus` CPUs, and a GPU where the device is `gpu`, that a node holds."""
    places = int(node.cpus / cpus + 1e-6)
    return min(places, node.gpus) if device == "gpu" else places
