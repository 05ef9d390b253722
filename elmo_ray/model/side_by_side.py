"""Independent parts of a computation side by side on a CPU's cores, such as the two directions of a biLM.

The directions share no recurrent state, so each may have half of the threads for a whole window. Parting every small
product between all threads instead costs a meeting of the threads for each, hundreds in a step, and a thread that the
operating system takes away makes all wait.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch

logger = logging.getLogger(__name__)

_SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread gives Python's lock to one that waits for it."""

_pools: dict[tuple[int, int], list[ThreadPoolExecutor]] = {}
"""By threads of all together and parts: one thread of Python's for each part."""

_starting = threading.Lock()
_asking = threading.local()

if hasattr(os, "register_at_fork"):  # a forked process has none of the threads, and starts its own
    os.register_at_fork(after_in_child=_pools.clear)


@contextlib.contextmanager
def threads_for_parts() -> Iterator[None]:
    """Within this, parts have the threads of torch, and what is computed between them has one where a part would have
    no more.

    For work that is little for each operation between the parts: waking a second thread costs more than it does.
    """
    threads = torch.get_num_threads()
    if threads >= 4:
        yield
        return
    before = getattr(_asking, "threads", None)
    _asking.threads = before or threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _asking.threads = before


def side_by_side(work: Callable[[int], None], parts: int, device: torch.device) -> None:
    """Calls work(part) for every part, without gradients; side by side where the device is a CPU with threads for it.

    A part's results depend on how many threads its products have, and not on what runs beside it. All parts have ended
    when this ends, also where one raises an error, which is the caller's then.
    """
    if device.type == "cpu" and has_threads_for(parts):
        threads = _threads()
        pools = _pools.get((threads, parts)) or _started(threads, parts)
        # where this thread has as many threads of torch as a part, it takes one itself: a wake less to wait for
        here = torch.get_num_threads() == threads // parts
        futures = [pool.submit(_without_gradients, work, part) for part, pool in enumerate(pools) if part or not here]
        try:
            if here:
                _without_gradients(work, 0)
        finally:
            wait(futures)
        for future in futures:
            future.result()
    else:
        for part in range(parts):
            _without_gradients(work, part)


def has_threads_for(parts: int) -> bool:
    """Whether a CPU's threads are enough for so many parts, or they would come one after the other."""
    return 1 < parts <= _threads()


def _threads() -> int:
    return getattr(_asking, "threads", None) or torch.get_num_threads()


def by_direction(work: Callable[[int | slice], None], directions: int, device: torch.device) -> None:
    """Calls work for each direction, side by side, on a CPU, and elsewhere once for all as one batch."""
    if device.type == "cpu":
        side_by_side(work, directions, device)
    else:
        _without_gradients(work, slice(None))


def _without_gradients(work: Callable[..., None], part: int | slice) -> None:
    with torch.no_grad():  # a thread does not know the mode of the one that asks
        work(part)


def _started(threads: int, parts: int) -> list[ThreadPoolExecutor]:
    with _starting:
        if (threads, parts) in _pools:
            return _pools[threads, parts]
        before = torch.get_num_threads()
        pools = [ThreadPoolExecutor(1, f"part-{part}") for part in range(parts)]
        for pool in pools:
            pool.submit(_take_threads, threads // parts).result()
        # A thread that runs Python, such as the one that loads text, otherwise keeps a part waiting for 5 ms.
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL))
        # what a thread sets is its own from here on, but it is also what new threads take
        torch.set_num_threads(before)
        _pools[threads, parts] = pools
        return pools


def _take_threads(count: int) -> None:
    torch.get_num_threads()  # a thread's first question sets it to the number of the whole process, so ask before
    torch.set_num_threads(count)


def without_lock(function: Callable[..., None]) -> Callable[[], Callable[..., None]]:
    """Asks for `function` as TorchScript: the same operations, and the same bits, without Python's lock between them.

    Where operations are small, parts would wait for the lock more than they compute. torch still has TorchScript but
    develops it no further: where it is gone, the answer is the function itself. Compiled when it is first asked for.
    """

    lock = threading.Lock()  # parts may be the first to ask, both at once

    @functools.cache
    def compiled_once() -> Callable[..., None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                script: Callable[..., None] = torch.jit.script(function)
        except Exception:
            logger.warning("no TorchScript here; %s runs in Python, and two threads slower", function.__name__)
            return function
        return script

    def compiled() -> Callable[..., None]:
        with lock:
            return compiled_once()

    return compiled
