"""The LSTM stack without gradients on a CPU, for sentences of unlike length, without work on padding.

Rows come longest first, and at each time step only the rows that still go on are computed. The input's part of the
gates is computed beforehand: in the first layer once for each distinct word, in the others for some time steps at once.
Nothing is kept of a time step but its output.

Shapes: D directions, L layers, U distinct words, N packed positions (all rows of time 0, then of time 1, ...), B rows,
I input, P projection, H memory of a cell, G = 4H gates in the order i, j, f, o.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray.kernels.cpu.loops import as_array, bound_of, compiled, limited, sigmoid, stored, tanh, wide
from elmo_ray.kernels.cpu.lstm import FORGET_BIAS, forward_projection
from elmo_ray.kernels.matmul import apply, fused_product
from elmo_ray.kernels.threads import run_parallel

_TILE, _ROWS = 256, 64
"""Most inputs of a product, and what their number is a multiple of: a product of a new size takes longer once."""

_FEW = 8
"""Rows below which a plain product is faster than one with a packed weight."""

_GATE_BYTES = 16 << 20
"""Size of the input's gates that are computed at a time: enough for products of full speed, and near a cache."""


@compiled
def _sigmoids(sums: Any, given: Any, gates: Any) -> None:
    for h in range(len(gates)):
        gates[h] = sigmoid(wide(sums[h]) + wide(given[h]))


@compiled
def _tanhs(sums: Any, given: Any, gates: Any) -> None:
    for h in range(len(gates)):
        gates[h] = tanh(wide(sums[h]) + wide(given[h]))


@compiled
def _cell(i: Any, j: Any, f: Any, o: Any, memory: Any, gated: Any, bound: Any) -> None:
    for h in range(len(memory)):
        c = limited(f[h] * memory[h] + i[h] * j[h], bound)
        memory[h], gated[h] = c, stored(o[h] * tanh(c), gated[h])


@compiled
def _gates_of_step(
    sums_BG: Any, table_UG: Any, places_B: Any, memory_BH: Any, gated_BH: Any, gates_G: Any, bound: Any
) -> None:
    """Update the memories and what goes into the projection. gates_G: room for the gates of a row."""
    n = memory_BH.shape[1]
    i, j, f, o = gates_G[:n], gates_G[n : 2 * n], gates_G[2 * n : 3 * n], gates_G[3 * n :]
    for b in range(len(places_B)):
        sums, given = sums_BG[b], table_UG[places_B[b]]
        _sigmoids(sums[:n], given[:n], i)
        _tanhs(sums[n : 2 * n], given[n : 2 * n], j)
        _sigmoids(sums[2 * n :], given[2 * n :], gates_G[2 * n :])
        _cell(i, j, f, o, memory_BH[b], gated_BH[b], bound)


class LstmInference:
    """A stack with its weights as they are now.

    layers: the four weights of each layer, as `model.lstm.Weights`. dtype: of the products and of what the gates let
    through, None for the weights' own; memories are in the weights' type.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Tensor | None]],
        clips: Sequence[float | None],
        use_skip_connections: bool,
        dtype: torch.dtype | None = None,
    ):
        self._skips = use_skip_connections
        directions = len(layers[0][0]) if layers[0][0] is not None else 0
        self._cells = [[_Cell(weights, k, clips, dtype) for weights in layers] for k in range(directions)]

    @torch.no_grad()
    def run(
        self, words_UI: Tensor, places_DN: Tensor, rows: Sequence[int], hidden_LDBP: Tensor, memory_LDBH: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the outputs of every layer [D, N, P], skip connections added, and each row's state after its last
        position.

        places_DN: which of the words is at each position. rows: how many rows each time step has, never rising; N is
        their sum. The state that is given has at least `rows[0]` rows.
        """
        outputs = [words_UI.new_empty(*places_DN.shape, hidden_LDBP.shape[-1]) for _ in hidden_LDBP]
        hidden_LDBP, memory_LDBH = hidden_LDBP.clone(), memory_LDBH.clone()

        def run(k: int) -> None:
            for index, cell in enumerate(self._cells[k]):
                states = hidden_LDBP[index, k], memory_LDBH[index, k]
                if index == 0:
                    cell.run(words_UI, as_array(places_DN[k]), rows, *states, outputs[0][k])
                    continue
                x, output = outputs[index - 1][k], outputs[index][k]
                cell.run(x, None, rows, *states, output)
                if self._skips:
                    output += x

        run_parallel(run, len(places_DN), words_UI.device)
        return outputs, hidden_LDBP, memory_LDBH


