"""The biLM's LSTM: projection, cell and projection clips, skip connections; a layer's window is in `recurrence.py`.

Shapes: D directions, T window, B rows, I input, P output of a cell (projection), H cell, L layers. Gate order i, j,
f, o as in TensorFlow's LSTMCell (BILM.md, Model).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elmo_ray.config.model import LstmConfig
from elmo_ray.kernels.clips import Clips
from elmo_ray.kernels.cpu.loops import for_tensor
from elmo_ray.kernels.cpu.lstm import CpuRecurrence
from elmo_ray.kernels.recurrence import Recurrence, Weights
from elmo_ray.model.dropout import Dropout

_NAMES = ("input_kernel", "hidden_kernel", "bias", "projection")
"""A layer's parameters in the order of `Weights`."""


class LstmState(NamedTuple):
    """State carried from window to window. hidden: [L, D, B, P]; cell: [L, D, B, H]."""

    hidden: Tensor
    cell: Tensor

    def detach(self) -> LstmState:
        return LstmState(self.hidden.detach(), self.cell.detach())

    def rows(self, order_B: Tensor) -> LstmState:
        """The state with its rows in another order."""
        return LstmState(self.hidden[:, :, order_B], self.cell[:, :, order_B])

    def zero_rows(self, rows_B: Tensor) -> LstmState:
        """The state with zeros in the rows where `rows_B` (bool) is set."""
        keep = ~rows_B[None, None, :, None]
        return LstmState(self.hidden.where(keep, 0.0), self.cell.where(keep, 0.0))


class LstmLayer(nn.Module):
    """One layer, both directions. Parameters: input_kernel [D, I, 4H], hidden_kernel [D, P, 4H], bias [D, 4H], and,
    unless `dim == projection_dim`, projection [D, H, P]. bilm-tf's kernel is the first two below each other."""

    def __init__(self, config: LstmConfig, directions: int, input_dim: int):
        super().__init__()
        cell, output = config.dim, config.projection_dim
        self.clips = Clips(config.cell_clip, config.proj_clip)
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
        self, x_DTBI: Tensor, hidden_DBP: Tensor, cell_DBH: Tensor, dtype: torch.dtype | None, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """All outputs [D, T, B, P] and all cells [D, T, B, H] of a window."""
        function = CpuRecurrence if for_tensor(x_DTBI) else Recurrence
        outputs, cells = function.apply(x_DTBI, hidden_DBP, cell_DBH, *weights, self.clips, dtype)
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
        parameters: Mapping[str, Tensor] | None = None,
    ) -> tuple[list[Tensor], LstmState]:
        """Run a window.

        parameters: what stands for this module's own, by their names; of one direction where x has one.
        lengths_B: valid positions of each row (its first ones); the state returned is that after the last valid one,
        and the state given where a row has none. None: all are valid.
        Returns the output of every layer, [D, T, B, P] each, skip connections added, and the new state (detached).
        """
        outputs, hiddens, cells = [], [], []
        given = dict(self.named_parameters()) if parameters is None else parameters
        x = x_DTBP
        for index, layer in enumerate(self.layers):
            dropped = x if dropout is None else dropout(x)
            weights = Weights(*(given.get(f"layers.{index}.{name}") for name in _NAMES))  # type: ignore[arg-type]
            h, c = layer(dropped, state.hidden[index], state.cell[index], dtype, weights)
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
