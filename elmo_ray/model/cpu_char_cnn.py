"""Parts of the character CNN on a CPU in float32 or with bf16 products, as autograd functions of few passes.

Shapes: U words, N characters that they are given with, M windows, W characters of a window, E embedding, F filters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elmo_ray.model.cpu_kernels import (
    as_array,
    backward_highway,
    forward_highway,
    largest_of_windows,
    spread_to_windows,
)
from elmo_ray.model.products import linear

_WORDS = 32
"""Whose windows' products are made at a time: a core's cache holds them until their maximum is known."""


class LargestProducts(torch.autograd.Function):
    """(types [U, N], embedding [C, E], weight [W * E, F], W, the products' dtype) -> [U, F]: the maximum over all
    windows of W characters of their products with the filters; the gradient goes to the first that has it."""

    @staticmethod
    def forward(
        ctx: Any, types_UN: Tensor, embedding: Tensor, weight: Tensor, width: int, dtype: torch.dtype | None
    ) -> Tensor:
        low = weight.dtype if dtype is None else dtype
        embedding_low, weight_low = embedding.to(low), weight.to(low)
        windows_UMW = types_UN.int().unfold(1, width, 1)
        largest_UF = weight.new_empty(len(types_UN), weight.shape[1])
        which_UF = torch.empty_like(largest_UF, dtype=torch.uint8)
        given = []
        pieces = zip(windows_UMW.split(_WORDS), largest_UF.split(_WORDS), which_UF.split(_WORDS), strict=True)
        for windows, largest, which in pieces:
            x = F.embedding(windows, embedding_low).flatten(2)
            products = torch.mm(x.flatten(0, 1), weight_low).view(*x.shape[:2], -1)
            largest_of_windows(as_array(products), as_array(largest), which.numpy())
            given.append(x)
        ctx.save_for_backward(windows_UMW, weight_low, which_UF, *given)
        ctx.like = embedding
        return largest_UF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        windows_UMW, weight_low, which_UF, *given = ctx.saved_tensors
        count, size = ctx.like.shape
        low, full = weight_low.dtype, grads[0].dtype
        d_weight = torch.zeros_like(weight_low, dtype=full)
        d_given = []
        pieces = zip(given, grads[0].contiguous().split(_WORDS), which_UF.split(_WORDS), strict=True)
        for x, gradient, which in pieces:
            u, m, _ = x.shape
            spread = torch.empty(u, m, weight_low.shape[1], dtype=low)
            spread_to_windows(as_array(gradient), which.numpy(), as_array(spread))
            spread_NF, x_NK = spread.flatten(0, 1), x.flatten(0, 1)
            if low == full:
                d_weight.addmm_(x_NK.t(), spread_NF)
            else:
                d_weight += torch.mm(x_NK.t(), spread_NF)
            if ctx.needs_input_grad[1]:
                d_given.append(torch.mm(spread_NF, weight_low.t()).view(u, m, -1, size))
        d_embedding = None
        if d_given:
            of_characters = torch.cat(d_given).to(full)
            d_embedding = torch.ops.aten.embedding_dense_backward(of_characters, windows_UMW, count, -1, False)
        return None, d_embedding, d_weight, None, None


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
