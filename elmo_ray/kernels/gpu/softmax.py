"""The sampled softmax's losses on a GPU: one pass over the logits, which are kept as powers in the products' type.

A position's logits are a row that one program reads once: it masks the negative that is the target, and writes the
powers exp(logit - largest) over the logits. With each position's sum they are all that a gradient needs, so no mask and
no probabilities as big as the logits are made. A touched row's gradient is summed over its positions in sorted order,
without atomic additions: the same input gives the same bits.

Shapes: D directions, N positions, P projection, K negatives, R touched rows of the table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from elmo_ray.kernels.gpu.arithmetic import product_float32, rows_at_once
from elmo_ray.kernels.gpu.rows import sort_positions
from elmo_ray.kernels.hints import SortedPositions

_MOST_NEGATIVES = 65536
"""Logits of a position that fit into one program's registers."""


def serves(negative_rows_DK: Tensor) -> bool:
    """Return True if `sampled_losses` computes such a softmax: one with not too many negatives."""
    return negative_rows_DK.shape[1] <= _MOST_NEGATIVES


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
    positions: SortedPositions | None = None,
) -> Tensor:
    """Return the losses [D, N] in nats of each position against its target and the negatives of its direction.

    rows_RP, bias_R: the touched rows of the table; the two `_rows_` arguments index them, and a direction's negatives
    are distinct. A negative equal to a position's target is masked (bilm-tf always does), and the log expected count is
    subtracted from every logit. dtype: of the products, None for float32. positions: of `target_rows_DN`, flat; None
    sorts them in the backward pass.
    """
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
        positions,
    )
    return losses


