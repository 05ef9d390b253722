"""The LSTM stack without gradients on a CPU, for many rows at a time.

What `PackedLstm` does, in fewer passes over memory: one product of input and hidden state together, whose activations
are part of it, and nothing is kept of a time step but its output. Shapes as there: D directions, N packed positions
(all rows of time 0, then of time 1, ...), T times, B rows, I input, P projection, H cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import List, Optional  # noqa: UP035  (what TorchScript knows)

import torch
from torch import Tensor

from elmo_ray.config import LstmConfig
from elmo_ray.model.fused_product import FusedProduct, apply, fused_product
from elmo_ray.model.lstm import BiLstm, LstmLayer, LstmState
from elmo_ray.model.recurrence import FORGET_BIAS
from elmo_ray.model.side_by_side import side_by_side, without_lock


class CpuLstm:
    """A BiLstm with its weights as they are now. dtype: of the products and of what the gates let through; cells are in
    the parameters' own."""

    def __init__(self, lstm: BiLstm, dtype: torch.dtype | None = None):
        self.config = lstm.config
        self._cells = [
            [_Cell(layer, direction, lstm.config, dtype) for layer in lstm.layers]  # type: ignore[arg-type]
            for direction in range(lstm.directions)
        ]

    @torch.no_grad()
    def run(self, x_DNP: Tensor, rows: Sequence[int], state: LstmState) -> tuple[list[Tensor], LstmState]:
        """Outputs of every layer [D, N, P], skip connections added, and each row's state after its last position.

        rows: how many rows each time step has, never rising; N is their sum. state: of at least `rows[0]` rows.
        """
        outputs = [torch.empty_like(x_DNP) for _ in state.hidden]
        after = LstmState(state.hidden.clone(), state.cell.clone())

        def run(k: int) -> None:
            x = x_DNP[k]
            # a tenth faster than no_grad: the loop is many small operations
            with torch.inference_mode():
                for index, cell in enumerate(self._cells[k]):
                    output = outputs[index][k]
                    cell.run(x, rows, after.hidden[index, k], after.cell[index, k], output)
                    if index and self.config.use_skip_connections:
                        output += x
                    x = output

        side_by_side(run, len(x_DNP), x_DNP.device)
        return outputs, after


class _Cell:
    """A layer of one direction."""

    def __init__(self, layer: LstmLayer, direction: int, config: LstmConfig, dtype: torch.dtype | None):
        self.config = config
        kernel = torch.cat([layer.input_kernel.detach()[direction], layer.hidden_kernel.detach()[direction]]).t()
        self.dtype = kernel.dtype if dtype is None else dtype
        i, j, f, o = kernel.to(self.dtype).chunk(4)
        bias_i, bias_j, bias_f, bias_o = layer.bias.detach()[direction].chunk(4)
        bias_ifo = torch.cat([bias_i, bias_f + FORGET_BIAS, bias_o])
        self.gates = fused_product(torch.cat([i, f, o]), bias_ifo, "sigmoid")
        self.candidate = fused_product(j, bias_j, "tanh")
        self.projection: FusedProduct | None = None
        if layer.projection is not None:  # it is given half of what it projects
            self.projection = fused_product(2.0 * layer.projection.detach()[direction].t().to(self.dtype))

    def run(self, x_NI: Tensor, rows: Sequence[int], hidden_BP: Tensor, cell_BH: Tensor, outputs_NP: Tensor) -> None:
        """Fills the outputs and changes the state from the first to that of the end."""
        # At each time the input and the hidden state that it begins with, side by side.
        given_TBK = x_NI.new_zeros(
            len(rows) + 1, _filled_up(rows[0]), x_NI.shape[1] + hidden_BP.shape[1], dtype=self.dtype
        )
        clips = self.config.cell_clip, self.config.proj_clip
        parts = self.gates, self.candidate, self.projection
        _steps()(x_NI, list(rows), hidden_BP, cell_BH, outputs_NP, given_TBK, *parts, *clips)


def _filled_up(count: int) -> int:
    """Products with the gates' kernel have a multiple of 8 rows, so that there are not too many kinds of them."""
    return -(-count // 8) * 8


def _time_steps(
    x_NI: Tensor,
    rows: List[int],  # noqa: UP006
    hidden_BP: Tensor,
    cell_BH: Tensor,
    outputs_NP: Tensor,
    given_TBK: Tensor,
    gates: FusedProduct,
    candidate: FusedProduct,
    projection: Optional[FusedProduct],  # noqa: UP045
    cell_clip: Optional[float],  # noqa: UP045
    proj_clip: Optional[float],  # noqa: UP045
) -> None:
    width, h = x_NI.shape[1], cell_BH.shape[1]
    inputs_TBI, hiddens_TBP = given_TBK[:, :, :width], given_TBK[:, :, width:]
    for step, x in enumerate(x_NI.split(rows)):
        inputs_TBI[step, : len(x)] = x
    hiddens_TBP[0, : rows[0]] = hidden_BP[: rows[0]]
    # Twice the cell, for its tanh: tanh(c) / 2 = sigmoid(2 c) - 1 / 2, and PyTorch's tanh takes six times as long as
    # its sigmoid.
    twice_BH = cell_BH * 2.0
    room_BH = torch.empty_like(twice_BH)
    before = rows[0]
    for step, count in enumerate(rows):
        if count < before:  # the shortest have ended
            hidden_BP[count:before] = hiddens_TBP[step, count:before]
        before = count
        given = given_TBK[step, : _filled_up(count)]
        twice, room = twice_BH[:count], room_BH[:count]
        i, f, o = apply(gates, given)[:count].to(twice.dtype).split(h, 1)
        j = apply(candidate, given)[:count].to(twice.dtype)
        twice.mul_(f).addcmul_(i, j, value=2.0)
        if cell_clip is not None:
            twice.clamp_(-2.0 * cell_clip, 2.0 * cell_clip)
        gated = torch.sigmoid(twice, out=room).sub_(0.5).mul_(o)
        ended = hiddens_TBP[step + 1, :count]
        if projection is None:
            ended.copy_(gated.mul_(2.0))
        else:
            projected = apply(projection, gated.to(given.dtype))
            if proj_clip is not None:
                projected.clamp_(-proj_clip, proj_clip)
            ended.copy_(projected)
    hidden_BP[:before] = hiddens_TBP[len(rows), :before]
    torch.mul(twice_BH, 0.5, out=cell_BH)
    for step, output in enumerate(outputs_NP.split(rows)):
        output.copy_(hiddens_TBP[step + 1, : len(output)])


_steps = without_lock(_time_steps)
"""Two threads meet at Python's lock between any two operations, which costs a tenth."""
