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

from elmo_ray.model.fused_product import FusedProduct
from elmo_ray.model.side_by_side import side_by_side

CHUNK, TILE = 2048, 256
"""Vocabulary rows and positions per product in evaluation: the logits stay in a CPU core's cache, and a [positions, V]
tensor never exists."""

_GPU_TILE = 8192
_ROWS = 32
"""Products have a multiple of so many positions, so that there are not too many kinds of them."""

_LOG2_E = math.log2(math.e)


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
    low, device = x_NP.dtype if dtype is None else dtype, x_NP.device
    tile, block = (TILE, 1) if device.type == "cpu" else (_GPU_TILE, 8)
    n, p = x_NP.shape
    # Bias and shift are columns of the product, so that what is rounded to `low` after it is the difference, which is
    # small where it matters. The bias has two, its value in `low` and what that leaves out. Logarithms are to the base
    # of 2 here: PyTorch's exp2 takes a third of its exp's time.
    columns = -(-(p + 3) // block) * block
    x_NK = torch.zeros(-(-n // _ROWS) * _ROWS, columns, dtype=low, device=device)
    x_NK[:n, :p] = x_NP * _LOG2_E
    x_NK[:n, p : p + 2] = 1.0
    x_NK[:n, p + 2] = shift_N * -_LOG2_E
    sums_2N = torch.zeros(2, len(x_NK), dtype=torch.float64, device=device)
    half = -(-len(weight_VP) // 32) * 16
    x_tiles = x_NK.split(tile)

    def run(part: int) -> None:
        """Half of the vocabulary: with threads for both, each half has its own."""
        stop = min(len(weight_VP), (part + 1) * half)
        of_chunk_N = torch.empty_like(sums_2N[part], dtype=x_NP.dtype)
        tiles = list(zip(x_tiles, of_chunk_N.split(tile), strict=True))
        for start in range(part * half, stop, CHUNK):
            weight_CP, bias_C = weight_VP[start : min(stop, start + CHUNK)], bias_V[start : min(stop, start + CHUNK)]
            weight_CK = torch.zeros(len(weight_CP), columns, dtype=low, device=device)
            weight_CK[:, :p] = weight_CP
            weight_CK[:, p] = bias_C * _LOG2_E
            weight_CK[:, p + 1] = bias_C * _LOG2_E - weight_CK[:, p]
            weight_CK[:, p + 2] = 1.0
            logits_of = FusedProduct(weight_CK, rows=min(n, tile))
            # few operations on much each: two threads meet at Python's lock between any two of them
            for x_tile, sums in tiles:
                torch.sum(logits_of(x_tile).to(x_NP.dtype).exp2_(), dim=1, out=sums)
            sums_2N[part] += of_chunk_N

    side_by_side(run, 2, device)
    # what rounding the shift to `low` has changed
    changed_N = x_NK[:n, p + 2].double() + shift_N.double() * _LOG2_E
    return ((sums_2N.sum(dim=0)[:n].log2_() - changed_N) / _LOG2_E).to(shift_N.dtype)


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