@triton.jit
def _softmax_forward(  # type: ignore[no-untyped-def]
    logits, offset, x, rows, bias, target, log_count, column_of_row, losses, others, total, N, K, P, R,
    MASK_HITS: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Turns a position's logits [K] into powers, and writes its loss, the powers' sum, and this with the target's."""
    d, n = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at = d * N + n
    k, p = tl.arange(0, BK), tl.arange(0, BP)
    row = tl.load(target + at).to(tl.int64)
    # The target's logit is summed in float32 even where the products are bf16.
    true = tl.sum(tl.load(x + at * P + p, p < P, 0.0) * tl.load(rows + row * P + p, p < P, 0.0), 0)
    true += tl.load(bias + row) - tl.load(log_count + at)
    logit = tl.load(logits + at * K + k, k < K, 0.0).to(tl.float32) + tl.load(offset + d * K + k, k < K, 0.0)
    counts = k < K
    if MASK_HITS:
        counts = counts & (k != tl.load(column_of_row + d * R + row))
    logit = tl.where(counts, logit, float("-inf"))
    largest = tl.maximum(tl.max(logit, 0), true)
    power = tl.exp(logit - largest)
    of_others = tl.sum(power, 0)
    of_all = of_others + tl.exp(true - largest)
    tl.store(logits + at * K + k, power.to(logits.dtype.element_ty), k < K)
    tl.store(losses + at, largest + tl.log(of_all) - true)
    tl.store(others + at, of_others)
    tl.store(total + at, of_all)


@triton.jit
def _softmax_backward(  # type: ignore[no-untyped-def]
    product, x, rows, target, gradient, others, total, d_x, x_scaled, scale, d_true, N, P, BP: tl.constexpr
):  # fmt: skip
    """Write a position's d_x = scale * (powers @ weight) + d_true * its target's row, and x_scaled = scale * x.

    product: powers @ weight [D, N, P]; the scale goes to the short side of each product, not to the powers.
    """
    at, p = tl.program_id(1).to(tl.int64) * N + tl.program_id(0), tl.arange(0, BP)
    inside = p < P
    by = tl.load(gradient + at) / tl.load(total + at)
    true = -tl.load(others + at) * by
    row = tl.load(target + at).to(tl.int64)
    of_others = by * tl.load(product + at * P + p, inside, 0.0).to(tl.float32)
    tl.store(d_x + at * P + p, of_others + true * tl.load(rows + row * P + p, inside, 0.0), inside)
    own = tl.load(x + at * P + p, inside, 0.0)
    tl.store(x_scaled + at * P + p, (own * by).to(x_scaled.dtype.element_ty), inside)
    tl.store(scale + at, by)
    tl.store(d_true + at, true)


@triton.jit
def _column_sums(x, scale, out, N, K, PER, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write out [S, D, K]: of x [D, N, K] times scale [D, N] the sum of PER positions each."""
    s, d, k = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.program_id(0) * BK + tl.arange(0, BK)
    total = tl.zeros((BK,), tl.float32)
    for first in range(s * PER, tl.minimum((s + 1) * PER, N), BN):
        n = first + tl.arange(0, BN)
        some = (n < N) & (n < (s + 1) * PER)
        at = x + (d * N + n)[:, None] * K + k[None, :]
        tile = tl.load(at, some[:, None] & (k < K)[None, :], 0.0).to(tl.float32)
        total += tl.sum(tile * tl.load(scale + d * N + n, some, 0.0)[:, None], 0)
    tl.store(out + (s * tl.num_programs(2) + d) * K + k, total, k < K)


def column_sums(x_DNK: Tensor, scale_DN: Tensor) -> Tensor:
    """Return the sums [D, K] of x over the positions, each times its scale, in float32."""
    d, n, k = x_DNK.shape
    per = max(64, triton.next_power_of_2(triton.cdiv(n, 8)))
    sums = scale_DN.new_empty(triton.cdiv(n, per), d, k)
    _column_sums[(triton.cdiv(k, 128), len(sums), d)](x_DNK, scale_DN, sums, n, k, per, BN=32, BK=128)
    return sums.sum(0)


@triton.jit
def _softmax_rows(  # type: ignore[no-untyped-def]
    x, d_true, order, starts, of_negatives, bias_of_negatives, column_of_row, d_rows, d_bias, P, R, K,
    D: tl.constexpr, BP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write a touched row's gradient: as the target of its positions, and as a negative of each direction."""
    r, p = tl.program_id(0).to(tl.int64), tl.arange(0, BP)
    first, end = tl.load(starts + r), tl.load(starts + r + 1)
    total, of_bias = tl.zeros((BP,), tl.float32), 0.0
    for n in range(first, end, AT_ONCE):
        at = n + tl.arange(0, AT_ONCE)
        place = tl.load(order + at, at < end, 0).to(tl.int64)
        by = tl.load(d_true + place, at < end, 0.0)
        inside = (at < end)[:, None] & (p < P)[None, :]
        total += tl.sum(by[:, None] * tl.load(x + place[:, None] * P + p[None, :], inside, 0.0), 0)
        of_bias += tl.sum(by, 0)
    for d in tl.static_range(D):
        k = tl.load(column_of_row + d * R + r).to(tl.int64)
        total += tl.load(of_negatives + (d * K + k) * P + p, (p < P) & (k >= 0), 0.0)
        of_bias += tl.load(bias_of_negatives + d * K + k, k >= 0, 0.0)
    tl.store(d_rows + r * P + p, total, p < P)
    tl.store(d_bias + r, of_bias)


class _SampledLosses(torch.autograd.Function):
    """The autograd function of `sampled_losses`, with its arguments."""

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
        positions: SortedPositions | None,
    ) -> Tensor:
        (d, n, p), r, k = x_DNP.shape, len(rows_RP), negative_rows_DK.shape[1]
        low = x_DNP.dtype if dtype is None else dtype
        x, rows, targets = x_DNP.contiguous(), rows_RP.contiguous(), target_rows_DN.contiguous()
        # Of each row the column that it is in as a negative; -1: it is none.
        column_of_row = torch.full((d, r), -1, dtype=torch.int32, device=x.device)
        columns = torch.arange(k, device=x.device, dtype=torch.int32).expand(d, k)
        column_of_row.scatter_(1, negative_rows_DK.long(), columns)
        weight_DKP = rows.to(low).index_select(0, negative_rows_DK.flatten()).view(d, k, p)
        offset = bias_R[negative_rows_DK] - negative_log_count_DK
        logits_DNK = torch.bmm(x.to(low), weight_DKP.transpose(1, 2))
        losses, others, total = (x.new_empty(d, n) for _ in range(3))
        _softmax_forward[(n, d)](
            logits_DNK, offset, x, rows, bias_R, targets, target_log_count_DN.contiguous(), column_of_row,
            losses, others, total, n, k, p, r,
            MASK_HITS=mask_hits, BK=triton.next_power_of_2(k), BP=triton.next_power_of_2(p), num_warps=8,
        )  # fmt: skip
        ctx.save_for_backward(x, rows, targets, weight_DKP, logits_DNK, others, total, column_of_row)
        ctx.positions = positions
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, targets, weight_DKP, powers_DNK, others, total, column_of_row = ctx.saved_tensors
        (d, n, p), r, k = x.shape, len(rows), weight_DKP.shape[1]
        d_x, x_scaled = torch.empty_like(x), torch.empty_like(x, dtype=powers_DNK.dtype)
        scale, d_true = torch.empty_like(total), torch.empty_like(total)
        block = triton.next_power_of_2(p)
        _softmax_backward[(n, d)](
            torch.bmm(powers_DNK, weight_DKP), x, rows, targets, grads[0].contiguous(), others, total,
            d_x, x_scaled, scale, d_true, n, p, BP=block, num_warps=4,
        )  # fmt: skip
        of_negatives = product_float32(powers_DNK.transpose(1, 2), x_scaled)
        bias_of_negatives = column_sums(powers_DNK, scale)
        order, starts = sort_positions(targets, r) if ctx.positions is None else ctx.positions
        d_rows, d_bias = torch.empty_like(rows), rows.new_empty(r)
        _softmax_rows[(r,)](
            x, d_true, order, starts, of_negatives, bias_of_negatives, column_of_row, d_rows, d_bias, p, r, k,
            D=d, BP=block, AT_ONCE=rows_at_once(block),
        )  # fmt: skip
        return d_x, d_rows, d_bias, *[None] * 7
