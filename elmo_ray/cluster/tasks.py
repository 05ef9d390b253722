"""Running of one function over many items on Ray, in tasks or in processes that keep a loaded model.

Errors of users are returned as values, so that Ray neither wraps nor logs them; a process that dies is replaced.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from elmo_ray.cluster.session import Device, alive_nodes, losses_as_errors
from elmo_ray.errors import ElmoRayError, short
from elmo_ray.machine import available_cores, leave_background
from elmo_ray.storage import expect_answers

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
    resources = {"num_cpus": cpus, "num_gpus": 1 if device == "gpu" else 0}
    pool = _Pool(_Work(function, threads, share), resources, keep)
    for _ in range(workers):
        pool.add_place()
    failures: Counter[int | None] = Counter()
    todo, done = deque(range(len(items))), 0
    with losses_as_errors(advice), contextlib.closing(pool):
        while done < len(items):
            while todo and pool.has_place:
                number = todo.popleft()
                pool.begin(number, items[number])
            ended = pool.wait(_NEWS_SECONDS)
            if ended is None:
                logger.info("%d of %d tasks are done", done, len(items))
            elif ended.loss is not None:
                failures[ended.number] += 1
                _log_loss(ended.loss, failures[ended.number], max_failures, advice)
                pool.replace(ended)
                if ended.number is not None:
                    todo.appendleft(ended.number)
            else:
                pool.free(ended)
                if ended.mistake is not None:
                    raise ended.mistake
                if ended.number is not None:
                    done += 1
                    yield ended.number, ended.result


@dataclass(frozen=True)
class _Ended:
    """Outcome of what ran in a place: a result, a user's mistake, or the loss of the process.

    number: of the item; None for the start of an actor. actor: None for a task.
    """

    number: int | None
    actor: Any
    result: Any = None
    mistake: ElmoRayError | None = None
    loss: Exception | None = None


class _Pool:
    """Places in the Ray cluster that take one item at a time: tasks, or with `keep` actors, which stay for many items.

    Ray itself retries nothing: it would log nothing about it, and where the node of an actor is gone for good, the item
    would wait for that actor while others are free.
    """

    def __init__(self, work: _Work[Any, Any], resources: dict[str, float], keep: bool):
        import ray

        self._task = ray.remote(_perform).options(**resources, max_retries=0)
        self._actor = ray.remote(_Process).options(**resources, max_restarts=0, max_task_retries=0)
        self._work = ray.put(work)  # once, and not with every task
        self._keep = keep
        self._actors: list[Any] = []
        self._idle: list[Any] = []  # actors; None stands for a task that may begin
        self._running: dict[Any, tuple[int | None, Any]] = {}  # by reference: number of the item, and its actor

    def add_place(self) -> None:
        """Add a task that may begin, or start an actor."""
        if not self._keep:
            self._idle.append(None)
            return
        actor = self._actor.remote(self._work)
        self._actors.append(actor)
        # An actor gets items only after it has answered: one that finds no room yet lets no item wait.
        self._running[actor.ready.remote()] = None, actor

    @property
    def has_place(self) -> bool:
        """Return whether an item can begin."""
        return bool(self._idle)

    def begin(self, number: int, item: Any) -> None:
        """Begin an item in an idle place."""
        actor = self._idle.pop()
        begun = self._task.remote(self._work, item) if actor is None else actor.perform.remote(item)
        self._running[begun] = number, actor

    def wait(self, timeout_s: float) -> _Ended | None:
        """Return the next outcome, or None if there is none in time. A defect of the function is raised."""
        import ray

        ready, _ = ray.wait(list(self._running), timeout=timeout_s)
        if not ready:
            return None
        number, actor = self._running.pop(ready[0])
        try:
            result, mistake = ray.get(ready[0])
        except ray.exceptions.RayTaskError:  # a defect of the function
            raise
        except ray.exceptions.RayError as error:
            return _Ended(number, actor, loss=error)
        return _Ended(number, actor, result, mistake)

    def free(self, ended: _Ended) -> None:
        """Let the place take another item."""
        self._idle.append(ended.actor)

    def replace(self, ended: _Ended) -> None:
        """Put a new place there for one that has lost its process."""
        import ray

        if ended.actor is not None:
            ray.kill(ended.actor)  # it may still be alive, but out of reach
        self.add_place()

    def close(self) -> None:
        """Cancel what still runs, and end the actors."""
        import ray

        if not ray.is_initialized():
            return  # else both calls would start it again
        for reference, (_, actor) in self._running.items():
            if actor is None:
                # by force: an interrupt can be lost while the process imports, and a long C call does not see it
                ray.cancel(reference, force=True)
        for actor in self._actors:
            ray.kill(actor)


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
    expect_answers()
    # Ray sets one OpenMP thread for each process, whatever the machine has.
    torch.set_num_threads(work.threads or max(1, available_cores() // work.share))
    try:
        return work.function(item), None
    except ElmoRayError as mistake:
        return None, mistake
