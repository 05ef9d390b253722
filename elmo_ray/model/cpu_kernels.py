"""Loops of the training step that a CPU runs in one pass over memory each, compiled by Numba.

PyTorch does an LSTM's gates in some twenty operations, each of which reads and writes all of its numbers and asks for
Python's lock; these need neither. They work on float32, and on bfloat16, which NumPy lacks, as uint16. Where Numba is
missing, and for other types and devices, `for_tensor` says no and PyTorch's operations do the same.

Shapes: B rows, H cell, P projection, U words, M windows, F filters. Arrays of one call do not overlap, or it is slow.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

try:
    import numba
    from numba.extending import overload
except ImportError as error:  # a Python that it does not know yet
    logger.warning("no Numba here (%s): training on the CPU is slower", error)
    numba = None  # type: ignore[assignment]

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract"},  # multiply and add in one instruction; NaN and infinity stay what they are
    "cache": True,
}

_f = np.float32
_LOG2_E, _LN2_HIGH, _LN2_LOW = _f(math.log2(math.e)), _f(0.693359375), _f(-2.12194440e-4)
_EXPONENT = np.int32(127)
_TO_INTEGER = _f(1.5 * 2**23)
"""Added to a small float32 and taken off again it leaves the nearest integer."""
_LARGEST = _f(80.0)


def for_tensor(tensor: Tensor) -> bool:
    """Whether the functions here do for this tensor and others of its type."""
    return numba is not None and tensor.device.type == "cpu" and tensor.dtype == torch.float32


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory, without a copy; bfloat16 as uint16."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    array: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def bound_of(clip: float | None) -> np.float32:
    """A clip's bound, which is never reached where there is none."""
    return _f(math.inf if clip is None else clip)


def _compiled(function: Function) -> Function:
    return _compiled_with(_OPTIONS)(function)


def _compiled_with(options: dict[str, Any]) -> Callable[[Function], Function]:
    def compiled(function: Function) -> Function:
        if numba is None:
            return function
        result: Function
        try:
            result = numba.njit(**options)(function)  # type: ignore[assignment]
        except RuntimeError:  # no folder to keep what is compiled in
            result = numba.njit(**{**options, "cache": False})(function)  # type: ignore[assignment]
        return result

    return compiled


def _wide(x: Any) -> Any:
    """A number as float32."""
    raise NotImplementedError("for compiled code")


def _stored(x: Any, like: Any) -> Any:
    """A float32 in the type of `like`."""
    raise NotImplementedError("for compiled code")


if numba is not None:

    @overload(_wide)
    def _wide_of(x):  # type: ignore[no-untyped-def]
        if x == numba.uint16:
            return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
        return lambda x: x

    @overload(_stored)
    def _stored_of(x, like):  # type: ignore[no-untyped-def]
        if like == numba.uint16:
            return lambda x, like: _rounded(x)
        return lambda x, like: x


@_compiled
def _rounded(x: Any) -> Any:
    """To the nearest bfloat16, ties to even."""
    bits = np.float32(x).view(np.uint32)
    bits = np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
    bits = np.uint32(bits >> np.uint32(16))
    return np.uint16(bits) if x == x else np.uint16(0x7FC0)


@_compiled
def _limited(x: Any, bound: Any) -> Any:
    """Between -bound and bound; a number that is none stays so."""
    x = bound if x > bound else x
    return -bound if x < -bound else x


@_compiled
def _exp(x: Any) -> Any:
    """To one unit of the last place, between -80 and 80 (Cephes' polynomial)."""
    x = _limited(x, _LARGEST)
    n = (x * _LOG2_E + _TO_INTEGER) - _TO_INTEGER
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = _f(1.9875691500e-4)
    p = p * r + _f(1.3981999507e-3)
    p = p * r + _f(8.3334519073e-3)
    p = p * r + _f(4.1665795894e-2)
    p = p * r + _f(1.6666665459e-1)
    p = p * r + _f(5.0000001201e-1)
    p = p * (r * r) + r + _f(1.0)
    return p * np.int32((np.int32(n) + _EXPONENT) << np.int32(23)).view(np.float32)


