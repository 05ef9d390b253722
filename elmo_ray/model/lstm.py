"""The biLM's LSTM: cells with a projection and two clips, in a stack with skip connections.

Directions never see each other; direction 1 is fed the reversed sentences. Shapes: D directions, T window, B rows, I
input, P output of a cell (its projection), H memory of a cell, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elmo_ray import kernels
from elmo_ray.config.model import LstmConfig
from elmo_ray.model.dropout import Dropout
from elmo_ray.model.product import product

FORGET_BIAS = 1.0
"""Bias that is added to the forget gate and never stored, as in TensorFlow's LSTMCell."""


class Weights(NamedTuple):
    """A layer's parameters: input [D, I, 4H], hidden [D, P, 4H], bias [D, 4H], projection [D, H, P] or None."""

    input: Tensor
    hidden: Tensor
    bias: Tensor
    projection: Tensor | None


class Clips(NamedTuple):
    """Bounds of a cell's memory and of its projection; None stands for no bound."""

    memory: float | None
    projection: float | None


class LstmState(NamedTuple):
    """State that is carried from window to window. hidden: [L, D, B, P]; cell: [L, D, B, H], the memories."""

    hidden: Tensor
    cell: Tensor

    def detach(self) -> LstmState:
        return LstmState(self.hidden.detach(), self.cell.detach())

    def rows(self, order_B: Tensor) -> LstmState:
        """Return the state with its rows in another order."""
        return LstmState(self.hidden[:, :, order_B], self.cell[:, :, order_B])

    def zero_rows(self, rows_B: Tensor) -> LstmState:
        """Return the state with zeros in the rows where `rows_B` (bool) is set."""
        keep = ~rows_B[None, None, :, None]
        return LstmState(self.hidden.where(keep, 0.0), self.cell.where(keep, 0.0))


def clip(x: Tensor, bound: float | None) -> Tensor:
    """Limit x to [-bound, bound]; no gradient passes at the bound itself, as in the kernels."""
    return x if bound is None else F.hardtanh(x, -bound, bound)


def cell(x: Tensor, hidden: Tensor, memory: Tensor, w: Weights, clips: Clips) -> tuple[Tensor, Tensor]:
    """Compute one step of an LSTM with projection (Sak et al. 2014): the new hidden state and the new memory.

    Gates come in TensorFlow's order i, j, f, o. Here is what other LSTMs do not have: both clips, and no projection
    nor its clip where its size would change nothing.
    """
    i, j, f, o = (product(x, w.input) + product(hidden, w.hidden) + w.bias).chunk(4, dim=-1)
    memory = clip(torch.sigmoid(f + FORGET_BIAS) * memory + torch.sigmoid(i) * torch.tanh(j), clips.memory)
    hidden = torch.sigmoid(o) * torch.tanh(memory)
    if w.projection is not None:
        hidden = clip(product(hidden, w.projection), clips.projection)
    return hidden, memory


def window(
    x_DTBI: Tensor,
    hidden_DBP: Tensor,
    memory_DBH: Tensor,
    w: Weights,
    clips: Clips,
    dtype: torch.dtype | None,
    step: Callable[[Tensor, Tensor, Tensor, Weights, Clips], tuple[Tensor, Tensor]] = cell,
) -> tuple[Tensor, Tensor]:
    """Run a layer over a window and return all hidden states [D, T, B, P] and all memories [D, T, B, H].

    dtype: of the products; None stands for the weights' own. step: the cell. The loop is over time, all directions at
    once.
    """
    projection = None if w.projection is None else w.projection.to(dtype or w.projection.dtype)
    # converted once for a window, and the bias as a row to be added to every row of the batch
    w = Weights(w.input.to(dtype or w.input.dtype), w.hidden.to(dtype or w.hidden.dtype), w.bias[:, None], projection)
    hiddens, memories = [], []
    hidden, memory = hidden_DBP, memory_DBH
    for x in x_DTBI.unbind(1):
        hidden, memory = step(x, hidden, memory, w, clips)
        hiddens.append(hidden)
        memories.append(memory)
    return torch.stack(hiddens, 1), torch.stack(memories, 1)


