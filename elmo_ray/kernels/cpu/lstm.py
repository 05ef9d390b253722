"""An LSTM layer's window on a CPU in float32, or with bf16 products: made for the way through its caches.

A window's gates are megabytes that come from memory at a fraction of the products' speed. So each time step has one
product of its input and hidden state together, whose result is used while a cache still holds it, and the compiled
loops of the gates pass over it once. No call holds Python's lock while it works, and the directions run in parallel.

Shapes: D directions, T window, B rows, I input, P output of a cell, K = I + P, H memory of a cell, G = 4H gates in the
order i, j, f, o.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from elmo_ray.kernels.cpu.loops import as_array, bound_of, compiled, float32, limited, sigmoid, stored, tanh, wide
from elmo_ray.kernels.matmul import PackedWeight, linear, matmul, pack
from elmo_ray.kernels.threads import run_parallel


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
    """Compute from the sums of products the activated gates i, j, f, o, the clipped memory, and o * tanh(memory)."""
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
    """Write the clipped result, and again in the products' type as the last columns of the next step's input."""
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
    """Write the sum of both gradients of an output, or 0 where the output is at its bound."""
    for b in range(len(output_BP)):
        _passed(gradient_BP[b], recurrent_BP[b], output_BP[b], d_raw_BP[b], clip)


@compiled
def _gradients_of(d_m: Any, i: Any, j: Any, f: Any, o: Any, c: Any, before: Any, d_cell: Any, clip: Any) -> Any:
    """Return the gradients of one cell's gates before their activations, and of the memory before."""
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
    """Write the gradients of the gates before their activations to d_gates or, where that is None, in place of the
    gates; add their sums to d_bias.

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


FORGET_BIAS = 1.0


def window(
    x_DTBI: Tensor,
    hidden_DBP: Tensor,
    memory_DBH: Tensor,
    weights: Sequence[Tensor | None],
    clips: Sequence[float | None],
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return what `model.lstm.window` returns, with the same arguments; the memories have no gradient."""
    outputs, memories = _Window.apply(x_DTBI, hidden_DBP, memory_DBH, *weights, *clips, dtype)
    return outputs, memories