@_compiled
def _sigmoid(x: Any) -> Any:
    return _f(1.0) / (_f(1.0) + _exp(-x))


@_compiled
def _tanh(x: Any) -> Any:
    return _f(2.0) / (_f(1.0) + _exp(_f(-2.0) * x)) - _f(1.0)


# Each loop over a row is a function of its own: only there does the compiler see that arrays can be told apart.


@_compiled
def _sigmoids(sums: Any, bias: Any, gates: Any) -> None:
    for h in range(len(gates)):
        gates[h] = _sigmoid(_wide(sums[h]) + bias[h])


@_compiled
def _tanhs(sums: Any, bias: Any, gates: Any) -> None:
    for h in range(len(gates)):
        gates[h] = _tanh(_wide(sums[h]) + bias[h])


@_compiled
def _cell(i: Any, j: Any, f: Any, o: Any, before: Any, cell: Any, gated: Any, clip: Any) -> None:
    for h in range(len(cell)):
        c = _limited(f[h] * before[h] + i[h] * j[h], clip)
        cell[h], gated[h] = c, _stored(o[h] * _tanh(c), gated[h])


@_compiled
def forward_gates(
    sums_BG: Any, bias_G: Any, before_BH: Any, gates_BG: Any, cell_BH: Any, gated_BH: Any, clip: Any
) -> None:
    """From the sums of products: the activated gates i, j, f, o, the clipped cell, and o * tanh(cell)."""
    n = before_BH.shape[1]
    for b in range(len(before_BH)):
        sums, gates = sums_BG[b], gates_BG[b]
        i, j, f, o = gates[:n], gates[n : 2 * n], gates[2 * n : 3 * n], gates[3 * n :]
        _sigmoids(sums[:n], bias_G[:n], i)
        _tanhs(sums[n : 2 * n], bias_G[n : 2 * n], j)
        _sigmoids(sums[2 * n :], bias_G[2 * n :], gates[2 * n :])
        _cell(i, j, f, o, before_BH[b], cell_BH[b], gated_BH[b], clip)


@_compiled
def _limits(x: Any, output: Any, low: Any, clip: Any) -> None:
    for p in range(len(output)):
        value = _limited(_wide(x[p]), clip)
        output[p], low[p] = value, _stored(value, low[p])


@_compiled
def forward_projection(x_BP: Any, output_BP: Any, given_BK: Any, clip: Any) -> None:
    """The clipped result, and the same in the type of products as the last columns of what the next step is given."""
    start = given_BK.shape[1] - output_BP.shape[1]
    for b in range(len(x_BP)):
        _limits(x_BP[b], output_BP[b], given_BK[b][start:], clip)


@_compiled
def _passed(gradient: Any, recurrent: Any, output: Any, d_raw: Any, clip: Any) -> None:
    for p in range(len(output)):
        d = gradient[p] + _wide(recurrent[p])
        d_raw[p] = _stored(_f(0.0) if abs(output[p]) >= clip else d, d_raw[p])


@_compiled
def backward_projection(gradient_BP: Any, recurrent_BP: Any, output_BP: Any, d_raw_BP: Any, clip: Any) -> None:
    """The sum of both gradients of an output, or 0 where that is at its bound."""
    for b in range(len(output_BP)):
        _passed(gradient_BP[b], recurrent_BP[b], output_BP[b], d_raw_BP[b], clip)


@_compiled
def _gradients_of(d_m: Any, i: Any, j: Any, f: Any, o: Any, c: Any, before: Any, d_cell: Any, clip: Any) -> Any:
    """Of one cell's gates before their activations, and of the cell before."""
    one, t = _f(1.0), _tanh(c)
    d_c = d_m * o * (one - t * t) + d_cell
    d_c = _f(0.0) if abs(c) >= clip else d_c
    d_i, d_j = d_c * j * i * (one - i), d_c * i * (one - j * j)
    return d_i, d_j, d_c * before * f * (one - f), d_m * t * o * (one - o), d_c * f


