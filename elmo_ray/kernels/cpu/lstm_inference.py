"""The LSTM stack without gradients on a CPU, for many rows at a time.

What `PackedLstm` does, in fewer products and passes over memory. What the input gives to the first layer's gates is
worked out once for each distinct word; in the other layers one product has input and hidden state together, and
activations are part of it. Nothing is kept of a time step but its output. Shapes: D directions, U distinct words, N
packed positions (all rows of time 0, then of time 1, ...), T times, B rows, I input, P projection, H cell, G = 4 H
gates.

The LSTM stack for use: sentences of unlike length, without work on padding and without what gradients need.

Rows come longest first, and at each time step only the rows that still go on are computed, as in a PackedSequence.
Shapes: D directions, N packed positions (all rows of time 0, then of time 1, ...), B rows, P projection, H cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import List, NamedTuple, Optional  # noqa: UP035  (what TorchScript knows)

import torch
from torch import Tensor

from elmo_ray.config.model import LstmConfig
from elmo_ray.kernels.clips import FORGET_BIAS
from elmo_ray.kernels.matmul import FusedProduct, apply, apply_and_add, fused_product
from elmo_ray.kernels.threads import by_direction, side_by_side, without_lock
from elmo_ray.model.lstm import BiLstm, LstmLayer, LstmState

_GATE_BYTES = 16 << 20
"""Of the gates at a time: few enough for a CPU's cache, enough for products of full speed."""


class _Weights(NamedTuple):
    """A layer's parameters in the type of the products, gates in the order i, f, o, j; the bias has the forget bias and
    is in the type of states."""

    input: Tensor
    hidden: Tensor
    bias: Tensor
    projection: Tensor | None

    def of(self, part: slice) -> _Weights:
        """Of some of the directions."""
        projection = None if self.projection is None else self.projection[part]
        return _Weights(self.input[part], self.hidden[part], self.bias[part], projection)


