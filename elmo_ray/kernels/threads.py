"""Independent branches of a computation in parallel on a CPU's cores, such as the two directions of a biLM.

The directions share no recurrent state, so each may have half of the threads for a whole window. Dividing every small
product among all threads instead makes the threads meet for each, hundreds of times in a step, and one thread that the
operating system takes away makes all wait.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch

_SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread gives Python's lock to one that waits for it."""

_pools: dict[tuple[int, int], list[ThreadPoolExecutor]] = {}
"""One Python thread for each branch, by the number of all threads and that of the branches."""

_starting = threading.Lock()
_asking = threading.local()

if hasattr(os, "register_at_fork"):  # a forked process has none of the threads, and starts its own
    os.register_at_fork(after_in_child=_pools.clear)


@contextlib.contextmanager
def threads_for_branches() -> Iterator[None]:
    """Give torch's threads to branches, and a single thread to what is computed between them, for a block of code.

    It serves work whose operations between the branches are small: waking a second thread costs more than it does.
    With four threads or more each branch has several, and nothing changes.
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


def run_parallel(work: Callable[[int], None], branches: int, device: torch.device) -> None:
    """Call work(branch) for every branch, without gradients; in parallel on a CPU that has threads for all of them.

    The result of a branch depends on how many threads its products have, and not on what runs beside it. All branches
    have ended when this returns; the error of one is raised here.
    """
    if device.type == "cpu" and has_threads_for(branches):
        threads = _threads()
        pools = _pools.get((threads, branches)) or _started(threads, branches)
        # where this thread has as many threads of torch as a branch, it takes one itself: one thread less to wake
        here = torch.get_num_threads() == threads // branches
        futures = [pool.submit(_without_gradients, work, n) for n, pool in enumerate(pools) if n or not here]
        try:
            if here:
                _without_gradients(work, 0)
        finally:
            wait(futures)
        for future in futures:
            future.result()
    else:
        for branch in range(branches):
            _without_gradients(work, branch)


def has_threads_for(branches: int) -> bool:
    """Return whether a CPU has threads for so many branches, which otherwise come one after the other."""
    return 1 < branches <= _threads()


def _threads() -> int:
    return getattr(_asking, "threads", None) or torch.get_num_threads()


def _without_gradients(work: Callable[..., None], branch: int | slice) -> None:
    with torch.no_grad():  # a thread does not know the mode of the one that asks
        work(branch)


def _started(threads: int, branches: int) -> list[ThreadPoolExecutor]:
    with _starting:
        if (threads, branches) in _pools:
            return _pools[threads, branches]
        before = torch.get_num_threads()
        pools = [ThreadPoolExecutor(1, f"branch-{branch}") for branch in range(branches)]
        for pool in pools:
            pool.submit(_take_threads, threads // branches).result()
        # A thread that runs Python, such as the one that loads text, otherwise keeps a branch waiting for 5 ms.
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL))
        # what a thread sets is its own from here on, but it is also what new threads take
        torch.set_num_threads(before)
        _pools[threads, branches] = pools
        return pools


def _take_threads(count: int) -> None:
    torch.get_num_threads()  # a thread's first question sets it to the number of the whole process, so ask before
    torch.set_num_threads(count)