class _Weight:
    """A matrix [K, N] for products of many rows, in oneDNN's order, and of few, for which that order is slower."""

    def __init__(self, weight_KN: Tensor, low: torch.dtype, bias: Tensor | None = None) -> None:
        self.few = weight_KN.to(low)
        self.many = fused_product(self.few.t(), bias)

    def times(self, x_MK: Tensor, count: int) -> Tensor:
        """Return the first `count` rows of x @ weight, and maybe some more, so that products come in few sizes."""
        return torch.mm(x_MK[:count], self.few) if count < _FEW else apply(self.many, x_MK[: -(-count // 8) * 8])


class _Cell:
    """One layer of one direction."""

    def __init__(
        self,
        weights: Sequence[Tensor | None],
        direction: int,
        clips: Sequence[float | None],
        dtype: torch.dtype | None,
    ) -> None:
        w_input, w_hidden, bias, projection = (None if w is None else w.detach()[direction] for w in weights)
        assert w_input is not None and w_hidden is not None and bias is not None
        self.low = w_input.dtype if dtype is None else dtype
        h = len(bias) // 4
        bias = bias.clone()
        bias[2 * h : 3 * h] += FORGET_BIAS
        self.bias = bias.to(self.low)
        self.input, self.hidden = _Weight(w_input, self.low, bias), _Weight(w_hidden, self.low)
        self.projection = None if projection is None else _Weight(projection, self.low)
        # the original has no clip of the projection's result where there is no projection
        self.bounds = bound_of(clips[0]), bound_of(clips[1] if projection is not None else None)
        self._width = 4 * h

    def run(
        self,
        inputs: Tensor,
        places_N: NDArray[np.int64] | None,
        rows: Sequence[int],
        hidden_BP: Tensor,
        memory_BH: Tensor,
        outputs_NP: Tensor,
    ) -> None:
        """Fill the outputs, and change the state from the first to that of each row's end.

        inputs: [U, I] distinct words, with the place of each position among them, or [N, I] without.
        """
        most = -(-rows[0] // 8) * 8  # products have a multiple of 8 rows, so that they come in few sizes
        low_BP = hidden_BP.new_zeros(most, hidden_BP.shape[1], dtype=self.low)
        low_BP[: rows[0]] = hidden_BP[: rows[0]]
        # without a projection the gated memory is the output, which is not rounded
        gated = memory_BH.new_zeros(
            most, memory_BH.shape[1], dtype=memory_BH.dtype if self.projection is None else self.low
        )
        gated_BH, memories, low_hidden = as_array(gated), as_array(memory_BH), as_array(low_BP)
        outputs, room_G = as_array(outputs_NP), np.empty(self._width, np.float32)
        table = as_array(self._input_gates(inputs)) if places_N is not None else None
        first = start = stop = 0
        limit = max(1, _GATE_BYTES // (self._width * 4))
        for step, count in enumerate(rows):
            if places_N is None and first == stop:
                start, stop = first, _end_of_steps(rows, step, first, limit)
                table = as_array(self._input_gates(inputs[start:stop]))
                places = np.arange(stop - start)
            now = places_N[first : first + count] if places_N is not None else places[first - start :][:count]
            sums = as_array(self.hidden.times(low_BP, count))
            _gates_of_step(sums, table, now, memories[:count], gated_BH[:count], room_G, self.bounds[0])
            result = gated_BH
            if self.projection is not None:
                result = as_array(self.projection.times(gated, count))
            ended = outputs[first : first + count]
            forward_projection(result[:count], ended, low_hidden[:count], self.bounds[1])
            following = rows[step + 1] if step + 1 < len(rows) else 0
            if following < count:  # these rows end here
                hidden_BP[following:count] = outputs_NP[first + following : first + count]
            first += count

    def _input_gates(self, x_UI: Tensor) -> Tensor:
        """Return [U, G], with the bias, in the type of the products; rows are filled up to a multiple."""
        if len(x_UI) < _FEW:
            return torch.addmm(self.bias, x_UI.to(self.low), self.input.few)
        filled = x_UI.new_zeros(-(-len(x_UI) // _ROWS) * _ROWS, x_UI.shape[1], dtype=self.low)
        filled[: len(x_UI)] = x_UI
        table = filled.new_empty(len(filled), self._width)
        for some, result in zip(filled.split(_TILE), table.split(_TILE), strict=True):
            result.copy_(apply(self.input.many, some))
        return table


def _end_of_steps(rows: Sequence[int], step: int, first: int, most: int) -> int:
    """Return the end of the steps from `step` on, which begins at `first`, that have `most` positions together; at
    least one step."""
    stop = first + rows[step]
    for count in rows[step + 1 :]:
        if stop + count - first > most:
            break
        stop += count
    return stop
