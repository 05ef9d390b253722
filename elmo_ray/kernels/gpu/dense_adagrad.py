"""Adagrad of all dense tensors in one launch on a GPU, from a table of their addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Numbers of a tensor that one program updates."""
_MOST_TABLES = 32
"""Tables of addresses that are kept: gradients come to few places, again and again."""


@triton.jit
def _dense_adagrad(  # type: ignore[no-untyped-def]
    addresses, tensor_of_block, first_block, sizes, rates, divisor, count, BLOCK: tl.constexpr
):  # fmt: skip
    """Updates a block of one tensor. addresses: [3, count], of values, slots and gradients, all float32."""
    d = tl.load(divisor)
    if d > 0.0:
        t = tl.load(tensor_of_block + tl.program_id(0))
        i = (tl.program_id(0) - tl.load(first_block + t)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < tl.load(sizes + t)
        value = tl.load(addresses + t).to(tl.pointer_type(tl.float32)) + i
        slot = tl.load(addresses + count + t).to(tl.pointer_type(tl.float32)) + i
        gradient = tl.load(addresses + 2 * count + t).to(tl.pointer_type(tl.float32)) + i
        g = tl.load(gradient, inside, 0.0) / d
        s = tl.load(slot, inside, 1.0) + g * g
        tl.store(slot, s, inside)
        tl.store(value, tl.load(value, inside) - tl.load(rates + t) * (g / tl.sqrt(s)), inside)


class DenseAdagrad:
    """The update of a fixed list of dense tensors: slot += (gradient / divisor)^2, and value -= rate * gradient /
    divisor / sqrt(slot).

    values, slots: contiguous float32 tensors of one device, whose memory stays where it is.
    """

    def __init__(self, values: Sequence[Tensor], slots: Sequence[Tensor]):
        assert all(x.is_contiguous() and x.dtype == torch.float32 for x in (*values, *slots))
        self._values, self._slots, self._device = list(values), list(slots), values[0].device
        blocks = torch.tensor([triton.cdiv(v.numel(), _BLOCK) for v in values])
        of_block = torch.repeat_interleave(torch.arange(len(values), dtype=torch.int32), blocks)
        self._tensor_of_block = of_block.to(self._device)
        self._first_block = (blocks.cumsum(0) - blocks).int().to(self._device)
        self._sizes = torch.tensor([v.numel() for v in values], device=self._device)
        self._tables: dict[tuple[int, ...], Tensor] = {}  # by the addresses of the gradients
        self._captured: list[Tensor] = []  # tables that graphs read, and so must stay where they are

    def __call__(self, gradients: Sequence[Tensor], divisor: Tensor, rates: Sequence[float] | Sequence[Tensor]) -> None:
        """Update values and slots in place; a divisor of 0 (or NaN) changes nothing, whatever the gradients are.

        gradients: one of each value, float32. divisor: 0-d float32 on the device. rates: one of each value, numbers or
        0-d float32 tensors on the device. A captured step needs the latter, and gradients at the addresses of a call
        before, because nothing can be copied to the GPU during a capture; anything else raises a RuntimeError.
        """
        gradients = [gradient.contiguous() for gradient in gradients]
        addresses = tuple(gradient.data_ptr() for gradient in gradients)
        table = self._tables.get(addresses)
        if table is None:
            of_all = [[x.data_ptr() for x in self._values], [x.data_ptr() for x in self._slots], list(addresses)]
            table = self._tables[addresses] = self._sent(torch.tensor(of_all))
            if len(self._tables) > _MOST_TABLES:
                del self._tables[next(iter(self._tables))]
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(table)
        if all(isinstance(rate, Tensor) for rate in rates):
            on_device = torch.stack(rates)  # type: ignore[arg-type]
        else:
            on_device = self._sent(torch.tensor(rates, dtype=torch.float32))
        _dense_adagrad[(len(self._tensor_of_block),)](
            table, self._tensor_of_block, self._first_block, self._sizes, on_device, divisor, len(gradients),
            BLOCK=_BLOCK,
        )  # fmt: skip
        for changed in (*self._values, *self._slots):
            # As PyTorch's own operations do, for those who keep what they made of a weight.
            torch.autograd.graph.increment_version(changed)

    def _sent(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a captured Adagrad needs rates on the device, and gradients where they were before")
        return tensor.pin_memory().to(self._device, non_blocking=True)
