"""Dropout on a CPU in one pass over the numbers, as a compiled loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from elmo_ray.kernels.cpu.loops import as_array, compiled, float32

_STEPS = 1 << 32
"""Number of values that a random number may have."""


@compiled
def _drop(x_N: Any, random_N: Any, threshold: Any, scale: Any, y_N: Any) -> None:
    """Fill y with x * scale where the random number is below the threshold, and with 0 elsewhere."""
    for n in range(len(x_N)):
        y_N[n] = x_N[n] * scale if random_N[n] < threshold else float32(0.0)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, random_N: NDArray[np.uint32], kept: int) -> Tensor:
        ctx.random, ctx.kept = random_N, kept
        return _dropped(x, random_N, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _dropped(grads[0], ctx.random, ctx.kept), None, None


def _dropped(x: Tensor, random_N: NDArray[np.uint32], kept: int) -> Tensor:
    scale = _STEPS / kept if kept else 0.0
    x = x.contiguous()
    result = torch.empty_like(x)
    _drop(as_array(x).reshape(-1), random_N, np.uint64(kept), np.float32(scale), as_array(result).reshape(-1))
    return result


def drop(x: Tensor, random_N: NDArray[np.uint32], kept: int) -> Tensor:
    """Return what `model.dropout.drop` returns."""
    result: Tensor = _Dropout.apply(x, random_N, kept)
    return result
