"""Independent parts of a computation side by side on a CPU's cores, such as the two directions of a biLM.

The directions share no recurrent state, so each may have half of the threads for a whole window. Parting every small
product between all threads instead costs a meeting of the threads for each, hundreds in a step, and a thread that the
operating system takes away makes all wait.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_pools: dict[tuple[int, int], list[ThreadPoolExecutor]] = {}
"""By threads of all together and parts: one thread of Python's for each part."""

_asking = threading.local()


@contextlib.contextmanager
def threads_for_parts() -> Iterator[None]:
    """Within this, parts have the threads of torch, and what is computed between them has one where a part would have
    no more.

    Between them is little work for each operation: waking a second thread costs more than it does.
    """
    threads = torch.get_num_threads()
    if threads >= 4:
        yield
        return
    _asking.threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del _asking.threads


def side_by_side(work: Callable[[int], None], parts: int, device: torch.device) -> None:
    """Calls work(part) for every part, without gradients; side by side where the device is a CPU with threads for it.

    A part's results depend on how many threads its products have, and not on what runs beside it.
    """
    threads = getattr(_asking, "threads", None) or torch.get_num_threads()
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
    before = torch.get_num_threads()
    pools = [ThreadPoolExecutor(1, f"part-{part}") for part in range(parts)]
    for pool in pools:
        pool.submit(_take_threads, threads // parts).result()
    torch.set_num_threads(before)  # what a thread sets is its own from here on, but it is also what new threads take
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
            logger.debug("no TorchScript here; %s runs in Python", function.__name__, exc_info=True)
            return function
        return script

    def compiled() -> Callable[..., None]:
        with lock:
            return compiled_once()

    return compiled


class Parted(torch.autograd.Function):
    """(work, parts, parameters...) -> work(0), work(1), ...: Tensors computed side by side, and so are their gradients.

    `work` may use the parameters given and no other tensor that has a gradient. The graph of each part is its own, so
    that each runs in its part's thread; gradients of the parts are added in their order.
    """

    @staticmethod
    def forward(ctx: Any, work: Callable[[int], Tensor], parts: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        results: list[Tensor] = [parameters[0]] * parts

        def run(part: int) -> None:
            with torch.enable_grad():
                results[part] = work(part)

        side_by_side(run, parts, parameters[0].device)
        ctx.results, ctx.parameters = results, parameters
        return tuple(result.detach() for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [p for p, needed in zip(ctx.parameters, ctx.needs_input_grad[2:], strict=True) if needed]
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        found: list[Sequence[Tensor]] = [wanted] * len(grads)

        def run(part: int) -> None:
            with torch.enable_grad():
                found[part] = torch.autograd.grad(ctx.results[part], wanted, grads[part], retain_graph=again)

        side_by_side(run, len(grads), grads[0].device)
        total = list(found[0])
        for more in found[1:]:
            torch._foreach_add_(total, list(more))
        given = iter(total)
        return None, None, *(next(given) if needed else None for needed in ctx.needs_input_grad[2:])
