"""The character CNN's convolutions and their maxima on a GPU: one product for all words and filters.

The characters' vectors of every window are written beside each other into one matrix for all words, however long, so a
single product serves all filters, the narrow ones padded with zeros. A word's windows are those that begin at one of
its characters or at its first padding: windows of padding alone are all alike. Bias and activation are monotone, so
they come after the maximum. A filter's maximum, and its gradient, are a Triton kernel each.

Shapes: U words, C characters of a word, V kinds of characters, E embedding, W characters of the widest filter, F
filters, M windows of all words, K = W * E numbers of a window, padded to a power of two.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from elmo_ray.kernels.gpu.arithmetic import block_for, product_float32, tanh

_LARGEST_WINDOW = 1024
"""Numbers of a window that one program's tile may have."""
_LARGEST_EMBEDDING = 128
"""Numbers of a character's vector that one program's tile may have."""


def serves(embedding_VE: Tensor, filters: Sequence[Tensor]) -> bool:
    """Return True if `largest_windows` computes such filters: those whose windows fit into tiles."""
    size = embedding_VE.shape[1]
    return size <= _LARGEST_EMBEDDING and size * max(w.shape[2] for w in filters) <= _LARGEST_WINDOW


def count_windows(types_UC: Tensor, padding: int) -> Tensor:
    """Return how many windows `largest_windows` looks at in each word, [U] int32: one for each character before the
    padding, and one for the padding if there is any."""
    return ((types_UC != padding).sum(1, dtype=torch.int32) + 1).clamp_max_(types_UC.shape[1])


def largest_windows(
    types_UC: Tensor,
    embedding_VE: Tensor,
    filters: Sequence[Tensor],
    bias_F: Tensor,
    activation: str,
    dtype: torch.dtype | None,
    windows_U: Tensor | None = None,
    capacity: int | None = None,
) -> Tensor:
    """Return activation(bias + the largest product of a word's windows with each filter), [U, F] in float32.

    types_UC: character ids, of which V - 1 is the padding; an id outside of the embedding is not noticed. filters: [n,
    E, width] each, F in all, in the order of bias_F. activation: "relu" or "tanh". dtype: of the products, None for
    float32. The gradient goes to the first window that has the maximum.

    windows_U: what `count_windows` gives; 0 for a word that is there to fill a fixed size and gets no gradient. None
    counts them. capacity: not less than all windows together, rounded up so that steps have one shape; None takes the
    sum, for which the CPU waits for the GPU.
    """
    largest_UF: Tensor = _LargestWindows.apply(
        types_UC, windows_U, capacity, dtype, activation == "relu", embedding_VE, bias_F, *filters
    )
    return largest_UF


