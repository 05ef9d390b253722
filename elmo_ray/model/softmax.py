"""The softmax over the vocabulary: full, and the draws of the sampled one; `full_softmax.py` has that of evaluation.

Shapes: N positions, P projection, V vocabulary, K negatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Negatives:
    """Negatives of one direction and step. ids: [K] int64 distinct vocabulary ids; tries: draws it took to find K
    distinct."""

    ids: NDArray[np.int64]
    tries: int


def draw_negatives(
    seed: int, step: int, direction: int, n_words: int, count: int, table: NDArray[np.int64] | None = None
) -> Negatives:
    """Log-uniform negatives without replacement, a pure function of its arguments.

    As TensorFlow's log_uniform_candidate_sampler(unique=True): draw ids with p(k) = log((k+2)/(k+1)) / log(V+1) one
    after another, keep the first `count` distinct ones; `tries` is the index of the last of them plus one. Needs
    count <= n_words (checked with the configuration). table: [n_words], to be written over.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, 2 * step + direction]))
    draws = np.zeros(0, np.int64)
    # of each drawn id its first place among the draws: ten times as fast as sorting them
    first = np.empty(n_words, np.int64) if table is None else table
    size = 4 * count + 64
    while True:
        uniform = random.random(size)
        more = np.expm1(uniform * math.log1p(n_words)).astype(np.int64)  # exp(u log(V+1)) - 1, rounded down
        draws = np.concatenate([draws, np.minimum(more, n_words - 1)])
        places = np.arange(len(draws))
        first[draws] = len(draws)
        np.minimum.at(first, draws, places)
        kept = np.flatnonzero(first[draws] == places)
        if len(kept) >= count:
            return Negatives(draws[kept[:count]], int(kept[count - 1]) + 1)
        size = len(draws)


def log_expected_count(ids: NDArray[np.int64], tries: int, n_words: int) -> NDArray[np.float32]:
    """log(-expm1(tries * log1p(-p(id)))): the log of how often an id is expected among the distinct draws."""
    probability = np.log1p(1.0 / (ids + 1.0)) / math.log1p(n_words)
    return np.log(-np.expm1(tries * np.log1p(-probability))).astype(np.float32)


def full_losses(
    x_NP: Tensor, weight_VP: Tensor, bias_V: Tensor, targets_N: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """[N] losses in nats over the whole vocabulary, differentiable; targets of -1 give 0."""
    if dtype is None:
        logits = torch.addmm(bias_V, x_NP, weight_VP.t())
    else:
        logits = torch.mm(x_NP.to(dtype), weight_VP.to(dtype).t()).to(x_NP.dtype) + bias_V
    return F.cross_entropy(logits, targets_N, ignore_index=-1, reduction="none")
