"""Adagrad on the rows of a table that a step touches, on a CPU: one loop, compiled by Numba, over each row's memory.

PyTorch takes rows out, changes them and puts them back, in some ten passes over all of their numbers.
Shapes: V words, R touched rows, P numbers of a row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from elmo_ray.kernels.cpu.loops import as_array, compiled, float32


@compiled
def _update(value_P: Any, slot_P: Any, gradient_P: Any, divisor: Any, rate: Any) -> None:
    for p in range(len(gradient_P)):
        g = gradient_P[p] / divisor
        s = slot_P[p] + g * g
        slot_P[p] = s
        value_P[p] -= rate * g / math.sqrt(s)


@compiled
def _update_all(value_VP: Any, slot_VP: Any, rows_R: Any, gradient_RP: Any, divisor: Any, rate: Any) -> None:
    for r in range(len(rows_R)):
        _update(value_VP[rows_R[r]], slot_VP[rows_R[r]], gradient_RP[r], divisor, rate)


def update_rows(value: Tensor, slot: Tensor, rows: Tensor, gradient: Tensor, divisor: Tensor, rate: float) -> None:
    """slot += (gradient / divisor)^2; value -= rate * gradient / divisor / sqrt(slot), in the given rows of both.

    value, slot: [V, P] or [V], contiguous float32; rows: [R], each of them once; gradient: [R, P] or [R]; divisor: 0-d.
    """
    arrays = as_array(value.view(len(value), -1)), as_array(slot.view(len(slot), -1))
    some = gradient.reshape(len(rows), -1)
    _update_all(*arrays, as_array(rows), as_array(some), float32(float(divisor)), float32(rate))
    for changed in (value, slot):
        torch.autograd.graph.increment_version(changed)  # as PyTorch's own operations do
