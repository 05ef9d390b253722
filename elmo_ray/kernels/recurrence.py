"""One LSTM layer over a window as an autograd function: the recurrent products, the gates, and both clips.

For GPUs, and for what the CPU's compiled loops (`cpu_recurrence.py`) do not have: float64, a Python without Numba.
Weight gradients are one product over all time steps instead of one a step. On a CPU the directions run beside each
other (`side_by_side.py`); elsewhere they are one batched product. So the functions here take tensors with and without
the leading D, and count dimensions from the last.

Shapes: D directions, T window, B rows, I input, P output of a cell (projection), H cell. Gates [..., 4H] in the order
i, j, f, o of TensorFlow's LSTMCell; the forget bias of 1 is added here and never stored (BILM.md, Model).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from elmo_ray.kernels.clips import FORGET_BIAS, Clips
from elmo_ray.kernels.gpu.lstm import steps_on
from elmo_ray.kernels.matmul import product_into, sum_into
from elmo_ray.kernels.threads import by_direction


class Weights(NamedTuple):
    """input [D, I, 4H], hidden [D, P, 4H], bias [D, 4H], projection [D, H, P] or None; any of them without D."""

    input: Tensor
    hidden: Tensor
    bias: Tensor
    projection: Tensor | None

    def of(self, index: int | slice) -> Weights:
        """Of one direction, or the whole."""
        projection = None if self.projection is None else self.projection[index]
        return Weights(self.input[index], self.hidden[index], self.bias[index], projection)

    def empty_like(self, dtype: torch.dtype) -> Weights:
        projection = None if self.projection is None else torch.empty_like(self.projection, dtype=dtype)
        a, b, c = (torch.empty_like(w, dtype=dtype) for w in self[:3] if w is not None)
        return Weights(a, b, c, projection)

    def to(self, dtype: torch.dtype) -> Weights:
        """For products in `dtype`; the bias is added in its own."""
        projection = None if self.projection is None else self.projection.to(dtype)
        return Weights(self.input.to(dtype), self.hidden.to(dtype), self.bias, projection)


class Window(NamedTuple):
    """A layer's window as it was computed. x [D, T*B, I] in the products' dtype; gates [D, T, B, 4H], activated; cells,
    their tanh and what goes into the projection, o tanh(cell), [D, T, B, H]; outputs [D, T, B, P]; any without D."""

    x: Tensor
    gates: Tensor
    cells: Tensor
    tanh_cells: Tensor
    gated: Tensor
    outputs: Tensor

    def of(self, index: int | slice) -> Window:
        """Of one direction, or the whole."""
        return Window(*(tensor[index] for tensor in self))


def run_forward(window: Window, hidden: Tensor, cell: Tensor, weights: Weights, clips: Clips) -> None:
    """Fills `window` but for its x, from the state [D, B, P] and [D, B, H] at its start."""
    h = cell.shape[-1]
    bias = weights.bias.clone()
    bias[..., 2 * h : 3 * h] += FORGET_BIAS
    sum_into(window.gates.flatten(-3, -2), bias.unsqueeze(-2), window.x, weights.input)
    forward = steps_on(window.x.device).forward
    forward(*window[1:], hidden, cell, weights.hidden, weights.projection, *clips)


def run_backward(
    d_outputs: Tensor, window: Window, cell: Tensor, weights: Weights, clips: Clips
) -> tuple[Tensor, Tensor]:
    """The gradients of the gates before their activations [D, T, B, 4H], in the products' dtype, and of the
    projection's result before its clip [D, T, B, P]. May overwrite `window.gates`."""
    gates, low = window.gates, window.x.dtype
    d_gates = gates if low == gates.dtype else torch.empty_like(gates, dtype=low)
    d_raw = torch.empty_like(window.outputs)
    saved = (gates, window.cells, window.tanh_cells, window.outputs, cell)
    factors = _transposed(weights.hidden), None if weights.projection is None else _transposed(weights.projection)
    steps_on(window.x.device).backward(d_outputs, *saved, *factors, *clips, d_gates, d_raw)
    return d_gates, d_raw


