"""Parts of the character CNN on a CPU in float32 or with bf16 products, as autograd functions of few passes.

Shapes: U words, N characters that they are given with, M windows, W characters of a window, E embedding, F filters.

The character CNN's windows, maxima and highways on a CPU, as compiled loops (`cpu_kernels.py`).

Shapes: U words, N characters, M windows, K numbers of a window, F filters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elmo_ray.kernels.cpu.loops import as_array, compiled, float32, sigmoid, stored, wide
from elmo_ray.kernels.matmul import linear


@compiled
def gather_windows(types_UN: Any, embedding: Any, x_UMK: Any) -> None:
    """The vectors of each window's characters beside each other."""
    size = embedding.shape[1]
    for u in range(x_UMK.shape[0]):
        for m in range(x_UMK.shape[1]):
            x = x_UMK[u, m]
            for w in range(len(x) // size):
                x[w * size : (w + 1) * size] = embedding[types_UN[u, m + w]]


@compiled
def _add(x: Any, into: Any) -> None:
    for e in range(len(into)):
        into[e] += wide(x[e])


@compiled
def add_from_windows(types_UN: Any, d_x_UMK: Any, d_embedding: Any) -> None:
    """The gradient of `gather_windows`, added to what is there."""
    size = d_embedding.shape[1]
    for u in range(d_x_UMK.shape[0]):
        for m in range(d_x_UMK.shape[1]):
            d_x = d_x_UMK[u, m]
            for w in range(len(d_x) // size):
                _add(d_x[w * size : (w + 1) * size], d_embedding[types_UN[u, m + w]])


@compiled
def _first(row: Any, largest: Any, which: Any) -> None:
    for f in range(len(largest)):
        largest[f], which[f] = wide(row[f]), np.int16(0)


@compiled
def _larger(row: Any, largest: Any, which: Any, number: Any) -> None:
    for f in range(len(largest)):
        x = wide(row[f])
        better = (x > largest[f]) | (x != x)  # one that is no number stays
        largest[f], which[f] = x if better else largest[f], number if better else which[f]


@compiled
def largest_of_windows(products_UMF: Any, largest_UF: Any, which_UF: Any) -> None:
    """The maximum over the windows, and the first window that has it."""
    for u in range(len(products_UMF)):
        products, largest, which = products_UMF[u], largest_UF[u], which_UF[u]
        _first(products[0], largest, which)
        for m in range(1, len(products)):
            _larger(products[m], largest, which, np.int16(m))


@compiled
def _where(gradient: Any, which: Any, number: Any, row: Any) -> None:
    for f in range(len(row)):
        row[f] = stored(gradient[f] if which[f] == number else float32(0.0), row[f])


@compiled
def spread_to_windows(gradient_UF: Any, which_UF: Any, gradient_UMF: Any) -> None:
    """The gradient of `largest_of_windows`: to the window that was chosen, and 0 to the others."""
    for u in range(len(gradient_UMF)):
        for m in range(gradient_UMF.shape[1]):
            _where(gradient_UF[u], which_UF[u], np.int16(m), gradient_UMF[u, m])


@compiled
def _mix(x: Any, carry: Any, transform: Any, b_carry: Any, b_transform: Any, gate: Any, other: Any, y: Any) -> None:
    for f in range(len(x)):
        g, t = sigmoid(wide(carry[f]) + b_carry[f]), wide(transform[f]) + b_transform[f]
        t = float32(0.0) if t < float32(0.0) else t
        gate[f], other[f], y[f] = g, t, x[f] + g * (t - x[f])


@compiled
def forward_highway(
    x_UF: Any,
    carry_UF: Any,
    transform_UF: Any,
    b_carry: Any,
    b_transform: Any,
    gate_UF: Any,
    other_UF: Any,
    y_UF: Any,
) -> None:
    """From two products of x: the gate sigmoid(carry), the other relu(transform), and gate * other + (1 - gate) * x."""
    for u in range(len(x_UF)):
        _mix(x_UF[u], carry_UF[u], transform_UF[u], b_carry, b_transform, gate_UF[u], other_UF[u], y_UF[u])


@compiled
def _unmix(dy: Any, x: Any, gate: Any, other: Any, d_carry: Any, d_transform: Any, d_x: Any) -> None:
    one = float32(1.0)
    for f in range(len(x)):
        g, t = gate[f], other[f]
        d_carry[f] = stored(dy[f] * (t - x[f]) * g * (one - g), d_carry[f])
        d_transform[f] = stored(dy[f] * g if t > float32(0.0) else float32(0.0), d_transform[f])
        d_x[f] = dy[f] * (one - g)


@compiled
def backward_highway(
    dy_UF: Any, x_UF: Any, gate_UF: Any, other_UF: Any, d_carry_UF: Any, d_transform_UF: Any, d_x_UF: Any
) -> None:
    """The gradients of both products with their biases, and the part of x's that does not come through them."""
    for u in range(len(x_UF)):
        _unmix(dy_UF[u], x_UF[u], gate_UF[u], other_UF[u], d_carry_UF[u], d_transform_UF[u], d_x_UF[u])


_WORDS = 32
"""Whose windows' products are made at a time: a core's cache holds them until their maximum is known."""


class LargestProducts(torch.autograd.Function):
    """(embedding [C, E], weight [W * E, F], W, the products' dtype, types [U, N] ...) -> [U of all, F]: the maximum
    over all windows of W characters of their products with the filters; the gradient goes to the first that has it."""

    @staticmethod
    def forward(
        ctx: Any, embedding: Tensor, weight: Tensor, width: int, dtype: torch.dtype | None, *types: Tensor
    ) -> Tensor:
        low = weight.dtype if dtype is None else dtype
        embedding_low, weight_low = as_array(embedding.to(low)), weight.to(low)
        largest_UF = weight.new_empty(sum(map(len, types)), weight.shape[1])
        which_UF = torch.empty_like(largest_UF, dtype=torch.int16)
        ctx.pieces, start = [], 0
        for words_UN in types:
            # the loops do not look
            if words_UN.numel() and not 0 <= int(words_UN.min()) <= int(words_UN.max()) < len(embedding):
                raise IndexError(f"character ids between {words_UN.min()} and {words_UN.max()}")
            for some_UN in words_UN.split(_WORDS):
                stop = start + len(some_UN)
                x_UMK = weight.new_empty(len(some_UN), some_UN.shape[1] - width + 1, len(weight), dtype=low)
                gather_windows(as_array(some_UN), embedding_low, as_array(x_UMK))
                products = torch.mm(x_UMK.flatten(0, 1), weight_low).view(*x_UMK.shape[:2], -1)
                largest_of_windows(as_array(products), as_array(largest_UF[start:stop]), which_UF[start:stop].numpy())
                ctx.pieces.append((start, stop, some_UN, x_UMK))
                start = stop
        ctx.save_for_backward(embedding, weight_low, which_UF)
        return largest_UF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        embedding, weight_low, which_UF = ctx.saved_tensors
        gradient_UF, which, low = grads[0].contiguous(), which_UF.numpy(), weight_low.dtype
        d_weight = torch.zeros_like(weight_low, dtype=gradient_UF.dtype)
        d_embedding = torch.zeros_like(embedding) if ctx.needs_input_grad[0] else None
        for start, stop, some_UN, x_UMK in ctx.pieces:
            spread = x_UMK.new_empty(*x_UMK.shape[:2], weight_low.shape[1])
            spread_to_windows(as_array(gradient_UF[start:stop]), which[start:stop], as_array(spread))
            spread_NF, x_NK = spread.flatten(0, 1), x_UMK.flatten(0, 1)
            if low == d_weight.dtype:
                d_weight.addmm_(x_NK.t(), spread_NF)
            else:
                d_weight += torch.mm(x_NK.t(), spread_NF)
            if d_embedding is not None:
                d_x = torch.mm(spread_NF, weight_low.t()).view(x_UMK.shape)
                add_from_windows(as_array(some_UN), as_array(d_x), as_array(d_embedding))
        return d_embedding, d_weight, *[None] * (len(ctx.needs_input_grad) - 2)


class CpuHighway(torch.autograd.Function):
    """(x [U, F], carry weight [F, F], carry bias, transform weight, transform bias, the products' dtype) -> [U, F]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_carry: Tensor,
        b_carry: Tensor,
        w_transform: Tensor,
        b_transform: Tensor,
        dtype: torch.dtype | None,
    ) -> Tensor:
        low = x.dtype if dtype is None else dtype
        x_low, w_carry_low, w_transform_low = x.to(low), w_carry.to(low), w_transform.to(low)
        carry, transform = linear(x_low, w_carry_low), linear(x_low, w_transform_low)
        gate, other, y = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        arrays = (x, carry, transform, b_carry, b_transform, gate, other, y)
        forward_highway(*map(as_array, arrays))
        ctx.save_for_backward(x, x_low, w_carry_low, w_transform_low, gate, other)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, x_low, w_carry, w_transform, gate, other = ctx.saved_tensors
        dy, full = grads[0].contiguous(), x.dtype
        d_carry, d_transform, d_x = torch.empty_like(x_low), torch.empty_like(x_low), torch.empty_like(x)
        backward_highway(*map(as_array, (dy, x, gate, other, d_carry, d_transform, d_x)))
        d_w_carry, d_w_transform = (torch.mm(x_low.t(), d).to(full) for d in (d_carry, d_transform))
        d_b_carry, d_b_transform = (torch.sum(d, dim=0, dtype=full) for d in (d_carry, d_transform))
        for d, weight in ((d_carry, w_carry), (d_transform, w_transform)):
            d_x += linear(d, weight.t())
        return d_x, d_w_carry, d_b_carry, d_w_transform, d_b_transform, None
