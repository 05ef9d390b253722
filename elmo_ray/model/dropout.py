"""Dropout whose masks are a function of (seed, step, rank) and not of a generator's history."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray import kernels

PLACES = ("input", "between", "output")
"""Places of dropout: the input of the first LSTM layer, the inputs of the other layers, and the last output."""

Rates = float | tuple[float, float, float]
"""Probability that a number is dropped: one for all places, or one for each of `PLACES`."""

_STEPS = 1 << 32
"""Number of values that a random number may have."""


def drop(x: Tensor, random_N: NDArray[np.uint32], kept: int) -> Tensor:
    """Return x where the random number is below `kept`, scaled so that the mean stays, and 0 elsewhere."""
    scale = _STEPS / kept if kept else 0.0
    return x * torch.from_numpy((random_N < kept) * scale).to(x.dtype).view(x.shape)


class Dropout:
    """Inverted dropout with a fresh mask for every element, so for every time step too, as in bilm-tf.

    Each half of a mask (a direction) is drawn from a generator of its own that is seeded for every step. On a CPU NumPy
    draws, in a sixth of the time that torch takes. A GPU's kernel draws by a key in the GPU's memory, which a captured
    step reads anew in every replay. Without that kernel torch draws on the GPU: masks from the CPU would have to be
    copied there.
    """

    def __init__(self, rates: Rates, seed: int, step: int, rank: int, device: torch.device):
        self.rates = dict(zip(PLACES, rates if isinstance(rates, tuple) else (rates,) * len(PLACES), strict=True))
        self.generators = [torch.Generator(device) for _ in range(2)]
        self.key = torch.zeros(1, dtype=torch.int64, device=device)
        self.seed(seed, step, rank)

    def seed(self, seed: int, step: int, rank: int) -> None:
        """Begin with the masks of a step."""
        self.uses = 0
        self.key.fill_(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))
        # Fixed multipliers keep (seed, step, rank, half) apart; the generator mixes the bits.
        base = seed * 1_000_003 + step * 7_919 + rank * 104_729
        for half, generator in enumerate(self.generators):
            generator.manual_seed((base + half * 15_485_863) % (1 << 63))
        self.random = [np.random.SFC64([seed, step, rank, half]) for half in range(2)]

    def __call__(self, x: Tensor, place: str = "output") -> Tensor:
        """Return x after the dropout of one of `PLACES`."""
        keep = 1.0 - self.rates[place]
        if keep == 1.0:
            return x
        if keyed := kernels.keyed_dropout(x):
            self.uses += 1
            dropped: Tensor = keyed(x, self.key, self.uses - 1, keep)
            return dropped
        if x.device.type == "cpu":
            run = kernels.dropout(x) or drop
            return run(x, self._drawn(x.numel()), round(keep * _STEPS))
        mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for half, generator in zip(mask.view(-1).chunk(len(self.generators)), self.generators, strict=True):
            half.bernoulli_(keep, generator=generator).div_(keep)
        return x * mask

    def _drawn(self, count: int) -> NDArray[np.uint32]:
        """Return `count` random numbers of 32 bits, each half of them from its own generator."""
        each = -(-count // len(self.random))
        drawn = [bits.random_raw(-(-each // 2)).view(np.uint32)[:each] for bits in self.random]
        return np.concatenate(drawn)[:count]
