"""The biLM: word inputs, two LSTM directions, and the softmax table.

Shapes: D directions (1 when forward only), B rows, T window, U distinct words, C characters, P projection, V
vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elmo_ray import kernels
from elmo_ray.config import SoftmaxConfig
from elmo_ray.config.model import ModelConfig
from elmo_ray.kernels.hints import SortedPositions, WindowCounts
from elmo_ray.model.char_cnn import CharCnn
from elmo_ray.model.dropout import Dropout
from elmo_ray.model.lstm import BiLstm, LstmState
from elmo_ray.model.softmax import KINDS
from elmo_ray.model.token_embedder import TokenEmbedder

TABLES = ("softmax_weight", "softmax_bias", "word_embedding")
"""Parameters with a row for each vocabulary word. Training updates only the rows that a step touches."""


class BiLM(nn.Module):
    """A bidirectional (or forward-only) language model as bilm-tf trains it.

    Parameters: `char_cnn.*`, `word_embedding` [V, P] or `token_embedder.*`; `lstm.layers.*`; `softmax_weight` [V, P]
    (absent where it is tied to the word embedding) and `softmax_bias` [V].  n_words: V, 0 for a model without a softmax
    (a published weights file).
    """

    def __init__(self, model: ModelConfig, softmax: SoftmaxConfig, n_words: int):
        super().__init__()
        self.config = model
        self.n_words = n_words
        self.tied = softmax.tied
        width = model.lstm.projection_dim
        self.directions = 2 if model.bidirectional else 1
        self.char_cnn = CharCnn(model.char_cnn, model.word_dim) if model.input == "characters" else None
        self.word_embedding = nn.Parameter(torch.empty(n_words, width)) if model.input == "words" else None
        self.token_embedder: TokenEmbedder | None = None  # of a model that reads words in neither of these ways
        self.lstm = BiLstm(model.lstm, self.directions, model.word_dim)
        self.softmax_kind = KINDS[softmax.kind]
        self.softmax_weight: nn.Parameter | None = None
        self.softmax_bias: nn.Parameter | None = None
        if n_words > 0:
            self.softmax_kind.add_parameters(self, n_words, width, softmax.tied)

    def reset_parameters(self, seed: int) -> None:
        """Draw initial values as the original does; they are a pure function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        if self.char_cnn is not None:
            self.char_cnn.reset_parameters(generator)
        self.lstm.reset_parameters(generator)
        with torch.no_grad():
            if self.word_embedding is not None:
                bound = math.sqrt(6.0 / sum(self.word_embedding.shape))
                self.word_embedding.uniform_(-bound, bound, generator=generator)
            if self.has_softmax:
                self.softmax_kind.reset_parameters(self, generator)

    @property
    def has_softmax(self) -> bool:
        """Return whether the model can tell what a word's probability is."""
        return any(name.startswith("softmax") for name, _ in self.named_parameters())

    @property
    def has_table(self) -> bool:
        """Return whether the softmax has one vector for each word, `output_weight`."""
        return self.softmax_bias is not None

    def drop_softmax(self) -> None:
        """Take the softmax away, as in a model that comes from a published weights file."""
        for name, _ in [*self.named_parameters(recurse=False), *self.named_children()]:
            if name.startswith("softmax"):
                setattr(self, name, None)

    @property
    def output_weight(self) -> Tensor:
        """Return the softmax table [V, P], with tied tables the word embedding. Raises ValueError if there is none."""
        weight = self.word_embedding if self.tied else self.softmax_weight
        if weight is None:
            raise ValueError("this model has no softmax with a table of words")
        return weight

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters but the tables, by name."""
        return {name: p for name, p in self.named_parameters() if name not in TABLES}

    def encode_types(
        self,
        types: Tensor,
        classes: tuple[tuple[int, int], ...] | None = None,
        rows_RP: Tensor | None = None,
        dtype: torch.dtype | None = None,
        windows: WindowCounts | None = None,
    ) -> Tensor:
        """Return [U, P] vectors of distinct words.

        types: [U, C] character ids, or [U] ids into the word embedding (or into `rows_RP`). windows: as in `CharCnn`.
        """
        if self.char_cnn is not None:
            return self.char_cnn(types, classes, dtype, windows)
        table = self.word_embedding if rows_RP is None else rows_RP
        if table is None:
            raise ValueError("a model with word input needs its embedding")
        return _rows_of(table, types, None)

    def forward(
        self,
        types: Tensor,
        classes: tuple[tuple[int, int], ...] | None,
        inputs_DBT: Tensor,
        state: LstmState,
        lengths_B: Tensor | None = None,
        dropout: Dropout | None = None,
        dtype: torch.dtype | None = None,
        rows_RP: Tensor | None = None,
        windows: WindowCounts | None = None,
        positions: SortedPositions | None = None,
    ) -> tuple[Tensor, LstmState]:
        """Return the top output [D, B, T, P], after dropout where that is given, and the new state.

        Arguments as in `streams.Batch`; rows_RP and windows as in `encode_types`; positions: of the inputs in the order
        [D, T, B], for kernels that would have to sort them.
        """
        types_UP = self.encode_types(types, classes, rows_RP, dtype, windows)
        x_DTBP = _rows_of(types_UP, inputs_DBT.transpose(1, 2), positions)
        outputs, state = self.lstm(x_DTBP, state, lengths_B, dropout, dtype)
        top = outputs[-1] if dropout is None else dropout(outputs[-1], "output")
        return top.transpose(1, 2), state


def _rows_of(table: Tensor, ids: Tensor, positions: SortedPositions | None) -> Tensor:
    """Return the rows of a table that the ids name, [*ids, P]."""
    if run := kernels.gather_rows(table):
        rows: Tensor = run(table, ids, positions)
        return rows
    return F.embedding(ids, table)