def _transposed(weight: Tensor) -> Tensor:
    """A copy: products of few rows with a transposed view run at a fraction of the speed on CPUs."""
    return weight.transpose(-1, -2).contiguous()


class Recurrence(torch.autograd.Function):
    """A layer over a window: (x [D, T, B, I], hidden [D, B, P], cell [D, B, H], the four weights, clips, the products'
    dtype) -> (outputs [D, T, B, P], cells [D, T, B, H], which have no gradient)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_DTBI: Tensor,
        hidden_DBP: Tensor,
        cell_DBH: Tensor,
        w_input: Tensor,
        w_hidden: Tensor,
        bias: Tensor,
        w_projection: Tensor | None,
        clips: Clips,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        d, t, b, _ = x_DTBI.shape
        low = x_DTBI.dtype if dtype is None else dtype
        # converted once a window, not once a time step
        weights = Weights(w_input, w_hidden, bias, w_projection).to(low)
        empty, h = x_DTBI.new_empty, cell_DBH.shape[-1]
        window = Window(
            x_DTBI.reshape(d, t * b, -1).to(low),
            empty(d, t, b, 4 * h),
            empty(d, t, b, h),
            empty(d, t, b, h),
            empty(d, t, b, h),
            empty(d, t, b, hidden_DBP.shape[-1]),
        )

        def run(k: int | slice) -> None:
            run_forward(window.of(k), hidden_DBP[k], cell_DBH[k], weights.of(k), clips)

        by_direction(run, d, x_DTBI.device)
        ctx.save_for_backward(hidden_DBP, cell_DBH, *weights, *window)
        ctx.clips = clips
        ctx.mark_non_differentiable(window.cells)
        return window.outputs, window.cells

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_DBP, cell_DBH, *rest = ctx.saved_tensors
        weights, window = Weights(*rest[:4]), Window(*rest[4:])
        if torch._C._autograd._get_current_graph_task_keep_graph():  # retain_graph: the gates are needed once more
            window = window._replace(gates=window.gates.clone())
        d_outputs = grads[0]
        d_x = torch.empty(
            *window.outputs.shape[:3], weights.input.shape[1], dtype=d_outputs.dtype, device=d_outputs.device
        )
        d_weights = weights.empty_like(d_outputs.dtype)

        def run(k: int | slice) -> None:
            """One direction, or all as one batch."""
            of, with_weights, hidden, cell = window.of(k), weights.of(k), hidden_DBP[k], cell_DBH[k]
            d_gates, d_raw = run_backward(d_outputs[k], of, cell, with_weights, ctx.clips)
            d_gates, d_raw = d_gates.flatten(-3, -2), d_raw.flatten(-3, -2).to(window.x.dtype)
            _weight_gradients(d_weights.of(k), d_gates, d_raw, of, hidden)
            if ctx.needs_input_grad[0]:
                product_into(d_x[k].flatten(-3, -2), d_gates, with_weights.input.transpose(-1, -2))

        by_direction(run, len(d_outputs), d_outputs.device)
        return d_x if ctx.needs_input_grad[0] else None, None, None, *d_weights, None, None


def _weight_gradients(into: Weights, d_gates: Tensor, d_raw: Tensor, window: Window, hidden: Tensor) -> None:
    """From the gradients of the gates [D, T*B, 4H] and of the projection's result [D, T*B, P], in the products'
    dtype."""
    low = d_gates.dtype
    previous = torch.cat([hidden.unsqueeze(-3), window.outputs[..., :-1, :, :]], dim=-3).flatten(-3, -2).to(low)
    product_into(into.input, window.x.transpose(-1, -2), d_gates)
    product_into(into.hidden, previous.transpose(-1, -2), d_gates)
    # of gates as they are multiplied: the rounding of each to bf16 is of no matter for their sum
    torch.sum(d_gates, dim=-2, dtype=into.bias.dtype, out=into.bias)
    if into.projection is not None:
        gated = window.gated.flatten(-3, -2).to(low)
        product_into(into.projection, gated.transpose(-1, -2), d_raw)