class LstmLayer(nn.Module):
    """One layer of all directions. Parameters: input_kernel [D, I, 4H], hidden_kernel [D, P, 4H], bias [D, 4H], and,
    unless `dim == projection_dim`, projection [D, H, P]. bilm-tf's kernel is the first two below each other.

    This is the seam for other cells: a subclass whose `forward` calls `window` with its own step, chosen in `BiLstm` by
    a setting of `LstmConfig`. Kernels, in training and after it, serve this class alone.
    """

    def __init__(self, config: LstmConfig, directions: int, input_dim: int):
        super().__init__()
        memory, output = config.dim, config.projection_dim
        self.clips = Clips(config.cell_clip, config.proj_clip)
        self.input_kernel = nn.Parameter(torch.empty(directions, input_dim, 4 * memory))
        self.hidden_kernel = nn.Parameter(torch.empty(directions, output, 4 * memory))
        self.bias = nn.Parameter(torch.zeros(directions, 4 * memory))
        # The original leaves the projection out, and its clip with it, where it would change nothing in size.
        self.projection = nn.Parameter(torch.empty(directions, memory, output)) if memory != output else None

    @property
    def weights(self) -> Weights:
        return Weights(self.input_kernel, self.hidden_kernel, self.bias, self.projection)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw Glorot uniform values for the whole kernel [I + P, 4H], as TensorFlow's default; biases are 0."""
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
        self, x_DTBI: Tensor, hidden_DBP: Tensor, memory_DBH: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Return all hidden states [D, T, B, P] and all memories [D, T, B, H] of a window."""
        run = kernels.lstm_window(x_DTBI) or window
        return run(x_DTBI, hidden_DBP, memory_DBH, self.weights, self.clips, dtype)


class BiLstm(nn.Module):
    """The stack of layers."""

    def __init__(self, config: LstmConfig, directions: int, word_dim: int | None = None):
        """Make the layers. word_dim: size of the first one's input; None: that of the other layers, P."""
        super().__init__()
        self.config = config
        self.directions = directions
        sizes = [config.projection_dim if word_dim is None else word_dim]
        sizes += [config.projection_dim] * (config.n_layers - 1)
        self.layers = nn.ModuleList(LstmLayer(config, directions, size) for size in sizes)

    @property
    def has_original_cells(self) -> bool:
        """Return whether all layers compute `cell`, as kernels for the whole stack do."""
        return all(type(layer) is LstmLayer for layer in self.layers)

    def reset_parameters(self, generator: torch.Generator) -> None:
        for layer in self.layers:
            layer.reset_parameters(generator)  # type: ignore[operator]

    def zero_state(self, rows: int, like: Tensor) -> LstmState:
        """Return a state of zeros for `rows` rows, with the device and dtype of `like`."""
        shape = (self.config.n_layers, self.directions, rows)
        return LstmState(like.new_zeros(*shape, self.config.projection_dim), like.new_zeros(*shape, self.config.dim))

    def forward(
        self,
        x_DTBI: Tensor,
        state: LstmState,
        lengths_B: Tensor | None = None,
        dropout: Dropout | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[list[Tensor], LstmState]:
        """Run a window and return the output [D, T, B, P] of every layer and the new state, which has no gradient.

        lengths_B: how many positions of each row are valid, from its first one on; the new state is that after the
        last valid one, and the given state in a row that has none. None: all are valid.
        """
        outputs, hiddens, memories = [], [], []
        x = x_DTBI
        for index, layer in enumerate(self.layers):
            dropped = x if dropout is None else dropout(x, "between" if index else "input")
            h, m = layer(dropped, state.hidden[index], state.cell[index], dtype)
            hiddens.append(_at_length(h.detach(), state.hidden[index], lengths_B))
            memories.append(_at_length(m.detach(), state.cell[index], lengths_B))
            # Skip connections begin at the second layer, and add the dropped input: dropout is outside of them.
            x = h + dropped if index and self.config.use_skip_connections else h
            outputs.append(x)
        return outputs, LstmState(torch.stack(hiddens), torch.stack(memories))


def _at_length(all_DTBX: Tensor, start_DBX: Tensor, lengths_B: Tensor | None) -> Tensor:
    """Return [D, B, X]: the value of each row at its last valid position, or at the start where it has none."""
    if lengths_B is None:
        return all_DTBX[:, -1]
    d, _, b, x = all_DTBX.shape
    index = (lengths_B - 1).clamp_min(0)[None, None, :, None].expand(d, 1, b, x)
    last = all_DTBX.gather(1, index)[:, 0]
    return torch.where((lengths_B > 0)[None, :, None], last, start_DBX)
