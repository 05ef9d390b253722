"""The LSTM stack for use: sentences of unlike length, without work on padding and without what gradients need.

Rows come longest first, and at each time step only the rows that still go on are computed, as in a PackedSequence.
Shapes: D directions, N packed positions (all rows of time 0, then of time 1, ...), B rows, P projection, H cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elmo_ray.model.lstm import BiLstm, LstmLayer, LstmState
from elmo_ray.model.recurrence import FORGET_BIAS
from elmo_ray.model.side_by_side import by_direction

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
                start, stop = first, _stop(rows, step, first, most)
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


def _stop(rows: Sequence[int], step: int, first: int, most: int) -> int:
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
