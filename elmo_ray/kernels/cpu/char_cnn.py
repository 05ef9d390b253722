"""The character CNN's windows, maxima and highways on a CPU, in float32 or with bf16 products.

Autograd functions of few passes around compiled loops. Words are divided between two branches that run in parallel.
Shapes: U words, N characters that they are given with, M windows, W characters of a window, E embedding, K numbers of a
window, F filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from elmo_ray.kernels.cpu.loops import as_array, compiled, float32, sigmoid, stored, wide
from elmo_ray.kernels.matmul import linear
from elmo_ray.kernels.threads import has_threads_for, run_parallel


@compiled
def gather_windows(types_UN: Any, embedding: Any, x_UMK: Any) -> None:
    """Write the vectors of each window's characters side by side into x."""
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
    """Add the gradient of `gather_windows` to d_embedding."""
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
    """Write the maximum over the windows and the first window that has it."""
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
    """Write the gradient of `largest_of_windows`: to the chosen window, and 0 to the others."""
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
    """Compute from two products of x the gate sigmoid(carry), the other relu(transform), and their mixture with x."""
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
    """Write the gradients of both products, and the part of x's gradient that does not come through them."""
    for u in range(len(x_UF)):
        _unmix(dy_UF[u], x_UF[u], gate_UF[u], other_UF[u], d_carry_UF[u], d_transform_UF[u], d_x_UF[u])


_WORDS = 32
"""Words whose windows' products are made at a time: a core's cache holds them until their maximum is known."""

_WORTH_DIVIDING = 64
"""Words from which on two branches share them."""


def largest_windows(
    groups: Sequence[Tensor], embedding: Tensor, filters: Sequence[Tensor], full: int, dtype: torch.dtype | None
) -> Tensor:
    """Return what `model.char_cnn.largest_windows` returns, with the same arguments."""
    # Words that leave `widest` columns of padding: the windows that begin at their ids and the first of padding alone
    # hold every filter's maximum, so one product serves all filters, the narrow ones padded with zeros.
    narrow = [words for words in groups if words.shape[1] < full]
    widest = max(weight.shape[2] for weight in filters)
    of_narrow: list[Tensor] = []
    if narrow:
        weight = torch.cat([F.pad(w, (0, widest - w.shape[2])) for w in filters])
        of_narrow = list(_largest(narrow, embedding, weight, dtype).split([len(words) for words in narrow]))
    if len(narrow) == len(groups):
        return torch.cat(of_narrow)
    found = [
        of_narrow.pop(0)
        if words.shape[1] < full
        else torch.cat([_largest([words], embedding, w, dtype) for w in filters], dim=1)
        for words in groups
    ]
    return torch.cat(found)