class _Window(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # within torch.autocast
    def forward(
        ctx: Any,
        x_DTBI: Tensor,
        hidden_DBP: Tensor,
        memory_DBH: Tensor,
        w_input: Tensor,
        w_hidden: Tensor,
        bias: Tensor,
        w_projection: Tensor | None,
        memory_clip: float | None,
        projection_clip: float | None,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        d, t, b, i = x_DTBI.shape
        p, h, low = hidden_DBP.shape[-1], memory_DBH.shape[-1], x_DTBI.dtype if dtype is None else dtype
        empty = x_DTBI.new_empty
        given_DTBK = empty(d, t, b, i + p, dtype=low)
        # what goes into a projection; without one it is the output, which is not rounded
        gated_DTBH = empty(d, t, b, h, dtype=x_DTBI.dtype if w_projection is None else low)
        gates_DTBG, memories_DTBH, outputs_DTBP = empty(d, t, b, 4 * h), empty(d, t, b, h), empty(d, t, b, p)
        # in the type of products
        kernel_DKG = empty(d, i + p, 4 * h, dtype=low)
        projection_DHP = None if w_projection is None else w_projection.to(low)
        # the original has no clip of the projection's result where there is no projection
        bounds = bound_of(memory_clip), bound_of(None if w_projection is None else projection_clip)

        def run(k: int) -> None:
            given_DTBK[k, ..., :i], given_DTBK[k, 0, :, i:] = x_DTBI[k], hidden_DBP[k]
            kernel_DKG[k, :i], kernel_DKG[k, i:] = w_input[k], w_hidden[k]
            projection = None if projection_DHP is None else pack(projection_DHP[k], b)
            windows = given_DTBK[k], gates_DTBG[k], memories_DTBH[k], gated_DTBH[k], outputs_DTBP[k]
            _forward_steps(*windows, memory_DBH[k], pack(kernel_DKG[k], b), bias[k], projection, *bounds)

        run_parallel(run, d, x_DTBI.device)
        ctx.save_for_backward(
            w_input,
            w_hidden,
            w_projection,
            None if low == w_input.dtype else kernel_DKG,
            projection_DHP,
            memory_DBH,
            given_DTBK,
            gates_DTBG,
            memories_DTBH,
            gated_DTBH,
            outputs_DTBP,
        )
        ctx.bounds = bounds
        ctx.mark_non_differentiable(memories_DTBH)
        return outputs_DTBP, memories_DTBH

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        w_input, w_hidden, w_projection, kernel_DKG, projection_DHP, *windows = ctx.saved_tensors
        memory_DBH, given_DTBK, gates_DTBG, *windows = windows
        low, i = given_DTBK.dtype, w_input.shape[1]
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        d_x_DTBI = grads[0].new_empty(*given_DTBK.shape[:3], i) if ctx.needs_input_grad[0] else None
        d_input, d_hidden = torch.empty_like(w_input), torch.empty_like(w_hidden)
        d_bias = w_input.new_empty(len(memory_DBH), w_input.shape[2])
        d_projection = None if w_projection is None else torch.empty_like(w_projection)

        def run(k: int) -> None:
            gates_TBG = gates_DTBG[k].clone() if again else gates_DTBG[k]
            # in float32 in place of the gates, for the caches' sake
            d_gates_TBG = gates_TBG if low == gates_TBG.dtype else torch.empty_like(gates_TBG, dtype=low)
            memories_TBH, gated_TBH, outputs_TBP = (window[k] for window in windows)
            d_raw_TBP = torch.empty_like(outputs_TBP, dtype=low)
            input_IG, hidden_PG = w_input[k], w_hidden[k]
            if kernel_DKG is not None:
                input_IG, hidden_PG = kernel_DKG[k, :i], kernel_DKG[k, i:]
            kernel = pack(hidden_PG, len(memory_DBH[k]), transposed=True)
            projection = None
            if projection_DHP is not None:
                projection = pack(projection_DHP[k], len(memory_DBH[k]), transposed=True)
            states = gates_TBG, memories_TBH, outputs_TBP, memory_DBH[k]
            d_bias[k] = _backward_steps(
                grads[0][k].contiguous(),
                *states,
                kernel,
                projection,
                ctx.bounds[0],
                ctx.bounds[1],
                d_gates_TBG,
                d_raw_TBP,
            )
            d_gates_NG, given_KN = d_gates_TBG.flatten(0, 1), given_DTBK[k].flatten(0, 1).t()
            if d_projection is not None:
                d_projection[k] = torch.mm(gated_TBH.flatten(0, 1).t(), d_raw_TBP.flatten(0, 1))
            # not by columns of the gates: for those oneDNN has no fast product
            for into, some in ((d_input[k], given_KN[:i]), (d_hidden[k], given_KN[i:])):
                into.copy_(linear(some, d_gates_NG))
            if d_x_DTBI is not None:
                d_x_DTBI[k].flatten(0, 1).copy_(linear(d_gates_NG, input_IG.t()))

        run_parallel(run, len(memory_DBH), memory_DBH.device)
        return d_x_DTBI, None, None, d_input, d_hidden, d_bias, d_projection, None, None, None


def _forward_steps(
    given_TBK: Tensor,
    gates_TBG: Tensor,
    memories_TBH: Tensor,
    gated_TBH: Tensor,
    outputs_TBP: Tensor,
    memory_BH: Tensor,
    kernel: PackedWeight,
    bias_G: Tensor,
    projection: PackedWeight | None,
    memory_bound: np.float32,
    output_bound: np.float32,
) -> None:
    """Fill the windows; `given` comes with the inputs and the first hidden state, and gets the other hidden states."""
    h = memory_BH.shape[1]
    bias_G = bias_G.clone()
    bias_G[2 * h : 3 * h] += FORGET_BIAS
    bias, before, gates, cells = as_array(bias_G), as_array(memory_BH), as_array(gates_TBG), as_array(memories_TBH)
    gated, outputs, given = as_array(gated_TBH), as_array(outputs_TBP), as_array(given_TBK)
    unused = as_array(torch.empty_like(given_TBK[0]))
    for step, (given_BK, gated_BH) in enumerate(zip(given_TBK.unbind(0), gated_TBH.unbind(0), strict=True)):
        sums, cell = as_array(matmul(given_BK, kernel)), cells[step]
        forward_gates(sums, bias, before, gates[step], cell, gated[step], memory_bound)
        before = cell
        result = gated[step] if projection is None else as_array(matmul(gated_BH, projection))
        forward_projection(result, outputs[step], given[step + 1] if step + 1 < len(given) else unused, output_bound)


def _backward_steps(
    d_outputs_TBP: Tensor,
    gates_TBG: Tensor,
    memories_TBH: Tensor,
    outputs_TBP: Tensor,
    memory_BH: Tensor,
    kernel: PackedWeight,
    projection: PackedWeight | None,
    memory_bound: np.float32,
    output_bound: np.float32,
    d_gates_TBG: Tensor,
    d_raw_TBP: Tensor,
) -> Tensor:
    """Fill the gradients of the gates before their activations, and of the projection's result before its clip.

    kernel, projection: transposed. d_gates_TBG may be gates_TBG. The state at the window's end has no gradient.
    Returns the gradient of the bias [G].
    """
    d_outputs, gates, cells = as_array(d_outputs_TBP), as_array(gates_TBG), as_array(memories_TBH)
    outputs, first, d_raw = as_array(outputs_TBP), as_array(memory_BH), as_array(d_raw_TBP)
    d_gates = None if d_gates_TBG is gates_TBG else as_array(d_gates_TBG)
    d_cell = as_array(torch.zeros_like(memory_BH))
    d_bias = as_array(memory_BH.new_zeros(gates_TBG.shape[2]))
    recurrent = as_array(torch.zeros_like(d_raw_TBP[0]))
    for step in reversed(range(len(gates))):
        backward_projection(d_outputs[step], recurrent, outputs[step], d_raw[step], output_bound)
        d_gated = d_raw[step] if projection is None else as_array(matmul(d_raw_TBP[step], projection))
        before, into = cells[step - 1] if step else first, None if d_gates is None else d_gates[step]
        backward_gates(d_gated, gates[step], before, cells[step], d_cell, into, d_bias, memory_bound)
        if step:
            recurrent = as_array(matmul(d_gates_TBG[step], kernel))
    return torch.from_numpy(d_bias)
