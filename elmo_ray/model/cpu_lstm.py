"""The LSTM stack without gradients on a CPU, for many rows at a time.

What `PackedLstm` does, in fewer passes over memory: one product of input and hidden state together, whose activations
are part of it, and nothing is kept of a time step but its output. Shapes as there: D directions, N packed positions
(all rows of time 0, then of time 1, ...), B rows, I input, P projection, H cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elmo_ray.config import LstmConfig
from elmo_ray.model.fused_product import FusedProduct
from elmo_ray.model.lstm import BiLstm, LstmLayer, LstmState
from elmo_ray.model.recurrence import FORGET_BIAS
from elmo_ray.model.side_by_side import side_by_side

_ROWS = 8
"""Products with the gates' kernel have a multiple of so many rows, so that there are not too many kinds of them."""


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
        self.gates = FusedProduct(torch.cat([i, f, o]), torch.cat([bias_i, bias_f + FORGET_BIAS, bias_o]), "sigmoid")
        self.candidate = FusedProduct(j, bias_j, "tanh")
        self.projection: FusedProduct | None = None
        if layer.projection is not None:  # it is given half of what it projects
            self.projection = FusedProduct(2.0 * layer.projection.detach()[direction].t().to(self.dtype))

    def run(self, x_NI: Tensor, rows: Sequence[int], hidden_BP: Tensor, cell_BH: Tensor, outputs_NP: Tensor) -> None:
        """Fills the outputs and changes the state from the first to that of the end."""
        h, width = self.config.dim, x_NI.shape[1]
        cell_clip, proj_clip = self.config.cell_clip, self.config.proj_clip
        # At each time the input and the hidden state that it begins with, side by side. Few operations on much each:
        # two threads meet at Python's lock between any two of them.
        given_TBK = x_NI.new_zeros(len(rows) + 1, _filled_up(rows[0]), width + hidden_BP.shape[1], dtype=self.dtype)
        inputs_TBI, hiddens_TBP = given_TBK[..., :width], given_TBK[..., width:]
        for given, x in zip(inputs_TBI, x_NI.split(list(rows)), strict=False):
            given[: len(x)] = x
        hiddens_TBP[0, : rows[0]] = hidden_BP[: rows[0]]
        cell, twice = cell_BH, torch.empty_like(cell_BH)
        before = rows[0]
        for count, given, started, ended in zip(rows, given_TBK[:-1], hiddens_TBP[:-1], hiddens_TBP[1:], strict=True):
            if count < before:  # the shortest have ended
                hidden_BP[count:before] = started[count:before]
                before = count
            if count < len(cell):
                cell, twice = cell[:count], twice[:count]
            if count < len(given):
                given, ended = given[: _filled_up(count)], ended[:count]
            i, f, o = _first(self.gates(given), count).to(cell.dtype).split(h, dim=1)
            j = _first(self.candidate(given), count).to(cell.dtype)
            cell.mul_(f).addcmul_(i, j)
            if cell_clip is not None:
                cell.clamp_(-cell_clip, cell_clip)
            # tanh(c) / 2 = sigmoid(2 c) - 1 / 2: PyTorch's tanh takes six times as long as its sigmoid
            gated = torch.add(cell, cell, out=twice).sigmoid_().sub_(0.5).mul_(o)
            if self.projection is None:
                torch.mul(gated, 2.0, out=ended)
            elif proj_clip is None:
                ended.copy_(self.projection(gated.to(self.dtype)))
            else:
                torch.clamp(self.projection(gated.to(self.dtype)), -proj_clip, proj_clip, out=ended)
        hidden_BP[:before] = hiddens_TBP[-1, :before]
        for output, ended in zip(outputs_NP.split(list(rows)), hiddens_TBP[1:], strict=True):
            output.copy_(ended[: len(output)])


def _filled_up(count: int) -> int:
    return -(-count // _ROWS) * _ROWS


def _first(rows: Tensor, count: int) -> Tensor:
    return rows if len(rows) == count else rows[:count]
