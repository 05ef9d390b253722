"""The two directions of a biLM side by side on a CPU's cores.

The directions share no recurrent state, so each may have half of the threads for a whole window. Parting every small
product between all threads instead costs a meeting of the threads for each, hundreds in a step, and a thread that the
operating system takes away makes all wait.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[int, list[ThreadPoolExecutor]] = {}
"""By the number of threads of all together: one thread of Python's for each direction."""


def each_direction(work: Callable[[int], None], directions: int, device: torch.device) -> None:
    """Calls work(d) for every direction, without gradients; side by side where the device is a CPU with threads for it.

    A direction's results depend on how many threads its products have, and not on what runs beside it.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu" and directions > 1 and threads >= directions:
        pools = _pools.get(threads) or _started(threads, directions)
        futures = [pool.submit(_without_gradients, work, d) for d, pool in enumerate(pools[:directions])]
        for future in futures:
            future.result()
    else:
        for d in range(directions):
            _without_gradients(work, d)


def _without_gradients(work: Callable[[int], None], direction: int) -> None:
    with torch.no_grad():  # a thread does not know the mode of the one that asks
        work(direction)


def _started(threads: int, directions: int) -> list[ThreadPoolExecutor]:
    pools = [ThreadPoolExecutor(1, f"direction-{d}") for d in range(directions)]
    for pool in pools:
        pool.submit(_take_threads, threads // directions).result()
    torch.set_num_threads(threads)  # what a thread sets is its own from here on, but it is also what new threads take
    _pools[threads] = pools
    return pools


def _take_threads(count: int) -> None:
    torch.get_num_threads()  # a thread's first question sets it to the number of the whole process, so ask before
    torch.set_num_threads(count)
