"""Independent parts of a computation side by side on a CPU's cores, such as the two directions of a biLM.

The directions share no recurrent state, so each may have half of the threads for a whole window. Parting every small
product between all threads instead costs a meeting of the threads for each, hundreds in a step, and a thread that the
operating system takes away makes all wait.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[tuple[int, int], list[ThreadPoolExecutor]] = {}
"""By threads of all together and parts: one thread of Python's for each part."""


def side_by_side(work: Callable[[int], None], parts: int, device: torch.device) -> None:
    """Calls work(part) for every part, without gradients; side by side where the device is a CPU with threads for it.

    A part's results depend on how many threads its products have, and not on what runs beside it.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu" and parts > 1 and threads >= parts:
        pools = _pools.get((threads, parts)) or _started(threads, parts)
        futures = [pool.submit(_without_gradients, work, part) for part, pool in enumerate(pools)]
        for future in futures:
            future.result()
    else:
        for part in range(parts):
            _without_gradients(work, part)


def _without_gradients(work: Callable[[int], None], part: int) -> None:
    with torch.no_grad():  # a thread does not know the mode of the one that asks
        work(part)


def _started(threads: int, parts: int) -> list[ThreadPoolExecutor]:
    pools = [ThreadPoolExecutor(1, f"part-{part}") for part in range(parts)]
    for pool in pools:
        pool.submit(_take_threads, threads // parts).result()
    torch.set_num_threads(threads)  # what a thread sets is its own from here on, but it is also what new threads take
    _pools[threads, parts] = pools
    return pools


def _take_threads(count: int) -> None:
    torch.get_num_threads()  # a thread's first question sets it to the number of the whole process, so ask before
    torch.set_num_threads(count)
