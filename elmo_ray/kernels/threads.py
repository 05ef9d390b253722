"""Independent parts of a computation side by side on a CPU's cores, such as the two directions of a biLM.

The directions share no recurrent state, so each may have half of the threads for a whole window. Parting every small
product between all threads instead costs a meeting of the threads for each, hundreds in a step, and a thread that the
operating system takes away makes all wait.

Autograd for parts that run side by side: each part's graph in its part's thread, and what a backward pass may put
off until a thread has nothing better to do.

A part whose thread the operating system took away for a moment makes the other one wait at their end. So what nothing
waits for, such as the gradients of the weights, is put on one pile, and done at the end by whichever part is there.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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


PartOf = Callable[[int, Sequence[Tensor]], Tensor]
Task = Callable[[], None]


@dataclass
class _Backward:
    """One part's backward pass. pile: of all parts; places: by the parameter's address, where its gradient belongs."""

    pile: deque[Task]
    places: dict[int, Tensor]
    taken: set[int] = field(default_factory=set)


class _Running(threading.local):
    backward: _Backward | None = None


_running = _Running()


def put_off(*tasks: Task) -> None:
    """Have tasks done before the gradients of all parts are given to anyone, by any part's thread; at once where no
    parts' backward pass is running. What they write must be a gradient of `place_for`, which nobody reads before."""
    backward = _running.backward
    if backward is None:
        for task in tasks:
            task()
    else:
        backward.pile.extend(tasks)


def place_for(parameter: Tensor) -> Tensor:
    """Where the gradient of a parameter is to be written, which is then the gradient: its place in that of all parts,
    or memory of its own. A part's function may use such a parameter once only."""
    backward = _running.backward
    if backward is None:
        return torch.empty_like(parameter)
    address = parameter.data_ptr()
    if address not in backward.places:
        backward.places[address] = torch.empty_like(parameter)
    backward.taken.add(address)
    return backward.places[address]


class Parted(torch.autograd.Function):
    """(work, parts, shared, scale, parameters...) -> work(0, parameters), work(1, parameters), ...: Tensors computed
    side by side, and so are their gradients.

    The first `shared` parameters are every part's; of the others a part gets its own slice of the first dimension, kept
    as one of length 1. `work` may use the parameters that it is given (others than the caller's, so that hooks on those
    see one gradient) and no other tensor that has a gradient. The graph of each part is its own, so that each runs in
    its part's thread; gradients of what is shared are added in the order of the parts.

    scale: what every number of the results will be multiplied with before all is summed and differentiated, where that
    is known: then the gradients are made together with the results, without a meeting of the parts between. None where
    it is not. RuntimeError if it turns out to be another, or if the gradients are asked for twice.
    """

    @staticmethod
    def forward(
        ctx: Any, work: PartOf, parts: int, shared: int, scale: float | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[4:]
        leaves: list[list[Tensor]] = [[] for _ in range(parts)]
        for number, (parameter, needed) in enumerate(zip(parameters, wanted, strict=True)):
            for part, own in enumerate(leaves):
                of_part = parameter if number < shared else parameter[part : part + 1]
                own.append(of_part.detach().requires_grad_(needed))
        results: list[Tensor] = [parameters[0]] * parts

        def run(part: int) -> None:
            with torch.set_grad_enabled(any(wanted)):
                results[part] = work(part, leaves[part])

        def run_with_gradient(part: int) -> tuple[Tensor, Tensor]:
            run(part)
            result, results[part] = results[part], results[part].detach()
            return result, torch.full_like(result, scale or 0.0)

        ctx.shared, ctx.scale, ctx.gradients = shared, scale, None
        if scale is None or not any(wanted):
            side_by_side(run, parts, parameters[0].device)
            ctx.results, ctx.leaves = results, leaves
        else:
            ctx.gradients = _gradients(run_with_gradient, leaves, shared)
        return tuple(result.detach() for result in results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.scale is None:
            again = torch._C._autograd._get_current_graph_task_keep_graph()
            results, leaves = ctx.results, ctx.leaves
            found = _gradients(lambda part: (results[part], grads[part]), leaves, ctx.shared, again)
        elif ctx.gradients is None or not all(torch.equal(grad, torch.full_like(grad, ctx.scale)) for grad in grads):
            raise RuntimeError(f"gradients were made for a scale of {ctx.scale} and for once")
        else:
            # not kept here: who gets them may keep them as they are, and not copies
            found, ctx.gradients = ctx.gradients, None
        given = iter(found)
        return None, None, None, None, *(next(given) if needed else None for needed in ctx.needs_input_grad[4:])


def _gradients(
    of: Callable[[int], tuple[Tensor, Tensor]], leaves: Sequence[Sequence[Tensor]], shared: int, again: bool = False
) -> list[Tensor]:
    """Gradients of the parameters that want one, of all parts together. of: a part's result and the gradient of it."""
    wanted = [[leaf for leaf in own if leaf.requires_grad] for own in leaves]
    shared = sum(leaf.requires_grad for leaf in leaves[0][:shared])
    # of slices: each part puts its own in its place
    whole = [leaf.new_empty(len(leaves), *leaf.shape[1:]) for leaf in wanted[0][shared:]]
    found: list[Sequence[Tensor]] = [[] for _ in leaves]
    pile: deque[Task] = deque()

    def run(part: int) -> None:
        own = [into[part : part + 1] for into in whole]
        places = {leaf.data_ptr(): place for leaf, place in zip(wanted[part][shared:], own, strict=True)}
        result, gradient = of(part)
        _running.backward = backward = _Backward(pile, places)
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(result, wanted[part], gradient, retain_graph=again)
        finally:
            _running.backward = None
        for leaf, each in zip(wanted[part], gradients, strict=True):
            if leaf.data_ptr() in backward.taken and each.data_ptr() != places[leaf.data_ptr()].data_ptr():
                raise RuntimeError("a parameter whose gradient is put off was used twice")
        for place, each in zip(own, gradients[shared:], strict=True):
            if each.data_ptr() != place.data_ptr():
                place.copy_(each)
        # of a transposed weight it may not be, and DDP's buckets want it so
        found[part] = [each.contiguous() for each in gradients[:shared]]
        while pile:
            with contextlib.suppress(IndexError):  # another part took the last one
                pile.pop()()

    side_by_side(run, len(leaves), leaves[0][0].device)
    total = list(found[0])
    for more in found[1:]:
        if total:
            torch._foreach_add_(total, list(more))
    return [*total, *whole]
