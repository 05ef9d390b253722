"""What one training step is given.

Shapes: D directions, B rows, T window, U distinct words, C characters, K negatives, R touched rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StepInput:
    """All that a step needs, on the device.

    types [U, C] (or [U] for word input: indices into `input_rows`, or ids with a full softmax), type_classes, inputs
    [D, B, T], targets [D, B, T], lengths [B] as in `streams.Batch`; reset [B] rows that start from zero state;
    positions: of all ranks in one direction, the divisor of the loss.
    With a sampled softmax: rows [R] of the softmax table (all ranks have the same), target_rows [D, B, T] and
    negative_rows [D, K] index into them, with the log expected counts of both; input_rows: rows of an untied word
    embedding. scale: the factor of the losses' sum, where it is on the device; None: worked out from `positions`.
    parts: rows and inputs of the parts that it is computed in, where they are ready (`accumulation.py`).
    """

    step: int
    types: Tensor
    type_classes: tuple[tuple[int, int], ...]
    inputs: Tensor
    targets: Tensor
    lengths: Tensor
    reset: Tensor
    positions: int
    rows: Tensor | None = None
    target_rows: Tensor | None = None
    target_log_count: Tensor | None = None
    negative_rows: Tensor | None = None
    negative_log_count: Tensor | None = None
    input_rows: Tensor | None = None
    scale: Tensor | None = None
    parts: tuple[tuple[range, StepInput], ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Those of the fields that are there, by their names."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def each(self, function: Callable[[Tensor], Tensor]) -> StepInput:
        """A copy with `function` of every tensor."""
        result = copy.copy(self)
        for name, value in self.tensors().items():
            setattr(result, name, function(value))
        result.parts = tuple((rows, part.each(function)) for rows, part in self.parts)
        return result

    def to(self, device: torch.device) -> StepInput:
        """A copy on `device`; from pinned memory the transfer does not wait."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> StepInput:
        """A copy in pinned memory."""
        return self.each(Tensor.pin_memory)
