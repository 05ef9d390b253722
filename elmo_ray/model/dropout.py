"""Dropout whose masks are a function of (seed, step, rank) and not of a generator's history."""

from __future__ import annotations

import torch
from torch import Tensor


class Dropout:
    """Inverted dropout with masks drawn from one generator, seeded anew for every step.

    A fresh mask for every element, so for every time step too, as in bilm-tf.
    """

    def __init__(self, probability: float, seed: int, step: int, rank: int, device: torch.device):
        self.probability = probability
        self.generator = torch.Generator(device)
        # Fixed multipliers keep (seed, step, rank) apart; the generator mixes the bits.
        self.generator.manual_seed((seed * 1_000_003 + step * 7_919 + rank * 104_729) % (1 << 63))

    def __call__(self, x: Tensor) -> Tensor:
        mask = torch.empty_like(x).bernoulli_(1.0 - self.probability, generator=self.generator)
        return x * mask.div_(1.0 - self.probability)
