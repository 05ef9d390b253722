"""One LSTM layer over a window as an autograd function: the recurrent products, the gates, and both clips.

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

from elmo_ray.model.side_by_side import side_by_side

FORGET_BIAS = 1.0

_sigmoid_backward, _tanh_backward = torch.ops.aten.sigmoid_backward.grad_input, torch.ops.aten.tanh_backward.grad_input


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


class Clips(NamedTuple):
    """Bounds of the cell and of the projection's result; None: no clip."""

    cell: float | None
    projection: float | None


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


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, in the dtype of `out`."""
    if a.dtype != out.dtype:
        out.copy_(_product(a, b))
    elif a.dim() == 2:
        torch.mm(a, b, out=out)
    else:
        torch.bmm(a, b, out=out)


def _sum_into(out: Tensor, c: Tensor, a: Tensor, b: Tensor) -> None:
    """out = c + a @ b, in the dtype of `out`; out may be c."""
    if a.dtype != out.dtype:
        torch.add(c, _product(a, b), out=out)
    elif a.dim() == 2:
        torch.addmm(c, a, b, out=out)
    else:
        torch.baddbmm(c, a, b, out=out)


def _clip_backward(gradient: Tensor, result: Tensor, bound: float) -> None:
    """The gradient, or 0 where the result is a bound; in place."""
    torch.ops.aten.hardtanh_backward.grad_input(gradient, result, -bound, bound, grad_input=gradient)


def _steps(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of the T steps."""
    return tensor.unbind(-3)


def run_forward(window: Window, hidden: Tensor, cell: Tensor, weights: Weights, clips: Clips) -> None:
    """Fills `window` but for its x, from the state [D, B, P] and [D, B, H] at its start."""
    h = cell.shape[-1]
    low = window.x.dtype
    bias = weights.bias.clone()
    bias[..., 2 * h : 3 * h] += FORGET_BIAS
    _sum_into(window.gates.flatten(-3, -2), bias.unsqueeze(-2), window.x, weights.input)
    for gate, new_cell, tanh_cell, gated, output in zip(*map(_steps, window[1:]), strict=True):
        _sum_into(gate, gate, hidden.to(low), weights.hidden)
        i, j, f, o = gate.split(h, -1)
        gate[..., 2 * h :].sigmoid_()
        torch.mul(f, cell, out=new_cell).addcmul_(i.sigmoid_(), j.tanh_())
        if clips.cell is not None:
            new_cell.clamp_(-clips.cell, clips.cell)
        torch.mul(o, torch.tanh(new_cell, out=tanh_cell), out=gated)
        if weights.projection is None:
            output.copy_(gated)
        else:
            _product_into(output, gated.to(low), weights.projection)
            if clips.projection is not None:
                output.clamp_(-clips.projection, clips.projection)
        hidden, cell = output, new_cell


def run_backward(
    d_outputs: Tensor, window: Window, hidden: Tensor, cell: Tensor, weights: Weights, clips: Clips
) -> Tensor:
    """Turns `window.gates` into the gradients of the gates before their activations, in place, for the caches' sake;
    returns the gradient of the projection's result before its clip [D, T, B, P].

    The state at the window's end has no gradient.
    """
    low = window.x.dtype
    # Copies, once a window: products of few rows with a transposed view run at a fraction of the speed on CPUs.
    hidden_weight = weights.hidden.transpose(-1, -2).contiguous()
    projection = None if weights.projection is None else weights.projection.transpose(-1, -2).contiguous()
    d_raw = torch.empty_like(window.outputs)
    d_outs, d_gates, d_raws = _steps(d_outputs), _steps(window.gates), _steps(d_raw)
    cells, tanh_cells, outputs = _steps(window.cells), _steps(window.tanh_cells), _steps(window.outputs)
    d_c, product = torch.empty_like(cell), torch.empty_like(cell)
    d_cell: Tensor | None = None
    for step in reversed(range(len(d_raws))):
        d_out = d_raws[step]
        if d_cell is None:
            d_out.copy_(d_outs[step])
        else:
            _sum_into(d_out, d_outs[step], d_gates[step + 1].to(low), hidden_weight)
        d_m = d_out
        if projection is not None:
            if clips.projection is not None:
                _clip_backward(d_out, outputs[step], clips.projection)
            d_m = _product(d_out.to(low), projection).to(d_out.dtype)
        i, j, f, o = d_gates[step].chunk(4, -1)
        _tanh_backward(torch.mul(d_m, o, out=d_c), tanh_cells[step], grad_input=d_c)
        if d_cell is None:
            d_cell = torch.empty_like(cell)
        else:
            d_c += d_cell
        if clips.cell is not None:
            _clip_backward(d_c, cells[step], clips.cell)
        _sigmoid_backward(torch.mul(d_m, tanh_cells[step], out=product), o, grad_input=o)
        torch.mul(d_c, i, out=d_cell)  # room that is free until the cell's own gradient goes there
        _sigmoid_backward(torch.mul(d_c, j, out=product), i, grad_input=i)
        _tanh_backward(d_cell, j, grad_input=j)
        torch.mul(d_c, f, out=d_cell)
        _sigmoid_backward(torch.mul(d_c, cells[step - 1] if step else cell, out=product), f, grad_input=f)
    return d_raw


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

        def run(k: int) -> None:
            run_forward(window.of(k), hidden_DBP[k], cell_DBH[k], weights.of(k), clips)

        if x_DTBI.device.type == "cpu":
            side_by_side(run, d, x_DTBI.device)
        else:
            run_forward(window, hidden_DBP, cell_DBH, weights, clips)
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
            d_raw = run_backward(d_outputs[k], of, hidden, cell, with_weights, ctx.clips)
            d_gates = of.gates.flatten(-3, -2).to(window.x.dtype)
            _weight_gradients(d_weights.of(k), d_gates, d_raw, of, hidden)
            if ctx.needs_input_grad[0]:
                _product_into(d_x[k].flatten(-3, -2), d_gates, with_weights.input.transpose(-1, -2).contiguous())

        if d_outputs.device.type == "cpu":
            side_by_side(run, len(d_outputs), d_outputs.device)
        else:
            with torch.no_grad():
                run(slice(None))
        return d_x if ctx.needs_input_grad[0] else None, None, None, *d_weights, None, None


def _weight_gradients(into: Weights, d_gates: Tensor, d_raw: Tensor, window: Window, hidden: Tensor) -> None:
    """From the gradients of the gates [D, T*B, 4H] in the products' dtype, and of the projection's result."""
    low = d_gates.dtype
    previous = torch.cat([hidden.unsqueeze(-3), window.outputs[..., :-1, :, :]], dim=-3).flatten(-3, -2)
    # one product for both kernels: few rows run at half the speed of many
    both = _product(torch.cat([window.x, previous.to(low)], dim=-1).transpose(-1, -2), d_gates)
    n_input = window.x.shape[-1]
    into.input.copy_(both[..., :n_input, :])
    into.hidden.copy_(both[..., n_input:, :])
    torch.sum(window.gates.flatten(-3, -2), dim=-2, out=into.bias)
    if into.projection is not None:
        gated, d_raw = window.gated.flatten(-3, -2).to(low), d_raw.flatten(-3, -2).to(low)
        _product_into(into.projection, gated.transpose(-1, -2), d_raw)
