"""Dropout whose masks are a function of (seed, step, rank) and not of a generator's history."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from elmo_ray.model.side_by_side import side_by_side


class Dropout:
    """Inverted dropout; each half of a mask (a direction) is drawn from a generator of its own, seeded for every step.

    A fresh mask for every element, so for every time step too, as in bilm-tf.
    """

    generators: list[torch.Generator]

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

    def of(self, half: int) -> Dropout:
        """For that half alone: the masks that it has as a part of the whole."""
        alone = copy.copy(self)
        alone.generators = [self.generators[half]]
        return alone

    def __call__(self, x: Tensor) -> Tensor:
        keep = 1.0 - self.probability
        mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        halves = mask.view(-1).chunk(len(self.generators))

        def draw(half: int) -> None:
            halves[half].bernoulli_(keep, generator=self.generators[half]).div_(keep)

        side_by_side(draw, len(halves), mask.device)
        return x * mask
