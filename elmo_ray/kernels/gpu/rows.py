"""Rows of a table that many positions share: their gradients are summed row by row, in a fixed order.

PyTorch's own gradient of an embedding sorts the ids in every step and takes several launches; here the positions come
sorted, from `sort_positions` or from whoever made the ids, and one Triton kernel adds them up.

Shapes: N positions, R rows, P width of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from elmo_ray.kernels.gpu.arithmetic import rows_at_once
from elmo_ray.kernels.hints import SortedPositions


def sort_positions(ids: Tensor, count: int) -> SortedPositions:
    """Return the places of ids of any shape, all below `count`, sorted by row."""
    values, order = torch.sort(ids.reshape(-1).int(), stable=True)
    rows = torch.arange(count + 1, device=ids.device, dtype=torch.int32)
    return SortedPositions(order.int(), torch.searchsorted(values, rows).int())


def gather_rows(rows_RP: Tensor, ids: Tensor, positions: SortedPositions | None = None) -> Tensor:
    """Return the rows of a table that `ids` name, [*ids, P]; the gradient is float32.

    positions: those of `ids`; None sorts them in the backward pass.
    """
    rows: Tensor = _GatherRows.apply(rows_RP, ids, positions)
    return rows


@triton.jit
def _sum_rows(x, order, starts, out, P, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write out [R, P]: of each row the sum of x [N, P] at its places."""
    r, p = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    first, end = tl.load(starts + r), tl.load(starts + r + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(first, end, AT_ONCE):
        at = n + tl.arange(0, AT_ONCE)
        place = tl.load(order + at, at < end, 0).to(tl.int64)
        inside = (at < end)[:, None] & (p < P)[None, :]
        total += tl.sum(tl.load(x + place[:, None] * P + p[None, :], inside, 0.0).to(tl.float32), 0)
    tl.store(out + r * P + p, total, p < P)


class _GatherRows(torch.autograd.Function):
    """The autograd function of `gather_rows`, with its arguments."""

    @staticmethod
    def forward(ctx: Any, rows_RP: Tensor, ids: Tensor, positions: SortedPositions | None) -> Tensor:
        ctx.count, ctx.positions = len(rows_RP), positions
        ctx.save_for_backward(ids)
        return F.embedding(ids, rows_RP)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        gradient, count = grads[0].contiguous(), ctx.count
        order, starts = sort_positions(ids, count) if ctx.positions is None else ctx.positions
        width = gradient.shape[-1]
        d_rows, block = gradient.new_empty(count, width, dtype=torch.float32), triton.next_power_of_2(width)
        _sum_rows[(count,)](gradient, order, starts, d_rows, width, BLOCK=block, AT_ONCE=rows_at_once(block))
        return d_rows, None, None
