"""The time steps of an LSTM layer over a window, forward and backward: products of few rows, gates, both clips.

Written in the part of Python that TorchScript has, so that `without_lock` can run the directions beside each other
without Python's lock. Shapes: T window, B rows, P output of a cell, H cell; all tensors may have a leading D.
Gates [T, B, 4H] in the order i, j, f, o.
"""

from __future__ import annotations

from typing import List, Optional, Union  # noqa: UP035  (what TorchScript knows)

import torch
from torch import Tensor

from elmo_ray.model.products import product, sum_into


def _product(x: Tensor, factor: Tensor, packed: bool) -> Tensor:
    x = x.to(factor.dtype)
    if packed:
        nothing: List[Optional[Union[int, float, complex]]] = []  # noqa: UP006, UP007, UP045
        return torch.ops.mkldnn._linear_pointwise(x, factor, None, "none", nothing, "")
    return product(x, factor)


def _add_product(out: Tensor, c: Tensor, x: Tensor, factor: Tensor, packed: bool) -> None:
    """out = c + x @ factor; out may be c."""
    if packed:
        torch.add(c, _product(x, factor, packed).to(out.dtype), out=out)
    else:
        sum_into(out, c, x.to(factor.dtype), factor)


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
    kernel_packed: bool,
    projection: Optional[Tensor],  # noqa: UP045
    projection_packed: bool,
    cell_clip: Optional[float],  # noqa: UP045
    projection_clip: Optional[float],  # noqa: UP045
) -> None:
    """Activates the gates, which come with the input's part in them, and fills the other windows."""
    hidden, cell = hidden_BP, cell_BH
    h = cell.shape[-1]
    on_cpu = cell.device.type == "cpu"
    gates, cells, tanh_cells = gates_TBG.unbind(-3), cells_TBH.unbind(-3), tanh_cells_TBH.unbind(-3)
    gated, outputs = gated_TBH.unbind(-3), outputs_TBP.unbind(-3)
    for step in range(len(gates)):
        gate, new_cell, tanh_cell, output = gates[step], cells[step], tanh_cells[step], outputs[step]
        _add_product(gate, gate, hidden, kernel, kernel_packed)
        i, j, f, o = gate.split(h, -1)
        if on_cpu:  # tanh(x) = 2 sigmoid(2 x) - 1, where torch's sigmoid takes a quarter of its tanh's time
            j.mul_(2.0)
            gate.sigmoid_()
            j.mul_(2.0).sub_(1.0)
        else:
            gate.narrow(-1, 2 * h, 2 * h).sigmoid_()
            i.sigmoid_()
            j.tanh_()
        torch.mul(f, cell, out=new_cell)
        new_cell.addcmul_(i, j)
        if cell_clip is not None:
            new_cell.clamp_(-cell_clip, cell_clip)
        if on_cpu:
            torch.mul(new_cell, 2.0, out=tanh_cell)
            tanh_cell.sigmoid_().mul_(2.0).sub_(1.0)
        else:
            torch.tanh(new_cell, out=tanh_cell)
        torch.mul(o, tanh_cell, out=gated[step])
        if projection is None:
            output.copy_(gated[step])
        else:
            output.copy_(_product(gated[step], projection, projection_packed))
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
    kernel_packed: bool,
    projection: Optional[Tensor],  # noqa: UP045
    projection_packed: bool,
    cell_clip: Optional[float],  # noqa: UP045
    projection_clip: Optional[float],  # noqa: UP045
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
    gate = gates[0] if in_place else torch.empty_like(gates[0])
    n_steps = len(gates)
    for back in range(n_steps):
        step = n_steps - 1 - back
        last = back == 0
        d_out = d_raw[step]
        if last:
            d_out.copy_(d_outputs[step])
        else:
            _add_product(d_out, d_outputs[step], d_gates[step + 1], kernel, kernel_packed)
        d_m = d_out
        if projection is not None:
            if projection_clip is not None:
                _clip_backward(d_out, outputs[step], projection_clip)
            d_m = _product(d_out, projection, projection_packed).to(d_out.dtype)
        if in_place:
            gate = d_gates[step]
        else:
            gate.copy_(gates[step])
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
        _sigmoid_backward(torch.mul(d_c, cells[step - 1] if step > 0 else cell_BH, out=room), f, f)
        if not in_place:
            d_gates[step].copy_(gate)
