"""Dropout on a GPU whose mask is never stored: it is a function of a key in the GPU's memory, and drawn twice.

Because the key is a tensor, a captured step draws other masks in every replay once the key is set anew.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1024


def dropout(x: Tensor, key: Tensor, use: int, keep: float) -> Tensor:
    """Return x / keep where a random number in [0, 1) is below `keep`, elsewhere 0.

    key: [1] int64 on x's device, a random number of the step's own. use: which of the step's masks this is, counted
    from 0 at the step's beginning, so that it is the same when a captured step is replayed.
    """
    y: Tensor = _Dropout.apply(x, key, use, keep)
    return y


@triton.jit
def _drop(x, y, key, use, keep, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Draws a number for each place with Philox, keyed by the step and the use, and writes what is kept."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    random = tl.rand(tl.load(key) + use, i.to(tl.int32))
    tl.store(y + i, tl.where(random < keep, tl.load(x + i, i < count, 0.0) / keep, 0.0), i < count)


def _dropped(x: Tensor, key: Tensor, use: int, keep: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    # A multiple of a large number, so that the uses of two steps whose keys are neighbours have no key in common.
    _drop[(triton.cdiv(x.numel(), _BLOCK),)](x, y, key, use * 1_000_003 + 1, keep, x.numel(), BLOCK=_BLOCK)
    return y


class _Dropout(torch.autograd.Function):
    """The autograd function of `dropout`, with its arguments; the mask is drawn again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, use: int, keep: float) -> Tensor:
        ctx.save_for_backward(key)
        ctx.use, ctx.keep = use, keep
        return _dropped(x, key, use, keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (key,) = ctx.saved_tensors
        return _dropped(grads[0], key, ctx.use, ctx.keep), None, None, None
