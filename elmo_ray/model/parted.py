"""Autograd for parts that run side by side: each part's graph in its part's thread, and what a backward pass may put
off until a thread has nothing better to do.

A part whose thread the operating system took away for a moment makes the other one wait at their end. So what nothing
waits for, such as the gradients of the weights, is put on one pile, and done at the end by whichever part is there.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elmo_ray.model.side_by_side import side_by_side

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