def highway(
    x_UF: Tensor,
    carry_weight: Tensor,
    carry_bias: Tensor,
    transform_weight: Tensor,
    transform_bias: Tensor,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return what `model.char_cnn.highway` returns, with the same arguments."""
    y_UF: Tensor = _Highway.apply(x_UF, carry_weight, carry_bias, transform_weight, transform_bias, dtype)
    return y_UF


def _largest(groups: Sequence[Tensor], embedding: Tensor, weight_FEW: Tensor, dtype: torch.dtype | None) -> Tensor:
    weight_KF = weight_FEW.permute(2, 1, 0).reshape(-1, weight_FEW.shape[0])
    result: Tensor = _LargestProducts.apply(embedding, weight_KF, weight_FEW.shape[2], dtype, *groups)
    return result


def _branches(words: int) -> int:
    """Return by how many branches so many words are computed."""
    return 2 if words >= _WORTH_DIVIDING and has_threads_for(2) else 1


class _LargestProducts(torch.autograd.Function):
    """(embedding [C, E], weight [W * E, F], W, the products' dtype, types [U, N] ...) -> [U of all, F]: the maximum
    over all windows of W characters of their products with the filters; the gradient goes to the first that has it."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # within torch.autocast
    def forward(
        ctx: Any, embedding: Tensor, weight: Tensor, width: int, dtype: torch.dtype | None, *types: Tensor
    ) -> Tensor:
        low = weight.dtype if dtype is None else dtype
        embedding_low, weight_low = as_array(embedding.to(low)), weight.to(low)
        largest_UF = weight.new_empty(sum(map(len, types)), weight.shape[1])
        which_UF = torch.empty_like(largest_UF, dtype=torch.int16)
        pieces, start = [], 0
        for words_UN in types:
            # the loops do not look
            if words_UN.numel() and not 0 <= int(words_UN.min()) <= int(words_UN.max()) < len(embedding):
                raise IndexError(f"character ids between {words_UN.min()} and {words_UN.max()}")
            for some_UN in words_UN.split(_WORDS):
                pieces.append((start, start + len(some_UN), some_UN))
                start += len(some_UN)
        # every other piece to a branch, so that both have words of all lengths
        n = _branches(start)
        ctx.branches = [
            [(*piece, _windows_of(piece[2], width, weight_low)) for piece in pieces[k::n]] for k in range(n)
        ]

        def run(k: int) -> None:
            for first, stop, some_UN, x_UMK in ctx.branches[k]:
                gather_windows(as_array(some_UN), embedding_low, as_array(x_UMK))
                products = torch.mm(x_UMK.flatten(0, 1), weight_low).view(*x_UMK.shape[:2], -1)
                largest_of_windows(as_array(products), as_array(largest_UF[first:stop]), which_UF[first:stop].numpy())

        run_parallel(run, n, weight.device)
        ctx.save_for_backward(embedding, weight_low, which_UF)
        return largest_UF

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        embedding, weight_low, which_UF = ctx.saved_tensors
        gradient_UF, which, low, n = grads[0].contiguous(), which_UF.numpy(), weight_low.dtype, len(ctx.branches)
        d_weights = torch.zeros(n, *weight_low.shape, dtype=gradient_UF.dtype)
        d_embeddings = torch.zeros(n, *embedding.shape, dtype=embedding.dtype) if ctx.needs_input_grad[0] else None

        def run(k: int) -> None:
            d_weight = d_weights[k]
            for first, stop, some_UN, x_UMK in ctx.branches[k]:
                spread = x_UMK.new_empty(*x_UMK.shape[:2], weight_low.shape[1])
                spread_to_windows(as_array(gradient_UF[first:stop]), which[first:stop], as_array(spread))
                spread_NF, x_NK = spread.flatten(0, 1), x_UMK.flatten(0, 1)
                if low == d_weight.dtype:
                    d_weight.addmm_(x_NK.t(), spread_NF)
                else:
                    d_weight += torch.mm(x_NK.t(), spread_NF)
                if d_embeddings is not None:
                    d_x = torch.mm(spread_NF, weight_low.t()).view(x_UMK.shape)
                    add_from_windows(as_array(some_UN), as_array(d_x), as_array(d_embeddings[k]))

        run_parallel(run, n, weight_low.device)
        d_embedding = None if d_embeddings is None else d_embeddings.sum(0)
        return d_embedding, d_weights.sum(0), *[None] * (len(ctx.needs_input_grad) - 2)


def _windows_of(some_UN: Tensor, width: int, weight_low: Tensor) -> Tensor:
    """Return memory [U, M, K] for the windows of some words."""
    return weight_low.new_empty(len(some_UN), some_UN.shape[1] - width + 1, len(weight_low))


class _Highway(torch.autograd.Function):
    """(x [U, F], carry weight [F, F], carry bias, transform weight, transform bias, the products' dtype) -> [U, F]."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # within torch.autocast
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
        x_low, w_carry_low, w_transform_low = x.contiguous().to(low), w_carry.to(low), w_transform.to(low)
        gate, other, y = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        shares = _shares(len(x))

        def run(k: int) -> None:
            some = shares[k]
            carry, transform = linear(x_low[some], w_carry_low), linear(x_low[some], w_transform_low)
            arrays = (x[some], carry, transform, b_carry, b_transform, gate[some], other[some], y[some])
            forward_highway(*map(as_array, arrays))

        run_parallel(run, len(shares), x.device)
        ctx.save_for_backward(x, x_low, w_carry_low, w_transform_low, gate, other)
        ctx.shares = shares
        return y

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, x_low, w_carry, w_transform, gate, other = ctx.saved_tensors
        dy, full, n = grads[0].contiguous(), x.dtype, len(ctx.shares)
        d_carry, d_transform, d_x = torch.empty_like(x_low), torch.empty_like(x_low), torch.empty_like(x)
        # of each branch its own, added up below
        d_weights, d_biases = x.new_empty(2, n, *w_carry.shape), x.new_empty(2, n, w_carry.shape[1])

        def run(k: int) -> None:
            some = ctx.shares[k]
            arrays = (dy, x, gate, other, d_carry, d_transform, d_x)
            backward_highway(*(as_array(array[some]) for array in arrays))
            for number, (d, weight) in enumerate(((d_carry[some], w_carry), (d_transform[some], w_transform))):
                d_weights[number, k] = torch.mm(x_low[some].t(), d).to(full)
                torch.sum(d, dim=0, dtype=full, out=d_biases[number, k])
                d_x[some] += linear(d, weight.t())

        run_parallel(run, n, x.device)
        (d_w_carry, d_w_transform), (d_b_carry, d_b_transform) = d_weights.sum(1), d_biases.sum(1)
        return d_x, d_w_carry, d_b_carry, d_w_transform, d_b_transform, None


def _shares(words: int) -> list[slice]:
    """Return the words of each branch."""
    n = _branches(words)
    ends = [words * (k + 1) // n for k in range(n)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