@_compiled
def _in_place(
    d_gated: Any, i: Any, j: Any, f: Any, o: Any, c: Any, before: Any, d_cell: Any, d_bias: Any, clip: Any
) -> None:
    n = len(c)
    of_i, of_j, of_f, of_o = d_bias[:n], d_bias[n : 2 * n], d_bias[2 * n : 3 * n], d_bias[3 * n :]
    for h in range(n):
        found = _gradients_of(_wide(d_gated[h]), i[h], j[h], f[h], o[h], c[h], before[h], d_cell[h], clip)
        i[h], j[h], f[h], o[h], d_cell[h] = found
        of_i[h] += found[0]
        of_j[h] += found[1]
        of_f[h] += found[2]
        of_o[h] += found[3]


@_compiled
def _to_other(
    d_gated: Any,
    i: Any,
    j: Any,
    f: Any,
    o: Any,
    c: Any,
    before: Any,
    d_cell: Any,
    d: Any,
    d_bias: Any,
    clip: Any,
) -> None:
    n = len(c)
    of_i, of_j, of_f, of_o = d_bias[:n], d_bias[n : 2 * n], d_bias[2 * n : 3 * n], d_bias[3 * n :]
    to_i, to_j, to_f, to_o = d[:n], d[n : 2 * n], d[2 * n : 3 * n], d[3 * n :]
    for h in range(n):
        found = _gradients_of(_wide(d_gated[h]), i[h], j[h], f[h], o[h], c[h], before[h], d_cell[h], clip)
        to_i[h], to_j[h] = _stored(found[0], to_i[h]), _stored(found[1], to_j[h])
        to_f[h], to_o[h] = _stored(found[2], to_f[h]), _stored(found[3], to_o[h])
        d_cell[h] = found[4]
        of_i[h] += found[0]
        of_j[h] += found[1]
        of_f[h] += found[2]
        of_o[h] += found[3]


@_compiled
def backward_gates(
    d_gated_BH: Any,
    gates_BG: Any,
    before_BH: Any,
    cell_BH: Any,
    d_cell_BH: Any,
    d_gates_BG: Any,
    d_bias_G: Any,
    clip: Any,
) -> None:
    """The gradients of the gates before their activations, in d_gates or, where that is None, in place of the gates;
    their sums are added to d_bias.

    d_cell is that of the cell, and becomes that of `before`. No gradient passes where the cell is at its bound.
    """
    n = cell_BH.shape[1]
    for b in range(len(cell_BH)):
        gates = gates_BG[b]
        i, j, f, o = gates[:n], gates[n : 2 * n], gates[2 * n : 3 * n], gates[3 * n :]
        if d_gates_BG is None:
            _in_place(d_gated_BH[b], i, j, f, o, cell_BH[b], before_BH[b], d_cell_BH[b], d_bias_G, clip)
        else:
            d = d_gates_BG[b]
            _to_other(d_gated_BH[b], i, j, f, o, cell_BH[b], before_BH[b], d_cell_BH[b], d, d_bias_G, clip)