class PackedLstm:
    """Runs a BiLstm without gradients. dtype: of the products; None: the parameters'.

    Converted weights are made once and again when a parameter has changed.
    """

    def __init__(self, lstm: BiLstm, dtype: torch.dtype | None = None):
        self.lstm, self.dtype = lstm, dtype
        self._weights: list[_Weights] = []
        self._made_of: object = None

    @torch.no_grad()
    def run(self, x_DNP: Tensor, rows: Sequence[int], state: LstmState) -> tuple[list[Tensor], LstmState]:
        """Outputs of every layer [D, N, P], skip connections added, and each row's state after its last position.

        rows: how many rows each time step has, never rising; N is their sum. state: of at least `rows[0]` rows.
        """
        config = self.lstm.config
        outputs, hiddens, cells = [], [], []
        x = x_DNP
        for index, weights in enumerate(self._converted()):
            h, hidden, cell = self._layer(x, rows, weights, state.hidden[index], state.cell[index])
            hiddens.append(hidden)
            cells.append(cell)
            x = h + x if index and config.use_skip_connections else h
            outputs.append(x)
        return outputs, LstmState(torch.stack(hiddens), torch.stack(cells))

    def _layer(
        self, x_DNP: Tensor, rows: Sequence[int], weights: _Weights, hidden_DBP: Tensor, cell_DBH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs [D, N, P], and the last hidden and cell of each row."""
        outputs = x_DNP.new_empty(*x_DNP.shape[:2], hidden_DBP.shape[-1])
        hidden, cell = hidden_DBP.clone(), cell_DBH.clone()

        def run(part: int | slice) -> None:
            # A tenth faster than no_grad: the loop is many small operations. What it fills is made outside of it, so
            # these are ordinary tensors, which a task's mixture may learn from.
            part = slice(part, part + 1) if isinstance(part, int) else part
            with torch.inference_mode():
                self._steps(x_DNP[part], rows, weights.of(part), outputs[part], hidden[part], cell[part])

        by_direction(run, len(x_DNP), x_DNP.device)
        return outputs, hidden, cell

    def _steps(
        self, x_DNP: Tensor, rows: Sequence[int], weights: _Weights, outputs: Tensor, hiddens: Tensor, cells: Tensor
    ) -> None:
        """Fills `outputs`, and changes `hiddens` [D, B, P] and `cells` [D, B, H] from the first state to the last."""
        config = self.lstm.config
        h, cell_clip = config.dim, config.cell_clip
        proj_clip = config.proj_clip if weights.projection is not None else None
        low = weights.input.dtype
        mixed = low != x_DNP.dtype
        most = _GATE_BYTES // (weights.bias.numel() * weights.bias.element_size())
        hidden = hiddens
        first = start = stop = 0
        for step, count in enumerate(rows):
            if first == stop:  # the input's part of the gates, for some steps at once
                start, stop = first, _end_of_steps(rows, step, first, most)
                x = x_DNP[:, start:stop]
                if mixed:
                    gates = torch.bmm(x.to(low), weights.input).to(x.dtype).add_(weights.bias[:, None])
                else:
                    gates = torch.baddbmm(weights.bias[:, None], x, weights.input)
            if count < hidden.shape[1]:  # the shortest have ended: their state stays as it is
                hiddens[:, count : hidden.shape[1]] = hidden[:, count:]
                hidden = hidden[:, :count]
            cell = cells[:, :count]
            gate = gates[:, first - start : first - start + count]
            if mixed:
                gate += torch.bmm(hidden.to(low), weights.hidden)
            else:
                gate.baddbmm_(hidden, weights.hidden)
            ifo, j = gate[..., : 3 * h].sigmoid_(), gate[..., 3 * h :].tanh_()
            cell.mul_(ifo[..., h : 2 * h]).addcmul_(ifo[..., :h], j)
            if cell_clip is not None:
                cell.clamp_(-cell_clip, cell_clip)
            m = torch.tanh(cell).mul_(ifo[..., 2 * h :])
            hidden = outputs[:, first : first + count]
            if weights.projection is None:
                hidden.copy_(m)
            elif mixed:
                hidden.copy_(torch.bmm(m.to(low), weights.projection))
            else:
                torch.bmm(m, weights.projection, out=hidden)
            if proj_clip is not None:
                hidden.clamp_(-proj_clip, proj_clip)
            first += count
        hiddens[:, : hidden.shape[1]] = hidden

    def _converted(self) -> list[_Weights]:
        parameters = list(self.lstm.parameters())
        made_of = fingerprint(parameters)
        if made_of != self._made_of:
            self._weights = [self._convert(layer) for layer in self.lstm.layers]  # type: ignore[arg-type]
            self._made_of = made_of
        return self._weights

    def _convert(self, layer: LstmLayer) -> _Weights:
        low = layer.input_kernel.dtype if self.dtype is None else self.dtype
        h = self.lstm.config.dim
        bias = layer.bias.detach().clone()
        bias[:, 2 * h : 3 * h] += FORGET_BIAS
        # i, j, f, o becomes i, f, o, j: one sigmoid over what is side by side
        input_kernel, hidden_kernel, bias = (
            torch.cat([x[..., :h], x[..., 2 * h :], x[..., h : 2 * h]], dim=-1)
            for x in (layer.input_kernel.detach().to(low), layer.hidden_kernel.detach().to(low), bias)
        )
        projection = None if layer.projection is None else layer.projection.detach().to(low)
        return _Weights(input_kernel, hidden_kernel, bias, projection)


def _end_of_steps(rows: Sequence[int], step: int, first: int, most: int) -> int:
    """The end of the steps from `step` on, which begins at `first`, that have `most` positions together; of one at
    least."""
    stop = first + rows[step]
    for count in rows[step + 1 :]:
        if stop + count - first > most:
            break
        stop += count
    return stop


def fingerprint(parameters: Sequence[Tensor]) -> list[tuple[int, int, torch.dtype]]:
    """Changes when a parameter is moved, replaced, or changed in place (through the parameter, not its `.data`)."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in parameters]


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
