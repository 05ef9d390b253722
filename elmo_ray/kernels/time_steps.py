"""The time steps of an LSTM layer over a window, forward and backward: products of few rows, gates, both clips.

In PyTorch's operations, for any device and type: what the GPU's kernels (`gate_kernels.py`) are compared with, and what
does their work and that of the CPU's compiled loops (`cpu_recurrence.py`) where those are not to be had.

Shapes: T window, B rows, P output of a cell, H cell; all tensors may have a leading D. Gates [T, B, 4H] in the order
i, j, f, o.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_ray.kernels.matmul import product, sum_into


def _sigmoid_backward(gradient: Tensor, result: Tensor, out: Tensor) -> None:
    torch.ops.aten.sigmoid_backward(gradient, result, grad_input=out)


def _tanh_backward(gradient: Tensor, result: Tensor, out: Tensor) -> None:
    torch.ops.aten.tanh_backward(gradient, result, grad_input=out)


def _clip_backward(gradient: Tensor, result: Tensor, bound: float) -> None:
    """The gradient, or 0 where the result is a bound; in place."""
    torch.ops.aten.hardtanh_backward(gradient, result, -bound, bound, grad_input=gradient)


def forward_steps(
    gates_TBG: Tensor,
    cells_TBH: Tensor,
    tanh_cells_TBH: Tensor,
    gated_TBH: Tensor,
    outputs_TBP: Tensor,
    hidden_BP: Tensor,
    cell_BH: Tensor,
    kernel: Tensor,
    projection: Tensor | None,
    cell_clip: float | None,
    projection_clip: float | None,
) -> None:
    """Activates the gates, which come with the input's part in them, and fills the other windows."""
    hidden, cell = hidden_BP, cell_BH
    h = cell.shape[-1]
    windows = (gates_TBG, cells_TBH, tanh_cells_TBH, gated_TBH, outputs_TBP)
    for gate, new_cell, tanh_cell, gated, output in zip(*(window.unbind(-3) for window in windows), strict=True):
        sum_into(gate, gate, hidden.to(kernel.dtype), kernel)
        i, j, f, o = gate.split(h, -1)
        gate.narrow(-1, 2 * h, 2 * h).sigmoid_()
        i.sigmoid_()
        j.tanh_()
        torch.mul(f, cell, out=new_cell)
        new_cell.addcmul_(i, j)
        if cell_clip is not None:
            new_cell.clamp_(-cell_clip, cell_clip)
        torch.tanh(new_cell, out=tanh_cell)
        torch.mul(o, tanh_cell, out=gated)
        if projection is None:
            output.copy_(gated)
        else:
            output.copy_(product(gated.to(projection.dtype), projection))
            if projection_clip is not None:
                output.clamp_(-projection_clip, projection_clip)
        hidden, cell = output, new_cell


def backward_steps(
    d_outputs_TBP: Tensor,
    gates_TBG: Tensor,
    cells_TBH: Tensor,
    tanh_cells_TBH: Tensor,
    outputs_TBP: Tensor,
    cell_BH: Tensor,
    kernel: Tensor,
    projection: Tensor | None,
    cell_clip: float | None,
    projection_clip: float | None,
    d_gates_TBG: Tensor,
    d_raw_TBP: Tensor,
) -> None:
    """Fills the gradients of the gates before their activations, and of the projection's result before its clip.

    kernel, projection: transposed. d_gates_TBG: in the dtype of the products; where that is the dtype of the gates it
    is gates_TBG itself, in place for the caches' sake. The state at the window's end has no gradient.
    """
    gates, cells, tanh_cells = gates_TBG.unbind(-3), cells_TBH.unbind(-3), tanh_cells_TBH.unbind(-3)
    outputs, d_outputs = outputs_TBP.unbind(-3), d_outputs_TBP.unbind(-3)
    d_gates, d_raw = d_gates_TBG.unbind(-3), d_raw_TBP.unbind(-3)
    d_c, room, d_cell = torch.empty_like(cell_BH), torch.empty_like(cell_BH), torch.empty_like(cell_BH)
    h = cell_BH.shape[-1]
    in_place = d_gates_TBG.dtype == gates_TBG.dtype
    copied = torch.empty_like(gates[0]) if not in_place else gates[0]
    for step in reversed(range(len(gates))):
        last = step == len(gates) - 1
        d_out = d_raw[step]
        if last:
            d_out.copy_(d_outputs[step])
        else:
            sum_into(d_out, d_outputs[step], d_gates[step + 1], kernel)
        d_m = d_out
        if projection is not None:
            if projection_clip is not None:
                _clip_backward(d_out, outputs[step], projection_clip)
            d_m = product(d_out.to(projection.dtype), projection).to(d_out.dtype)
        gate = d_gates[step] if in_place else copied.copy_(gates[step])
        i, j, f, o = gate.split(h, -1)
        _tanh_backward(torch.mul(d_m, o, out=d_c), tanh_cells[step], d_c)
        if not last:
            d_c.add_(d_cell)
        if cell_clip is not None:
            _clip_backward(d_c, cells[step], cell_clip)
        _sigmoid_backward(torch.mul(d_m, tanh_cells[step], out=room), o, o)
        torch.mul(d_c, i, out=d_cell)  # room that is free until the cell's own gradient goes there
        _sigmoid_backward(torch.mul(d_c, j, out=room), i, i)
        _tanh_backward(d_cell, j, j)
        torch.mul(d_c, f, out=d_cell)
        _sigmoid_backward(torch.mul(d_c, cells[step - 1] if step else cell_BH, out=room), f, f)
        if not in_place:
            d_gates[step].copy_(gate)
