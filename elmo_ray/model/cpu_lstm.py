"""The LSTM stack without gradients on a CPU, for many rows at a time.

What `PackedLstm` does, in fewer products and passes over memory. What the input gives to the first layer's gates is
worked out once for each distinct word; in the other layers one product has input and hidden state together, and
activations are part of it. Nothing is kept of a time step but its output. Shapes: D directions, U distinct words, N
packed positions (all rows of time 0, then of time 1, ...), T times, B rows, I input, P projection, H cell, G = 4 H
gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import List, Optional  # noqa: UP035  (what TorchScript knows)

import torch
from torch import Tensor

from elmo_ray.config import LstmConfig
from elmo_ray.model.fused_product import FusedProduct, apply, apply_and_add, fused_product
from elmo_ray.model.lstm import BiLstm, LstmLayer, LstmState
from elmo_ray.model.recurrence import FORGET_BIAS
from elmo_ray.model.side_by_side import side_by_side, without_lock

_TILE, _ROWS = 256, 64
"""Most words of a product, and what their number is a multiple of, so that there are few kinds of products."""


class CpuLstm:
    """A BiLstm with its weights as they are now. dtype: of the products and of what the gates let through; cells are in
    the parameters' own."""

    def __init__(self, lstm: BiLstm, dtype: torch.dtype | None = None):
        self.config = lstm.config
        self._cells = [
            [_Cell(layer, direction, lstm.config, dtype, index == 0) for index, layer in enumerate(lstm.layers)]  # type: ignore[arg-type]
            for direction in range(lstm.directions)
        ]

    @torch.no_grad()
    def run(
        self, words_UP: Tensor, places_DN: Tensor, rows: Sequence[int], state: LstmState
    ) -> tuple[list[Tensor], LstmState]:
        """Outputs of every layer [D, N, P], skip connections added, and each row's state after its last position.

        places_DN: which of the words is at each position. rows: how many rows each time step has, never rising; N is
        their sum. state: of at least `rows[0]` rows.
        """
        outputs = [words_UP.new_empty(*places_DN.shape, words_UP.shape[1]) for _ in state.hidden]
        after = LstmState(state.hidden.clone(), state.cell.clone())

        def run(k: int) -> None:
            # a tenth faster than no_grad: the loop is many small operations
            with torch.inference_mode():
                for index, cell in enumerate(self._cells[k]):
                    states = after.hidden[index, k], after.cell[index, k]
                    if index == 0:
                        cell.run(places_DN[k], cell.gates_of(words_UP), rows, *states, outputs[0][k])
                        continue
                    x, output = outputs[index - 1][k], outputs[index][k]
                    cell.run(x, None, rows, *states, output)
                    if self.config.use_skip_connections:
                        output += x

        side_by_side(run, len(places_DN), words_UP.device)
        return outputs, after


class _Cell:
    """A layer of one direction. first: whether the input's part of the gates is to be given by word."""

    def __init__(
        self, layer: LstmLayer, direction: int, config: LstmConfig, dtype: torch.dtype | None, first: bool
    ) -> None:
        self.config = config
        kernels = layer.input_kernel.detach()[direction].t(), layer.hidden_kernel.detach()[direction].t()
        self.dtype = kernels[0].dtype if dtype is None else dtype
        bias_i, bias_j, bias_f, bias_o = layer.bias.detach()[direction].chunk(4)
        bias_ifo = torch.cat([bias_i, bias_f + FORGET_BIAS, bias_o])
        self.candidate: FusedProduct | None = None
        if first:  # tanh(x) = 2 sigmoid(2 x) - 1, so that one sigmoid serves all four
            input_kernel, hidden_kernel = (
                torch.cat([i, f, o, 2.0 * j]).to(self.dtype) for i, j, f, o in (kernel.chunk(4) for kernel in kernels)
            )
            self.of_words = fused_product(input_kernel, torch.cat([bias_ifo, 2.0 * bias_j]))
            self.gates = fused_product(hidden_kernel)
        else:
            i, j, f, o = torch.cat(kernels, dim=1).to(self.dtype).chunk(4)
            self.gates = fused_product(torch.cat([i, f, o]), bias_ifo, "sigmoid")
            self.candidate = fused_product(j, bias_j, "tanh")
        self.projection: FusedProduct | None = None
        if layer.projection is not None:  # it is given half of what it projects
            self.projection = fused_product(2.0 * layer.projection.detach()[direction].t().to(self.dtype))

    def gates_of(self, words_UP: Tensor) -> Tensor:
        """[U, G] the input's part of the first layer's gates."""
        filled_up = words_UP.new_zeros(-(-len(words_UP) // _ROWS) * _ROWS, words_UP.shape[1], dtype=self.dtype)
        filled_up[: len(words_UP)] = words_UP
        table = filled_up.new_empty(len(filled_up), 4 * self.config.dim)
        for some, result in zip(filled_up.split(_TILE), table.split(_TILE), strict=True):
            result.copy_(apply(self.of_words, some))
        return table

    def run(
        self,
        inputs: Tensor,
        gates_UG: Tensor | None,
        rows: Sequence[int],
        hidden_BP: Tensor,
        cell_BH: Tensor,
        outputs_NP: Tensor,
    ) -> None:
        """Fills the outputs and changes the state from the first to that of the end. inputs: [N, I], or [N] places in
        `gates_UG`."""
        most = -(-rows[0] // 8) * 8
        # at each time the input, or none, and the hidden state that it begins with, side by side
        width = 0 if gates_UG is not None else inputs.shape[1]
        given_TBK = outputs_NP.new_zeros(len(rows) + 1, most, width + hidden_BP.shape[1], dtype=self.dtype)
        places_TB = None if gates_UG is None else inputs.new_zeros(len(rows), most)
        inputs_TB = given_TBK[..., :width] if places_TB is None else places_TB
        for given, some in zip(inputs_TB, inputs.split(list(rows)), strict=False):
            given[: len(some)] = some
        parts = self.gates, self.candidate, self.projection
        clips = self.config.cell_clip, self.config.proj_clip
        _steps()(given_TBK, places_TB, gates_UG, list(rows), hidden_BP, cell_BH, outputs_NP, *parts, *clips)


def _time_steps(
    given_TBK: Tensor,
    places_TB: Optional[Tensor],  # noqa: UP045
    gates_UG: Optional[Tensor],  # noqa: UP045
    rows: List[int],  # noqa: UP006
    hidden_BP: Tensor,
    cell_BH: Tensor,
    outputs_NP: Tensor,
    gates: FusedProduct,
    candidate: Optional[FusedProduct],  # noqa: UP045
    projection: Optional[FusedProduct],  # noqa: UP045
    cell_clip: Optional[float],  # noqa: UP045
    proj_clip: Optional[float],  # noqa: UP045
) -> None:
    h = cell_BH.shape[1]
    hiddens_TBP = given_TBK[:, :, given_TBK.shape[2] - hidden_BP.shape[1] :]
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
        # a multiple of 8 rows, so that there are not too many kinds of products
        filled = -(-count // 8) * 8
        given = given_TBK[step, :filled]
        twice, room = twice_BH[:count], room_BH[:count]
        if places_TB is not None and gates_UG is not None:
            of_words = gates_UG.index_select(0, places_TB[step, :filled])
            i, f, o, j = apply_and_add(gates, given, of_words)[:count].to(twice.dtype).sigmoid_().split(h, 1)
            j = j.mul_(2.0).sub_(1.0)
        else:
            i, f, o = apply(gates, given)[:count].to(twice.dtype).split(h, 1)
            assert candidate is not None
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
