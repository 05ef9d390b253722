"""The LSTM's gates and clips on a CPU, as compiled loops (`cpu_kernels.py`).

Shapes: B rows, H cell, G = 4H gates i, j, f, o, P projection, K what a time step is given.
"""

from __future__ import annotations

from typing import Any

from elmo_ray.model.cpu_kernels import compiled, float32, limited, sigmoid, stored, tanh, wide


@compiled
def _sigmoids(sums: Any, bias: Any, gates: Any) -> None:
    for h in range(len(gates)):
        gates[h] = sigmoid(wide(sums[h]) + bias[h])


@compiled
def _tanhs(sums: Any, bias: Any, gates: Any) -> None:
    for h in range(len(gates)):
        gates[h] = tanh(wide(sums[h]) + bias[h])


@compiled
def _cell(i: Any, j: Any, f: Any, o: Any, before: Any, cell: Any, gated: Any, clip: Any) -> None:
    for h in range(len(cell)):
        c = limited(f[h] * before[h] + i[h] * j[h], clip)
        cell[h], gated[h] = c, stored(o[h] * tanh(c), gated[h])


@compiled
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


@compiled
def _limits(x: Any, output: Any, low: Any, clip: Any) -> None:
    for p in range(len(output)):
        value = limited(wide(x[p]), clip)
        output[p], low[p] = value, stored(value, low[p])


@compiled
def forward_projection(x_BP: Any, output_BP: Any, given_BK: Any, clip: Any) -> None:
    """The clipped result, and the same in the type of products as the last columns of what the next step is given."""
    start = given_BK.shape[1] - output_BP.shape[1]
    for b in range(len(x_BP)):
        _limits(x_BP[b], output_BP[b], given_BK[b][start:], clip)


@compiled
def _passed(gradient: Any, recurrent: Any, output: Any, d_raw: Any, clip: Any) -> None:
    for p in range(len(output)):
        d = gradient[p] + wide(recurrent[p])
        d_raw[p] = stored(float32(0.0) if abs(output[p]) >= clip else d, d_raw[p])


@compiled
def backward_projection(gradient_BP: Any, recurrent_BP: Any, output_BP: Any, d_raw_BP: Any, clip: Any) -> None:
    """The sum of both gradients of an output, or 0 where that is at its bound."""
    for b in range(len(output_BP)):
        _passed(gradient_BP[b], recurrent_BP[b], output_BP[b], d_raw_BP[b], clip)


@compiled
def _gradients_of(d_m: Any, i: Any, j: Any, f: Any, o: Any, c: Any, before: Any, d_cell: Any, clip: Any) -> Any:
    """Of one cell's gates before their activations, and of the cell before."""
    one, t = float32(1.0), tanh(c)
    d_c = d_m * o * (one - t * t) + d_cell
    d_c = float32(0.0) if abs(c) >= clip else d_c
    d_i, d_j = d_c * j * i * (one - i), d_c * i * (one - j * j)
    return d_i, d_j, d_c * before * f * (one - f), d_m * t * o * (one - o), d_c * f


@compiled
def _in_place(
    d_gated: Any, i: Any, j: Any, f: Any, o: Any, c: Any, before: Any, d_cell: Any, d_bias: Any, clip: Any
) -> None:
    n = len(c)
    of_i, of_j, of_f, of_o = d_bias[:n], d_bias[n : 2 * n], d_bias[2 * n : 3 * n], d_bias[3 * n :]
    for h in range(n):
        found = _gradients_of(wide(d_gated[h]), i[h], j[h], f[h], o[h], c[h], before[h], d_cell[h], clip)
        i[h], j[h], f[h], o[h], d_cell[h] = found
        of_i[h] += found[0]
        of_j[h] += found[1]
        of_f[h] += found[2]
        of_o[h] += found[3]


@compiled
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
        found = _gradients_of(wide(d_gated[h]), i[h], j[h], f[h], o[h], c[h], before[h], d_cell[h], clip)
        to_i[h], to_j[h] = stored(found[0], to_i[h]), stored(found[1], to_j[h])
        to_f[h], to_o[h] = stored(found[2], to_f[h]), stored(found[3], to_o[h])
        d_cell[h] = found[4]
        of_i[h] += found[0]
        of_j[h] += found[1]
        of_f[h] += found[2]
        of_o[h] += found[3]


@compiled
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
