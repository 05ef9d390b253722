"""Parts of the character CNN on a CPU in float32 or with bf16 products, as autograd functions of few passes.

Shapes: U words, N characters that they are given with, M windows, W characters of a window, E embedding, F filters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elmo_ray.model.char_cnn_kernels import (
    add_from_windows,
    backward_highway,
    forward_highway,
    gather_windows,
    largest_of_windows,
    spread_to_windows,
)
from elmo_ray.model.cpu_kernels import as_array
from elmo_ray.model.products import linear

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
