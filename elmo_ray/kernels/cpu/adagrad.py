"""Adagrad on a CPU as one compiled loop over each number's value, slot and gradient.

PyTorch takes rows out, changes them and puts them back, in some ten passes over all of their numbers.
Shapes: V rows of a table or of a dense parameter, R rows that are updated, P numbers of a row.
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
def _update_rows(value_VP: Any, slot_VP: Any, rows_R: Any, gradient_RP: Any, divisor: Any, rate: Any) -> None:
    for r in range(len(rows_R)):
        _update(value_VP[rows_R[r]], slot_VP[rows_R[r]], gradient_RP[r], divisor, rate)


def adagrad(
    value: Tensor, slot: Tensor, gradient: Tensor, rows: Tensor | None, divisor: Tensor, rate: float | Tensor
) -> None:
    """Do what `training.optimizer.adagrad` does, with the same arguments; value and slot are contiguous float32."""
    if not (known := float(divisor)):  # on a CPU nothing waits for it
        return
    if rows is None:
        of_value, of_slot, of_gradient = (as_array(x.reshape(-1)) for x in (value, slot, gradient))
        _update(of_value, of_slot, of_gradient, float32(known), float32(rate))
    else:
        by_row = as_array(value.view(len(value), -1)), as_array(slot.view(len(slot), -1))
        some = as_array(gradient.reshape(len(rows), -1))
        _update_rows(*by_row, as_array(rows), some, float32(known), float32(rate))
    for changed in (value, slot):
        torch.autograd.graph.increment_version(changed)  # as PyTorch's own operations do
