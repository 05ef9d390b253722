"""The sampled softmax's losses on a CPU: few passes over the logits, and no mask as big as they are.

Shapes: D directions, N positions, P projection, K negatives, R touched rows of the table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elmo_ray.kernels.cpu.loops import LARGEST, as_array, compiled, compiled_with, exp, float32
from elmo_ray.kernels.matmul import linear
from elmo_ray.kernels.threads import run_parallel

_embedding_backward = torch.ops.aten.embedding_dense_backward  # adds in a fixed order with several threads


def sampled_losses(
    x_DNP: Tensor,
    rows_RP: Tensor,
    bias_R: Tensor,
    target_rows_DN: Tensor,
    target_log_count_DN: Tensor,
    negative_rows_DK: Tensor,
    negative_log_count_DK: Tensor,
    dtype: torch.dtype | None = None,
    mask_hits: bool = True,
) -> Tensor:
    """Return what `model.softmax.sampled_losses` returns, with the same arguments."""
    losses: Tensor = _SampledLosses.apply(
        x_DNP,
        rows_RP,
        bias_R,
        target_rows_DN,
        target_log_count_DN,
        negative_rows_DK,
        negative_log_count_DK,
        dtype,
        mask_hits,
    )
    return losses


@compiled_with(fastmath={"contract", "reassoc"})  # a sum in any order, so many numbers at a time
def _powers(logits: Any, top: Any) -> Any:
    total = float32(0.0)
    for k in range(len(logits)):
        x = logits[k] - top
        power = float32(0.0) if x < -LARGEST else exp(x)
        logits[k] = power
        total += power
    return total


@compiled
def _to_powers(logits_NK: Any, top_N: Any, total_N: Any) -> None:
    """Put exp(logit - top) in place of the logits, and compute their sums."""
    for n in range(len(logits_NK)):
        total_N[n] = _powers(logits_NK[n], top_N[n])


class _SampledLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_DNP: Tensor,
        rows_RP: Tensor,
        bias_R: Tensor,
        target_rows_DN: Tensor,
        target_log_count_DN: Tensor,
        negative_rows_DK: Tensor,
        negative_log_count_DK: Tensor,
        dtype: torch.dtype | None,
        mask_hits: bool,
    ) -> Tensor:
        d, n, _ = x_DNP.shape
        k = negative_rows_DK.shape[1]
        # exp(logit - the position's largest); with `total` of each position all that a gradient needs
        powers_NK: list[Tensor] = [x_DNP] * d
        others_DN, total_DN = x_DNP.new_empty(d, n), x_DNP.new_empty(d, n)
        losses_DN = torch.empty_like(total_DN)
        numbers_K = torch.arange(k, device=x_DNP.device)

        def run(direction: int) -> None:
            x, targets, negatives = x_DNP[direction], target_rows_DN[direction], negative_rows_DK[direction]
            true = (x * F.embedding(targets, rows_RP)).sum(dim=1) + bias_R[targets] - target_log_count_DN[direction]
            weight, offset = rows_RP.index_select(0, negatives), bias_R[negatives] - negative_log_count_DK[direction]
            if dtype is None:
                logits = linear(x, weight.t(), offset)
            else:
                logits = torch.mm(x.to(dtype), weight.to(dtype).t()) + offset
            powers_NK[direction] = logits
            if mask_hits:
                column_of_row = negatives.new_full((len(rows_RP),), -1).index_copy_(0, negatives, numbers_K)
                hit = column_of_row[targets][:, None]
                column = hit.clamp_min(0)
                logits.scatter_(1, column, logits.gather(1, column).masked_fill_(hit >= 0, -math.inf))
            top = torch.maximum(logits.amax(dim=1), true)
            others = others_DN[direction]
            _to_powers(as_array(logits), as_array(top), as_array(others))
            total = torch.add(others, torch.exp(true - top), out=total_DN[direction])
            torch.sub(top + total.log(), true, out=losses_DN[direction])

        run_parallel(run, d, x_DNP.device)
        ctx.save_for_backward(x_DNP, rows_RP, target_rows_DN, negative_rows_DK, others_DN, total_DN, *powers_NK)
        ctx.low = x_DNP.dtype if dtype is None else dtype
        return losses_DN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_DNP, rows_RP, target_rows_DN, negative_rows_DK, others_DN, total_DN, *powers_NK = ctx.saved_tensors
        g_DN, low, full = grads[0], ctx.low, x_DNP.dtype
        d_x = torch.empty_like(x_DNP)
        d_rows: list[Tensor] = [rows_RP] * len(x_DNP)
        d_bias: list[Tensor] = [rows_RP] * len(x_DNP)

        def run(direction: int) -> None:
            x, targets, negatives = x_DNP[direction], target_rows_DN[direction], negative_rows_DK[direction]
            scale = (g_DN[direction] / total_DN[direction])[:, None]
            d_true = -(others_DN[direction][:, None] * scale)
            powers, powers_low = powers_NK[direction], powers_NK[direction].to(low)
            # the scale goes to the short side of each product, not to the logits
            weight = rows_RP.index_select(0, negatives).to(low)
            into = torch.mul(linear(powers_low, weight), scale, out=d_x[direction])
            into.addcmul_(F.embedding(targets, rows_RP), d_true)
            # its transpose: faster than a product that begins with the transpose of the bigger one
            of_negatives = linear((x * scale).to(low).t().contiguous(), powers_low).t().to(full)
            count = len(rows_RP)
            d_rows[direction] = _embedding_backward(x * d_true, targets, count, -1, False)
            d_rows[direction].index_add_(0, negatives, of_negatives)
            d_bias[direction] = _embedding_backward(d_true, targets, count, -1, False)[:, 0]
            d_bias[direction].index_add_(0, negatives, torch.mv(powers.t(), scale[:, 0]))

        run_parallel(run, len(x_DNP), x_DNP.device)
        return (d_x, _total(d_rows), _total(d_bias), *[None] * 6)


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
