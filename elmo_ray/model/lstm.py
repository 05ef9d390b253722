"""The biLM's LSTM: projection, cell and projection clips, skip connections, both directions in one batched product.

Shapes: D directions, T window, B rows, I input, P output of a cell (projection), H cell, L layers. Gate order i, j,
f, o as in TensorFlow's LSTMCell; the forget bias of 1 is added at run time and never stored (BILM.md, Model).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elmo_ray.config import LstmConfig
from elmo_ray.model.dropout import Dropout

FORGET_BIAS = 1.0


class LstmState(NamedTuple):
    """State carried from window to window. hidden: [L, D, B, P]; cell: [L, D, B, H]."""

    hidden: Tensor
    cell: Tensor

    def detach(self) -> LstmState:
        return LstmState(self.hidden.detach(), self.cell.detach())

    def zero_rows(self, rows_B: Tensor) -> LstmState:
        """The state with zeros in the rows where `rows_B` (bool) is set."""
        keep = ~rows_B[None, None, :, None]
        return LstmState(self.hidden.where(keep, 0.0), self.cell.where(keep, 0.0))


class _Recurrence(torch.autograd.Function):
    """One layer over a window. Weight gradients are one product over all time steps instead of one a step."""

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
        cell_clip: float | None,
        proj_clip: float | None,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        d, t, b, _ = x_DTBI.shape
        h = cell_DBH.shape[-1]
        # The weights are converted once a window, not once a time step.
        low = dtype if dtype is not None else x_DTBI.dtype
        w_input_low, w_hidden_low = w_input.to(low), w_hidden.to(low)
        w_projection_low = None if w_projection is None else w_projection.to(low)
        x_low = x_DTBI.reshape(d, t * b, -1).to(low)
        gates = torch.bmm(x_low, w_input_low).view(d, t, b, 4 * h).to(x_DTBI.dtype)
        run_bias = bias.clone()
        run_bias[:, 2 * h : 3 * h] += FORGET_BIAS
        gates += run_bias[:, None, None, :]

        cells = x_DTBI.new_empty(d, t, b, h)
        tanh_cells = torch.empty_like(cells)
        outputs = x_DTBI.new_empty(d, t, b, hidden_DBP.shape[-1])
        hidden, cell = hidden_DBP, cell_DBH
        for step in range(t):
            gate = gates[:, step]
            if low == gate.dtype:
                gate.baddbmm_(hidden, w_hidden_low)
            else:
                gate += torch.bmm(hidden.to(low), w_hidden_low)
            i = gate[..., :h].sigmoid_()
            j = gate[..., h : 2 * h].tanh_()
            fo = gate[..., 2 * h :].sigmoid_()
            new_cell = torch.mul(fo[..., :h], cell, out=cells[:, step]).addcmul_(i, j)
            if cell_clip is not None:
                new_cell.clamp_(-cell_clip, cell_clip)
            cell = new_cell
            tanh_cell = torch.tanh(cell, out=tanh_cells[:, step])
            if w_projection_low is None:
                hidden = torch.mul(fo[..., h:], tanh_cell, out=outputs[:, step])
            else:
                hidden = outputs[:, step]
                hidden.copy_(torch.bmm((fo[..., h:] * tanh_cell).to(low), w_projection_low))
                if proj_clip is not None:
                    hidden.clamp_(-proj_clip, proj_clip)
        ctx.save_for_backward(
            x_low, hidden_DBP, cell_DBH, w_input_low, w_hidden_low, w_projection_low, gates, cells, tanh_cells, outputs
        )
        ctx.clips = (cell_clip, proj_clip)
        ctx.low = low
        ctx.mark_non_differentiable(cells)
        return outputs, cells

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_low, hidden_DBP, cell_DBH, w_input, w_hidden, w_projection, gates, cells, tanh_cells, outputs) = (
            ctx.saved_tensors
        )
        cell_clip, proj_clip = ctx.clips
        low = ctx.low
        d, t, b, h = cells.shape
        p = outputs.shape[-1]
        d_outputs = grads[0]
        d_gates = torch.empty_like(gates)
        d_raw = torch.empty_like(outputs)  # gradient of the projection's result before its clip
        # Copies, once a window: products of few rows with a transposed view run at a fraction of the speed on CPUs.
        w_hidden_t = w_hidden.transpose(1, 2).contiguous()
        w_projection_t = None if w_projection is None else w_projection.transpose(1, 2).contiguous()
        d_hidden: Tensor | None = None
        d_cell: Tensor | None = None
        aten = torch.ops.aten
        sigmoid_backward, tanh_backward = aten.sigmoid_backward, aten.tanh_backward
        hardtanh_backward = aten.hardtanh_backward  # of a clip: the gradient, or 0 where the result is a bound
        for step in range(t - 1, -1, -1):
            gate = gates[:, step]
            i, j, f, o = gate[..., :h], gate[..., h : 2 * h], gate[..., 2 * h : 3 * h], gate[..., 3 * h :]
            d_out = d_raw[:, step]
            if d_hidden is None:
                d_out.copy_(d_outputs[:, step])
            else:
                torch.add(d_outputs[:, step], d_hidden, out=d_out)
            if w_projection_t is None:
                d_m = d_out
            else:
                if proj_clip is not None:
                    hardtanh_backward.grad_input(d_out, outputs[:, step], -proj_clip, proj_clip, grad_input=d_out)
                d_m = torch.bmm(d_out.to(low), w_projection_t).to(cells.dtype)
            tanh_cell = tanh_cells[:, step]
            grad = d_gates[:, step]
            sigmoid_backward.grad_input(d_m * tanh_cell, o, grad_input=grad[..., 3 * h :])
            d_c = tanh_backward(d_m.mul(o), tanh_cell)
            if d_cell is not None:
                d_c += d_cell
            if cell_clip is not None:
                d_c = hardtanh_backward(d_c, cells[:, step], -cell_clip, cell_clip)
            sigmoid_backward.grad_input(d_c * j, i, grad_input=grad[..., :h])
            tanh_backward.grad_input(d_c * i, j, grad_input=grad[..., h : 2 * h])
            before = cells[:, step - 1] if step else cell_DBH
            sigmoid_backward.grad_input(d_c * before, f, grad_input=grad[..., 2 * h : 3 * h])
            if step:
                d_cell = d_c.mul_(f)
                d_hidden = torch.bmm(grad.to(low), w_hidden_t)

        flat = d_gates.view(d, t * b, 4 * h)
        flat_low = flat.to(low)
        full = d_gates.dtype
        d_x = (
            torch.bmm(flat_low, w_input.transpose(1, 2).contiguous()).to(full).view(d, t, b, -1)
            if ctx.needs_input_grad[0]
            else None
        )
        d_w_input = torch.bmm(x_low.transpose(1, 2), flat_low).to(full)
        previous = torch.cat([hidden_DBP[:, None], outputs[:, :-1]], dim=1).view(d, t * b, p).to(low)
        d_w_hidden = torch.bmm(previous.transpose(1, 2), flat_low).to(full)
        d_bias = flat.sum(dim=1)
        d_w_projection = None
        if w_projection is not None:
            m = (gates[..., 3 * h :] * tanh_cells).view(d, t * b, h).to(low)
            d_w_projection = torch.bmm(m.transpose(1, 2), d_raw.view(d, t * b, p).to(low)).to(full)
        return d_x, None, None, d_w_input, d_w_hidden, d_bias, d_w_projection, None, None, None


class LstmLayer(nn.Module):
    """One layer, both directions. Parameters: input_kernel [D, I, 4H], hidden_kernel [D, P, 4H], bias [D, 4H], and,
    unless `dim == projection_dim`, projection [D, H, P]. bilm-tf's kernel is the first two below each other."""

    def __init__(self, config: LstmConfig, directions: int, input_dim: int):
        super().__init__()
        cell, output = config.dim, config.projection_dim
        self.cell_clip = config.cell_clip
        self.proj_clip = config.proj_clip
        self.input_kernel = nn.Parameter(torch.empty(directions, input_dim, 4 * cell))
        self.hidden_kernel = nn.Parameter(torch.empty(directions, output, 4 * cell))
        self.bias = nn.Parameter(torch.zeros(directions, 4 * cell))
        # The original leaves the projection out, and its clip with it, where it would change nothing in size.
        self.projection = nn.Parameter(torch.empty(directions, cell, output)) if cell != output else None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Glorot uniform over the whole kernel [I + P, 4H], as TensorFlow's default initialiser; biases 0."""
        input_dim, hidden_dim, gates = self.input_kernel.shape[1], self.hidden_kernel.shape[1], self.bias.shape[1]
        with torch.no_grad():
            bound = math.sqrt(6.0 / (input_dim + hidden_dim + gates))
            self.input_kernel.uniform_(-bound, bound, generator=generator)
            self.hidden_kernel.uniform_(-bound, bound, generator=generator)
            self.bias.zero_()
            if self.projection is not None:
                bound = math.sqrt(6.0 / sum(self.projection.shape[1:]))
                self.projection.uniform_(-bound, bound, generator=generator)

    def forward(
        self, x_DTBI: Tensor, hidden_DBP: Tensor, cell_DBH: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """All outputs [D, T, B, P] and all cells [D, T, B, H] of a window."""
        outputs, cells = _Recurrence.apply(
            x_DTBI,
            hidden_DBP,
            cell_DBH,
            self.input_kernel,
            self.hidden_kernel,
            self.bias,
            self.projection,
            self.cell_clip,
            self.proj_clip,
            dtype,
        )
        return outputs, cells


class BiLstm(nn.Module):
    """The stack of layers. Directions never see each other; direction 1 is fed the reversed sentences."""

    def __init__(self, config: LstmConfig, directions: int):
        super().__init__()
        self.config = config
        self.directions = directions
        self.layers = nn.ModuleList(
            LstmLayer(config, directions, config.projection_dim) for _ in range(config.n_layers)
        )

    def reset_parameters(self, generator: torch.Generator) -> None:
        for layer in self.layers:
            layer.reset_parameters(generator)  # type: ignore[operator]

    def zero_state(self, rows: int, like: Tensor) -> LstmState:
        """State of zeros for `rows` rows with the device and dtype of `like`."""
        shape = (self.config.n_layers, self.directions, rows)
        return LstmState(like.new_zeros(*shape, self.config.projection_dim), like.new_zeros(*shape, self.config.dim))

    def forward(
        self,
        x_DTBP: Tensor,
        state: LstmState,
        lengths_B: Tensor | None = None,
        dropout: Dropout | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[list[Tensor], LstmState]:
        """Run a window.

        lengths_B: valid positions of each row (its first ones); the state returned is that after the last valid one,
        and the state given where a row has none. None: all are valid.
        Returns the output of every layer, [D, T, B, P] each, skip connections added, and the new state (detached).
        """
        outputs, hiddens, cells = [], [], []
        x = x_DTBP
        for index, layer in enumerate(self.layers):
            dropped = x if dropout is None else dropout(x)
            h, c = layer(dropped, state.hidden[index], state.cell[index], dtype)
            hiddens.append(_at_length(h.detach(), state.hidden[index], lengths_B))
            cells.append(_at_length(c, state.cell[index], lengths_B))
            # The residual adds the dropped input: dropout is outside of the skip connection (BILM.md, Model).
            x = h + dropped if index and self.config.use_skip_connections else h
            outputs.append(x)
        return outputs, LstmState(torch.stack(hiddens), torch.stack(cells))


def _at_length(all_DTBX: Tensor, start_DBX: Tensor, lengths_B: Tensor | None) -> Tensor:
    if lengths_B is None:
        return all_DTBX[:, -1]
    d, _, b, x = all_DTBX.shape
    index = (lengths_B - 1).clamp_min(0)[None, None, :, None].expand(d, 1, b, x)
    last = all_DTBX.gather(1, index)[:, 0]
    return torch.where((lengths_B > 0)[None, :, None], last, start_DBX)
