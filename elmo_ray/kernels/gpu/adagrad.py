"""Adagrad in one pass over value, slot and gradient on a GPU (Triton): dense tensors, and chosen rows of tables.

torch has a fused Adagrad for the CPU only; its other one, with the clip before it, goes some fifteen times through
memory as large as the model. What is computed is the same, and `usable` compares it before first use.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it
    triton = None

logger = logging.getLogger(__name__)

_BLOCK = 1024


if triton is not None:

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
            tl.store(value + at, tl.load(value + at, inside) - rate * (g / tl.sqrt(s)), inside)


def adagrad_(value: Tensor, slot: Tensor, gradient: Tensor, rows: Tensor | None, divisor: Tensor, rate: float) -> None:
    """slot += (gradient / divisor)^2; value -= rate * gradient / divisor / sqrt(slot).

    rows: those of `value` and `slot` that the rows of `gradient` are for, each of them once; None: all. divisor: 0-d; 0
    changes nothing, whatever the gradient is. `value` and `slot` are contiguous.
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
    _adagrad[(count * blocks,)](
        value, slot, gradient, places, divisor, rate, width, blocks, HAS_ROWS=rows is not None, BLOCK=block
    )
    for changed in (value, slot):
        torch.autograd.graph.increment_version(changed)  # as PyTorch's own operations do: what is made of weights asks


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether Triton is at hand for this device and computes what PyTorch does; a line in the log where it is not."""
    if device.type != "cuda" or triton is None:
        return False
    try:
        worst = largest_difference(device)
    except Exception as error:  # a compiler or driver that does not fit
        logger.warning("the fused Adagrad is not used: %s: %s", type(error).__name__, str(error).split("\n")[0])
        return False
    if worst > 1e-5:
        logger.warning("the fused Adagrad differs from PyTorch's by %.2g here: it is not used", worst)
    return worst <= 1e-5


def largest_difference(device: torch.device, shape: tuple[int, int] = (70, 1030), bad: bool = False) -> float:
    """Between fused and plain updates of random tensors: a whole one, some rows, a vector's places. bad: the gradient
    has what is no number, and nothing may change."""
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    some = torch.randperm(shape[0], generator=generator)[: shape[0] // 2].to(device)
    for size, rows in ((shape, None), (shape, some), (shape[:1], some)):
        value, slot = (torch.rand(size, generator=generator).to(device) for _ in range(2))
        touched = slice(None) if rows is None else rows
        gradient = torch.randn(value[touched].shape, generator=generator).to(device)
        expected = value.clone(), slot.clone()
        g = gradient / 2.0
        expected[1][touched] += g * g
        expected[0][touched] -= 0.2 * g / expected[1][touched].sqrt()
        if bad:
            gradient.view(-1)[0], expected = torch.nan, (value.clone(), slot.clone())
        adagrad_(value, slot, gradient, rows, torch.tensor(0.0 if bad else 2.0).to(device), 0.2)
        for ours, theirs in zip((value, slot), expected, strict=True):
            difference = float((ours - theirs).abs().max())
            worst = max(worst, difference if difference == difference else torch.inf)
    return worst
