"""The character CNN's windows, maxima and highways on a CPU, as compiled loops (`cpu_kernels.py`).

Shapes: U words, N characters, M windows, K numbers of a window, F filters.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from elmo_ray.model.cpu_kernels import compiled, float32, sigmoid, stored, wide


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