@_compiled
def gather_windows(types_UN: Any, embedding: Any, x_UMK: Any) -> None:
    """The vectors of each window's characters beside each other."""
    size = embedding.shape[1]
    for u in range(x_UMK.shape[0]):
        for m in range(x_UMK.shape[1]):
            x = x_UMK[u, m]
            for w in range(len(x) // size):
                x[w * size : (w + 1) * size] = embedding[types_UN[u, m + w]]


@_compiled
def _add(x: Any, into: Any) -> None:
    for e in range(len(into)):
        into[e] += _wide(x[e])


@_compiled
def add_from_windows(types_UN: Any, d_x_UMK: Any, d_embedding: Any) -> None:
    """The gradient of `gather_windows`, added to what is there."""
    size = d_embedding.shape[1]
    for u in range(d_x_UMK.shape[0]):
        for m in range(d_x_UMK.shape[1]):
            d_x = d_x_UMK[u, m]
            for w in range(len(d_x) // size):
                _add(d_x[w * size : (w + 1) * size], d_embedding[types_UN[u, m + w]])


@_compiled
def _first(row: Any, largest: Any, which: Any) -> None:
    for f in range(len(largest)):
        largest[f], which[f] = _wide(row[f]), np.uint8(0)


@_compiled
def _larger(row: Any, largest: Any, which: Any, number: Any) -> None:
    for f in range(len(largest)):
        x = _wide(row[f])
        better = not x <= largest[f]
        largest[f], which[f] = x if better else largest[f], number if better else which[f]


@_compiled
def largest_of_windows(products_UMF: Any, largest_UF: Any, which_UF: Any) -> None:
    """The maximum over the windows, and the first window that has it; there are at most 256."""
    for u in range(len(products_UMF)):
        products, largest, which = products_UMF[u], largest_UF[u], which_UF[u]
        _first(products[0], largest, which)
        for m in range(1, len(products)):
            _larger(products[m], largest, which, np.uint8(m))


@_compiled
def _where(gradient: Any, which: Any, number: Any, row: Any) -> None:
    for f in range(len(row)):
        row[f] = _stored(gradient[f] if which[f] == number else _f(0.0), row[f])


@_compiled
def spread_to_windows(gradient_UF: Any, which_UF: Any, gradient_UMF: Any) -> None:
    """The gradient of `largest_of_windows`: to the window that was chosen, and 0 to the others."""
    for u in range(len(gradient_UMF)):
        for m in range(gradient_UMF.shape[1]):
            _where(gradient_UF[u], which_UF[u], np.uint8(m), gradient_UMF[u, m])


@_compiled
def _mix(x: Any, carry: Any, transform: Any, b_carry: Any, b_transform: Any, gate: Any, other: Any, y: Any) -> None:
    for f in range(len(x)):
        g, t = _sigmoid(_wide(carry[f]) + b_carry[f]), _wide(transform[f]) + b_transform[f]
        t = _f(0.0) if t < _f(0.0) else t
        gate[f], other[f], y[f] = g, t, x[f] + g * (t - x[f])


@_compiled
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


@_compiled
def _unmix(dy: Any, x: Any, gate: Any, other: Any, d_carry: Any, d_transform: Any, d_x: Any) -> None:
    one = _f(1.0)
    for f in range(len(x)):
        g, t = gate[f], other[f]
        d_carry[f] = _stored(dy[f] * (t - x[f]) * g * (one - g), d_carry[f])
        d_transform[f] = _stored(dy[f] * g if t > _f(0.0) else _f(0.0), d_transform[f])
        d_x[f] = dy[f] * (one - g)


@_compiled
def backward_highway(
    dy_UF: Any, x_UF: Any, gate_UF: Any, other_UF: Any, d_carry_UF: Any, d_transform_UF: Any, d_x_UF: Any
) -> None:
    """The gradients of both products with their biases, and the part of x's that does not come through them."""
    for u in range(len(x_UF)):
        _unmix(dy_UF[u], x_UF[u], gate_UF[u], other_UF[u], d_carry_UF[u], d_transform_UF[u], d_x_UF[u])


@_compiled_with({**_OPTIONS, "fastmath": {"contract", "reassoc"}})  # a sum in any order, so many numbers at a time
def _powers(logits: Any, top: Any) -> Any:
    total = _f(0.0)
    for k in range(len(logits)):
        x = logits[k] - top
        power = _f(0.0) if x < -_LARGEST else _exp(x)
        logits[k] = power
        total += power
    return total


@_compiled
def to_powers(logits_NK: Any, top_N: Any, total_N: Any) -> None:
    """exp(logit - top) in place of the logits, and their sums."""
    for n in range(len(logits_NK)):
        total_N[n] = _powers(logits_NK[n], top_N[n])


@_compiled
def drop(x_N: Any, random_N: Any, threshold: Any, scale: Any, y_N: Any) -> None:
    """x * scale where the random number is below the threshold, elsewhere 0."""
    for n in range(len(x_N)):
        y_N[n] = x_N[n] * scale if random_N[n] < threshold else _f(0.0)
