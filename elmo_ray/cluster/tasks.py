"""Running of one function over many items on Ray, in tasks or in processes that keep a loaded model.

Errors of users are returned as values, so that Ray neither wraps nor logs them; a process that dies is replaced.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from elmo_ray.cluster.session import Device, alive_nodes
from elmo_ray.errors import ElmoRayError, short
from elmo_ray.machine import available_cores, leave_background

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_NEWS_SECONDS = 20.0
"""Time without a finished task after which the number of finished ones is logged."""


@dataclass(frozen=True)
class _Work(Generic[T, R]):
    """Work of every process. threads: torch's; None for its share. share: largest number of processes on a machine."""

    function: Callable[[T], R]
    threads: int | None
    share: int


def run_tasks(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    workers: int,
    cpus: float,
    device: Device = "cpu",
    threads: int | None = None,
    max_failures: int = 3,
    keep: bool = False,
    advice: str = "run it again",
) -> Generator[tuple[int, R], None, None]:
    """Yield (number of the item, `function(item)`) in the order in which they are done; starts or joins Ray first.

    workers: number of items that are worked on at a time; a result that the caller has not taken counts as one of them,
        so that results never pile up.
    cpus: number of CPUs that Ray reserves for each, with a GPU where `device` is `gpu`.
    threads: number of torch's threads in a process; None for its share of the machine's cores.
    keep: keep each process for many items, with its copy of `function`, which can hold a loaded model.
    max_failures: number of times that an item is begun again after it lost its process. advice: for the error's message
        after that.

    Raises an ElmoRayError of `function` as it is, and one with `advice` for an item that lost its process too often;
    the remaining tasks are then cancelled. Other exceptions arrive as Ray's RayTaskError.
    """
    workers = min(workers, len(items))
    share = -(-workers // len(alive_nodes()))
    import ray

    resources = {"num_cpus": cpus, "num_gpus": 1 if device == "gpu" else 0}
    # Ray itself retries nothing: it would log nothing about it, and where the node of an actor is gone for good, the
    # item would wait for that actor while others are free.
    task = ray.remote(_perform).options(**resources, max_retries=0)
    actor = ray.remote(_Process).options(**resources, max_restarts=0, max_task_retries=0)
    work = ray.put(_Work(function, threads, share))  # once, and not with every task
    running: dict[Any, tuple[int | None, Any]] = {}
    processes: list[Any] = []

    def start_process() -> None:
        process = actor.remote(work)
        processes.append(process)
        # A process gets items only after it has answered: one that finds no room yet lets no item wait.
        running[process.ready.remote()] = None, process

    idle: list[Any] = []  # processes; None stands for a task that may begin
    for _ in range(workers):
        if keep:
            start_process()
        else:
            idle.append(None)
    failures: Counter[int | None] = Counter()
    todo, done = deque(range(len(items))), 0
    try:
        while done < len(items):
            while todo and idle:
                first, process = todo.popleft(), idle.pop()
                item = items[first]
                begun = task.remote(work, item) if process is None else process.perform.remote(item)
                running[begun] = first, process
            ready, _ = ray.wait(list(running), timeout=_NEWS_SECONDS)
            if not ready:
                logger.info("%d of %d tasks are done", done, len(items))
            for reference in ready:
                number, process = running.pop(reference)
                try:
                    result, mistake = ray.get(reference)
                except ray.exceptions.RayTaskError:  # a defect of the function
                    raise
                except ray.exceptions.RayError as error:
                    failures[number] += 1
                    _log_loss(error, failures[number], max_failures, advice)
                    if number is not None:
                        todo.appendleft(number)
                    if process is None:
                        idle.append(None)
                    else:
                        ray.kill(process)  # it may still be alive, but out of reach
                        start_process()
                    continue
                idle.append(process)
                if mistake is not None:
                    raise mistake
                if number is not None:
                    done += 1
                    yield number, result
    finally:
        if ray.is_initialized():  # else both calls would start it again
            for reference, (_, process) in running.items():
                if process is None:
                    # by force: an interrupt can be lost while the process imports, and a long C call does not see it
                    ray.cancel(reference, force=True)
            for process in processes:
                ray.kill(process)


def _log_loss(error: Exception, count: int, max_failures: int, advice: str) -> None:
    """Log the loss of a process, or raise ElmoRayError if the item has lost more than `max_failures`."""
    reason = f"{type(error).__name__}: {short(str(error), 300)}"
    if count > max_failures:
        raise ElmoRayError(
            f"a task lost its worker process more than cluster.max_failures={max_failures} times; is there enough "
            f"memory? {advice}; the last loss: {reason}"
        ) from None
    logger.warning("failure %d of %d: a task lost its worker process and begins again: %s", count, max_failures, reason)


# ---------------------------------------------------------------- in a worker process


class _Process:
    """Actor that keeps the function, with the model it has loaded, for as long as there are items."""

    def __init__(self, work: _Work[Any, Any]) -> None:
        self.work = work

    def ready(self) -> tuple[None, None]:
        return None, None

    def perform(self, item: Any) -> tuple[Any, ElmoRayError | None]:
        return _perform(self.work, item)


def _perform(work: _Work[T, R], item: T) -> tuple[R | None, ElmoRayError | None]:
    """Return (result, None), or (None, the user's mistake)."""
    leave_background()
    # Ray sets one OpenMP thread for each process, whatever the machine has.
    torch.set_num_threads(work.threads or max(1, available_cores() // work.share))
    try:
        return work.function(item), None
    except ElmoRayError as mistake:
        return None, mistake
