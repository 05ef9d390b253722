"""Losses over the whole vocabulary for evaluation, exact, in chunks: a [positions, vocabulary] tensor never exists.

Shapes: N positions, P projection, K columns of a product, V vocabulary, C vocabulary rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from elmo_ray.kernels.matmul import FusedProduct, apply, fused_product
from elmo_ray.kernels.threads import run_parallel

CHUNK, TILE = 2048, 256
"""Vocabulary rows and positions of a product on a CPU: the logits stay in a core's cache, or near it."""

_GPU_TILE = 8192
_ROWS = 32
"""Products have a multiple of so many positions, so that there are not too many kinds of them."""

_KEPT_BYTES = 1 << 28
"""Of a table in the layout of its products; a bigger one is converted anew for every call, chunk by chunk."""

_LOG2_E = math.log2(math.e)

_LEAST = 2.0**-100
"""Smaller sums may lack addends below float32's range."""


class FullSoftmax:
    """A softmax with its table as it is now. dtype: of the products, None for the table's own. rows: about how many
    positions are to be asked for at a time, at most TILE."""

    def __init__(self, weight_VP: Tensor, bias_V: Tensor, dtype: torch.dtype | None = None, rows: int = TILE):
        self._rows = min(rows, TILE)
        self.weight, self.bias = weight_VP.detach(), bias_V.detach()
        self.low = self.weight.dtype if dtype is None else dtype
        n, self._on_cpu = len(self.weight), self.weight.device.type == "cpu"
        half = -(-n // 32) * 16
        # halves of the vocabulary: of two threads each has its own part of the table to convert
        self._halves = [range(0, min(half, n), CHUNK), range(half, n, CHUNK)]
        self._ends = [half, n]
        self._kept: dict[int, FusedProduct] = {}
        self._keeps = self.weight.numel() * self.low.itemsize <= _KEPT_BYTES
        # Where products are rounded, the true logit and the bias are columns of them, so that what is rounded is the
        # difference to the true logit, which is small where it matters. The bias has two, its value in `low` and what
        # that leaves out. On a GPU columns are cheaper than another pass.
        self._shifts = self.low != self.weight.dtype or not self._on_cpu
        block = 1 if self._on_cpu else 8
        self._columns = -(-(self.weight.shape[1] + 3 * self._shifts) // block) * block

    @torch.no_grad()
    def losses(self, x_NP: Tensor, targets_N: Tensor) -> Tensor:
        """Return [N] losses in nats; targets of -1 give 0."""
        safe_N = targets_N.clamp_min(0)
        true_N = (x_NP * self.weight[safe_N]).sum(dim=1).add_(self.bias[safe_N])
        # There is no pass for the largest logit; positions beyond the range of exp are done again with one.
        losses_N = self._losses(x_NP, true_N)
        beyond_N = ~torch.isfinite(losses_N)
        if bool(beyond_N.any()):
            losses_N[beyond_N] = self._safe_log_sums(x_NP[beyond_N]) - true_N[beyond_N]
        return torch.where(targets_N >= 0, losses_N, 0.0)

    def _losses(self, x_NP: Tensor, true_N: Tensor) -> Tensor:
        """Return [N] log of the sum of exp(logit - true logit), not finite where that is beyond the numbers' range."""
        n, p = x_NP.shape
        x_NK = x_NP
        if self._columns > p or n % _ROWS:
            x_NK = x_NP.new_zeros(-(-n // _ROWS) * _ROWS, self._columns, dtype=self.low)
            x_NK[:n, :p] = x_NP
        shift_N: Tensor | float = 0.0
        if self._shifts:
            x_NK[:n, p : p + 2] = 1.0
            x_NK[:n, p + 2] = true_N * -_LOG2_E
            shift_N = x_NK[:n, p + 2].double()  # as it was rounded
        sums_2N = x_NP.new_zeros(2, len(x_NK), dtype=torch.float64)
        tiles = list(x_NK.split(TILE if self._on_cpu else _GPU_TILE))

        def run(part: int) -> None:
            of_chunk_N = torch.empty_like(sums_2N[part], dtype=x_NP.dtype)
            of_tiles = list(of_chunk_N.split(len(tiles[0])))
            for start in self._halves[part]:
                _sums_of_tiles(self._logits_of(start, self._ends[part]), tiles, of_tiles)
                sums_2N[part] += of_chunk_N

        run_parallel(run, 2, x_NP.device)
        sums_N = sums_2N.sum(dim=0)[:n]
        logs_N = torch.where(sums_N > _LEAST, sums_N, math.nan).log2_().sub_(shift_N)
        return logs_N.div_(_LOG2_E).sub_(true_N).to(true_N.dtype)

    def _logits_of(self, start: int, end: int) -> FusedProduct:
        """Return the product for a chunk, to the base of 2: PyTorch's exp2 takes a third of its exp's time."""
        if start in self._kept:
            return self._kept[start]
        chunk = slice(start, min(start + CHUNK, end))
        weight_CP, bias_C = self.weight[chunk] * _LOG2_E, self.bias[chunk] * _LOG2_E
        if not self._shifts:
            product = fused_product(weight_CP, bias_C, rows=self._rows)
        else:
            p = weight_CP.shape[1]
            weight_CK = weight_CP.new_zeros(len(weight_CP), self._columns, dtype=self.low)
            weight_CK[:, :p] = weight_CP
            weight_CK[:, p] = bias_C
            weight_CK[:, p + 1] = bias_C - weight_CK[:, p]
            weight_CK[:, p + 2] = 1.0
            product = fused_product(weight_CK, rows=self._rows)
        if self._keeps:
            self._kept[start] = product
        return product

    def _safe_log_sums(self, x_NP: Tensor) -> Tensor:
        """Return [N] log of the sum of exp(logit), whatever the logits are."""
        x_low = x_NP.to(self.low)
        total_N = torch.full_like(x_NP[:, 0], -math.inf)
        for start in range(0, len(self.weight), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = torch.mm(x_low, self.weight[chunk].to(self.low).t()).to(x_NP.dtype) + self.bias[chunk]
            total_N = torch.logaddexp(total_N, torch.logsumexp(logits, dim=1))
        return total_N


def _sums_of_tiles(logits_of: FusedProduct, tiles: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    for x_tile, result in zip(tiles, sums, strict=True):
        logits = apply(logits_of, x_tile).to(result.dtype)
        torch.sum(logits.exp2_(), dim=1, out=result)
