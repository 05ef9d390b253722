"""Adagrad in one pass over value, slot and gradient on a GPU (Triton): dense tensors, and chosen rows of tables.

torch has a fused Adagrad for the CPU only; its other one, with the clip before it, goes some fifteen times through
memory as large as the model. What is computed is the same, and the tests compare it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _adagrad(  # type: ignore[no-untyped-def]
    value, slot, gradient, rows, divisor, rate, width, blocks, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    d = tl.load(divisor)
    if d > 0.0:
        row = (tl.program_id(0) // blocks).to(tl.int64)
        column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(gradient + row * width + column, inside, 0.0) / d
        if HAS_ROWS:
            row = tl.load(rows + row).to(tl.int64)
        at = row * width + column
        s = tl.load(slot + at, inside, 1.0) + g * g
        tl.store(slot + at, s, inside)
        tl.store(value + at, tl.load(value + at, inside) - tl.load(rate) * (g / tl.sqrt(s)), inside)


def adagrad(
    value: Tensor, slot: Tensor, gradient: Tensor, rows: Tensor | None, divisor: Tensor, rate: float | Tensor
) -> None:
    """slot += (gradient / divisor)^2; value -= rate * gradient / divisor / sqrt(slot).

    rows: those of `value` and `slot` that the rows of `gradient` are for, each of them once; None: all. divisor: 0-d; 0
    changes nothing, whatever the gradient is. rate: a number, or 0-d in float32 on the device, where a captured step
    reads it. `value` and `slot` are contiguous.
    """
    assert value.is_contiguous() and slot.is_contiguous()
    gradient = gradient.contiguous()
    count = 1 if rows is None else len(rows)
    width = gradient.numel() // max(1, count)
    if not width:
        return
    block = min(_BLOCK, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    places = gradient if rows is None else rows
    if not isinstance(rate, Tensor):
        rate = torch.full((), rate, dtype=torch.float32, device=value.device)
    _adagrad[(count * blocks,)](
        value, slot, gradient, places, divisor, rate, width, blocks, HAS_ROWS=rows is not None, BLOCK=block
    )
    for changed in (value, slot):
        torch.autograd.graph.increment_version(changed)  # as PyTorch's own operations do: what is made of weights asks
