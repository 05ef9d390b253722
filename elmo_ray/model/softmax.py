"""The softmax over the vocabulary: full, exact in chunks for evaluation, and the draws of the sampled one.

Shapes: N positions, P projection, V vocabulary, K negatives, R touched rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray.model.side_by_side import side_by_side

CHUNK, TILE = 2048, 256
"""Vocabulary rows and positions per product in evaluation: the logits stay in a CPU core's cache, and a [positions, V]
tensor never exists."""

_GPU_TILE = 8192


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


@torch.no_grad()
def full_losses_in_chunks(
    x_NP: Tensor, weight_VP: Tensor, bias_V: Tensor, targets_N: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """[N] losses in nats over the whole vocabulary, for evaluation: memory is TILE * CHUNK; targets of -1 give 0."""
    safe_N = targets_N.clamp_min(0)
    true_N = (x_NP * weight_VP[safe_N]).sum(dim=1) + bias_V[safe_N]
    # Losses are log(sum(exp(logit - true logit))): with the difference as part of the product there is no pass for the
    # largest logit. Positions whose loss is beyond exp's range are done again with one.
    losses_N = _log_sums(x_NP, weight_VP, bias_V, true_N, dtype)
    beyond_N = ~torch.isfinite(losses_N)
    if bool(beyond_N.any()):
        losses_N[beyond_N] = _safe_log_sums(x_NP[beyond_N], weight_VP, bias_V, dtype) - true_N[beyond_N]
    return torch.where(targets_N >= 0, losses_N, 0.0)


def _log_sums(x_NP: Tensor, weight_VP: Tensor, bias_V: Tensor, shift_N: Tensor, dtype: torch.dtype | None) -> Tensor:
    """[N] log of the sum of exp(logit - shift) over the vocabulary; infinite where that is beyond the numbers'
    range."""
    tile = TILE if x_NP.device.type == "cpu" else _GPU_TILE
    if dtype is None:
        x_NP = torch.cat([x_NP, torch.ones_like(shift_N)[:, None], -shift_N[:, None]], dim=1)
    sums_N = torch.zeros_like(shift_N, dtype=torch.float64)
    half = -(-len(x_NP) // (2 * tile)) * tile

    def run(number: int) -> None:
        """Half of the positions, in whole tiles: with threads for both, each half has its own."""
        stop = min(len(x_NP), (number + 1) * half)
        for start in range(0, len(weight_VP), CHUNK):
            weight_CP, bias_C = weight_VP[start : start + CHUNK], bias_V[start : start + CHUNK]
            if dtype is None:
                weight_CP = torch.cat([weight_CP, bias_C[:, None], torch.ones_like(bias_C)[:, None]], dim=1)
            else:
                weight_CP = weight_CP.to(dtype)
            for first in range(number * half, stop, tile):
                part = slice(first, min(stop, first + tile))
                if dtype is None:
                    logits = torch.mm(x_NP[part], weight_CP.t())
                else:
                    logits = torch.mm(x_NP[part].to(dtype), weight_CP.t()).to(x_NP.dtype) + bias_C - shift_N[part, None]
                sums_N[part] += logits.exp_().sum(dim=1)

    side_by_side(run, 2, x_NP.device)
    return sums_N.log_().to(shift_N.dtype)


def _safe_log_sums(x_NP: Tensor, weight_VP: Tensor, bias_V: Tensor, dtype: torch.dtype | None) -> Tensor:
    """[N] log of the sum of exp(logit) over the vocabulary, whatever the logits are."""
    low = x_NP.dtype if dtype is None else dtype
    x_low = x_NP.to(low)
    total_N = torch.full_like(x_NP[:, 0], -math.inf)
    for start in range(0, len(weight_VP), CHUNK):
        stop = start + CHUNK
        logits = torch.mm(x_low, weight_VP[start:stop].to(low).t()).to(x_NP.dtype) + bias_V[start:stop]
        total_N = torch.logaddexp(total_N, torch.logsumexp(logits, dim=1))
    return total_N
