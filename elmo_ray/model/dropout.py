"""Dropout whose masks are a function of (seed, step, rank) and not of a generator's history."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from elmo_ray.kernels.cpu.loops import as_array, compiled, float32, for_tensor

_STEPS = 1 << 32
"""Of the random numbers."""


@compiled
def _drop(x_N: Any, random_N: Any, threshold: Any, scale: Any, y_N: Any) -> None:
    """x * scale where the random number is below the threshold, elsewhere 0."""
    for n in range(len(x_N)):
        y_N[n] = x_N[n] * scale if random_N[n] < threshold else float32(0.0)


class Dropout:
    """Inverted dropout; each half of a mask (a direction) is drawn from a generator of its own, seeded for every step.

    A fresh mask for every element, so for every time step too, as in bilm-tf. On a CPU NumPy draws, in a sixth of the
    time that torch takes.
    """

    generators: list[torch.Generator]
    """Those of a GPU's masks."""

    def __init__(self, probability: float, seed: int, step: int, rank: int, device: torch.device):
        self.probability = probability
        self.generators = [torch.Generator(device) for _ in range(2)]
        self.seed(seed, step, rank)

    def seed(self, seed: int, step: int, rank: int) -> None:
        """Begin with the masks of a step."""
        # Fixed multipliers keep (seed, step, rank, half) apart; the generator mixes the bits.
        base = seed * 1_000_003 + step * 7_919 + rank * 104_729
        for half, generator in enumerate(self.generators):
            generator.manual_seed((base + half * 15_485_863) % (1 << 63))
        self.random = [np.random.SFC64([seed, step, rank, half]) for half in range(2)]

    def of(self, half: int) -> Dropout:
        """For that half alone: the masks that it has as a part of the whole."""
        alone = copy.copy(self)
        alone.generators, alone.random = self.generators[half : half + 1], self.random[half : half + 1]
        return alone

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            result: Tensor = _CpuDropout.apply(x, self._drawn(x.numel()), round((1.0 - self.probability) * _STEPS))
            return result
        keep = 1.0 - self.probability
        mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for half, generator in zip(mask.view(-1).chunk(len(self.generators)), self.generators, strict=True):
            half.bernoulli_(keep, generator=generator).div_(keep)
        return x * mask

    def _drawn(self, count: int) -> NDArray[np.uint32]:
        each = -(-count // len(self.random))
        drawn = [bits.random_raw(-(-each // 2)).view(np.uint32)[:each] for bits in self.random]
        return drawn[0] if len(drawn) == 1 else np.concatenate(drawn)[:count]


class _CpuDropout(torch.autograd.Function):
    """(x, random numbers, below which they let an element through) -> x's elements that are let through, scaled so that
    the mean stays."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: NDArray[np.uint32], kept: int) -> Tensor:
        ctx.numbers, ctx.kept = numbers, kept
        return _dropped(x, numbers, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _dropped(grads[0], ctx.numbers, ctx.kept), None, None


def _dropped(x: Tensor, numbers: NDArray[np.uint32], kept: int) -> Tensor:
    scale = _STEPS / kept if kept else 0.0
    if not for_tensor(x):
        return x * torch.from_numpy((numbers < kept) * scale).to(x.dtype).view(x.shape)
    x = x.contiguous()
    result = torch.empty_like(x)
    _drop(as_array(x).reshape(-1), numbers, np.uint64(kept), np.float32(scale), as_array(result).reshape(-1))
    return result