@triton.jit
def _unfold(  # type: ignore[no-untyped-def]
    types, windows, offsets, embedding, out, C, PADDING, E: tl.constexpr, KE: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Write out [M, BK]: the vectors of a window's characters one after another, KE numbers, then zeros."""
    u, k = tl.program_id(0).to(tl.int64), tl.arange(0, BK)
    n, at = tl.load(windows + u), tl.load(offsets + u).to(tl.int64)
    for first in range(0, n, 16):
        m = first + tl.arange(0, 16)
        c = m[:, None] + (k // E)[None, :]
        ids = tl.load(types + u * C + c, c < C, PADDING).to(tl.int32)
        x = tl.load(embedding + ids * E + (k % E)[None, :], (k < KE)[None, :], 0.0)
        tl.store(out + (at + m)[:, None] * BK + k[None, :], x, (m < n)[:, None])


@triton.jit
def _window_maximum(  # type: ignore[no-untyped-def]
    product, windows, offsets, widths, bias, out, which, C, F, RELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write out [U, F]: activation(bias + the largest of a word's products [M, F]), and which window it is of."""
    u, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    n, at, width = tl.load(windows + u), tl.load(offsets + u).to(tl.int64), tl.load(widths + f, inside, 0)
    best, where = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for m in range(n):
        v = tl.load(product + (at + m) * F + f, inside, 0.0).to(tl.float32)
        # A window that would reach behind the word's last character is none; NaN, once found, stays.
        better = (m + width <= C) & ((v > best) | (v != v))
        best, where = tl.where(better, v, best), tl.where(better, m, where)
    y = best + tl.load(bias + f, inside, 0.0)
    y = tl.where(y < 0.0, 0.0, y) if RELU else tanh(y)
    tl.store(out + u * F + f, y, inside)
    tl.store(which + u * F + f, where.to(which.dtype.element_ty), inside)


@triton.jit
def _window_gradient(  # type: ignore[no-untyped-def]
    gradient, out, which, windows, offsets, d_product, F, RELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write d_product [M, F]: the gradient where the window was the largest, elsewhere 0."""
    u, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    g, y = tl.load(gradient + u * F + f, inside, 0.0), tl.load(out + u * F + f, inside, 0.0)
    g = tl.where(y > 0.0, g, 0.0) if RELU else g * (1.0 - y * y)
    where, at = tl.load(which + u * F + f, inside, 0).to(tl.int32), tl.load(offsets + u).to(tl.int64)
    for m in range(tl.load(windows + u)):
        d = tl.where(where == m, g, 0.0).to(d_product.dtype.element_ty)
        tl.store(d_product + (at + m) * F + f, d, inside)


@triton.jit
def _fold(  # type: ignore[no-untyped-def]
    types, windows, offsets, d_windows, parts, U, C, PER,
    E: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, BU: tl.constexpr, BV: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    """Write parts [S, V, E]: the gradient of the characters' vectors from the windows of PER words each.

    The sum over the places where a character stands is a product with the matrix that says where it does.
    """
    s, v, e = tl.program_id(1), tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, BE)
    total = tl.zeros((BV, BE), tl.float32)
    for first in range(s * PER, tl.minimum((s + 1) * PER, U), BU):
        u = first + tl.arange(0, BU)
        inside = u < U
        n, at = tl.load(windows + u, inside, 0), tl.load(offsets + u, inside, 0).to(tl.int64)
        for c in range(tl.minimum(tl.max(n, 0) + W - 1, C)):
            g = tl.zeros((BU, BE), tl.float32)
            for j in tl.static_range(W):
                m = c - j
                some = inside & (m >= 0) & (m < n)
                place = d_windows + (at + m)[:, None] * BK + j * E + e[None, :]
                g += tl.load(place, some[:, None] & (e < E)[None, :], 0.0)
            ids = tl.load(types + u.to(tl.int64) * C + c, inside, -1).to(tl.int32)
            total = tl.dot((ids[None, :] == v[:, None]).to(tl.float32), g, total, input_precision="ieee")
    tl.store(parts + (s * V + v)[:, None] * E + e[None, :], total, (v < V)[:, None] & (e < E)[None, :])


@functools.lru_cache(maxsize=16)
def _widths(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the width of each filter, [F] int32, of groups of (count, width)."""
    return torch.cat([torch.full((count,), width, dtype=torch.int32) for count, width in shapes]).to(device)


class _LargestWindows(torch.autograd.Function):
    """The autograd function of `largest_windows`: (types, windows, capacity, dtype, whether relu, embedding, bias,
    filters ...)."""

    @staticmethod
    @custom_fwd(device_type="cuda", cast_inputs=torch.float32)  # within torch.autocast
    def forward(
        ctx: Any,
        types_UC: Tensor,
        windows_U: Tensor | None,
        capacity: int | None,
        dtype: torch.dtype | None,
        relu: bool,
        embedding_VE: Tensor,
        bias_F: Tensor,
        *filters: Tensor,
    ) -> Tensor:
        (u, c), (v, e), f = types_UC.shape, embedding_VE.shape, len(bias_F)
        low = embedding_VE.dtype if dtype is None else dtype
        shapes = tuple((weight.shape[0], weight.shape[2]) for weight in filters)
        widest = max(width for _, width in shapes)
        k = triton.next_power_of_2(max(16, widest * e))
        types = types_UC.contiguous()
        windows = count_windows(types, v - 1) if windows_U is None else windows_U
        offsets = windows.cumsum(0, dtype=torch.int32) - windows
        if capacity is None:
            capacity = int(windows.sum())
        weight_KF, start = torch.zeros(k, f, device=types.device, dtype=low), 0
        for (count, width), weight in zip(shapes, filters, strict=True):
            place = weight_KF[: width * e, start : start + count]
            place.view(width, e, count).copy_(weight.permute(2, 1, 0))
            start += count
        # Rows behind the last window stay 0, so their products add nothing to a gradient.
        x_MK = torch.zeros(capacity, k, device=types.device, dtype=low)
        _unfold[(u,)](
            types, windows, offsets, embedding_VE.to(low).contiguous(), x_MK, c, v - 1, E=e, KE=widest * e, BK=k
        )
        product_MF = torch.mm(x_MK, weight_KF)
        largest_UF = bias_F.new_empty(u, f)
        which_UF = torch.empty_like(largest_UF, dtype=torch.uint8 if c <= 256 else torch.int16)
        block = block_for(f)
        _window_maximum[(u, triton.cdiv(f, block))](
            product_MF, windows, offsets, _widths(shapes, types.device), bias_F, largest_UF, which_UF, c, f,
            RELU=relu, BLOCK=block,
        )  # fmt: skip
        # The product is kept for its memory: its gradient is written over it.
        ctx.save_for_backward(types, windows, offsets, x_MK, weight_KF, largest_UF, which_UF, product_MF)
        ctx.relu, ctx.sizes, ctx.shapes = relu, (v, e, widest), shapes
        return largest_UF

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cuda")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        types, windows, offsets, x_MK, weight_KF, largest_UF, which_UF, d_product_MF = ctx.saved_tensors
        (v, e, widest), (u, c), (k, f) = ctx.sizes, types.shape, weight_KF.shape
        gradient_UF, block = grads[0].contiguous(), block_for(f)
        _window_gradient[(u, triton.cdiv(f, block))](
            gradient_UF, largest_UF, which_UF, windows, offsets, d_product_MF, f, RELU=ctx.relu, BLOCK=block
        )
        d_weight_KF = product_float32(x_MK.t(), d_product_MF)
        d_x_MK = product_float32(d_product_MF, weight_KF.t())
        per = max(64, triton.next_power_of_2(triton.cdiv(u, 32)))
        parts = largest_UF.new_empty(triton.cdiv(u, per), v, e)
        _fold[(triton.cdiv(v, 64), len(parts))](
            types, windows, offsets, d_x_MK, parts, u, c, per,
            E=e, W=widest, BK=k, BE=max(16, triton.next_power_of_2(e)), BU=64, BV=64, V=v,
        )  # fmt: skip
        if ctx.relu:
            d_bias = torch.where(largest_UF > 0, gradient_UF, 0.0).sum(0)
        else:
            d_bias = (gradient_UF * (1 - largest_UF * largest_UF)).sum(0)
        d_filters, start = [], 0
        for count, width in ctx.shapes:
            of_filters = d_weight_KF[: width * e, start : start + count]
            d_filters.append(of_filters.view(width, e, count).permute(2, 1, 0))
            start += count
        return *[None] * 5, parts.sum(0), d_bias, *d_filters
